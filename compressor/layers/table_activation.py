"""Reads an activation from a lookup table (BCT).

Tensors: table  float32 (entries,), f(low + k * step) at k = 0 .. entries - 1
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor

from compressor.kernels.ops.table_functions import activate
from compressor.layers.base import Layer

STRAIGHT = 1e-4  # for GELU from 4.3 on, where the asymptote has an error of 4e-5


class TableActivation(Layer):
    """Replaces an activation module.

    function  its name, as information; the lookup table decides
    low       input of the first entry
    step      between two entries
    lookup    linear | nearest
    slopes    left and right of the lookup table, where the function continues as a straight line
    """

    format_name = "table_activation"
    stands_for = "activation"
    weight_only = False
    helpers = ("compressor.kernels.ops.table_functions",)
    table: Tensor

    def __init__(
        self, function: str, entries: int, low: float, step: float, lookup: str, slopes: tuple[float, float]
    ) -> None:
        super().__init__()
        self.function, self.low, self.step, self.lookup = function, low, step, lookup
        self.slopes = (float(slopes[0]), float(slopes[1]))
        self.register_buffer("table", torch.zeros(entries, dtype=torch.float32))

    @classmethod
    def empty(cls, shape: tuple[int, ...], format_params: dict[str, Any], dtype: torch.dtype, bias: bool) -> Self:
        return cls(**format_params)

    def forward(self, x: Tensor) -> Tensor:
        return activate(x, self.table, self.low, self.step, self.lookup == "linear", self.slopes).to(x.dtype)

    def outside(self, x: Tensor) -> Tensor:
        """Number of inputs beyond an end of the lookup table where the function is not straight yet."""
        rises = ((self.table[1] - self.table[0]) / self.step, (self.table[-1] - self.table[-2]) / self.step)
        bent = [abs(rise - slope) > STRAIGHT for rise, slope in zip(rises, self.slopes)]
        high = self.low + (len(self.table) - 1) * self.step
        return ((x < self.low) & bent[0]).sum() + ((x > high) & bent[1]).sum()

    def format_params(self) -> dict[str, Any]:
        settings = {"function": self.function, "entries": len(self.table), "low": self.low, "step": self.step}
        return {**settings, "lookup": self.lookup, "slopes": list(self.slopes)}

    def tensors(self) -> dict[str, Tensor]:
        return {"table": self.table}

    @classmethod
    def from_tensors(
        cls, format_params: dict[str, Any], tensors: dict[str, Tensor], bias: Tensor | None = None
    ) -> Self:
        with torch.device("meta"):
            layer = cls(**format_params)
        layer.fill(tensors)
        return layer
