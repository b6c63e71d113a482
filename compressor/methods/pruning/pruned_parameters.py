"""Computes the parameters of a pruned model part by part, and corrects output projections for the dense output.

`compressor.methods.pruning.pruned_shapes` describes what is removed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from compressor.lazy import torch
from compressor.methods.pruning.pruned_shapes import is_root, kept_channels, kept_slices, kept_units
from compressor.methods.pruning.reconstruction import Calibration, Repair, repair
from compressor.model.class_changes import SHAPES
from compressor.model.facts import PrunableModule, PruningDecision
from compressor.model.residual_records import Residual
from compressor.protocol import PartView


def narrowed(value: torch.Tensor, axes: Mapping[int, Sequence[int]]) -> torch.Tensor:
    """A parameter without its removed indices."""
    for axis, kept in axes.items():
        value = value.index_select(axis, torch.tensor(kept, device=value.device))
    return value


def prune(
    view: PartView,
    prunables: Sequence[PrunableModule],
    decision: PruningDecision,
    *,
    factors: Mapping[str, Sequence[float]] | None = None,
    ridge: float | None = None,
) -> dict[str, Repair]:
    """Write the narrower parameters of one part. A parameter that loses nothing is not changed.

    factors  name of a prunable module -> factor of each kept unit's signal, folded into the output projection
    ridge    solve pruned output projections again for the dense output (`reconstruction`); needs a redefinition that
             `follows`. None: their columns are only removed
    returns  name of a prunable module -> the result, where its output projection was solved
    """
    own = [s for s in prunables if s.block == view.index]
    channels = kept_channels(view, decision)
    residual = None if channels is None else view.residual
    shapes = view.redefinition.shapes
    values = {
        name: view.read(name)
        for name, shape in shapes.items()
        if shape is not None and part_of(name, view, residual) == view.index and not _is_new(name, own, decision)
    }
    kept = kept_slices({name: tuple(value.shape) for name, value in values.items()}, own, decision, residual)
    gains = {} if channels is None else _gains(view.residual, len(channels))
    is_stock = SHAPES not in view.redefinition.config
    repairs: dict[str, Repair] = {}
    inputs = _calibrations(view, [s for s in own if _is_repaired(s, decision)]) if ridge is not None else {}
    for number, s in enumerate(own if factors or ridge is not None else ()):
        view.progress(s.name, number / len(own))
        found = _new_projection(view, s, decision, (factors or {}).get(s.name), inputs.get(s.name), ridge)
        if found is not None:
            repairs |= {s.name: found.repair} if found.repair is not None else {}
            values |= found.values
            kept.setdefault(s.slices[0].parameter, {}).pop(s.slices[0].axis, None)  # it already has only these columns
    for name, value in values.items():
        value = narrowed(value, kept.get(name, {}))
        if name in gains:
            offset, factor = gains[name]
            value = (offset + value) * factor - offset
        if channels is not None and is_stock and view.index < 0:
            value = value * _embedding_factor(name, view.residual, len(channels))
        if shapes.get(name, ()) is not None:
            view.write(name, value)
    for s in own:
        if s.bias and (path := _left_bias(s, decision)) and f"{path}.bias" in shapes:
            bias = values[s.bias] if s.bias in values else view.read(s.bias)
            view.write(f"{path}.bias", narrowed(bias, kept.get(s.bias, {})))
    return repairs


@dataclass(frozen=True)
class _NewProjection:
    """The new matrix of an output projection (only its kept columns) and its bias, under their names."""

    values: dict[str, torch.Tensor]
    repair: Repair | None


def _is_repaired(s: PrunableModule, decision: PruningDecision) -> bool:
    """Whether an output projection loses columns, and has columns or a bias that can make up for them."""
    units = kept_units(s, decision)
    return len(units) < s.units and bool(units or s.bias)


def _calibrations(view: PartView, prunables: Sequence[PrunableModule]) -> dict[str, Calibration]:
    """Name of each prunable module -> the inputs of its output projection, from one run of the part."""
    batches = len(view.states())
    assert batches or not prunables, "the redefinition doesn't follow, so there are no inputs to solve for"
    found = {s.name: Calibration(batches) for s in prunables}
    for number, inputs in enumerate(view.inputs_of([s.output_projection for s in prunables]) if prunables else ()):
        for calibration, x in zip(found.values(), inputs, strict=True):
            calibration.add(x)
        view.progress("inputs of the output projections", (number + 1) / batches)
    return found


def _new_projection(
    view: PartView,
    s: PrunableModule,
    decision: PruningDecision,
    factors: Sequence[float] | None,
    inputs: Calibration | None,
    ridge: float | None,
) -> _NewProjection | None:
    """None for an output projection that doesn't change. inputs: of the projection, if it is solved again"""
    if factors is None and inputs is None:
        return None
    units = kept_units(s, decision)
    weight, axis = view.read(s.slices[0].parameter), s.slices[0].axis
    matrix = weight if axis == 1 else weight.t()
    columns = sorted(column for unit in units for column in s.columns[unit])
    plain = matrix[:, torch.tensor(columns, dtype=torch.int64, device=matrix.device)]
    if factors is not None:
        of = {column: factor for unit, factor in zip(units, factors, strict=True) for column in s.columns[unit]}
        plain = plain * torch.tensor([of[column] for column in columns], dtype=plain.dtype, device=plain.device)
    values: dict[str, torch.Tensor] = {}
    found = None
    if inputs is not None:
        assert ridge is not None
        found = repair(matrix, columns, plain, inputs, ridge, s.bias is not None)
        plain = found.weight
        if found.shift is not None and s.bias is not None:
            values[s.bias] = view.read(s.bias) + found.shift
    if columns:
        values[s.slices[0].parameter] = plain if axis == 1 else plain.t()
    return _NewProjection(values, found)


def _is_new(name: str, prunables: Sequence[PrunableModule], decision: PruningDecision) -> bool:
    """Whether a parameter is the bias of a `removed` layer."""
    return any(path is not None and name == f"{path}.bias" for path in (_left_bias(s, decision) for s in prunables))


def _left_bias(prunable: PrunableModule, decision: PruningDecision) -> str | None:
    """Path of the `removed` layer that keeps the bias of a removed sub-block."""
    if kept_units(prunable, decision):
        return None
    return next(entry.path for entry in prunable.layout.removal or () if entry.adds)


def part_of(name: str, view: PartView, residual: Residual | None) -> int | None:
    """Number of the part that stores a parameter, as in `PartView.index`; None: another block."""
    if name.startswith(view.path + "."):
        return view.index
    if residual is None or name.startswith(view.path.rpartition(".")[0] + "."):
        return None
    return -1 if any(write.parameter == name for write in residual.embeddings) else len(residual.blocks)


def _gains(residual: Residual, kept: int) -> dict[str, tuple[float, float]]:
    """Gain -> (offset, factor), for gains that a stream of the width `kept` changes."""
    if residual.kind == "layer":
        return {}
    factor = (residual.width / kept) ** 0.5
    return {
        f"{norm.module}.weight": (norm.formula.offset, factor) for norm in residual.norms() if norm.formula.has_weight
    }


def _embedding_factor(name: str, residual: Residual, kept: int) -> float:
    """The factor that keeps an embedding's scale if its class multiplies it by the square root of the width."""
    for write in residual.embeddings:
        if write.parameter == name and write.scale is not None and is_root(write.scale, residual.width):
            return (residual.width / kept) ** 0.5
    return 1.0
