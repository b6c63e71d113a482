"""Computes the size of a model, in parameters or multiplications, as a function of its kept prunable units."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

from compressor.methods.pruning.pruned_shapes import stream_edges
from compressor.methods.pruning.size_budget import Part, Size
from compressor.model.facts import ModelFacts, PrunableModule


def model_size(
    facts: ModelFacts,
    prunables: Sequence[PrunableModule],
    *,
    measure: Literal["parameters", "flops"],
    of: Literal["blocks", "model"],
    tokens: int,
    narrows: bool = False,
) -> Size:
    """The size of the model, or of all its blocks, as a function of the units of these prunable modules.

    parameters  tied ones count once
    flops       multiplications for one token: entries of every matrix that multiplies it, and for each query head the
                scores and sums over `tokens` keys; none for look-ups, biases and norms
    narrows     the residual stream gets narrower too
    """
    along = dict(stream_edges(facts.residual)) if narrows else {}
    inside = f"{facts.blocks}."
    heads = facts.residual.end.consumers if (of, measure) == ("model", "flops") else ()
    multiplied = {consumer.parameter for consumer in heads}
    rest: dict[str, int] = {}  # parameter -> entries that belong to no unit
    for name, shape in facts.shapes.items():
        is_counted = name.startswith(inside) or (of == "model" and (measure == "parameters" or name in multiplied))
        is_again = name in facts.tied and measure == "parameters"
        if is_counted and not is_again and (measure == "parameters" or len(shape) > 1):
            rest[name] = math.prod(shape)
    parts = []
    for prunable in prunables:
        unit = per_width = 0
        for sliced in prunable.slices:
            if sliced.parameter not in rest:
                continue
            shape, rows = facts.shapes[sliced.parameter], len(sliced.rows[0])
            entries = rows * math.prod(shape) // shape[sliced.axis]
            rest[sliced.parameter] -= entries * prunable.units
            if along.get(sliced.parameter, sliced.axis) != sliced.axis:
                per_width += entries // shape[along[sliced.parameter]]
            else:
                unit += entries
        if measure == "flops" and prunable.kind == "heads":
            unit += 2 * tokens * prunable.layout.head_dim * prunable.layout.query_heads
        parts.append(
            Part(
                prunable.name,
                prunable.kind,
                prunable.block,
                prunable.units,
                unit,
                per_width,
                _beside(facts, prunable, rest),
            )
        )
    fixed = sum(count for name, count in rest.items() if name not in along)
    if not narrows:
        return Size(tuple(parts), fixed)
    width = facts.residual.width
    per_channel = sum(count // width for name, count in rest.items() if name in along)
    return Size(tuple(parts), fixed, width, per_channel)


def _beside(facts: ModelFacts, prunable: PrunableModule, rest: Mapping[str, int]) -> int:
    """Size, besides the units, that a `removed` layer removes; its bias stays."""
    paths = [f"{entry.path}." for entry in prunable.layout.removal or ()]
    removed = [name for name in rest if any(name.startswith(path) for path in paths)]
    stays = rest.get(prunable.bias or "", 0) if any(entry.adds for entry in prunable.layout.removal or ()) else 0
    return sum(rest[name] for name in removed) - stays
