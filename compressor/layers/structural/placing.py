"""Gives a model the shapes in `compressed_shapes` and the layers in `compressed_modules`, two keys of config.json.

    compressed_shapes   parameter name -> its shape, or null if it is removed. It may be a parameter that the class
                        doesn't have but its module can have: the bias of a nn.Linear that was made without one
    compressed_modules  path -> {"form", "spec", "shape"} of a structural layer: it changes what the model computes and
                        is not a quantization format. It replaces the module there. A layer for a block becomes that
                        block and keeps its children with their names. A layer for settings only sets attributes of
                        the module there

Weights inside may have any quantization format, which is applied afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from compressor.errors import ModelError
from compressor.layers.base import Layer

SPREAD = 0.02  # standard deviation of new parameters until they are loaded, as in most families' own initialization
IN_PLACE = ("block", "settings")  # kinds of layers that change a module instead of replacing it
RESHAPED_HINT = "Copy config.json again from where the artifact was written, or build the artifact again."


def reshape(
    model: nn.Module,
    shapes: Mapping[str, Sequence[int] | None],
    modules: Mapping[str, Mapping[str, Any]],
    formats: Mapping[str, type[Layer]],
) -> None:
    """Give a new model these shapes and layers, in place. New parameters are random until they are loaded.

    Entries for a block that the model doesn't have (a probe model has few) are skipped.

    formats  name of a structural layer -> its class
    raises  ModelError naming a parameter or module that the model doesn't have, or a shape that it can't have
    """
    for name, shape in shapes.items():
        path, _, leaf = name.rpartition(".")
        owner = _module_at(model, path, name)
        if owner is None:
            continue
        if leaf not in owner._parameters:
            raise ModelError(
                f"{type(owner).__name__} has no such parameter",
                where=name,
                hint=RESHAPED_HINT,
                data={"reason": "no-parameter", "module": type(owner).__name__},
            )
        _set_shape(owner, leaf, shape, name)
    for format_name in sorted({str(entry["form"]) for entry in modules.values()}):
        if format_name not in formats:
            raise ModelError(
                f"a module has the unknown format {format_name!r}",
                where="compressed_modules",
                hint=RESHAPED_HINT,
                data={"format_name": format_name},
            )
        formats[format_name].prepare(model)
    for path, entry in modules.items():
        module = _module_at(model, path, path)
        if module is None:
            continue
        layer, dtype = formats[entry["form"]], _dtype_of(module)
        if layer.stands_for in IN_PLACE:
            layer.wrap(module, tuple(entry["shape"]), entry["spec"])  # type: ignore[attr-defined]
            continue
        made = layer.empty(tuple(entry["shape"]), entry["spec"], dtype, bias=False)
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, made)


def _module_at(model: nn.Module, path: str, name: str) -> nn.Module | None:
    """The module, or None if it is in a list that is shorter here. `name` is the place in an error."""
    module = model
    for part in path.split(".") if path else []:
        child = module._modules.get(part)
        if child is None:
            if isinstance(module, nn.ModuleList) and part.isdigit() and int(part) >= len(module):
                return None
            raise ModelError(
                f"{type(module).__name__} has no {part}",
                where=name,
                hint=RESHAPED_HINT,
                data={"reason": "no-module", "module": type(module).__name__, "part": part},
            )
        module = child
    return module


def _set_shape(owner: nn.Module, leaf: str, shape: Sequence[int] | None, name: str) -> None:
    if shape is None:
        owner._parameters[leaf] = None
        return
    old = owner._parameters[leaf]
    if not all(isinstance(n, int) and n > 0 for n in shape) or (old is not None and old.dim() != len(shape)):
        found = "a new parameter" if old is None else f"a parameter of shape {tuple(old.shape)}"
        raise ModelError(
            f"config.json gives the shape {list(shape)} to {found}",
            where=name,
            hint=RESHAPED_HINT,
            data={"reason": "shape", "shape": list(shape), "old": None if old is None else list(old.shape)},
        )
    device = next((p.device for p in owner.parameters()), torch.get_default_device())
    value = torch.empty(*shape, dtype=_dtype_of(owner), device=device)
    owner._parameters[leaf] = nn.Parameter(value.normal_(0, SPREAD), old is None or old.requires_grad)
    if leaf == "weight":
        _state_sizes(owner, shape)
    for before, after in zip(old.shape if old is not None else (), shape):
        if (
            before != after and getattr(owner, "hidden_dim", None) == before
        ):  # routers of experts use it in their forward
            owner.hidden_dim = after  # type: ignore[assignment]


def _state_sizes(module: nn.Module, shape: Sequence[int]) -> None:
    """Update a module's attributes for the shape of its weight, which some modules compute with."""
    stated: dict[str, Any] = {}
    if isinstance(module, nn.Linear):
        stated = {"out_features": shape[0], "in_features": shape[1]}
    elif isinstance(module, nn.Embedding):
        stated = {"num_embeddings": shape[0], "embedding_dim": shape[1]}
    elif isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        stated = {"out_channels": shape[0], "in_channels": shape[1] * module.groups}
    elif isinstance(module, nn.LayerNorm):
        stated = {"normalized_shape": tuple(shape)}
    elif hasattr(module, "nf") and hasattr(module, "nx"):  # transformers' Conv1D
        stated = {"nx": shape[0], "nf": shape[1]}
    for name, value in stated.items():
        setattr(module, name, value)


def _dtype_of(module: nn.Module) -> torch.dtype:
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.get_default_dtype())
