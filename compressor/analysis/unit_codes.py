"""Identifies the unit of each row of a matrix: every unit is weighted by a number of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from compressor.model.probe_model import PROBE_SEED

FAINT = 1e-6  # of the largest gradient of a matrix: below it, rounding may hide the unit
SAME = 1e-7  # relative to a gradient: above its rounding, and below the distance of two codes for up to a million units


def unit_codes(count: int) -> list[Tensor]:
    """Two sets of numbers that identify units."""
    generator = torch.Generator().manual_seed(PROBE_SEED)
    even = torch.arange(count, dtype=torch.float64)
    return [1 + (even + 1) / count, 1 + (torch.randperm(count, generator=generator).double() + 1) / count]


def decoded_units(values: Sequence[Tensor], axis: int, count: int) -> Tensor:
    """The unit of each index along `axis`, or -1.

    An index belongs to a unit if both weighted values are the unweighted value times that unit's codes.

    values  the effect of all units, unweighted, and weighted with each set of codes
    """
    plain, *weighted = (value.movedim(axis, 0).reshape(value.shape[axis], -1) for value in values)
    norms = plain.square().sum(1)
    alive = norms.sqrt() > FAINT * norms.max().sqrt()
    shares = (weighted[0] * plain).sum(1) / norms.clamp(min=torch.finfo(torch.float64).tiny)
    units = ((shares - 1) * count - 1).round().clamp(0, count - 1).nan_to_num(0).long()
    for value, codes in zip(weighted, unit_codes(count)):
        apart = (value - codes[units].unsqueeze(1) * plain).square().sum(1).sqrt()
        alive &= apart <= SAME * norms.sqrt()
    return torch.where(alive, units, -1)


def columns_of_units(units: Tensor, count: int) -> tuple[tuple[int, ...], ...]:
    """The indices of each unit."""
    rows: list[list[int]] = [[] for _ in range(count)]
    for index, unit in enumerate(units.tolist()):
        if unit >= 0:
            rows[unit].append(index)
    return tuple(tuple(indices) for indices in rows)
