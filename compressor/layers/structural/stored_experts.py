"""Keeps the experts of a layer in their quantization formats, although the model's class has them in one parameter.

The class reads the parameter (experts, rows, columns) as a whole, one expert at a time, or in a grouped product. So the
parameter exists only while its module runs: it is dequantized before the module's forward, and freed after it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from compressor.layers.base import Layer


def store_experts(
    model: nn.Module, entries: Mapping[str, Mapping[str, Any]], formats: Mapping[str, type[Layer]], prefix: str
) -> None:
    """Replace parameters of a new model by layers, one for each expert, or several whose rows follow each other.

    entries  path of a layer, relative to `model` -> {"form", "spec", "shape" (out_features, in_features),
             "parameter" that it is a part of, "expert" (its index there), "rows" (start, stop), "transposed"}
    formats  name of a quantization format -> its layer
    prefix   path of `model` in the model that the names of parameters are from
    """
    parameters: dict[str, list[tuple[str, Mapping[str, Any]]]] = {}
    for path, entry in entries.items():
        parameters.setdefault(entry["parameter"].removeprefix(prefix), []).append((path, entry))
    for parameter, members in parameters.items():
        owner, _, leaf = parameter.rpartition(".")
        module = model.get_submodule(owner)
        shape = tuple(getattr(module, leaf).shape)
        delattr(module, leaf)
        layers = []
        for path, entry in members:
            layer = formats[entry["form"]]
            layer.prepare(model)
            made = layer.empty(tuple(entry["shape"]), entry["spec"], torch.get_default_dtype(), False)
            _put(model, path, made)
            layers.append((path.removeprefix(f"{owner}."), entry["expert"], tuple(entry["rows"]), entry["transposed"]))
        module.register_forward_pre_hook(partial(_fill, leaf, shape, layers), with_kwargs=True)
        module.register_forward_hook(partial(_free, leaf), always_call=True)
        module._is_hf_initialized = True  # type: ignore[assignment]  # its initialization reads the parameter


def _put(model: nn.Module, path: str, layer: nn.Module) -> None:
    """Put a layer at a path, with a module for each expert on the way."""
    module = model
    *names, leaf = path.split(".")
    for name in names:
        if name not in module._modules:
            module.add_module(name, nn.Module())
        module = module.get_submodule(name)
    module.add_module(leaf, layer)


def _fill(
    leaf: str,
    shape: tuple[int, ...],
    layers: list[tuple[str, int, tuple[int, int], bool]],
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """Dequantize a parameter, in the dtype of the module's input."""
    x = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.is_floating_point())
    whole = torch.empty(shape, dtype=x.dtype, device=x.device)
    for path, expert, rows, transposed in layers:
        layer = module.get_submodule(path)
        part = whole[expert].t() if transposed else whole[expert]
        part[rows[0] : rows[1]] = layer.matrix(x.dtype)  # type: ignore[operator]
    setattr(module, leaf, whole)


def _free(leaf: str, module: nn.Module, _args: Any, _output: Any) -> None:
    delattr(module, leaf)
