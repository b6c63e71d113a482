"""Makes the class of a model whose config gives its parameters other shapes than the architecture's own.

Such a class is a subclass of the stock one, of the same name, that reshapes each instance when it is made (`placing`).
So the model is read, run, reduced to a probe model and loaded like any other. Its checkpoint still names the stock
model type and architecture.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from compressor.errors import ModelError
from compressor.layers import find_layer
from compressor.layers.structural.placing import RESHAPED_HINT, reshape
from compressor.model.class_changes import MODULES, SHAPES


def is_reshaped(config: PretrainedConfig | Mapping[str, Any]) -> bool:
    """Whether a config, or a parsed config.json, has other shapes or structural layers."""
    return any(reshaping(config))


def reshaping(config: PretrainedConfig | Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The shapes and the structural layers in a config.

    raises  ModelError for values that `compressor.layers.structural.placing` can't read
    """
    values = config if isinstance(config, Mapping) else vars(config)
    shapes, modules = (values.get(key) or {} for key in (SHAPES, MODULES))
    if not isinstance(shapes, dict) or not all(s is None or isinstance(s, list) for s in shapes.values()):
        raise ModelError(
            "is not a map from parameters to shapes",
            where=f"config.json: {SHAPES}",
            hint=RESHAPED_HINT,
            data={"reason": "no-map"},
        )
    if not isinstance(modules, dict) or not all(
        isinstance(entry, dict) and entry.keys() >= {"form", "spec", "shape"} for entry in modules.values()
    ):
        raise ModelError(
            "is not a map from modules to form, spec and shape",
            where=f"config.json: {MODULES}",
            hint=RESHAPED_HINT,
            data={"reason": "no-map"},
        )
    return shapes, modules


def structural_formats(config: PretrainedConfig | Mapping[str, Any]) -> list[str]:
    """Sorted names of the structural layers in a config."""
    return sorted({entry["form"] for entry in reshaping(config)[1].values()})


def class_for(cls: type[PreTrainedModel], config: PretrainedConfig | Mapping[str, Any]) -> type[PreTrainedModel]:
    """The class for a config: `cls` itself, or its reshaped subclass."""
    return reshaped_class(cls) if is_reshaped(config) else cls  # type: ignore[arg-type]


@cache
def reshaped_class(cls: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """A subclass of a stock class whose instances have the shapes of their config."""

    def __init__(self: Any, config: PretrainedConfig, *args: Any, **kwargs: Any) -> None:
        cls.__init__(self, config, *args, **kwargs)
        shapes, modules = reshaping(config)
        reshape(
            self, shapes, modules, {format_name: find_layer(format_name) for format_name in structural_formats(config)}
        )

    attributes = {"__init__": __init__, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (cls,), {**attributes, "stock": cls})


def stock_class(model: PreTrainedModel | type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The class of transformers of a model or of a reshaped class."""
    cls = model if isinstance(model, type) else type(model)
    return cls.__dict__.get("stock", cls)
