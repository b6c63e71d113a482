"""Describes how a modeling file changes its model's class: the values of two keys of config.json.

`compressor.layers.structural.placing` reads them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, TypedDict

SHAPES, MODULES = "compressed_shapes", "compressed_modules"


class ModuleEntry(TypedDict):
    """A structural layer. `format_params` are its own parameters, those of some formats are below."""

    form: str
    spec: Mapping[str, Any]
    shape: Sequence[int]


class ClassChanges(TypedDict):
    """The keys of config.json. A parameter without a shape is removed."""

    compressed_shapes: NotRequired[Mapping[str, Sequence[int] | None]]
    compressed_modules: NotRequired[Mapping[str, ModuleEntry]]


class RemovedParams(TypedDict):
    """See `compressor.layers.structural.removed`."""

    returns: int | None
    layer: int | None
    has_bias: bool
    of: str


class ResizedParams(TypedDict):
    """See `compressor.layers.structural.resized`."""

    attributes: Mapping[str, int]
    eps: NotRequired[float]


class RmsNormParams(TypedDict):
    """See `compressor.layers.structural.rms_norm`."""

    width: int
    eps: float


def changed_shapes(config: Mapping[str, Any]) -> dict[str, Sequence[int] | None]:
    """The shapes in a config.json, a copy."""
    return dict(config.get(SHAPES) or {})


def changed_modules(config: Mapping[str, Any]) -> dict[str, ModuleEntry]:
    """The structural layers in a config.json, a copy."""
    return dict(config.get(MODULES) or {})


def rms_norm_entry(divisor: int, eps: float, width: int) -> ModuleEntry:
    """A norm without gain over `width` values that divides the sum of squares by `divisor`."""
    format_params: RmsNormParams = {"width": divisor, "eps": eps}
    return {"form": "rms_norm", "spec": format_params, "shape": [width]}


def resized_entry(format_params: ResizedParams) -> ModuleEntry:
    return {"form": "resized", "spec": format_params, "shape": []}
