"""Groups the rows of a plan by kind of weight, so that a model of many blocks fits on a screen."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from compressor.engine.plan_records import PlanRow


@dataclass(frozen=True)
class KindRow:
    """Weights of the same place in different blocks (or experts) to which the same happens.

    name   path with `*` for all numbers that the model has there, or with ranges: model.layers.0,2-5.mlp.down_proj
    count  number of weights
    first  one of them; shape, role, pass and formats are those of all
    """

    name: str
    count: int
    first: PlanRow
    bytes_before: int
    bytes_after: int


def rows_by_kind(rows: Iterable[PlanRow]) -> list[KindRow]:
    """One row for each kind of weight, in the order in which the kinds appear."""
    kinds: dict[tuple[object, ...], list[PlanRow]] = {}
    numbers: dict[tuple[str, ...], list[set[int]]] = {}  # pattern -> at each `*` the numbers of all its rows
    for row in rows:
        pattern = _pattern(row.name)
        how = (row.shape, row.role, row.step, row.format_before, row.format_after)
        kinds.setdefault((pattern, *how), []).append(row)
        seen = numbers.setdefault(pattern, [set() for part in pattern if part == "*"])
        for known, number in zip(seen, _numbers(row.name), strict=True):
            known.add(number)
    return [_kind_row(alike, numbers[_pattern(alike[0].name)]) for alike in kinds.values()]


def one_by_one(rows: Iterable[PlanRow]) -> list[KindRow]:
    """One row for each weight."""
    return [KindRow(row.name, 1, row, row.bytes_before, row.bytes_after) for row in rows]


def _pattern(name: str) -> tuple[str, ...]:
    return tuple("*" if part.isdigit() else part for part in name.split("."))


def _numbers(name: str) -> list[int]:
    return [int(part) for part in name.split(".") if part.isdigit()]


def _kind_row(alike: Sequence[PlanRow], everywhere: Sequence[set[int]]) -> KindRow:
    here = [set(column) for column in zip(*(_numbers(row.name) for row in alike))]
    labels = iter(
        "*" if len(held) > 1 and held == known else ranges(held) for held, known in zip(here, everywhere, strict=True)
    )
    name = ".".join(next(labels) if part == "*" else part for part in _pattern(alike[0].name))
    return KindRow(
        name, len(alike), alike[0], sum(row.bytes_before for row in alike), sum(row.bytes_after for row in alike)
    )


def ranges(numbers: Iterable[int]) -> str:
    """Numbers as text, neighbours as a range: {0, 2, 3, 4} is 0,2-4."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)
