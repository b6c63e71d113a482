"""The sweeps of a recipe: each lets its steps transform one part after the other, and stores what they made of it.

Only one block's weights are in memory (placement `stream`), or all of them (`resident`, the same walk without
freeing). What a later block sees is computed by the earlier blocks as they are stored, so a resumed run, which
recomputes activations through stored blocks, is bit-identical to an uninterrupted one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from compressor.data.samples import Samples
from compressor.engine.block_io import UnitSource, free_all, load_unit, return_large_blocks, unit_name, unit_tensors
from compressor.engine.block_view import BlockView, Needs, watched_parameters
from compressor.engine.calibration_batch import (
    CalibrationBatch,
    batch_labels,
    calibration_batches,
    probe_batch,
    run_unit,
)
from compressor.engine.choice_view import ShapingView, WholeModelView
from compressor.engine.events import Emit, warning_event
from compressor.engine.line_facts import DecisionFacts, LineFacts, StepRecord
from compressor.engine.plan import decided_plan
from compressor.engine.plan_records import Plan, Reshape
from compressor.engine.rewrite_sweep import Reshaper, run_reshape
from compressor.engine.walk import Holder, Part, Written, unit_event, unit_forms, walk
from compressor.errors import Notice, PassError
from compressor.layers import find_layer
from compressor.layers.base import Layer
from compressor.model.facts import Decision
from compressor.model.redefined_structure import regated
from compressor.model.stored_weight import StoredWeight
from compressor.model.structure import Structure
from compressor.recipe.recipe import Step
from compressor.storage.journal import Journal, Line
from compressor.storage.safetensors_file import Entry, write_file


@dataclass
class Sweeper:
    """What stays the same over a run, the model as it now is, and the lines of finished parts."""

    plan: Plan
    journal: Journal
    samples: Samples | None
    device: torch.device
    seed: int
    emit: Emit
    is_interrupted: Callable[[], bool]
    probe: Tensor | None = None
    needs: Needs = field(default_factory=dict)
    structure: Structure = field(init=False)

    def __post_init__(self) -> None:
        self.structure = self.plan.source

    def begin(self, number: int, steps: tuple[Step, ...]) -> None:
        """Tell of a sweep."""
        units, passes = self.structure.block_count + 2, [step.name for step in steps]
        self.emit({"event": "sweep", "sweep": number, "units": units, "passes": passes})

    def batches(self, steps: tuple[Step, ...]) -> list[CalibrationBatch]:
        """Calibration batches before the embeddings (none if no step reads inputs), and the probe as the last one."""
        found = calibration_batches(self.structure, self.device, self.samples, steps)
        return [*found, CalibrationBatch.before_embeddings(probe_batch(self.structure, self.device))]

    def holder(self, source: Callable[[int], UnitSource | None], **options: Any) -> Holder:
        return Holder(self.structure, self.device, source, self.is_interrupted, **options)

    def seed_of(self, *place: int) -> int:
        return _seed(self.seed, *place)


def run_sweeps(sweeper: Sweeper) -> tuple[list[Path], dict[str, StoredWeight]]:
    """All sweeps of the recipe. Returns the last sweep's part files and the forms they hold.

    raises Interrupted between parts when asked to stop; PassError naming the part when a pass fails
    """
    return_large_blocks()
    files: list[Path] = []
    stored = Written()  # by the last sweep that stored weights
    sweeps = sweeper.plan.recipe.sweeps
    for number, steps in enumerate(sweeps):
        settings = steps[0].settings
        if not settings.reshapes:
            _prepare(sweeper)
            stored = _run_sweep(sweeper, number, steps, stored)
            files = stored.files
        elif settings.rewrites:
            files = _run_reshape(sweeper, number, steps[0])
        else:
            _regate(sweeper, number, steps[0], stored)
    if not files:  # nothing was written yet
        stored = _run_sweep(sweeper, len(sweeps), (), stored)
        return stored.files, stored.forms
    if sweeps[-1][0].settings.reshapes:
        _run_probe(sweeper, stored)
    return files, stored.forms


def _prepare(sweeper: Sweeper) -> None:
    """Let the model of now hold the forms that storing steps put into it."""
    for form in sorted({form.form for form in sweeper.plan.forms.values()}):
        find_layer(form).prepare(sweeper.structure.model)


def _begin_reshape(sweeper: Sweeper, number: int, step: Step, before: Written) -> Reshape:
    """What the step makes of the model, after it has chosen where it has to."""
    sweeper.begin(number, (step,))
    if step.settings.decides:
        sweeper.plan = decided_plan(sweeper.plan, step, _choose(sweeper, number, step, before))
    return sweeper.plan.reshape_of(step)


def _run_reshape(sweeper: Sweeper, number: int, step: Step) -> list[Path]:
    """Let a step change the model itself; later sweeps start from what it made."""
    structure, reshape = sweeper.structure, _begin_reshape(sweeper, number, step, Written())
    work = Reshaper(
        number,
        structure,
        reshape.after,
        reshape.facts,
        reshape.remodel,
        sweeper.journal,
        calibration_batches(structure, sweeper.device, sweeper.samples, (step,)),
        sweeper.device,
        lambda unit: sweeper.seed_of(number, 0, unit),
        sweeper.is_interrupted,
        sweeper.emit,
    )
    after, files = run_reshape(work, step)
    sweeper.structure, sweeper.needs = after, {}
    return files


def _regate(sweeper: Sweeper, number: int, step: Step, before: Written) -> None:
    """Let a step change what blocks do; weights stay where and as they are."""
    reshape = _begin_reshape(sweeper, number, step, before)
    sweeper.structure, sweeper.needs = regated(sweeper.structure, reshape.remodel), {}
    if before.forms:
        _prepare(sweeper)


def _choose(sweeper: Sweeper, number: int, step: Step, before: Written) -> Decision:
    """What a reshaping step chooses over the whole model, from the journal where it is there already."""
    reshape, structure = sweeper.plan.reshape_of(step), sweeper.structure

    def choose(warnings: list[Notice]) -> Decision:
        view = ShapingView(
            number,
            reshape.facts,
            structure,
            calibration_batches(structure, sweeper.device, sweeper.samples, (step,)),
            batch_labels(sweeper.samples, sweeper.device, step),
            sweeper.device,
            lambda unit: torch.Generator().manual_seed(sweeper.seed_of(number, 0, unit, -1)),
            sweeper.journal,
            sweeper.plan.recipe.model.placement == "resident",
            sweeper.is_interrupted,
            warnings,
            partial(before.source, structure),
        )
        try:
            return step.settings.choose(view)
        finally:
            view.close()

    decision = _decided(sweeper, number, 0, step, choose)
    assert decision is not None
    return decision


def _run_probe(sweeper: Sweeper, stored: Written) -> None:
    """Take the probe through the model as it now is."""
    structure = sweeper.structure
    (probe,) = sweeper.batches(())
    for part in walk(structure, [probe], sweeper.holder(partial(stored.source, structure))):
        if part.is_head:
            sweeper.probe = part.output(probe)
    free_all(structure)


@dataclass(frozen=True)
class StoringSweep:
    """A sweep whose steps store weights.

    before     the model as the sweeps before it wrote it
    batches    calibration batches, and the probe as the last one
    decisions  what each step has chosen over the whole model
    """

    sweeper: Sweeper
    number: int
    steps: tuple[Step, ...]
    before: Written
    batches: list[CalibrationBatch]
    decisions: list[Decision | None]

    def line(self, unit: int) -> Line | None:
        """The journal's line of a part that is stored."""
        return self.sweeper.journal.done(f"{self.number}/{unit}")

    def source_before(self, unit: int) -> UnitSource:
        return self.before.source(self.sweeper.structure, unit)

    def source(self, unit: int) -> UnitSource:
        """Where a part lies now: as it is stored, or as it was before this sweep has come to it."""
        if (line := self.line(unit)) is None:
            return self.source_before(unit)
        return UnitSource(self.sweeper.structure, self.sweeper.journal.path(line), dict(LineFacts.of(line).forms))


