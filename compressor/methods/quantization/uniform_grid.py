"""Computes uniform quantization grids: range, scale, zero point, rounding, and the search for a better range.

Codes are signed, in [-2**(bits-1), 2**(bits-1) - 1]; w = (code - zero_point) * scale. All arithmetic is float32 with
scales that are first rounded to their stored dtype, so that the optimized values are the stored ones.
Source: Frantar et al. 2022 (arXiv 2210.17323) and its reference implementation, for the min-max grid and for the search
over smaller ranges with the error exponent 2.4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from compressor.lazy import torch

ERROR_EXPONENT = 2.4  # IST-DASLab/gptq, quant.py
SMALLEST_SHRINK = 0.40  # below it no tested group improved; the reference tries down to 0.21
COARSE_STEP, FINE_STEP = 0.06, 0.02
CHUNK_ELEMENTS = 1 << 18  # one chunk of rows and its temporaries stay in the L2 cache


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
    out, groups, size = weight.shape
    scale = torch.empty(out, groups, device=weight.device)
    zero_point = torch.empty(out, groups, device=weight.device)
    rows = max(1, CHUNK_ELEMENTS // (groups * size))
    for start in range(0, out, rows):
        part = weight[start : start + rows]
        low, high = part.amin(-1).clamp_(max=0), part.amax(-1).clamp_(min=0)
        best = _grid_of_range(low, high, bits, symmetric, stored)
        if search != "minmax":
            best = _search(part, low, high, bits, symmetric, stored, importance if search == "hessian_diag" else None)
        scale[start : start + rows], zero_point[start : start + rows] = best
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


def _grid_of_range(
    low: torch.Tensor, high: torch.Tensor, bits: int, symmetric: bool, stored: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point of ranges (out, groups) with low <= 0 <= high."""
    levels = 2**bits - 1
    spread = 2 * torch.maximum(-low, high) if symmetric else high - low
    empty = spread == 0
    scale = round_scale(spread / levels, stored)
    scale = torch.where(empty, torch.ones_like(scale), scale)
    half = 2 ** (bits - 1)
    below = torch.full_like(scale, half)  # codes between zero and the lowest value
    if not symmetric:
        below = torch.round(-low / scale).clamp_(0, levels)
        below = torch.where(empty, torch.full_like(below, half), below)
    # The lowest or highest code times the scale must not overflow the stored dtype, as -8 * (65504 / 7.5) would.
    most = torch.finfo(stored).max * (1 - torch.finfo(stored).eps) / torch.maximum(below, levels - below)
    scale = torch.where(scale > most, most.to(stored).float(), scale)
    return scale, below - half


def round_scale(scale: torch.Tensor, stored: torch.dtype) -> torch.Tensor:
    """Scales with their stored values, never 0.

    scale    float32, not negative
    stored   the dtype on disk
    returns  float32, exactly representable in `stored`: rounded to nearest if that is a normal number. A subnormal
             float16 scale is rounded up, since its steps are coarse and a smaller scale would clip the largest weights
    """
    rounded = scale.to(stored).float()
    kind = torch.finfo(stored)
    if stored == torch.float16:
        step = kind.smallest_normal * kind.eps
        rounded = torch.where(scale < kind.smallest_normal, torch.ceil(scale / step) * step, rounded).clamp_(min=step)
    # Subnormal numbers of the other dtypes are subnormal in float32 too, and some processors treat them as 0.
    return rounded if stored == torch.float16 else rounded.clamp_(min=kind.smallest_normal)


def _search(
    part: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    bits: int,
    symmetric: bool,
    stored: torch.dtype,
    importance: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Shrink each range by the factor with the least error: a coarse search, then a finer one around each best factor.

    It costs a twelfth of the reference's hundred steps. Of equal errors the larger scale wins.
    """
    work = torch.empty_like(part)
    error = torch.empty_like(part)
    best_error = torch.full_like(low, torch.inf)
    best_scale, best_zero = torch.empty_like(low), torch.empty_like(low)
    best_factor = torch.ones_like(low)
    levels = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)

    def attempt(factor: torch.Tensor) -> None:
        nonlocal best_scale, best_zero, best_factor
        scale, zero = _grid_of_range(low * factor, high * factor, bits, symmetric, stored)
        torch.div(part, scale.unsqueeze(-1), out=work)
        work.round_().clamp_((levels[0] - zero).unsqueeze(-1), (levels[1] - zero).unsqueeze(-1))
        work.mul_(scale.unsqueeze(-1)).sub_(part)
        if importance is not None:
            torch.mul(work, work, out=error).mul_(importance)
        else:  # |e|**2.4 as exp(2.4 log|e|) without pow
            torch.abs(work, out=error).log_().mul_(ERROR_EXPONENT).exp_()
        total = error.sum(-1)
        better = (total < best_error) | ((total == best_error) & (factor > best_factor))
        best_error.copy_(torch.where(better, total, best_error))
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)
        best_factor = torch.where(better, factor, best_factor)

    steps = round((1 - SMALLEST_SHRINK) / COARSE_STEP)
    for step in range(steps + 1):
        attempt(torch.full_like(low, 1 - step * COARSE_STEP))
    centre = best_factor.clone()
    for step in (-2, -1, 1, 2):
        attempt((centre + step * FINE_STEP).clamp_(SMALLEST_SHRINK, 1.0))
    return best_scale, best_zero
