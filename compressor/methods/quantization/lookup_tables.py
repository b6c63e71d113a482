"""Computes lookup tables of functions at equally spaced knots, with bounds on the error between the knots.

Bounds hold for a function with |f'| <= steepness and |f''| <= curvature everywhere, by Taylor's theorem:
    linear   step**2 / 8 * curvature
    nearest  step / 2 * steepness
float32 adds the rounding of the result. Steps have STEP_BITS significant bits, and knots are integer multiples of them
(1 + multiples for the root), so every knot is exact in float32. This makes a step at most 1 / 64 wider than the
smallest possible one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from compressor.lazy import torch
from compressor.model.activations import KNOWN, Function

STEP_BITS = 8
NARROWEST = 1 / 16  # of a calibrated range: a smaller one would fill the lookup table with rounding errors


@dataclass(frozen=True)
class Table:
    """values  (entries,) float32: f(low + k * step)"""

    values: torch.Tensor
    low: float
    step: float

    @property
    def high(self) -> float:
        return self.low + (len(self.values) - 1) * self.step

    def bound(self, steepness: float, curvature: float, linear: bool) -> float:
        """The largest error between the knots, in exact arithmetic."""
        return self.step**2 / 8 * curvature if linear else self.step / 2 * steepness


def tabulate(function: Function, low: float, high: float, entries: int, base: float = 0.0) -> Table:
    """The lookup table of a float64 function over low .. high, with knots at base + whole steps.

    raises  ValueError for an empty range
    """
    if not low < high:
        raise ValueError(f"a lookup table from {low} to {high} is empty")
    step = _round_up((high - low) / (entries - 1))
    while math.ceil((base - low) / step) + math.ceil((high - base) / step) > entries - 1:
        step = _round_up(step * (1 + 2.0**-STEP_BITS))
    first = -math.ceil((base - low) / step)
    knots = base + (first + torch.arange(entries, dtype=torch.float64)) * step
    return Table(function(knots).to(torch.float32), base + first * step, step)


def activation_table(name: str, smallest: float, largest: float, entries: int) -> Table:
    """The lookup table of a known activation over its calibration inputs, without the range of its asymptotes."""
    known = KNOWN[name]
    low = min(0.0, max(smallest, -known.reach))
    high = max(0.0, min(largest, known.reach))
    if high - low < NARROWEST:
        low, high = low - NARROWEST / 2, high + NARROWEST / 2
    return tabulate(known.formula, low, high, entries)


def exp_table(low: float, entries: int) -> Table:
    """exp from `low` to 0, which is the last knot. Steepness and curvature are at most 1 there."""
    return tabulate(torch.exp, low, 0.0, entries)


def root_table(entries: int) -> Table:
    """1 / sqrt over [1, 4): steepness 1 / 2, curvature 3 / 4, both also relative to the function (largest at 1)."""
    return tabulate(torch.rsqrt, 1.0, 4.0, entries, base=1.0)


def _round_up(step: float) -> float:
    """The next number of STEP_BITS significant bits."""
    mantissa, power = math.frexp(step)
    return math.ldexp(math.ceil(mantissa * 2**STEP_BITS), power - STEP_BITS)
