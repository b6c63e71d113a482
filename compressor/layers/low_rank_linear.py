"""Stores a weight (out, in) as the product of two thin matrices of rank r.

Tensors (docs/format.md):
    weight_left   (out, r), weight_right (r, in): float16, bfloat16 or int8
    weight_scale  float32 (r,), int8 only

    W' = left · diag(scale) · right        bytes = v · r · (out + in), and 4 · r with int8; v is 2, or 1 with int8

The forward pass costs r · (out + in) multiply-adds per token. Matmuls have the input's dtype: a bfloat16 model rounds
the r values in between.
"""

from __future__ import annotations

from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressor.errors import ShapeError
from compressor.layers.base import DAMAGED_HINT, Layer


class LowRankLinear(Layer):
    """Replaces nn.Linear. Multiplies by one thin matrix and then by the other."""

    format_name = "low_rank_linear"
    weight_only = False
    weight_left: Tensor
    weight_right: Tensor
    weight_scale: Tensor

    def __init__(
        self, in_features: int, out_features: int, rank: int, values: str, dtype: torch.dtype, bias: bool = False
    ) -> None:
        """values: the stored dtype, float16 | bfloat16 | int8"""
        super().__init__()
        self.in_features, self.out_features, self.dtype = in_features, out_features, dtype
        self.rank, self.values = rank, values
        kind = getattr(torch, values)
        self.register_buffer("weight_left", torch.zeros(out_features, rank, dtype=kind))
        self.register_buffer("weight_right", torch.zeros(rank, in_features, dtype=kind))
        if values == "int8":
            self.register_buffer("weight_scale", torch.zeros(rank, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype), requires_grad=False) if bias else None

    @classmethod
    def empty(cls, shape: tuple[int, ...], format_params: dict[str, Any], dtype: torch.dtype, bias: bool) -> Self:
        return cls(shape[1], shape[0], format_params["rank"], format_params["values"], dtype, bias)

    @classmethod
    def pack(cls, left: Tensor, right: Tensor, values: str) -> Self:
        """Store factors left (out, r) and right (r, in), floating. raises ShapeError if they don't fit each other"""
        if left.dim() != 2 or right.dim() != 2 or left.shape[1] != right.shape[0]:
            raise ShapeError(
                f"factors {tuple(left.shape)} and {tuple(right.shape)} have no product",
                hint=DAMAGED_HINT,
                data={"left": list(left.shape), "right": list(right.shape)},
            )
        if values != "int8":
            kind = getattr(torch, values)
            tensors = {"weight_left": left.to(kind), "weight_right": right.to(kind)}
        else:
            steps = [part.abs().amax(dim).clamp(min=1e-30) / 127 for part, dim in ((left, 0), (right, 1))]
            tensors = {
                "weight_left": torch.round(left / steps[0]).to(torch.int8),
                "weight_right": torch.round(right / steps[1][:, None]).to(torch.int8),
                "weight_scale": (steps[0].double() * steps[1].double()).float(),
            }
        return cls.from_tensors({"rank": left.shape[1], "values": values}, tensors)

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """left (out, r) and right (r, in), with the scale folded into the latter."""
        right = self.weight_right.to(torch.float32)
        if self.values == "int8":
            right = right * self.weight_scale[:, None]
        return self.weight_left.to(dtype), right.to(dtype)

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """The product of the factors (out, in)."""
        left, right = self.factors(torch.float32)
        return (left @ right).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.factors(x.dtype)
        return F.linear(F.linear(x, right), left, self.bias)

    def format_params(self) -> dict[str, Any]:
        return {"rank": self.rank, "values": self.values}

    def tensors(self) -> dict[str, Tensor]:
        names = ("weight_left", "weight_right", *(("weight_scale",) if self.values == "int8" else ()))
        return {name: getattr(self, name) for name in names}

    @classmethod
    def from_tensors(
        cls, format_params: dict[str, Any], tensors: dict[str, Tensor], bias: Tensor | None = None
    ) -> Self:
        shape = (tensors["weight_left"].shape[0], tensors["weight_right"].shape[1])
        with torch.device("meta"):
            layer = cls.empty(shape, format_params, torch.float32, bias=False)
        layer.fill(tensors)
        layer.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        return layer
