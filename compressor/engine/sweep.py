"""The one loop: load a unit, let each step of the sweep transform it, store it, read it back, push activations on.

Only one block's weights are in memory (placement `stream`), or all of them (`resident`, the same loop without
freeing). What a later block sees is computed by the earlier blocks as they are stored, so a resumed run, which
recomputes activations through stored blocks, is bit-identical to an uninterrupted one.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._pytree import tree_flatten

from compressor.data.samples import Samples
from compressor.engine.block_io import (
    Installed,
    UnitSource,
    free_all,
    free_unit,
    load_unit,
    return_large_blocks,
    unit_name,
    unit_tensors,
)
from compressor.engine.block_view import (
    Needs,
    Stream,
    UnitSite,
    finish_unit,
    holds_containers,
    run_unit,
    watched_parameters,
)
from compressor.engine.choice_view import ShapingView
from compressor.engine.estimates import BATCH_TOKENS
from compressor.engine.plan import decided_plan
from compressor.engine.plan_records import Plan, Reshape
from compressor.engine.rewrite_sweep import Reshaper, run_reshape
from compressor.errors import Interrupted, PassError
from compressor.layers import find_layer
from compressor.layers.base import Layer
from compressor.model.block_runner import Batch, Call
from compressor.model.facts import Decision
from compressor.model.redefined_structure import regated
from compressor.model.stored_weight import StoredWeight
from compressor.model.structure import Structure
from compressor.model.tracing import example_batch
from compressor.recipe.recipe import Step
from compressor.storage.journal import Journal
from compressor.storage.safetensors_file import Entry, write_file

Emit = Callable[[dict[str, Any]], None]


@dataclass
class Sweeper:
    """What stays the same over a run, the model as it now is, and the lines of finished units."""

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


def unit_forms(source: UnitSource, unit: int) -> dict[str, StoredWeight]:
    """The forms that this unit holds, of all that the source knows."""
    names = source.names(unit) if source.forms else []
    return {name: form for name, form in source.forms.items() if any(t.startswith(name + ".") for t in names)}


def run_sweeps(sweeper: Sweeper) -> tuple[list[Path], dict[str, StoredWeight]]:
    """All sweeps of the recipe. Returns the last sweep's unit files and the forms they hold.

    raises Interrupted between units when asked to stop; PassError naming the unit when a pass fails
    """
    return_large_blocks()
    files: list[Path] = []
    before: list[Path] = []
    forms: dict[str, StoredWeight] = {}
    sweeps = sweeper.plan.recipe.sweeps
    for number, steps in enumerate(sweeps):
        settings = steps[0].settings
        if not settings.reshapes:
            _prepare(sweeper)
            files, forms = _run_sweep(sweeper, number, steps, before, forms)
            before = files
        elif settings.rewrites:
            files = _run_reshape(sweeper, number, steps[0])
        else:
            _regate(sweeper, number, steps[0], before, forms)
    if not files:  # nothing was written yet
        return _run_sweep(sweeper, len(sweeps), (), before, forms)
    if sweeps[-1][0].settings.reshapes:
        _run_probe(sweeper, before, forms)
    return files, forms


def _prepare(sweeper: Sweeper) -> None:
    """Let the model of now hold the forms that storing steps put into it."""
    for form in sorted({form.form for form in sweeper.plan.forms.values()}):
        find_layer(form).prepare(sweeper.structure.model)


def _begin_reshape(sweeper: Sweeper, number: int, step: Step, source: Callable[[int], UnitSource] | None) -> Reshape:
    """What the step makes of the model, after it has chosen where it has to."""
    structure = sweeper.structure
    sweeper.emit({"event": "sweep", "sweep": number, "units": structure.block_count + 2, "passes": [step.name]})
    if step.settings.decides:
        sweeper.plan = decided_plan(sweeper.plan, step, _choose(sweeper, number, step, source))
    return sweeper.plan.reshape_of(step)


def _run_reshape(sweeper: Sweeper, number: int, step: Step) -> list[Path]:
    """Let a step change the model itself; later sweeps start from what it made."""
    structure, reshape = sweeper.structure, _begin_reshape(sweeper, number, step, None)
    work = Reshaper(
        number,
        structure,
        reshape.after,
        reshape.facts,
        reshape.remodel,
        sweeper.journal,
        _batches(sweeper, (step,))[:-1],
        sweeper.device,
        lambda unit: _seed(sweeper.seed, number, 0, unit),
        sweeper.is_interrupted,
        sweeper.emit,
    )
    after, files = run_reshape(work, step, _embed)
    sweeper.structure, sweeper.needs = after, {}
    return files


def _regate(sweeper: Sweeper, number: int, step: Step, before: list[Path], forms: dict[str, StoredWeight]) -> None:
    """Let a step change what blocks do; weights stay where and as they are."""

    def source(unit: int) -> UnitSource:
        found = UnitSource(sweeper.structure, before[unit] if before else None, forms)
        return UnitSource(sweeper.structure, found.file, unit_forms(found, unit))

    reshape = _begin_reshape(sweeper, number, step, source)
    sweeper.structure, sweeper.needs = regated(sweeper.structure, reshape.remodel), {}
    if forms:
        _prepare(sweeper)


def _choose(sweeper: Sweeper, number: int, step: Step, source: Callable[[int], UnitSource] | None = None) -> Decision:
    """What a reshaping step chooses over the whole model, from the journal where it is there already."""
    reshape, structure = sweeper.plan.reshape_of(step), sweeper.structure

    def choose(warnings: list[dict[str, str]]) -> Decision:
        view = ShapingView(
            number,
            reshape.facts,
            structure,
            _batches(sweeper, (reshape.step,))[:-1],
            _labels(sweeper, reshape.step),
            sweeper.device,
            lambda unit: torch.Generator().manual_seed(_seed(sweeper.seed, number, 0, unit, -1)),
            sweeper.journal,
            _embed,
            sweeper.plan.recipe.model.placement == "resident",
            sweeper.is_interrupted,
            warnings,
            source,
        )
        try:
            return step.settings.choose(view)
        finally:
            view.close()

    decision = _decided(sweeper, number, 0, step, choose)
    assert decision is not None
    return decision


def _run_probe(sweeper: Sweeper, before: list[Path], forms: dict[str, StoredWeight]) -> None:
    """The probe through the model as it now is, unit by unit."""
    structure = sweeper.structure
    (stream,) = _batches(sweeper, ())
    for unit in range(structure.block_count + 2):
        source = UnitSource(structure, before[unit] if before else None, forms)
        installed = Installed(structure)
        load_unit(structure, unit, source, sweeper.device)
        installed.install_stored(UnitSource(structure, source.file, unit_forms(source, unit)), sweeper.device)
        if unit == 0:
            _embed(structure, [stream])
        elif unit <= structure.block_count:
            stream.hidden = run_unit(structure, unit, stream)
            installed.remove()
            free_unit(structure, unit)
        else:
            sweeper.probe = structure.pieces.head(stream.batch, stream.hidden)
            installed.remove()
    free_all(structure)


def probe_batch(structure: Structure, device: torch.device) -> Batch:
    """Fixed inputs whose logits the written artifact has to reproduce."""
    return example_batch(structure.model, device, samples=2, tokens=32)


def _run_sweep(
    sweeper: Sweeper, number: int, steps: tuple[Step, ...], before: list[Path], forms: dict[str, StoredWeight]
) -> tuple[list[Path], dict[str, StoredWeight]]:
    structure, journal = sweeper.structure, sweeper.journal
    units = structure.block_count + 2
    resident = sweeper.plan.recipe.model.placement == "resident"
    sweeper.emit({"event": "sweep", "sweep": number, "units": units, "passes": [step.name for step in steps]})
    after: dict[str, StoredWeight] = {}
    files: list[Path] = []
    decisions = _decide(sweeper, number, steps, before, forms)
    streams = _batches(sweeper, steps)
    for unit in range(units):
        began = time.perf_counter()
        if sweeper.is_interrupted():
            raise Interrupted("stopped between two units", hint="Continue with --resume.")
        source = UnitSource(structure, before[unit] if before else None, forms)
        key = f"{number}/{unit}"
        line = journal.done(key)
        installed = Installed(structure)
        if line is None:
            load_unit(structure, unit, source, sweeper.device)
            installed.install_stored(UnitSource(structure, source.file, unit_forms(source, unit)), sweeper.device)
            line = _transform(sweeper, number, unit, steps, source, streams, key, installed, decisions)
        files.append(journal.path(line))
        kept = {name: StoredWeight.from_dict(entry) for name, entry in line["forms"].items()}
        after.update(kept)
        _read_back(installed, unit, UnitSource(structure, files[-1], kept), sweeper.device, streams)
        entered = streams[-1].hidden
        if unit == 0:
            _embed(structure, streams)
        elif unit < units - 1:
            for stream in streams:
                stream.hidden = finish_unit(structure, unit, stream)
            installed.remove()
            _check_probe(sweeper, unit, source, streams[-1], streams[-1].hidden, entered)
            if not resident:
                free_unit(structure, unit)
        else:
            last = streams[-1]
            sweeper.probe = structure.pieces.head(last.batch, last.hidden)
            installed.remove()
            _check_probe(sweeper, unit, source, last, sweeper.probe, entered)
        sweeper.emit(
            {
                "event": "unit",
                "sweep": number,
                "unit": unit,
                "units": units,
                "name": unit_name(structure, unit),
                "seconds": time.perf_counter() - began,
            }
        )
    free_all(structure)
    return files, after


def _check_probe(
    sweeper: Sweeper, unit: int, source: UnitSource, stream: Stream, output: torch.Tensor, entered: torch.Tensor
) -> None:
    """Stop where the probe, of which the artifact has to give the outputs again, overflows.

    source   the unit as it was before this sweep, to tell whose fault it is
    output   what the unit as it is stored makes of `entered`
    raises   PassError naming the unit
    """
    if bool(torch.isfinite(output).all()):
        return
    structure = sweeper.structure
    load_unit(structure, unit, source, sweeper.device)
    before = run_unit(structure, unit, replace(stream, hidden=entered, tape=None))
    dtype = str(structure.dtype).removeprefix("torch.")
    if bool(torch.isfinite(before).all()):
        raise PassError(
            f"gives NaN or Inf for random tokens in {dtype} once its weights are stored, and not before",
            where=unit_name(structure, unit),
            hint="Use more bits or other settings for its weights, or leave them out with `except`.",
            data={"reason": "overflow-as-stored", "dtype": dtype},
        )
    raise PassError(
        f"the model itself gives NaN or Inf for random tokens in {dtype}",
        where=unit_name(structure, unit),
        hint="Set model.dtype: bfloat16 or float32 in the recipe.",
        data={"reason": "overflow-of-model", "dtype": dtype},
    )


def _read_back(
    installed: Installed, unit: int, source: UnitSource, device: torch.device, streams: list[Stream]
) -> None:
    """Load the unit as it is stored; batches that wait in it start anew if it isn't bit by bit what the passes left."""
    structure = installed.structure
    waiting = [stream for stream in streams if stream.tape is not None]
    left = watched_parameters(structure, unit) if waiting else {}
    stands_in = bool(installed.originals)
    installed.remove()
    load_unit(structure, unit, source, device)
    same = all(torch.equal(value, structure.model.get_parameter(name)) for name, value in left.items())
    installed.install_stored(source, device)
    if stands_in or not same:
        for stream in waiting:
            stream.tape = None


