"""Collects the facts of a model that a pass may use (`model.facts`). Most of them are found by running it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from compressor.analysis.branch_calls import check_widths, find_branches
from compressor.analysis.prunable_units import Seen, find_prunable, look
from compressor.analysis.residual_stream import read_residual
from compressor.analysis.token_gates import find_token_gates
from compressor.model.facts import KINDS, ModelFacts, PrunableModule
from compressor.model.redefined_structure import class_misfit, config_misfit, misfit, parameter_shapes
from compressor.model.residual_records import Residual
from compressor.model.structure import Structure


def facts_of(structure: Structure, given: int) -> ModelFacts:
    """The facts of a model for its passes. A fact that needs a run of the model is found at its first use.

    given  number of parameters before any step
    """

    @cache
    def residual() -> Residual:
        return read_residual(structure)

    @cache
    def seen() -> Seen:
        return look(structure)

    @cache
    def prunable(kinds: tuple[str, ...] = KINDS) -> tuple[PrunableModule, ...]:
        return find_prunable(structure, kinds, seen())

    return ModelFacts(
        structure.architecture,
        structure.model.config.to_dict(),
        parameter_shapes(structure),
        dict(structure.bindings.tied),
        residual,
        given,
        lambda widths: _branches(structure, residual(), widths),
        structure.pieces.blocks_path,
        lambda redefinition: misfit(structure, redefinition),
        prunable,
        cache(lambda: find_token_gates(structure)),
        lambda changes: config_misfit(structure, changes),
        lambda changes: class_misfit(structure, changes),
    )


def _branches(structure: Structure, residual: Residual, widths: Sequence[Sequence[int]]) -> tuple[dict[str, Any], ...]:
    """The settings of a rotated_block for each block."""
    found = find_branches(structure, residual)
    check_widths(structure, residual, found, widths)
    return tuple(found[kind] for kind in structure.kinds)