def _run_sweep(sweeper: Sweeper, number: int, steps: tuple[Step, ...], before: Written) -> Written:
    """Let the steps store weights, part by part. Returns the model as it is then written."""
    structure = sweeper.structure
    sweeper.begin(number, steps)
    decisions = _decide(sweeper, number, steps, before)
    sweep = StoringSweep(sweeper, number, steps, before, sweeper.batches(steps), decisions)
    hold = sweeper.holder(sweep.source, keeps_blocks=sweeper.plan.recipe.model.placement == "resident")
    after = Written()

    def done(part: Part, seconds: float) -> None:
        sweeper.emit(unit_event(structure, number, part, seconds))

    for part in walk(structure, sweep.batches, hold, done):
        if sweep.line(part.unit) is None:
            _store_part(sweep, part)
            _read_back(part, sweep.source(part.unit), sweeper.device)
        stored = sweep.source(part.unit)
        assert stored.file is not None
        after.files.append(stored.file)
        after.forms.update(stored.forms)
        _take_on(sweep, part)
    free_all(structure)
    return after


def _take_on(sweep: StoringSweep, part: Part) -> None:
    """Take the batches on through the part as it is stored. raises PassError where the probe overflows"""
    probe = sweep.batches[-1]
    entered = probe.hidden
    part.advance()
    if part.is_block:
        _check_probe(sweep, part, probe.hidden, entered)
    if part.is_head:
        sweep.sweeper.probe = part.output(probe)
        _check_probe(sweep, part, sweep.sweeper.probe, entered)


