"""Carries prunable units that were found on a narrow probe model over to other widths (`lifting`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod

from compressor.analysis.lifting import Unliftable, factor, run_of
from compressor.model.facts import Cut, PrunableModule
from compressor.model.narrow_probe import Probe

Attributes = Mapping[str, Mapping[str, int]]  # module path -> attribute that counts heads -> number per unit


def lifted_site(site: PrunableModule, attributes: Attributes, narrow: Probe, wider: Probe) -> PrunableModule:
    """A prunable module of a narrow probe model as that of another one.

    A head stays one head of more values. A neuron stands for as many neurons as its axis was divided by.

    attributes  those of the other probe model
    raises      Unliftable
    """
    cuts = tuple(_lifted_cut(site, cut, narrow, wider) for cut in site.cuts)
    units = len(cuts[0].rows)
    if any(len(cut.rows) != units for cut in cuts):
        raise Unliftable("the axes of neurons were divided by several numbers")
    cost = sum(_entries(cut, wider) for cut in cuts)
    lifted = replace(site, units=units, columns=cuts[0].rows, cuts=cuts, cost=cost)
    if site.kind == "ffn":
        return lifted
    layout = site.layout
    head_dim = len(cuts[0].rows[0]) // layout.query_heads
    config = layout.config
    if config is not None:
        fixed = {key: head_dim if key == "head_dim" else value for key, value in config.fixed.items()}
        config = replace(config, fixed=fixed)
    counted = {path: dict(attributes.get(path, {})) for path in layout.attributes}
    if any(counted[path].keys() != own.keys() for path, own in layout.attributes.items()):
        raise Unliftable("other attributes count heads")
    return replace(lifted, layout=replace(layout, head_dim=head_dim, config=config, attributes=counted))


def _lifted_cut(site: PrunableModule, cut: Cut, narrow: Probe, wider: Probe) -> Cut:
    by = factor(narrow, wider, cut.parameter, cut.axis)
    if by == 1:
        return cut
    if site.kind == "heads":
        return replace(cut, rows=tuple(run_of(rows, by) for rows in cut.rows))
    return replace(cut, rows=tuple(tuple(row * by + n for row in rows) for rows in cut.rows for n in range(by)))


def _entries(cut: Cut, probe: Probe) -> int:
    """Entries of one unit."""
    others = (n for axis, n in enumerate(probe.shapes[cut.parameter]) if axis != cut.axis)
    return len(cut.rows[0]) * prod(others)
