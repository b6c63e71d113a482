"""Reads functions from lookup tables of equally spaced values, and computes activations and norms with them.

A table has f(low + k * step) for k = 0 .. entries - 1 in float32. `step` has few significant bits and the knots
low + k * step are exact in float32, so that a division gives a knot's number exactly. Between knots:

    linear   |error| <= step**2 / 8 * max |f''|
    nearest  |error| <= step / 2 * max |f'|

The source of these functions is copied into the modeling file of a custom artifact, so they use only torch. A prepared
model passes a faster function in place of `look_up` (`compressor.kernels.prepared.prepared_lookup_table`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def look_up(x: Tensor, table: Tensor, low: float, step: float, linear: bool) -> Tensor:
    """f(x) for x (...) float32 within the table's range; the first or last entry beyond it; NaN stays NaN."""
    place = ((x - low) / step).clamp(0, len(table) - 1)
    known = torch.nan_to_num(place)
    if not linear:
        return torch.where(place.isnan(), place, table[torch.round(known).long()])
    left = known.floor().clamp(max=len(table) - 2).long()
    return torch.lerp(table[left], table[left + 1], place - left)


Read = Callable[[Tensor, Tensor, float, float, bool], Tensor]  # look_up, or a function with the same results


def activate(x: Tensor, table: Tensor, low: float, step: float, linear: bool, slopes: tuple[float, float]) -> Tensor:
    """An activation of x (...), in float32. Beyond the table it continues from the ends with these slopes."""
    x = x.to(torch.float32)
    high = low + (len(table) - 1) * step
    inside = look_up(x, table, low, step, linear)
    if slopes[0]:
        inside = torch.where(x < low, table[0] + slopes[0] * (x - low), inside)
    if slopes[1]:
        inside = torch.where(x > high, table[-1] + slopes[1] * (x - high), inside)
    return inside


def softmax(scores: Tensor, table: Tensor, step: float, linear: bool, read: Read = look_up) -> Tensor:
    """Softmax over the last dimension of scores (...), float32. The table has exp up to 0.

    A score that is further below its row's largest one than the table reaches, such as a masked one, gets exactly 0.
    """
    scores = scores.to(torch.float32)
    below = scores - scores.amax(-1, keepdim=True)
    low = -(len(table) - 1) * step
    parts = torch.where(below < low, 0.0, read(below, table, low, step, linear))
    return parts / parts.sum(-1, keepdim=True)


def inverse_root(x: Tensor, table: Tensor, step: float, linear: bool) -> Tensor:
    """1 / sqrt(x) for x (...) float32 > 0, from x = a * 4**s with a in [1, 4): the table has 1 / sqrt(a) from 1 on."""
    mantissa, power = torch.frexp(x)  # mantissa in [1/2, 1)
    half = torch.div(power - 1, 2, rounding_mode="floor")
    a = torch.ldexp(mantissa, power - 2 * half)
    root = torch.ldexp(look_up(a, table, 1.0, step, linear), -half)
    return torch.where(torch.isfinite(x) & (x > 0), root, torch.rsqrt(x))


Root = Callable[[Tensor, Tensor, float, bool], Tensor]  # inverse_root, or a function with the same results


def normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    table: Tensor,
    subtracts_mean: bool,
    offset: float,
    eps: float,
    step: float,
    linear: bool,
    root: Root = inverse_root,
) -> Tensor:
    """A norm of x (..., width) over its last dimension, in float32, with the table of `inverse_root`.

    weight   (width,) or None; the gain is offset + weight. bias (width,) or None
    returns  (..., width) in the dtype of x
    """
    wide = x.to(torch.float32)
    if subtracts_mean:
        wide = wide - wide.mean(-1, keepdim=True)
    spread = wide.square().mean(-1, keepdim=True) + eps
    wide = wide * root(spread, table, step, linear)
    if weight is not None:
        wide = wide * (weight.to(torch.float32) + offset)
    if bias is not None:
        wide = wide + bias.to(torch.float32)
    return wide.to(x.dtype)
