"""Computes uniform quantization grids: range, scale, zero point, rounding, and the search for a better range.

Codes are signed, in [-2**(bits-1), 2**(bits-1) - 1]; w = (code - zero_point) * scale. All arithmetic is float32 with
scales that are first rounded to their stored dtype, so that the optimized values are the stored ones. The operation
that searches the scales is `compressor.kernels.ops.scale_search`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from compressor.lazy import torch


@dataclass(frozen=True)
class Grid:
    """scale       (out, groups) float32, exactly representable in the stored dtype
    zero_point  (out, groups) float32, integers in the range of the codes
    """

    bits: int
    symmetric: bool
    scale: torch.Tensor
    zero_point: torch.Tensor

    @property
    def low(self) -> int:
        return -(2 ** (self.bits - 1))

    @property
    def high(self) -> int:
        return 2 ** (self.bits - 1) - 1


def find_grid(
    weight: torch.Tensor,
    bits: int,
    symmetric: bool,
    search: Literal["minmax", "mse", "hessian_diag"],
    stored: torch.dtype,
    importance: torch.Tensor | None = None,
) -> Grid:
    """One grid per row of each group.

    weight      (out, groups, group_size) float32
    stored      dtype of the scales on disk
    importance  (groups, group_size) diagonal of the Hessian, for hessian_diag
    """
    from compressor.kernels.ops.scale_search import scale_search  # imports torch, which loading settings must not

    used = importance.to(weight.dtype) if importance is not None and search == "hessian_diag" else None
    scale, zero_point = scale_search(weight, used, bits, symmetric, search != "minmax", stored)
    return Grid(bits, symmetric, scale, zero_point)


def quantize(weight: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Nearest codes (half to even, clamped after adding the zero point).

    weight   (out, groups, group_size) float32
    returns  the same shape, integers in float32
    """
    codes = torch.round(weight / grid.scale.unsqueeze(-1)) + grid.zero_point.unsqueeze(-1)
    return codes.clamp_(grid.low, grid.high)


def dequantize(codes: torch.Tensor, grid: Grid) -> torch.Tensor:
    """(codes - zero_point) * scale, float32, the shape of codes (out, groups, group_size)."""
    return (codes - grid.zero_point.unsqueeze(-1)) * grid.scale.unsqueeze(-1)