def _check_probe(sweep: StoringSweep, part: Part, output: Tensor, entered: Tensor) -> None:
    """Stop where the probe, of which the artifact has to give the outputs again, overflows.

    output   what the part as it is stored makes of `entered`
    raises   PassError naming the part, and whose fault it is
    """
    if bool(torch.isfinite(output).all()):
        return
    structure = part.structure
    part.installed.remove()
    load_unit(structure, part.unit, sweep.source_before(part.unit), sweep.sweeper.device)
    before = run_unit(structure, part.unit, replace(sweep.batches[-1], hidden=entered, tape=None))
    dtype = str(structure.dtype).removeprefix("torch.")
    if bool(torch.isfinite(before).all()):
        raise PassError(
            f"gives NaN or Inf for random tokens in {dtype} once its weights are stored, and not before",
            where=unit_name(structure, part.unit),
            hint="Use more bits or other settings for its weights, or leave them out with `except`.",
            data={"reason": "overflow-as-stored", "dtype": dtype},
        )
    raise PassError(
        f"the model itself gives NaN or Inf for random tokens in {dtype}",
        where=unit_name(structure, part.unit),
        hint="Set model.dtype: bfloat16 or float32 in the recipe.",
        data={"reason": "overflow-of-model", "dtype": dtype},
    )


def _read_back(part: Part, source: UnitSource, device: torch.device) -> None:
    """Load the part as it is stored; batches that wait in it start anew if it isn't bit by bit what the passes left."""
    structure, installed = part.structure, part.installed
    waiting = [batch for batch in part.batches if batch.tape is not None]
    left = watched_parameters(structure, part.unit) if waiting else {}
    stands_in = bool(installed.originals)
    installed.remove()
    load_unit(structure, part.unit, source, device)
    same = all(torch.equal(value, structure.model.get_parameter(name)) for name, value in left.items())
    installed.install_stored(source, device)
    if stands_in or not same:
        for batch in waiting:
            batch.tape = None


@dataclass
class Changes:
    """What the steps of a sweep have made of one part.

    put     weight name -> its format, and the layer that holds it
    errors  relative, of each stored weight as it is rebuilt
    """

    records: list[StepRecord] = field(default_factory=list)
    warnings: list[Notice] = field(default_factory=list)
    put: dict[str, tuple[StoredWeight, Layer]] = field(default_factory=dict)
    errors: dict[str, float | None] = field(default_factory=dict)


def _store_part(sweep: StoringSweep, part: Part) -> None:
    """Let the steps change the loaded part, commit it, and tell of it."""
    changes = _run_steps(sweep, part)
    _commit(sweep, part.unit, changes)
    for record in changes.records:
        name, seconds = record.weight.name, record.weight.seconds
        sweep.sweeper.emit({"event": "weight", "name": name, "pass": record.pass_name, "seconds": seconds})
    for warning in changes.warnings:
        sweep.sweeper.emit(warning_event(warning))


def _run_steps(sweep: StoringSweep, part: Part) -> Changes:
    """Let each step of the sweep change the loaded part."""
    sweeper, changes = sweep.sweeper, Changes()
    for position, (step, decision) in enumerate(zip(sweep.steps, sweep.decisions, strict=True)):
        view = _view(sweeper, step, part, sweeper.seed_of(sweep.number, position, part.unit))
        view.decision = decision
        settings = step.settings
        work = settings.stem if part.unit == 0 else settings.head if part.is_head else settings.block
        try:
            work(view, {})
        except torch.OutOfMemoryError as error:
            raise PassError(
                f"{step.name} ran out of memory",
                where=unit_name(part.structure, part.unit),
                hint="Use smaller calibration data.",
            ) from error
        step_number = sweeper.plan.recipe.steps.index(step)
        changes.records += [StepRecord(step_number, step.name, record) for record in view.records]
        changes.warnings += view.warnings
        changes.put.update(view.put_layers)
        changes.errors.update(view.errors)
    return changes