def _transform(
    sweeper: Sweeper,
    number: int,
    unit: int,
    steps: tuple[Step, ...],
    source: UnitSource,
    streams: list[Stream],
    key: str,
    installed: Installed,
    decisions: list[dict[str, Any] | None],
) -> dict[str, Any]:
    """Let the steps change the loaded unit, and commit it."""
    structure = sweeper.structure
    records: list[dict[str, Any]] = []
    warnings: list[dict[str, str]] = []
    put: dict[str, tuple[StoredWeight, Layer]] = {}
    errors: dict[str, float | None] = {}
    for position, step in enumerate(steps):
        site = _site(sweeper, step, unit, streams, installed, _seed(sweeper.seed, number, position, unit))
        site.decision = decisions[position]
        settings = step.settings
        work = settings.stem if unit == 0 else settings.head if unit == structure.block_count + 1 else settings.block
        try:
            work(site, {})
        except torch.OutOfMemoryError as error:
            raise PassError(
                f"{step.name} ran out of memory", where=unit_name(structure, unit), hint="Use smaller calibration data."
            ) from error
        step_number = sweeper.plan.recipe.steps.index(step)
        records += [{"step": step_number, "pass": step.name, **record} for record in site.records]
        warnings += site.warnings
        put.update(site.put_layers)
        errors.update(site.errors)
    forms = unit_forms(source, unit) | {name: form for name, (form, _) in put.items()}
    tensors = dict(unit_tensors(unit, source, put))
    entries = [Entry(name, t.dtype, tuple(t.shape), partial(_same, t)) for name, t in tensors.items()]
    facts = {
        "forms": {name: form.to_dict() for name, form in forms.items()},
        "records": records,
        "warnings": warnings,
        "relative_errors": errors,
    }
    journal = sweeper.journal
    journal.commit(key, f"s{number:02d}-{unit:05d}.safetensors", lambda path: write_file(path, entries), facts)
    for record in records:
        sweeper.emit({"event": "weight", **{k: record[k] for k in ("name", "pass", "seconds")}})
    for warning in warnings:
        sweeper.emit({"event": "warning", **warning})
    line = journal.done(key)
    assert line is not None
    return line


