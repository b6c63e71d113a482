"""Searches the scales of a uniform grid in torch: what the compiled search must agree with.

Codes are signed, in [-2**(bits-1), 2**(bits-1) - 1]; w = (code - zero_point) * scale. All arithmetic is in the dtype of
the weight, with scales that are first rounded to their stored dtype, so that the optimized values are the stored ones.
Source: Frantar et al. 2022 (arXiv 2210.17323) and its reference implementation, for the grid of the extremes and for
the search over smaller ranges with the error exponent 2.4.
"""

from __future__ import annotations

import torch
from torch import Tensor

ERROR_EXPONENT = 2.4  # IST-DASLab/gptq, quant.py; scale_search.cpp has it in its polynomials
SMALLEST_SHRINK = 0.40  # below it no tested group improved; the reference tries down to 0.21
COARSE_STEP, FINE_STEP = 0.06, 0.02
COARSE_STEPS = round((1 - SMALLEST_SHRINK) / COARSE_STEP)
CHUNK_ELEMENTS = 1 << 18  # one chunk of rows and its temporaries stay in the L2 cache


def search_in_torch(
    weight: Tensor, importance: Tensor | None, bits: int, symmetric: bool, search: bool, stored: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each group of each row. Arguments: as in `compressor.kernels.ops.scale_search`."""
    out, groups, size = weight.shape
    scale, zero_point = (torch.empty(out, groups, dtype=torch.float32, device=weight.device) for _ in range(2))
    rows = max(1, CHUNK_ELEMENTS // max(1, groups * size))
    for start in range(0, out, rows):
        part = weight[start : start + rows]
        low, high = part.amin(-1).clamp_(max=0), part.amax(-1).clamp_(min=0)
        best = grid_of_range(low, high, bits, symmetric, stored)
        if search:
            best = _search(part, low, high, bits, symmetric, stored, importance)
        scale[start : start + rows], zero_point[start : start + rows] = best
    return scale, zero_point


def grid_of_range(low: Tensor, high: Tensor, bits: int, symmetric: bool, stored: torch.dtype) -> tuple[Tensor, Tensor]:
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


def round_scale(scale: Tensor, stored: torch.dtype) -> Tensor:
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
    part: Tensor,
    low: Tensor,
    high: Tensor,
    bits: int,
    symmetric: bool,
    stored: torch.dtype,
    importance: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Shrink each range by the factor with the least error: a coarse search, then a finer one around each best factor.

    It costs a twelfth of the reference's hundred steps. Of equal errors the larger scale wins.
    """
    work = torch.empty_like(part)
    error = torch.empty_like(part)
    best_error = torch.full_like(low, torch.inf)
    best_scale, best_zero = torch.empty_like(low), torch.empty_like(low)
    best_factor = torch.ones_like(low)
    levels = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)

    def attempt(factor: Tensor) -> None:
        nonlocal best_scale, best_zero, best_factor
        scale, zero = grid_of_range(low * factor, high * factor, bits, symmetric, stored)
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

    for step in range(COARSE_STEPS + 1):
        attempt(torch.full_like(low, 1 - step * COARSE_STEP))
    centre = best_factor.clone()
    for step in (-2, -1, 1, 2):
        attempt((centre + step * FINE_STEP).clamp_(SMALLEST_SHRINK, 1.0))
    return best_scale, best_zero
