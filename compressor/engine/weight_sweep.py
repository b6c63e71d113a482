"""Runs a sweep whose steps store weights: each part is changed, stored, read back, and run as it is stored."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from compressor.engine.block_io import PartSource, fill_part, free_all, part_entries, part_name
from compressor.engine.block_view import watched_parameters
from compressor.engine.calibration_batch import (
    CalibrationBatch,
    run_part,
)
from compressor.engine.decisions import decide
from compressor.engine.events import warning_event
from compressor.engine.line_facts import LineFacts, StepRecord
from compressor.engine.plan_records import Plan
from compressor.engine.sweeper import Sweeper
from compressor.engine.walk import Part, Written, part_event, part_formats, walk
from compressor.errors import Notice, PassError
from compressor.layers.base import Layer
from compressor.model.facts import Decision
from compressor.model.mapped_tensors import MappedTensors
from compressor.model.redefined_structure import split_parameter
from compressor.model.stored_weight import StoredWeight, relative_distance
from compressor.model.weight_names import read_matrix, read_parameter
from compressor.protocol import WeightPass
from compressor.recipe.recipe import Step
from compressor.storage.journal import Line
from compressor.storage.safetensors_file import write_file


@dataclass(frozen=True)
class StoringSweep:
    """A sweep whose steps store weights.

    plan       the plan that it follows
    before     the model that the earlier sweeps wrote
    batches    calibration batches, and the verification batch as the last one
    decisions  the choice of each step over the whole model
    """

    sweeper: Sweeper
    plan: Plan
    number: int
    steps: tuple[Step, ...]
    before: Written
    batches: list[CalibrationBatch]
    decisions: list[Decision | None]

    def line(self, part: int) -> Line | None:
        """The journal's line of a part, if the part is stored."""
        return self.sweeper.journal.done(f"{self.number}/{part}")

    def written(self, part: int) -> set[str]:
        """Dense parameters of a stored part whose values differ from the checkpoint's."""
        line = self.line(part)
        assert line is not None
        own = self.sweeper.structure.parameters_of(part)
        return {*LineFacts.of(line).written, *(name for name in self.before.written if name in own)}

    def source_before(self, part: int) -> PartSource:
        return self.before.source(self.sweeper.structure, part)

    def source(self, part: int) -> PartSource:
        """Where a part lies now: as this sweep stored it, or as it was before this sweep."""
        if (line := self.line(part)) is None:
            return self.source_before(part)
        return PartSource(self.sweeper.structure, self.sweeper.journal.path(line), dict(LineFacts.of(line).formats))


def run_weight_sweep(sweeper: Sweeper, plan: Plan, number: int, steps: tuple[Step, ...], before: Written) -> Written:
    """Let the steps store weights, part by part. Returns the model that was written."""
    structure = sweeper.structure
    sweeper.begin(number, steps)
    decisions = decide(sweeper, plan, number, steps, before)
    sweep = StoringSweep(sweeper, plan, number, steps, before, sweeper.batches(steps), decisions)
    stays = sweeper.recipe.model.placement == "resident"
    hold = sweeper.holder(sweep.source, keeps_blocks=stays, keeps_embeddings=stays)
    after = Written()

    def done(part: Part, seconds: float) -> None:
        sweeper.emit(part_event(structure, number, part, seconds))

    for part in walk(structure, sweep.batches, hold, done):
        if sweep.line(part.number) is None:
            _store_part(sweep, part)
            _read_back(part, sweep.source(part.number), sweeper.device, sweeper.mapped)
        stored = sweep.source(part.number)
        assert stored.file is not None
        after.files.append(stored.file)
        after.formats.update(stored.formats)
        after.written.update(sweep.written(part.number))
        _take_on(sweep, part)
    free_all(structure)
    return after


def _take_on(sweep: StoringSweep, part: Part) -> None:
    """Run the batches through the part as it is stored. raises PassError if the verification batch overflows"""
    batch = sweep.batches[-1]
    entered = batch.hidden
    part.advance()
    if part.is_block:
        _check_verification_batch(sweep, part, batch.hidden, entered)
    if part.is_output_head:
        sweep.sweeper.verification_output = part.output(batch)
        _check_verification_batch(sweep, part, sweep.sweeper.verification_output, entered)


def _check_verification_batch(sweep: StoringSweep, part: Part, output: Tensor, entered: Tensor) -> None:
    """Stop if the verification batch overflows, because the artifact must reproduce its outputs.

    output   output of the stored part for `entered`
    raises   PassError naming the part, and whether the model or its storing is the cause
    """
    if bool(torch.isfinite(output).all()):
        return
    structure = part.structure
    part.installed.remove()
    sweeper = sweep.sweeper
    fill_part(structure, part.number, sweep.source_before(part.number), sweeper.device, mapped=sweeper.mapped)
    before = run_part(structure, part.number, replace(sweep.batches[-1], hidden=entered, recorded=None))
    dtype = str(structure.dtype).removeprefix("torch.")
    if bool(torch.isfinite(before).all()):
        raise PassError(
            f"gives NaN or Inf for random tokens in {dtype} once its weights are stored, and not before",
            where=part_name(structure, part.number),
            hint="Set more bits for these weights, leave them out with `except`, or set model.dtype: float32.",
            data={"reason": "overflow-as-stored", "dtype": dtype},
        )
    raise PassError(
        f"the model itself gives NaN or Inf for random tokens in {dtype}",
        where=part_name(structure, part.number),
        hint="Set model.dtype: bfloat16 or float32 in the recipe.",
        data={"reason": "overflow-of-model", "dtype": dtype},
    )


