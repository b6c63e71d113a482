"""Stores a weight as packed integer codes, with a scale and optionally a zero point per group of inputs.

Tensors with the names and layout of compressed-tensors' `pack-quantized` (docs/format.md):
    weight_packed      int32 (out, ceil(in * bits / 32))
    weight_scale       (out, groups), dtype of the model
    weight_shape       int64 (2,) = [out, in]
    weight_zero_point  int32 (ceil(out * bits / 32), groups), asymmetric only, packed down the columns
    weight_g_idx       int32 (in,), only with act_order_index: the group of each input, where groups aren't neighbours
"""

from __future__ import annotations

from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressor.errors import ShapeError
from compressor.kernels.ops.pack_codes import dequantize, pack_codes, unpack_codes
from compressor.layers.base import DAMAGED_HINT, Layer, Stock, integer_scheme


class PackedLinear(Layer):
    """Replaces nn.Linear. Multiplies by the dequantized weight."""

    format_name = "packed_linear"
    helpers = ("compressor.kernels.ops.pack_codes",)
    weight_packed: Tensor
    weight_scale: Tensor
    weight_shape: Tensor
    weight_zero_point: Tensor
    weight_g_idx: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        group_size: int,
        symmetric: bool,
        dtype: torch.dtype,
        bias: bool = False,
        act_order_index: bool = False,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.group_size, self.symmetric = bits, group_size, symmetric
        self.act_order_index = act_order_index
        groups = 1 if group_size == -1 else in_features // group_size
        words = -(-in_features * bits // 32)
        self.register_buffer("weight_packed", torch.zeros(out_features, words, dtype=torch.int32))
        self.register_buffer("weight_scale", torch.zeros(out_features, groups, dtype=dtype))
        self.register_buffer("weight_shape", torch.tensor([out_features, in_features], dtype=torch.int64))
        if not symmetric:
            rows = -(-out_features * bits // 32)
            self.register_buffer("weight_zero_point", torch.zeros(rows, groups, dtype=torch.int32))
        if act_order_index:
            self.register_buffer("weight_g_idx", torch.zeros(in_features, dtype=torch.int32))
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype), requires_grad=False) if bias else None

    @classmethod
    def empty(cls, shape: tuple[int, ...], format_params: dict[str, Any], dtype: torch.dtype, bias: bool) -> Self:
        return cls(shape[1], shape[0], **format_params, dtype=dtype, bias=bias)

    @classmethod
    def stock(cls, format_params: dict[str, Any]) -> Stock | str:
        if format_params.get("act_order_index"):
            return "stores the group of each input (act_order: group), which no stock format can hold"
        weights = integer_scheme(format_params["bits"], format_params["group_size"], format_params["symmetric"])
        return Stock("compressed-tensors", {"format": "pack-quantized", "weights": weights})

    def codes(self) -> Tensor:
        """Signed codes (out, in) int8."""
        return (unpack_codes(self.weight_packed, self.bits, self.in_features) - 2 ** (self.bits - 1)).view(torch.int8)

    def zero_points(self) -> Tensor | None:
        """Signed zero points (out, groups) int8; None when symmetric."""
        if self.symmetric:
            return None
        packed = self.weight_zero_point.t().contiguous()
        return (unpack_codes(packed, self.bits, self.out_features) - 2 ** (self.bits - 1)).view(torch.int8).t()

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """The dequantized weight (out, in)."""
        index = self.weight_g_idx if self.act_order_index else None
        return dequantize(self.codes(), self.weight_scale, self.zero_points(), index).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix(x.dtype), self.bias)

    @classmethod
    def pack(
        cls,
        codes: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        *,
        bits: int,
        group_size: int,
        symmetric: bool,
        bias: Tensor | None = None,
        index: Tensor | None = None,
    ) -> Self:
        """Store signed codes.

        codes       (out, in) int8 in [-2**(bits-1), 2**(bits-1) - 1]
        scale       (out, groups), in the dtype to store
        zero_point  (out, groups) int8 in the range of the codes; None when symmetric
        index       (in,) the group of each input; None: the groups are consecutive
        raises      ShapeError if the shapes don't fit each other
        """
        out, columns = codes.shape
        groups = 1 if group_size == -1 else columns // group_size
        if tuple(scale.shape) != (out, groups) or (groups > 1 and columns % group_size):
            raise ShapeError(
                f"scale {tuple(scale.shape)} doesn't fit codes {(out, columns)} in groups of {group_size}",
                hint=DAMAGED_HINT,
                data={"tensor": "scale", "shape": list(scale.shape), "codes": [out, columns], "group_size": group_size},
            )
        layer = cls(columns, out, bits, group_size, symmetric, scale.dtype, bias is not None, index is not None)
        half = 2 ** (bits - 1)
        layer.weight_packed = pack_codes((codes.to(torch.int16) + half).to(torch.uint8), bits)
        layer.weight_scale = scale.contiguous()
        if zero_point is not None:
            unsigned = (zero_point.to(torch.int16) + half).to(torch.uint8)
            layer.weight_zero_point = pack_codes(unsigned.t().contiguous(), bits).t().contiguous()
        if index is not None:
            layer.weight_g_idx = _checked_index(index.to(torch.int32), columns, groups)
        if bias is not None:
            layer.bias = nn.Parameter(bias, requires_grad=False)
        return layer

    def format_params(self) -> dict[str, Any]:
        settings = {"bits": self.bits, "group_size": self.group_size, "symmetric": self.symmetric}
        return {**settings, "act_order_index": True} if self.act_order_index else settings

    def tensors(self) -> dict[str, Tensor]:
        found = {"weight_packed": self.weight_packed, "weight_scale": self.weight_scale}
        found["weight_shape"] = self.weight_shape
        if not self.symmetric:
            found["weight_zero_point"] = self.weight_zero_point
        if self.act_order_index:
            found["weight_g_idx"] = self.weight_g_idx
        return found

    @classmethod
    def from_tensors(
        cls, format_params: dict[str, Any], tensors: dict[str, Tensor], bias: Tensor | None = None
    ) -> Self:
        out, columns = tensors["weight_shape"].tolist()
        layer = cls(columns, out, **format_params, dtype=tensors["weight_scale"].dtype, bias=bias is not None)
        for name, value in tensors.items():
            if getattr(layer, name).shape != value.shape:
                expected = getattr(layer, name).shape
                raise ShapeError(
                    f"{name} has shape {tuple(value.shape)}, {tuple(expected)} expected",
                    hint=DAMAGED_HINT,
                    data={"tensor": name, "shape": list(value.shape), "expected": list(expected)},
                )
            setattr(layer, name, value)
        if layer.act_order_index:
            _checked_index(tensors["weight_g_idx"], columns, layer.weight_scale.shape[1])
        if bias is not None:
            layer.bias = nn.Parameter(bias, requires_grad=False)
        return layer


def _checked_index(index: Tensor, columns: int, groups: int) -> Tensor:
    """raises ShapeError unless index (columns,) names groups that exist"""
    if tuple(index.shape) != (columns,) or int(index.min()) < 0 or int(index.max()) >= groups:
        raise ShapeError(
            f"weight_g_idx {tuple(index.shape)} must name one of {groups} groups for {columns} inputs",
            hint=DAMAGED_HINT,
            data={"tensor": "weight_g_idx", "shape": list(index.shape), "groups": groups, "inputs": columns},
        )
    return index
