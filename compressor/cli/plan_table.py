"""Groups the rows of a plan by kind of weight, so that a model of many blocks fits on a screen."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from compressor.engine.plan_records import PlanRow
from compressor.model.name_kinds import kinds


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


def rows_by_kind(rows: Sequence[PlanRow]) -> list[KindRow]:
    """One row for each kind of weight, in the order in which the kinds appear."""
    how = [(row.shape, row.role, row.step, row.format_before, row.format_after) for row in rows]
    return [
        _kind_row(name, [rows[position] for position in alike])
        for name, alike in kinds([row.name for row in rows], how)
    ]


def one_by_one(rows: Iterable[PlanRow]) -> list[KindRow]:
    """One row for each weight."""
    return [KindRow(row.name, 1, row, row.bytes_before, row.bytes_after) for row in rows]


def _kind_row(name: str, alike: Sequence[PlanRow]) -> KindRow:
    return KindRow(
        name, len(alike), alike[0], sum(row.bytes_before for row in alike), sum(row.bytes_after for row in alike)
    )
