"""Computes LayerNorm or RMSNorm with 1 / sqrt from a lookup table (BCT).

Tensors
    weight  (width,) in the dtype of the model: the gain, if the norm has one
    table   float32 (entries,): 1 / sqrt(1 + k * step), over [1, 4)

Mean and mean square are summed in float32; variance + eps = a * 4**s with a in [1, 4), and only 1 / sqrt(a) is read, so
the relative error is the same at every scale: at most step**2 / 8 * 3 / 4 with linear interpolation. A bias stays in
the dtype of the model.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from compressor.kernels.ops.table_functions import normalize
from compressor.layers.base import Layer


class TableNorm(Layer):
    """Replaces a norm over the last dimension.

    kind    layer (subtracts the mean) | rms
    offset  the gain is offset + weight: 1 in Gemma, else 0
    """

    format_name = "table_norm"
    stands_for = "norm"
    weight_only = False
    helpers = ("compressor.kernels.ops.table_functions",)
    weight: Tensor | None
    table: Tensor

    def __init__(
        self,
        width: int | None,
        kind: str,
        offset: float,
        eps: float,
        entries: int,
        step: float,
        lookup: str,
        dtype: torch.dtype,
        bias: bool,
    ) -> None:
        super().__init__()
        self.kind, self.offset, self.eps, self.step, self.lookup = kind, offset, eps, step, lookup
        self.register_buffer("weight", None if width is None else torch.zeros(width, dtype=dtype))
        self.register_buffer("table", torch.zeros(entries, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(width or 0, dtype=dtype), requires_grad=False) if bias else None

    @classmethod
    def empty(cls, shape: tuple[int, ...], format_params: dict[str, Any], dtype: torch.dtype, bias: bool) -> Self:
        return cls(shape[0] if shape else None, **format_params, dtype=dtype, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return normalize(
            x, self.weight, self.bias, self.table, self.kind == "layer", self.offset, self.eps, self.step,
            self.lookup == "linear",
        )  # fmt: skip

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """The gain (width,), as in the dense model."""
        assert self.weight is not None
        return self.weight.to(dtype)

    def format_params(self) -> dict[str, Any]:
        settings = {"kind": self.kind, "offset": self.offset, "eps": self.eps}
        return {**settings, "entries": len(self.table), "step": self.step, "lookup": self.lookup}

    def tensors(self) -> dict[str, Tensor]:
        return {"table": self.table} if self.weight is None else {"weight": self.weight, "table": self.table}

    @classmethod
    def from_tensors(
        cls, format_params: dict[str, Any], tensors: dict[str, Tensor], bias: Tensor | None = None
    ) -> Self:
        weight = tensors.get("weight")
        with torch.device("meta"):
            layer = cls(
                None if weight is None else len(weight),
                **format_params,
                dtype=torch.float32 if weight is None else weight.dtype,
                bias=False,
            )
        layer.fill(tensors)
        layer.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        return layer