def _site(sweeper: Sweeper, step: Step, unit: int, streams: list[Stream], installed: Installed, seed: int) -> UnitSite:
    """The loaded unit as a step may see it; the last of the streams is the probe, which no pass sees."""
    return UnitSite(
        sweeper.structure,
        unit,
        frozenset(weight.name for weight in sweeper.plan.selected[step.path]),
        streams[:-1],
        sweeper.device,
        torch.Generator().manual_seed(seed),
        sweeper.needs,
        installed,
        selected_functions=sweeper.plan.functions_of(step, unit),
    )


def _decide(
    sweeper: Sweeper, number: int, steps: tuple[Step, ...], before: list[Path], forms: dict[str, StoredWeight]
) -> list[dict[str, Any] | None]:
    """What each step of the sweep chooses over the whole model, read from the journal where it is there already."""
    decisions: list[dict[str, Any] | None] = []
    for position, step in enumerate(steps):
        if not step.settings.decides:
            decisions.append(None)
            continue
        view = WholeModelView(sweeper, number, position, step, before, forms)
        decisions.append(_decided(sweeper, number, position, step, lambda _, at=view: at.step.settings.decide(at)))  # type: ignore[misc]
    return decisions


def _decided(
    sweeper: Sweeper,
    number: int,
    position: int,
    step: Step,
    decide: Callable[[list[dict[str, str]]], Decision | None],
) -> Decision | None:
    """The decision of a step: from the journal, or made now and committed with the warnings it adds to the list."""
    key, journal = f"{number}/decision/{position}", sweeper.journal
    if journal.done(key) is None:
        sweeper.emit({"event": "decide", "sweep": number, "pass": step.name})
        warnings: list[dict[str, str]] = []
        try:
            made = decide(warnings)
        except torch.OutOfMemoryError as error:
            raise PassError(f"{step.name} ran out of memory", hint="Use smaller calibration data.") from error
        free_all(sweeper.structure)
        text = json.dumps(made, sort_keys=True)
        facts = {"forms": {}, "records": [], "warnings": warnings, "decision": json.loads(text)}
        journal.commit(key, f"s{number:02d}-decision-{position:02d}.json", lambda path: _write_text(path, text), facts)
        for warning in warnings:
            sweeper.emit({"event": "warning", **warning})
    line = journal.done(key)
    assert line is not None
    found: Decision | None = line["decision"]
    return found


