"""What passes that leave integer codes share: the form, its settings, and handing codes to the view."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from compressor.errors import ShapeError, WidthError
from compressor.lazy import torch
from compressor.methods.quantization.uniform_grid import Grid
from compressor.model.weights import Weight
from compressor.protocol import BlockView

GroupSize = Literal[-1, 32, 64, 128]


def group_width(weight: Weight, group_size: int) -> int:
    return weight.in_features if group_size == -1 else group_size


def stored_form(bits: int, symmetric: bool, act_order_index: bool = False) -> str:
    """Packed codes; 8-bit ones with zero points one a byte, which stock loaders read in more cases at equal size."""
    return "byte_linear" if bits == 8 and not symmetric and not act_order_index else "packed_linear"


def packed_spec(
    weight: Weight, bits: int, group_size: int, symmetric: bool, act_order_index: bool = False
) -> dict[str, Any]:
    """Settings of the stored form. raises ShapeError when group_size doesn't divide the inputs

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
    spec = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
    return {**spec, "act_order_index": True} if act_order_index else spec


def store(
    view: BlockView,
    weight: Weight,
    codes: torch.Tensor,
    grid: Grid,
    group_size: int,
    record: Mapping[str, Any],
    index: torch.Tensor | None = None,
) -> None:
    """Hand codes (out, ...) to the view in their stored form, scales in the view's dtype.

    index  (in,) the group of each input, where groups aren't neighbours
    """
    from compressor.layers.byte_linear import ByteLinear
    from compressor.layers.packed_linear import PackedLinear

    spec = packed_spec(weight, grid.bits, group_size, grid.symmetric)
    codes = codes.reshape(weight.shape).to(torch.int8)
    scale = grid.scale.to(view.dtype)
    zero_point = None if grid.symmetric else grid.zero_point.to(torch.int8)
    if zero_point is not None and stored_form(grid.bits, grid.symmetric, index is not None) == ByteLinear.form:
        tensors = {"weight": codes, "weight_scale": scale, "weight_zero_point": zero_point}
        view.put(weight, ByteLinear.from_tensors(spec, {k: v.contiguous() for k, v in tensors.items()}), **record)
        return
    view.put(weight, PackedLinear.pack(codes, scale, zero_point, **spec, index=index), **record)
