"""Computes the size of a model from the units that its sub-blocks keep, and chooses the units for a target size.

The size is linear in the units of each sub-block, and where the residual stream is pruned too, linear in its width:

    size = fixed + d * per_width + sum over parts of n (unit + d * unit_per_width)

The formula holds for parameters, bytes and multiplications, each with other numbers, and for whole and soft counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Any

STREAM = "hidden"  # name of the residual stream's own mask
TOLERANCE = 0.01  # relative to the whole size: how far below its target a choice may end


@dataclass(frozen=True)
class Part:
    """A sub-block whose units can be removed.

    unit, unit_per_width  size of one unit: independent of the stream's width, and for each channel of it
    rest                  further size that is removed if no unit is kept
    least                 smallest number of units that it may keep
    align                 it keeps a multiple of this, or all units
    allowed               it keeps one of these numbers, or all units; empty: any number
    """

    name: str
    kind: str
    block: int
    units: int
    unit: int
    unit_per_width: int = 0
    rest: int = 0
    least: int = 1
    align: int = 1
    allowed: tuple[int, ...] = ()

    def may_keep(self, count: int) -> bool:
        """Whether `least`, `align` and `allowed` allow this number of units."""
        fits = count >= self.least and count % self.align == 0 and (not self.allowed or count in self.allowed)
        return fits or count == self.units

    @property
    def counts(self) -> list[int]:
        """The allowed numbers of units, descending from all of them."""
        return [count for count in range(self.units, -1, -1) if self.may_keep(count)]

    @property
    def floor(self) -> int:
        """The smallest allowed number of units."""
        return self.counts[-1]


@dataclass(frozen=True)
class Size:
    """width  channels of the residual stream; `least_width` and `align_width` bound it if it is pruned"""

    parts: tuple[Part, ...]
    fixed: int
    width: int = 0
    per_width: int = 0
    least_width: int = 0
    align_width: int = 1

    def of(self, counts: Mapping[str, Any], width: Any = None) -> Any:
        """The size with that many units of each part: integers, or tensors (for which `rest` is never removed)."""
        d = self.width if width is None else width
        total = self.fixed + d * self.per_width
        for part in self.parts:
            count = counts[part.name]
            total = total + count * (part.unit + d * part.unit_per_width)
            if isinstance(count, int) and count == 0:
                total = total - part.rest
        return total

    @property
    def full(self) -> int:
        return self.of({part.name: part.units for part in self.parts})

    @property
    def narrowest(self) -> int:
        """The smallest number of channels that `least_width` and `align_width` allow together."""
        return min(self.width, -(-self.least_width // self.align_width) * self.align_width)


@dataclass(frozen=True)
class Kept:
    """units  of each part, in order; none if the part is removed
    width     channels of the stream; None if it is not pruned
    """

    units: dict[str, tuple[int, ...]]
    width: tuple[int, ...] | None
    size: int


class Unreachable(Exception):
    """No choice within the bounds is as small as the target. `least` is the smallest size that was found."""

    def __init__(self, least: int) -> None:
        super().__init__(f"no less than {least}")
        self.least = least


@dataclass(frozen=True, slots=True)
class _Move:
    """Units that are removed together: some of a part (of several parts if counts are uniform), or whole parts."""

    score: float
    drops: tuple[tuple[str, tuple[int, ...]], ...]
    whole: bool = False


def prune_to_size(
    size: Size,
    scores: Mapping[str, Sequence[float]],
    target: int,
    *,
    removable: Mapping[tuple[str, ...], float] | None = None,
    uniform: bool = False,
    prunes_width: bool = False,
) -> Kept:
    """Remove the units with the lowest scores until the size is at most `target`, then add back what still fits.

    `align` units are removed at a time: the lowest ones of a part together, with the mean of their scores, so that
    every step leaves allowed counts. If a step would miss the target by more than 1 % of the whole, smaller units with
    higher scores are removed first. Scores are not divided by the size of a unit: masks are already trained against
    the size of their units, and doing it twice gave a trained small model perplexity 369 instead of 106.

    scores     of each unit, by part (and of each channel under STREAM); larger is more important
    removable  parts that may be removed as a whole (several: together) -> their score; the last of a kind stays
    uniform    parts of one kind keep the same number; they must have the same number of units
    raises     Unreachable
    """
    state = _State(size, {part.name: set(range(part.units)) for part in size.parts}, set(range(size.width)))
    moves = _unit_moves(size, scores, uniform)
    if prunes_width:
        chunks = _chunks(scores[STREAM], _aligned(size.width, size.narrowest, size.align_width))
        moves += [_Move(score, ((STREAM, units),)) for score, units in chunks]
    moves += [
        _Move(score, tuple((name, ()) for name in names), whole=True) for names, score in (removable or {}).items()
    ]
    moves.sort(key=lambda move: move.score)  # stable: equal scores keep the order of parts and units
    done: list[_Move] = []
    heavy: list[_Move] = []
    least = target - TOLERANCE * size.full
    for move in moves:
        if state.size <= target:
            break
        if state.size - state.weight(move) < least:
            heavy.append(move)  # later, smaller ones may come closer to the target
        elif state.drop(move):
            done.append(move)
    for move in [*heavy, *moves]:  # those that waited for a large one come last
        if state.size > target and state.drop(move):
            done.append(move)
    if state.size > target:
        raise Unreachable(state.size)
    for move in reversed(done):
        if not move.whole:
            state.restore_if_within(move, target)
    width = tuple(sorted(state.channels)) if prunes_width else None
    return Kept({name: tuple(sorted(units)) for name, units in state.units.items()}, width, state.size)


@dataclass
class _State:
    """The kept units so far, and their size."""

    base: Size
    units: dict[str, set[int]]
    channels: set[int]

    def __post_init__(self) -> None:
        self._parts = {part.name: part for part in self.base.parts}
        self._removed: set[str] = set()
        self.size = self._measure()

    def _measure(self) -> int:
        return self.base.of({name: len(units) for name, units in self.units.items()}, len(self.channels))

    def channel_weight(self) -> int:
        kept = ((part, len(self.units[part.name])) for part in self.base.parts)
        return self.base.per_width + sum(count * part.unit_per_width for part, count in kept)

    def _unit_weight(self, name: str) -> int:
        part = self._parts[name]
        return part.unit + len(self.channels) * part.unit_per_width

    def weight(self, move: _Move) -> int:
        """The size that a move would remove now."""
        total = 0
        for name, units in move.drops:
            if name == STREAM:
                total += len(units) * self.channel_weight()
            elif name not in self._removed:
                removed = self.units[name] if move.whole else self.units[name] & set(units)
                total += len(removed) * self._unit_weight(name) + move.whole * self._parts[name].rest
        return total

    def drop(self, move: _Move) -> bool:
        """Remove the units of a move. Returns whether there were any."""
        if move.whole and self._is_last_of_its_kind(move):
            return False
        present = [name for name, _ in move.drops if name != STREAM and name not in self._removed]
        going = {name: self.units[name].intersection(units) for name, units in move.drops if name in present}
        if not move.whole and not all(
            self._parts[name].may_keep(len(self.units[name]) - len(units)) for name, units in going.items()
        ):
            return False
        weight = self.weight(move)
        for name, units in move.drops:
            if name == STREAM:
                self.channels.difference_update(units)
        for name in present:
            self.units[name].difference_update(self.units[name].copy() if move.whole else going[name])
        if move.whole:
            self._removed.update(present)
        self.size -= weight
        return weight > 0

    def _is_last_of_its_kind(self, move: _Move) -> bool:
        going = self._removed | {name for name, _ in move.drops}
        kinds = {self._parts[name].kind for name, _ in move.drops}
        return any(all(part.name in going for part in self.base.parts if part.kind == kind) for kind in kinds)

    def restore_if_within(self, move: _Move, target: int) -> None:
        if move.drops[0][0] == STREAM:
            more = len(move.drops[0][1]) * self.channel_weight()
            if self.size + more <= target:
                self.channels |= set(move.drops[0][1])
                self.size += more
            return
        back = [(name, units) for name, units in move.drops if name not in self._removed]
        more = sum(len(units) * self._unit_weight(name) for name, units in back)
        if self.size + more > target:
            return
        added = {name: set(units).difference(self.units[name]) for name, units in back}
        if all(self._parts[name].may_keep(len(self.units[name]) + len(units)) for name, units in added.items()):
            for name, units in added.items():
                self.units[name] |= units
            self.size += more


def _unit_moves(size: Size, scores: Mapping[str, Sequence[float]], uniform: bool) -> list[_Move]:
    if not uniform:
        return [
            _Move(score, ((part.name, units),))
            for part in size.parts
            for score, units in _chunks(scores[part.name], part.counts)
        ]
    moves = []
    for kind in dict.fromkeys(part.kind for part in size.parts):
        parts = [part for part in size.parts if part.kind == kind]
        assert len({tuple(part.counts) for part in parts}) == 1, "uniform counts need equal parts"
        rows = [_chunks(scores[part.name], part.counts) for part in parts]
        for together in zip(*rows, strict=True):
            mean = sum(score for score, _ in together) / len(together)
            drops = tuple((part.name, units) for part, (_, units) in zip(parts, together, strict=True))
            moves.append(_Move(mean, drops))
    return moves


def _chunks(scores: Sequence[float], counts: Sequence[int]) -> list[tuple[float, tuple[int, ...]]]:
    """(mean score, units) of the lowest units, in groups that lead from each of `counts` to the next."""
    order = sorted(range(len(scores)), key=lambda unit: scores[unit])
    found = []
    for before, after in pairwise(counts):
        units = tuple(order[len(scores) - before : len(scores) - after])
        found.append((sum(scores[unit] for unit in units) / len(units), units))
    return found


def _aligned(count: int, least: int, align: int) -> list[int]:
    """`count`, and the multiples of `align` below it down to `least`."""
    return [count, *(n for n in range(count - 1, least - 1, -1) if n % align == 0)]


def target_size(full: int, share: float) -> int:
    """The largest integer size that is at least `share` smaller than `full`. The share is read as a decimal number."""
    return full - math.ceil(full * Fraction(str(share)))
