"""Tables of functions at equally spaced knots, with bounds on what reading between the knots costs.

Bounds hold for a function with |f'| <= steepness and |f''| <= curvature everywhere, by Taylor's theorem:
    linear   step**2 / 8 * curvature
    nearest  step / 2 * steepness
to which float32 adds a rounding of the result. Steps have STEP_BITS significant bits and knots are whole multiples of
them (of 1 + multiples for the root), so every knot is exact in float32; that makes a step at most 1 / 64 wider than the
narrowest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from compressor.lazy import torch
from compressor.model.activations import KNOWN, Function

STEP_BITS = 8
NARROWEST = 1 / 16  # of a calibrated range: less would spend the table on rounding errors


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
        """What reading between the knots can cost, in exact arithmetic."""
        return self.step**2 / 8 * curvature if linear else self.step / 2 * steepness


def tabulate(function: Function, low: float, high: float, entries: int, base: float = 0.0) -> Table:
    """The table of a float64 function that covers low .. high, with base + whole steps for its knots.

    raises ValueError for an empty range
    """
    if not low < high:
        raise ValueError(f"a table from {low} to {high} covers nothing")
    step = _round_up((high - low) / (entries - 1))
    while math.ceil((base - low) / step) + math.ceil((high - base) / step) > entries - 1:
        step = _round_up(step * (1 + 2.0**-STEP_BITS))
    first = -math.ceil((base - low) / step)
    knots = base + (first + torch.arange(entries, dtype=torch.float64)) * step
    return Table(function(knots).to(torch.float32), base + first * step, step)


def activation_table(name: str, smallest: float, largest: float, entries: int) -> Table:
    """The table of a known activation over the inputs that calibration saw, as far as its asymptotes don't serve."""
    known = KNOWN[name]
    low = min(0.0, max(smallest, -known.reach))
    high = max(0.0, min(largest, known.reach))
    if high - low < NARROWEST:
        low, high = low - NARROWEST / 2, high + NARROWEST / 2
    return tabulate(known.formula, low, high, entries)


def exp_table(low: float, entries: int) -> Table:
    """exp from `low` up to 0, where the last knot lies. Steepness and curvature there are at most 1."""
    return tabulate(torch.exp, low, 0.0, entries)


def root_table(entries: int) -> Table:
    """1 / sqrt over [1, 4): steepness 1 / 2, curvature 3 / 4, both also relative to the function (largest at 1)."""
    return tabulate(torch.rsqrt, 1.0, 4.0, entries, base=1.0)


def _round_up(step: float) -> float:
    """The next number of STEP_BITS significant bits."""
    mantissa, power = math.frexp(step)
    return math.ldexp(math.ceil(mantissa * 2**STEP_BITS), power - STEP_BITS)
