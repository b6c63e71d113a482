"""Carries what was found on a narrow probe model over to the widths of the model, and proves that this is right.

Where an axis of a parameter was divided by f, index i of the narrow axis stands for the indices i f to (i + 1) f - 1 of
the model's own axis. That is so for every layout in which the values of a head, of a gate or of a query lie side by
side, but not where they alternate. So it is tried: what was found on one narrow probe model, carried over to a second
one of other widths, must be what is found on that one. If it is not, MLPs keep their widths, and at last the probe
model has the model's own ones.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from itertools import pairwise
from operator import eq
from typing import TypeVar

from compressor.model.narrow_probe import Probe, Probes
from compressor.model.remembered import remembered

Found = TypeVar("Found")


class Unliftable(Exception):
    """Indices of an axis that was not divided by a whole number, or by another one than an axis beside it."""


def found_on_narrow(
    question: Hashable,
    probes: Probes,
    find: Callable[[Probe], Found],
    lift: Callable[[Found, Probe, Probe], Found],
    is_same: Callable[[Found, Found], bool] = eq,
) -> Found:
    """What `find` finds at the model's own widths, by running narrow probe models if possible.

    question  names what is found, with everything that `find` depends on except the probe; the answer is remembered
    probes    of the model
    lift      (found, the probe on which, another probe) -> the same for the other probe; may raise Unliftable
    is_same   compares what was carried over with what was found
    raises    what `find` raises for the narrowest probe
    """
    known = remembered((question, probes.key), lambda: _found(probes, find, lift, is_same))
    if known is not None:
        return known
    warnings.warn(
        f"{type(probes.whole.empty).__name__}: a probe model of its own widths runs, which takes long", stacklevel=2
    )
    return find(probes.whole)


def _found(
    probes: Probes,
    find: Callable[[Probe], Found],
    lift: Callable[[Found, Probe, Probe], Found],
    is_same: Callable[[Found, Found], bool],
) -> Found | None:
    """None if no narrow probe model stands for a large one."""
    whole = probes.whole
    for keeps_units in (False, True):
        for narrow, wider in pairwise(probes.narrow(keeps_units=keeps_units)):
            try:
                found = find(narrow)
                if is_same(lift(found, narrow, wider), find(wider)):
                    return lift(found, narrow, whole)
            except Unliftable:
                continue  # the next two may have been divided alike
            break
    return None if whole.is_large else find(whole)


def factor(narrow: Probe, wider: Probe, parameter: str, axis: int) -> int:
    """The number by which one axis was divided; the others may be of any length. raises Unliftable"""
    small, large = narrow.shapes[parameter][axis], wider.shapes[parameter][axis]
    if large % small:
        raise Unliftable(parameter)
    return large // small


def run_of(indices: tuple[int, ...], factor: int) -> tuple[int, ...]:
    """The indices of the whole axis for which indices of the narrow axis stand."""
    return tuple(index * factor + number for index in indices for number in range(factor))
