"""Divides the shapes in the config of a reshaped model by the factors by which its class is made narrower."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from compressor.layers.structural.removed import Removed
from compressor.layers.structural.resized import Resized
from compressor.layers.structural.rms_norm import RmsNorm
from compressor.layers.structural.rotated_block import RotatedBlock
from compressor.model.class_changes import MODULES, SHAPES
from compressor.model.probe_model import make_probe_model
from compressor.model.reshaped_class import reshaping, stock_class

ALONG_STREAM = (
    RmsNorm.format_name,
    RotatedBlock.format_name,
    Removed.format_name,
)  # their shapes are widths of the stream


class _Odd(Exception):
    """A number of the config can't be divided by the factor of its axis."""


def divisor(narrow: Sequence[int], whole: Sequence[int]) -> tuple[int, ...]:
    """The whole numbers by which the axes of a shape were divided; () if there are none."""
    if len(narrow) != len(whole) or any(large % small for small, large in zip(narrow, whole)):
        return ()
    return tuple(large // small for small, large in zip(narrow, whole)) or (1,)


def divide_shapes(cls: type[PreTrainedModel], config: PretrainedConfig, narrow: PretrainedConfig) -> bool:
    """Divide `compressed_shapes` and `compressed_modules` of `narrow`, a narrower copy of `config`, in place.

    The factors are those of the stock class without these shapes. Returns False if some number can't be divided.
    """
    try:
        models = [_stock(cls, part) for part in (config, narrow)]
    except Exception:  # any: the class rejects these widths
        return False
    small, large = ({name: p.shape for name, p in m.named_parameters(remove_duplicate=False)} for m in reversed(models))
    width, wide = (getattr(part.get_text_config(), "hidden_size", None) for part in (narrow, config))
    if not isinstance(width, int) or not isinstance(wide, int) or wide % width:
        return False
    shapes, modules = reshaping(narrow)
    try:
        present = {path for path, _ in models[0].named_modules()}  # a shallow model lacks most blocks
        found = {
            name: _shape(name, shape, models[0], small, large)
            if shape is not None and name.rpartition(".")[0] in present
            else shape
            for name, shape in shapes.items()
        }
        entries = {
            path: _entry(path, entry, wide // width, *models) if path in present else entry
            for path, entry in modules.items()
        }
    except _Odd:
        return False
    setattr(narrow, SHAPES, found)
    setattr(narrow, MODULES, entries)
    return True


def _stock(cls: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    plain = copy.deepcopy(config)
    for key in (SHAPES, MODULES):
        if hasattr(plain, key):
            delattr(plain, key)
    return make_probe_model(stock_class(cls), plain, torch.device("meta"), torch.float32)


def _shape(
    name: str,
    shape: Sequence[int],
    whole: nn.Module,
    small: Mapping[str, Sequence[int]],
    large: Mapping[str, Sequence[int]],
) -> list[int]:
    """The shape of one parameter. The bias of a weight, which its class need not have, is as long as its outputs."""
    if name not in large:
        weight = name.removesuffix("bias") + "weight"
        if weight not in large or len(shape) != 1:
            raise _Odd
        axis = 0 if isinstance(whole.get_submodule(name.rpartition(".")[0]), nn.Linear) else -1
        return [_over(shape[0], large[weight][axis], small[weight][axis])]
    if len(shape) != len(large[name]):
        raise _Odd
    return [
        n if before == after else after if n == before else _over(n, before, after)
        for n, before, after in zip(shape, large[name], small[name])
    ]


def _over(number: int, before: int, after: int) -> int:
    """A number, divided as an axis of `before` values is that now has `after`."""
    if before % after or number % (before // after):
        raise _Odd
    return number // (before // after)


def _entry(path: str, entry: Mapping[str, Any], factor: int, whole: nn.Module, narrow: nn.Module) -> dict[str, Any]:
    """A structural layer with divided widths."""
    made = copy.deepcopy(dict(entry))
    if entry["form"] in ALONG_STREAM:
        made["shape"] = [_over(n, factor, 1) for n in entry["shape"]]
    if entry["form"] == RmsNorm.format_name:
        made["spec"]["width"] = _over(entry["spec"]["width"], factor, 1)
    if entry["form"] == Resized.format_name:
        old, new = (model.get_submodule(path) for model in (whole, narrow))
        attributes = entry["spec"]["attributes"]
        made["spec"]["attributes"] = {
            name: _over(number, getattr(old, name), getattr(new, name)) for name, number in attributes.items()
        }
    return made