def _write_text(path: Path, text: str) -> None:
    path.write_text(text)


@dataclass
class WholeModelView:
    """The model as earlier sweeps left it (`protocol.WholeModel`)."""

    sweeper: Sweeper
    number: int
    position: int
    step: Step
    before: list[Path]
    forms: dict[str, StoredWeight]

    def sites(self) -> Iterator[UnitSite]:
        sweeper, structure = self.sweeper, self.sweeper.structure
        streams = _batches(sweeper, (self.step,))
        for unit in range(structure.block_count + 2):
            if sweeper.is_interrupted():
                raise Interrupted("stopped while deciding", hint="Continue with --resume.")
            source = UnitSource(structure, self.before[unit] if self.before else None, self.forms)
            installed = Installed(structure)
            load_unit(structure, unit, source, sweeper.device)
            installed.install_stored(UnitSource(structure, source.file, unit_forms(source, unit)), sweeper.device)
            seed = _seed(sweeper.seed, self.number, self.position, unit, -1)
            site = _site(sweeper, self.step, unit, streams, installed, seed)
            site.is_open = False
            yield site
            if unit == 0:
                _embed(structure, streams)
            elif unit <= structure.block_count:
                for stream in streams:
                    stream.hidden = finish_unit(structure, unit, stream)
            installed.remove()
            if 0 < unit <= structure.block_count:
                free_unit(structure, unit)


