"""Stores a weight as one 8-bit code per byte, with a scale and a zero point per group of inputs.

Tensors with the names and layout of compressed-tensors' `naive-quantized` (docs/format.md):
    weight             int8 (out, in), signed codes
    weight_scale       (out, groups), dtype of the model
    weight_zero_point  int8 (out, groups)
It exists beside `packed_linear` because stock loaders read these zero points in any mixture of schemes, but packed ones
only if all weights share one scheme.
"""

from __future__ import annotations

from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressor.kernels.ops.pack_codes import dequantize
from compressor.layers.base import Layer, Stock, integer_scheme


class ByteLinear(Layer):
    """Replaces nn.Linear. Multiplies by the dequantized weight."""

    format_name = "byte_linear"
    helpers = ("compressor.kernels.ops.pack_codes",)
    bits, symmetric = 8, False
    weight: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor

    def __init__(
        self, in_features: int, out_features: int, group_size: int, dtype: torch.dtype, bias: bool = False
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.group_size = in_features, out_features, group_size
        groups = 1 if group_size == -1 else in_features // group_size
        self.register_buffer("weight", torch.zeros(out_features, in_features, dtype=torch.int8))
        self.register_buffer("weight_scale", torch.zeros(out_features, groups, dtype=dtype))
        self.register_buffer("weight_zero_point", torch.zeros(out_features, groups, dtype=torch.int8))
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype), requires_grad=False) if bias else None

    @classmethod
    def empty(cls, shape: tuple[int, ...], format_params: dict[str, Any], dtype: torch.dtype, bias: bool) -> Self:
        return cls(shape[1], shape[0], format_params["group_size"], dtype, bias)

    @classmethod
    def stock(cls, format_params: dict[str, Any]) -> Stock | str:
        weights = integer_scheme(8, format_params["group_size"], False)
        return Stock("compressed-tensors", {"format": "naive-quantized", "weights": weights})

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """The dequantized weight (out, in)."""
        return dequantize(self.weight, self.weight_scale, self.weight_zero_point).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix(x.dtype), self.bias)

    def format_params(self) -> dict[str, Any]:
        return {"bits": 8, "group_size": self.group_size, "symmetric": False}

    def tensors(self) -> dict[str, Tensor]:
        return {
            "weight": self.weight,
            "weight_scale": self.weight_scale,
            "weight_zero_point": self.weight_zero_point,
        }

    @classmethod
    def from_tensors(
        cls, format_params: dict[str, Any], tensors: dict[str, Tensor], bias: Tensor | None = None
    ) -> Self:
        out, columns = tensors["weight"].shape
        with torch.device("meta"):
            layer = cls(columns, out, format_params["group_size"], tensors["weight_scale"].dtype)
        layer.fill(tensors)
        layer.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        return layer