def _commit(sweep: StoringSweep, unit: int, changes: Changes) -> None:
    """Make a part durable as the steps have left it."""
    source = sweep.source_before(unit)
    forms = unit_forms(source, unit) | {name: form for name, (form, _) in changes.put.items()}
    tensors = dict(unit_tensors(unit, source, changes.put))
    entries = [Entry(name, t.dtype, tuple(t.shape), partial(_same, t)) for name, t in tensors.items()]
    facts = LineFacts(forms, tuple(changes.records), tuple(changes.warnings), changes.errors).to_json()
    file = f"s{sweep.number:02d}-{unit:05d}.safetensors"
    sweep.sweeper.journal.commit(f"{sweep.number}/{unit}", file, lambda path: write_file(path, entries), facts)


def _view(sweeper: Sweeper, step: Step, part: Part, seed: int) -> BlockView:
    """The loaded part as a step may see it; the last of the batches is the probe, which no pass sees."""
    return BlockView(
        part.structure,
        part.unit,
        frozenset(weight.name for weight in sweeper.plan.selected[step.path]),
        part.batches[:-1],
        sweeper.device,
        torch.Generator().manual_seed(seed),
        sweeper.needs,
        part.installed,
        selected_functions=sweeper.plan.functions_of(step, part.unit),
    )


def _decide(sweeper: Sweeper, number: int, steps: tuple[Step, ...], before: Written) -> list[Decision | None]:
    """What each step of the sweep chooses over the whole model, read from the journal where it is there already."""
    decisions: list[Decision | None] = []
    for position, step in enumerate(steps):
        if not step.settings.decides:
            decisions.append(None)
            continue
        view = _whole_model(sweeper, number, position, step, before)
        decisions.append(_decided(sweeper, number, position, step, partial(_decide_on, step, view)))
    return decisions


def _decide_on(step: Step, view: WholeModelView, warnings: list[Notice]) -> Decision | None:
    """What a storing step chooses; it has no warnings to add."""
    return step.settings.decide(view)


def _whole_model(sweeper: Sweeper, number: int, position: int, step: Step, before: Written) -> WholeModelView:
    """The model as earlier sweeps left it, as a step may see it before its own."""
    structure = sweeper.structure
    hold = sweeper.holder(partial(before.source, structure), stopped="stopped while deciding")

    def begin() -> Iterator[Part]:
        return walk(structure, sweeper.batches((step,)), hold)

    def view(part: Part) -> BlockView:
        return _view(sweeper, step, part, sweeper.seed_of(number, position, part.unit, -1))

    return WholeModelView(begin, view)


def _decided(
    sweeper: Sweeper,
    number: int,
    position: int,
    step: Step,
    decide: Callable[[list[Notice]], Decision | None],
) -> Decision | None:
    """The decision of a step: from the journal, or made now and committed with the warnings it adds to the list."""
    key, journal = f"{number}/decision/{position}", sweeper.journal
    if journal.done(key) is None:
        sweeper.emit({"event": "decide", "sweep": number, "pass": step.name})
        warnings: list[Notice] = []
        try:
            made = decide(warnings)
        except torch.OutOfMemoryError as error:
            raise PassError(f"{step.name} ran out of memory", hint="Use smaller calibration data.") from error
        free_all(sweeper.structure)
        text = json.dumps(made, sort_keys=True)
        facts = DecisionFacts(json.loads(text), tuple(warnings)).to_json()
        journal.commit(key, f"s{number:02d}-decision-{position:02d}.json", lambda path: _write_text(path, text), facts)
        for warning in warnings:
            sweeper.emit(warning_event(warning))
    line = journal.done(key)
    assert line is not None
    return DecisionFacts.of(line).decision


def _write_text(path: Path, text: str) -> None:
    path.write_text(text)


def save_probe(path: Path, structure: Structure, logits: Tensor, device: torch.device) -> None:
    batch = probe_batch(structure, device)
    save_file(
        {**{k: v.cpu().contiguous() for k, v in batch.items()}, "output": logits.float().cpu().contiguous()}, path
    )


def _seed(*parts: int) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1


def _same(tensor: Tensor) -> Tensor:
    return tensor