def _read_back(part: Part, source: PartSource, device: torch.device, mapped: MappedTensors | None) -> None:
    """Load the part as it is stored. Paused batches start again unless it is bit-identical to what the passes left."""
    structure, installed = part.structure, part.installed
    waiting = [batch for batch in part.batches if batch.recorded is not None]
    compared = set(watched_parameters(structure, part.number)) if waiting else set()
    stands_in = bool(installed.originals)
    installed.remove()
    same = fill_part(structure, part.number, source, device, compared, mapped)
    installed.install_stored(source, device)
    if stands_in or not same:
        for batch in waiting:
            batch.recorded = None


@dataclass
class Changes:
    """What the steps of a sweep have changed in one part.

    put      weight name -> its format, and the layer that holds it
    errors   relative error of each stored weight after it is dequantized
    written  parameters that stay dense and have new values
    """

    records: list[StepRecord] = field(default_factory=list)
    warnings: list[Notice] = field(default_factory=list)
    put: dict[str, tuple[StoredWeight, Layer]] = field(default_factory=dict)
    errors: dict[str, float | None] = field(default_factory=dict)
    written: set[str] = field(default_factory=set)


def _store_part(sweep: StoringSweep, part: Part) -> None:
    """Let the steps change the loaded part, commit it, and report it."""
    changes = _run_steps(sweep, part)
    _commit(sweep, part.number, changes)
    for record in changes.records:
        name, seconds = record.weight.name, record.weight.seconds
        sweep.sweeper.emit({"event": "weight", "name": name, "pass": record.pass_name, "seconds": seconds})
    for warning in changes.warnings:
        sweep.sweeper.emit(warning_event(warning))


def _run_steps(sweep: StoringSweep, part: Part) -> Changes:
    """Let each step of the sweep change the loaded part."""
    sweeper, changes = sweep.sweeper, Changes()
    for position, (step, decision) in enumerate(zip(sweep.steps, sweep.decisions, strict=True)):
        seed = sweeper.seed_of(sweep.number, position, part.number)
        view = sweeper.view(sweep.plan, sweep.number, step, part, seed)
        view.decision = decision
        settings = step.settings
        assert isinstance(settings, WeightPass)
        work = (
            settings.embeddings if part.number == 0 else settings.output_head if part.is_output_head else settings.block
        )
        try:
            work(view)
        except torch.OutOfMemoryError as error:
            raise PassError(
                f"{step.name} ran out of memory",
                where=part_name(part.structure, part.number),
                hint="Set a smaller data.samples or data.length, then begin again with --fresh.",
                data={"reason": "memory", "pass": step.name},
            ) from error
        if left := view.left_out():
            raise PassError(
                f"{step.name} has neither stored this weight nor kept it dense",
                where=left[0],
                hint="Report this to the authors of the pass; until then leave the weight out with `except`.",
                data={"reason": "left-out", "pass": step.name, "weights": len(left)},
            )
        step_number = sweeper.recipe.steps.index(step)
        changes.records += [StepRecord(step_number, step.name, record) for record in view.records]
        changes.warnings += view.warnings
        changes.put.update(view.put_layers)
        changes.errors.update(view.errors)
        changes.written |= view.written
    return changes


def _commit(sweep: StoringSweep, part: int, changes: Changes) -> None:
    """Commit a part as the steps have left it."""
    structure, source = sweep.sweeper.structure, sweep.source_before(part)
    formats = part_formats(source, part) | {name: stored for name, (stored, _) in changes.put.items()}
    values: dict[str, Tensor] = {}
    for name in sorted(changes.written):
        values |= split_parameter(structure, name, structure.model.get_parameter(name).data)
    entries = list(part_entries(part, source, changes.put, {name: t.contiguous() for name, t in values.items()}))
    errors = changes.errors | _errors_of_rescaled(sweep, changes)
    written = _written_errors(sweep, changes)
    facts = LineFacts(formats, tuple(changes.records), tuple(changes.warnings), errors, written).to_json()
    file = f"s{sweep.number:02d}-{part:05d}.safetensors"
    sweep.sweeper.journal.commit(f"{sweep.number}/{part}", file, lambda path: write_file(path, entries), facts)


def _errors_of_rescaled(sweep: StoringSweep, changes: Changes) -> dict[str, float | None]:
    """Distance of each stored weight from the checkpoint's, for weights that got new values before they were stored.

    For other weights this is the distance from their values when they were stored, which is known already.
    """
    structure = sweep.sweeper.structure
    checkpoint, dtype = PartSource(structure), structure.dtype
    rescaled = changes.written | sweep.before.written
    errors: dict[str, float | None] = {}
    for name, (stored, layer) in changes.put.items():
        if stored.weight.parameter in rescaled:
            meant = read_matrix(stored.weight, structure.bindings, checkpoint.read, structure.model)
            errors[name] = relative_distance(layer.matrix(dtype), meant)
    return errors


def _written_errors(sweep: StoringSweep, changes: Changes) -> dict[str, float]:
    """Distance of each dense parameter with new values from the checkpoint's parameter."""
    structure = sweep.sweeper.structure
    stored = {
        stored_weight.weight.parameter
        for stored_weight, _ in changes.put.values()
        if stored_weight.weight.expert is None
    }
    checkpoint, model = PartSource(structure), structure.model
    return {
        name: relative_distance(
            model.get_parameter(name).data, read_parameter(name, structure.bindings, checkpoint.read, model)
        )
        for name in sorted(changes.written - stored)
    }