def _batches(sweeper: Sweeper, steps: tuple[Step, ...]) -> list[Stream]:
    """Calibration batches before the stem (none if no step reads inputs), and the probe as the last one."""
    structure, device = sweeper.structure, sweeper.device
    name = structure.model.main_input_name
    batches: list[Batch] = []
    for _, stacked in _stacked(sweeper, steps):
        value = stacked.to(structure.dtype) if stacked.is_floating_point() else stacked
        batches.append({name: value.to(device)})
    batches.append(probe_batch(structure, device))
    return [Stream(batch, torch.empty(0), []) for batch in batches]


def _labels(sweeper: Sweeper, step: Step) -> list[Tensor | None]:
    """Those of each calibration batch, where the data has them."""
    labels = None if sweeper.samples is None else sweeper.samples.labels
    batches = _stacked(sweeper, (step,))
    return [None if labels is None else labels[numbers].to(sweeper.device) for numbers, _ in batches]


def _stacked(sweeper: Sweeper, steps: tuple[Step, ...]) -> Iterator[tuple[list[int], Tensor]]:
    """(sample numbers, samples) of each calibration batch, if any of the steps reads inputs."""
    samples = sweeper.samples
    if samples is not None and any(step.settings.traits.reads != "weights" for step in steps):
        tokens = samples.inputs[0].numel() if samples.is_text else 256
        most = [step.settings.batch_samples for step in steps if step.settings.batch_samples is not None]
        yield from samples.batches(min([max(1, BATCH_TOKENS // tokens), *most]))


def _embed(structure: Structure, streams: list[Stream]) -> None:
    """Take every batch through the stem."""
    done: list[Stream] = []
    for stream in streams:
        hidden, calls = structure.pieces.stem(stream.batch)
        shared = next((s.calls for s in done if s.hidden.shape == hidden.shape and _equal(s.calls, calls)), calls)
        stream.hidden, stream.calls = hidden, shared
        done.append(stream)


def _equal(first: list[Call], second: list[Call]) -> bool:
    """Whether blocks would be called alike, so that one copy of masks and positions serves many batches.

    Never where blocks may put something into what they are called with: that is each batch's own.
    """
    if any(holds_containers(call) for calls in (first, second) for call in calls):
        return False
    flat = [tree_flatten([(call.args, call.kwargs) for call in calls])[0] for calls in (first, second)]
    if len(flat[0]) != len(flat[1]):
        return False
    for a, b in zip(*flat, strict=True):
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            if a.shape != b.shape or a.dtype != b.dtype or not torch.equal(a, b):
                return False
        elif a is not b and (type(a) is not type(b) or not isinstance(a, (int, float, str)) or a != b):
            return False
    return True


def save_probe(path: Path, structure: Structure, logits: Tensor, device: torch.device) -> None:
    batch = probe_batch(structure, device)
    save_file(
        {**{k: v.cpu().contiguous() for k, v in batch.items()}, "output": logits.float().cpu().contiguous()}, path
    )


def _seed(*parts: int) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1


def _same(tensor: Tensor) -> Tensor:
    return tensor
