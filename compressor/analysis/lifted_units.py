"""Carries prunable units that were found on a narrow probe model over to other widths (`lifting`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod

from compressor.analysis.lifting import Unliftable, factor, run_of
from compressor.model.facts import PrunableModule, PrunedSlice
from compressor.model.narrow_probe import Probe

Attributes = Mapping[str, Mapping[str, int]]  # module path -> attribute that counts heads -> number per unit


def lifted_prunable(prunable: PrunableModule, attributes: Attributes, narrow: Probe, wider: Probe) -> PrunableModule:
    """A prunable module of a narrow probe model as that of another one.

    A head stays one head of more values. A neuron stands for as many neurons as its axis was divided by.

    attributes  those of the other probe model
    raises      Unliftable
    """
    slices = tuple(_lifted_slice(prunable, sliced, narrow, wider) for sliced in prunable.slices)
    units = len(slices[0].rows)
    if any(len(sliced.rows) != units for sliced in slices):
        raise Unliftable("the axes of neurons were divided by several numbers")
    cost = sum(_entries(sliced, wider) for sliced in slices)
    lifted = replace(prunable, units=units, columns=slices[0].rows, slices=slices, cost=cost)
    if prunable.kind == "ffn":
        return lifted
    layout = prunable.layout
    head_dim = len(slices[0].rows[0]) // layout.query_heads
    config = layout.config
    if config is not None:
        fixed = {key: head_dim if key == "head_dim" else value for key, value in config.fixed.items()}
        config = replace(config, fixed=fixed)
    counted = {path: dict(attributes.get(path, {})) for path in layout.attributes}
    if any(counted[path].keys() != own.keys() for path, own in layout.attributes.items()):
        raise Unliftable("other attributes count heads")
    return replace(lifted, layout=replace(layout, head_dim=head_dim, config=config, attributes=counted))


def _lifted_slice(prunable: PrunableModule, sliced: PrunedSlice, narrow: Probe, wider: Probe) -> PrunedSlice:
    by = factor(narrow, wider, sliced.parameter, sliced.axis)
    if by == 1:
        return sliced
    if prunable.kind == "heads":
        return replace(sliced, rows=tuple(run_of(rows, by) for rows in sliced.rows))
    return replace(sliced, rows=tuple(tuple(row * by + n for row in rows) for rows in sliced.rows for n in range(by)))


def _entries(sliced: PrunedSlice, probe: Probe) -> int:
    """Entries of one unit."""
    others = (n for axis, n in enumerate(probe.shapes[sliced.parameter]) if axis != sliced.axis)
    return len(sliced.rows[0]) * prod(others)
