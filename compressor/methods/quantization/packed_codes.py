"""Helps passes that store integer codes: the quantization format, its parameters, and storing the codes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from compressor.errors import ShapeError, WidthError
from compressor.lazy import torch
from compressor.methods.quantization.uniform_grid import Grid, dequantize, find_grid, quantize
from compressor.model.weights import Weight
from compressor.protocol import BlockView

GroupSize = Literal[-1, 32, 64, 128]


def group_width(weight: Weight, group_size: int) -> int:
    return weight.in_features if group_size == -1 else group_size


def quantization_format(bits: int, symmetric: bool, act_order_index: bool = False) -> str:
    """The format's name: packed codes, except 8-bit codes with zero points, which are one per byte.

    Stock loaders read the latter in more cases, at equal size.
    """
    return "byte_linear" if bits == 8 and not symmetric and not act_order_index else "packed_linear"


def packed_params(
    weight: Weight, bits: int, group_size: int, symmetric: bool, act_order_index: bool = False
) -> dict[str, Any]:
    """Format parameters. raises ShapeError if group_size doesn't divide the inputs

    act_order_index  the group of each input is stored, because groups aren't neighbours
    """
    if group_size != -1 and weight.in_features % group_size:
        usable = [str(size) for size in (128, 64, 32) if weight.in_features % size == 0]
        advice = " or ".join([*usable, "-1"])
        kind = ShapeError if usable else WidthError
        raise kind(
            f"group_size {group_size} does not divide in_features {weight.in_features}.",
            where=weight.name,
            hint=f"Set group_size to {advice}, or leave this weight out with `except`.",
            data={"group_size": group_size, "in_features": weight.in_features, "usable": [*map(int, usable), -1]},
        )
    format_params = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
    return {**format_params, "act_order_index": True} if act_order_index else format_params


def store(
    view: BlockView,
    weight: Weight,
    codes: torch.Tensor,
    grid: Grid,
    group_size: int,
    record: Mapping[str, Any],
    index: torch.Tensor | None = None,
) -> None:
    """Store codes (out, ...) in their quantization format, with scales in the dtype of the model.

    index  (in,) the group of each input, if groups aren't neighbours
    """
    from compressor.layers.byte_linear import ByteLinear
    from compressor.layers.packed_linear import PackedLinear

    format_params = packed_params(weight, grid.bits, group_size, grid.symmetric)
    codes = codes.reshape(weight.shape).to(torch.int8)
    scale = grid.scale.to(view.dtype)
    zero_point = None if grid.symmetric else grid.zero_point.to(torch.int8)
    if (
        zero_point is not None
        and quantization_format(grid.bits, grid.symmetric, index is not None) == ByteLinear.format_name
    ):
        tensors = {"weight": codes, "weight_scale": scale, "weight_zero_point": zero_point}
        view.put(
            weight, ByteLinear.from_tensors(format_params, {k: v.contiguous() for k, v in tensors.items()}), **record
        )
        return
    view.put(weight, PackedLinear.pack(codes, scale, zero_point, **format_params, index=index), **record)


def store_nearest(
    view: BlockView,
    weight: Weight,
    bits: int,
    group_size: int,
    symmetric: bool,
    search: Literal["minmax", "mse"],
    record: Mapping[str, Any],
) -> None:
    """Round a weight as it is now to the nearest points of its grid, and store the codes with their relative error."""
    matrix = view.matrix(weight)
    grouped = matrix.view(len(matrix), -1, group_width(weight, group_size))
    grid = find_grid(grouped, bits, symmetric, search, view.dtype)
    codes = quantize(grouped, grid)
    error = (dequantize(codes, grid) - grouped).norm() / matrix.norm().clamp(min=1e-30)
    store(view, weight, codes, grid, group_size, {"weight_error": float(error), **record})
