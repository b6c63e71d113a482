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
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._pytree import tree_flatten

from compressor.data import Samples
from compressor.errors import Interrupted, PassError
from compressor.journal import Journal
from compressor.layers.base import Layer
from compressor.plan import BATCH_TOKENS, TAPE_SHARE, Plan
from compressor.protocol import Group, Stage, State, Weight
from compressor.recipe import Step
from compressor.replay import Batch, Call, LinearCall, Stop
from compressor.safetensors_file import Entry, write_file
from compressor.structure import Structure, example_batch, signature
from compressor.tape import Diverged, Tape, advance, needs, run_on
from compressor.units import (
    Form,
    Installed,
    UnitSource,
    free_all,
    free_unit,
    load_unit,
    return_large_blocks,
    unit_tensors,
    view,
)

Emit = Callable[[dict[str, Any]], None]
# kind of block, product and batch -> what is called before that product, and which results are read after it
Needs = dict[tuple[Any, ...], tuple[list[Any], frozenset[tuple[int, int]]]]


@dataclass
class Stream:
    """One batch on its way through the model: hidden states, what each block is called with beside them, and the tape
    of the block it waits in, if it does.
    """

    batch: Batch
    hidden: Tensor
    calls: list[Call]
    tape: Tape | None = None

    @property
    def kept_bytes(self) -> int:
        return 0 if self.tape is None else self.tape.nbytes


@dataclass
class Sweeper:
    """What stays the same over a run, and the lines of finished units."""

    plan: Plan
    journal: Journal
    samples: Samples | None
    device: torch.device
    seed: int
    emit: Emit
    is_interrupted: Callable[[], bool]
    probe: Tensor | None = None
    needs: Needs = field(default_factory=dict)

    @property
    def structure(self) -> Structure:
        return self.plan.structure


@dataclass
class UnitSite:
    """A unit as a pass may see it (`protocol.Site`)."""

    structure: Structure
    unit: int
    selected: frozenset[str]
    streams: list[Stream]
    device: torch.device
    generator: torch.Generator
    needs: Needs
    installed: Installed
    decision: dict[str, Any] | None = None
    is_open: bool = True
    put_layers: dict[str, tuple[Form, Layer]] = field(default_factory=dict)
    records: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[dict[str, str]] = field(default_factory=list)
    began: float = field(default_factory=time.perf_counter)

    @property
    def index(self) -> int:
        return self.unit - 1

    @property
    def dtype(self) -> torch.dtype:
        return self.structure.dtype

    def stages(self, sequential: bool = True) -> list[Stage]:
        stages = []
        for stage in self.structure.stages(self.unit):
            groups = (Group(tuple(w for w in group if w.name in self.selected)) for group in stage)
            if kept := tuple(group for group in groups if group.weights):
                stages.append(kept)
        if sequential or not stages:
            return stages
        return [tuple(group for stage in stages for group in stage)]

    def fold(
        self, stage: Stage, start: Callable[[Group], State], step: Callable[[State, Tensor], State]
    ) -> list[State]:
        states = [start(group) for group in stage]
        for numbered in self._inputs(stage):
            states[numbered[0]] = step(states[numbered[0]], numbered[1])
        return states

    def inputs(self, group: Group) -> Iterator[Tensor]:
        for _, x in self._inputs((group,)):
            yield x

    def matrix(self, weight: Weight) -> Tensor:
        return view(self.structure, weight).to(torch.float32, copy=True).contiguous()

    def bias(self, weight: Weight) -> Tensor | None:
        if weight.bias is None:
            return None
        parameter = self.structure.bindings.parameter_of()[weight.bias]
        return self.structure.model.get_parameter(parameter).data

    def put(self, weight: Weight, layer: Layer, **record: Any) -> None:
        assert self.is_open, "nothing can be put while a pass decides"
        form = Form(layer.form, layer.spec(), weight)
        self._untie(weight)
        for stream in self.streams:  # whoever has multiplied by the weight has to do it again
            if stream.tape is not None and weight.parameter in stream.tape.passed:
                stream.tape = None
        target = view(self.structure, weight)
        target.copy_(layer.matrix(self.dtype).to(target.device))
        if not layer.weight_only:
            self.installed.install(weight, layer.to(target.device))
        self.put_layers[weight.name] = (form, layer)
        now = time.perf_counter()
        self.records.append(
            {
                "name": weight.name,
                "unit": self.unit,
                "form": layer.form,
                "spec": layer.spec(),
                "shape": list(weight.shape),
                "role": weight.role,
                "bytes_after": sum(tensor.nbytes for tensor in layer.tensors().values()),
                "seconds": now - self.began,
                **record,
            }
        )
        self.began = now

    def warn(self, code: str, where: str, message: str) -> None:
        self.warnings.append({"code": code, "where": where, "message": message})

    def _untie(self, weight: Weight) -> None:
        """A tied head that is changed gets storage of its own."""
        source = self.structure.bindings.tied.get(weight.parameter)
        if source is not None:
            owner, _, leaf = weight.parameter.rpartition(".")
            module = self.structure.model.get_submodule(owner)
            if module._parameters[leaf] is self.structure.model.get_parameter(source):
                module._parameters[leaf] = torch.nn.Parameter(
                    self.structure.model.get_parameter(source).data.clone(), requires_grad=False
                )

    def _inputs(self, stage: Stage) -> Iterator[tuple[int, Tensor]]:
        """(group number, (tokens, in) input) for each batch, in order; of tables in the stem, (tokens,) row numbers.

        Each batch goes on to the stage's first product and waits there, as far as TAPE_SHARE lets them keep what that
        takes; the others look ahead from where they are, or start again.
        """
        if self.unit == 0:
            yield from self._row_numbers(stage)
            return
        numbers = {(group.weights[0].parameter, group.expert): number for number, group in enumerate(stage)}
        watched = watched_parameters(self.structure, self.unit)

        def number_of(call: LinearCall) -> int | None:
            expert = call.row_offset // call.elements if watched[call.parameter].dim() == 3 else None
            return numbers.get((call.parameter, expert))

        wanted = {name for name, _ in numbers}
        limit = TAPE_SHARE * sum(stream.hidden.nbytes for stream in self.streams)
        kept = sum(stream.kept_bytes for stream in self.streams)
        here = 0  # what one batch keeps at this stage
        for stream in self.streams:
            before = stream.kept_bytes
            waits = stream.tape is not None and not stream.tape.passed & wanted
            if waits and kept - before + here > limit:  # no room to move on: look ahead from where it waits
                yield from self._ahead(stream, watched, number_of, stage)
            else:
                first = self._halt(stream, watched, lambda call: number_of(call) is not None, wanted)
                if first is not None:
                    self._forget_unread(stream, first.parameter)
                here = stream.kept_bytes
                if first is None:  # no token of this batch was routed to these experts
                    pass
                elif len(stage) == 1:
                    yield 0, first.input.reshape(-1, first.input.shape[-1])
                else:
                    yield from self._ahead(stream, watched, number_of, stage)
            if kept - before + stream.kept_bytes > limit:
                stream.tape = None
            kept += stream.kept_bytes - before

    def _row_numbers(self, stage: Stage) -> Iterator[tuple[int, Tensor]]:
        """(group number, row numbers (tokens,)) that the stem looks up, for each batch."""
        found: dict[int, Tensor] = {}
        handles = []
        for number, group in enumerate(stage):
            module = self.structure.model.get_submodule(group.weights[0].parameter.removesuffix(".weight"))

            def note(_module: Any, args: tuple[Any, ...], number: int = number) -> None:
                found[number] = args[0].reshape(-1)

            handles.append(module.register_forward_pre_hook(note))
        try:
            for stream in self.streams:
                found.clear()
                self.structure.pieces.stem(stream.batch)
                yield from found.items()
        finally:
            for handle in handles:
                handle.remove()

    def _forget_unread(self, stream: Stream, parameter: str) -> None:
        """Keep only what the rest of the block reads: found on the first batch of a kind, for all blocks alike."""
        tape = stream.tape
        assert tape is not None
        if not 1 <= self.unit <= self.structure.block_count:
            return
        block = self.structure.pieces.blocks[self.unit - 1]
        relative = parameter.removeprefix(f"{self.structure.pieces.blocks_path}.{self.unit - 1}.")
        kind = (signature(self.structure.model.config, block, self.unit - 1), relative, tuple(stream.hidden.shape))
        if kind not in self.needs:
            calls = tape.calls
            try:
                self.needs[kind] = (calls, needs(tape, partial(run_unit, self.structure, self.unit, stream)))
            except Diverged:
                self.needs[kind] = ([], frozenset())
                tape.is_spent = True
        calls, leaves = self.needs[kind]
        if tape.is_spent:
            stream.tape = None
        elif calls == tape.calls:
            tape.keep_only(leaves)

    def _halt(
        self, stream: Stream, watched: dict[str, Tensor], halts: Callable[[LinearCall], bool], wanted: set[str]
    ) -> LinearCall | None:
        """Take the batch to the first product of the stage, from where it waits if that lies before it."""
        work = partial(run_unit, self.structure, self.unit, stream)
        if stream.tape is not None and not stream.tape.passed & wanted:
            try:
                return advance(stream.tape, watched, work, halts)
            except Diverged:
                pass  # some forwards can't be taped; from the start it goes always
        stream.tape = Tape()
        first = advance(stream.tape, watched, work, halts)
        if first is None:
            stream.tape = None
        return first

    def _ahead(
        self,
        stream: Stream,
        watched: dict[str, Tensor],
        number_of: Callable[[LinearCall], int | None],
        stage: Stage,
    ) -> Iterator[tuple[int, Tensor]]:
        """Inputs of the stage's groups, seen by running on past the halt; the batch stays where it waits."""
        caught: dict[int, Tensor] = {}
        all_come = all(group.expert is None for group in stage)

        def visit(call: LinearCall) -> None:
            number = number_of(call)
            if number is not None and number not in caught:
                caught[number] = call.input.reshape(-1, call.input.shape[-1])
            if all_come and len(caught) == len(stage):
                raise Stop

        work = partial(run_unit, self.structure, self.unit, stream)
        stream.tape = stream.tape or Tape()
        try:
            run_on(stream.tape, watched, work, visit)
        except Diverged:
            caught.clear()
            stream.tape = Tape()
            run_on(stream.tape, watched, work, visit)
        if stream.tape.is_spent:
            stream.tape = None
        yield from caught.items()


def watched_parameters(structure: Structure, unit: int) -> dict[str, Tensor]:
    """Parameters of a unit that multiply something, by name; without those that a layer stands in for."""
    names = {weight.parameter for stage in structure.stages(unit) for group in stage for weight in group}
    held = dict(structure.model.named_parameters(remove_duplicate=False))
    return {name: held[name] for name in sorted(names) if name in held}


def run_unit(structure: Structure, unit: int, stream: Stream) -> Tensor:
    """What a block makes of the batch's hidden states, or the head of them."""
    if unit == structure.block_count + 1:
        return structure.pieces.head(stream.batch, stream.hidden)
    return structure.pieces.block(unit - 1, stream.hidden, stream.calls[unit - 1])


def unit_forms(source: UnitSource, unit: int) -> dict[str, Form]:
    """The forms that this unit holds, of all that the source knows."""
    names = source.names(unit) if source.forms else []
    return {name: form for name, form in source.forms.items() if any(t.startswith(name + ".") for t in names)}


def finish_unit(structure: Structure, unit: int, stream: Stream) -> Tensor:
    """The same, from where the batch waits; its tape is used up."""
    tape, stream.tape = stream.tape, None
    if tape is None:
        return run_unit(structure, unit, stream)
    try:
        return run_on(tape, {}, partial(run_unit, structure, unit, stream), lambda call: None)
    except Diverged:
        return run_unit(structure, unit, stream)


def run_sweeps(sweeper: Sweeper) -> tuple[list[Path], dict[str, Form]]:
    """All sweeps of the recipe. Returns the last sweep's unit files and the forms they hold.

    raises Interrupted between units when asked to stop; PassError naming the unit when a pass fails
    """
    return_large_blocks()
    files: list[Path] = []
    forms: dict[str, Form] = {}
    for number, steps in enumerate(sweeper.plan.recipe.sweeps):
        files, forms = _run_sweep(sweeper, number, steps, files, forms)
    return files, forms


def probe_batch(structure: Structure, device: torch.device) -> Batch:
    """Fixed inputs whose logits the written artifact has to reproduce."""
    return example_batch(structure.model, device, samples=2, tokens=32)


def _run_sweep(
    sweeper: Sweeper, number: int, steps: tuple[Step, ...], before: list[Path], forms: dict[str, Form]
) -> tuple[list[Path], dict[str, Form]]:
    structure, journal = sweeper.structure, sweeper.journal
    units = structure.block_count + 2
    resident = sweeper.plan.recipe.model.placement == "resident"
    sweeper.emit({"event": "sweep", "sweep": number, "units": units, "passes": [step.name for step in steps]})
    after: dict[str, Form] = {}
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
        kept = {name: Form.from_dict(entry) for name, entry in line["forms"].items()}
        after.update(kept)
        _read_back(installed, unit, UnitSource(structure, files[-1], kept), sweeper.device, streams)
        if unit == 0:
            _embed(structure, streams)
        elif unit < units - 1:
            for stream in streams:
                stream.hidden = finish_unit(structure, unit, stream)
            installed.remove()
            if not resident:
                free_unit(structure, unit)
        else:
            last = streams[-1]
            sweeper.probe = structure.pieces.head(last.batch, last.hidden)
            installed.remove()
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
    put: dict[str, tuple[Form, Layer]] = {}
    for position, step in enumerate(steps):
        selected = frozenset(weight.name for weight in sweeper.plan.selected[step.path])
        generator = torch.Generator().manual_seed(_seed(sweeper.seed, number, position, unit))
        site = UnitSite(
            structure,
            unit,
            selected,
            streams[:-1],
            sweeper.device,
            generator,
            sweeper.needs,
            installed,
            decisions[position],
        )
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
    forms = unit_forms(source, unit) | {name: form for name, (form, _) in put.items()}
    tensors = dict(unit_tensors(unit, source, put))
    entries = [Entry(name, t.dtype, tuple(t.shape), partial(_same, t)) for name, t in tensors.items()]
    facts = {
        "forms": {name: form.to_dict() for name, form in forms.items()},
        "records": records,
        "warnings": warnings,
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


def _decide(
    sweeper: Sweeper, number: int, steps: tuple[Step, ...], before: list[Path], forms: dict[str, Form]
) -> list[dict[str, Any] | None]:
    """What each step of the sweep chooses over the whole model, read from the journal where it is there already."""
    decisions: list[dict[str, Any] | None] = []
    for position, step in enumerate(steps):
        if not step.settings.decides:
            decisions.append(None)
            continue
        key = f"{number}/decision/{position}"
        line = sweeper.journal.done(key)
        if line is None:
            sweeper.emit({"event": "decide", "sweep": number, "pass": step.name})
            made = step.settings.decide(WholeModelView(sweeper, number, position, step, before, forms))
            free_all(sweeper.structure)
            text = json.dumps(made, sort_keys=True)
            name = f"s{number:02d}-decision-{position:02d}.json"
            facts = {"forms": {}, "records": [], "warnings": [], "decision": json.loads(text)}
            sweeper.journal.commit(key, name, lambda path, text=text: path.write_text(text), facts)  # type: ignore[misc]
            line = sweeper.journal.done(key)
            assert line is not None
        decisions.append(line["decision"])
    return decisions


@dataclass
class WholeModelView:
    """The model as earlier sweeps left it (`protocol.WholeModel`)."""

    sweeper: Sweeper
    number: int
    position: int
    step: Step
    before: list[Path]
    forms: dict[str, Form]

    def sites(self) -> Iterator[UnitSite]:
        sweeper, structure = self.sweeper, self.sweeper.structure
        selected = frozenset(weight.name for weight in sweeper.plan.selected[self.step.path])
        streams = _batches(sweeper, (self.step,))
        for unit in range(structure.block_count + 2):
            if sweeper.is_interrupted():
                raise Interrupted("stopped while deciding", hint="Continue with --resume.")
            source = UnitSource(structure, self.before[unit] if self.before else None, self.forms)
            installed = Installed(structure)
            load_unit(structure, unit, source, sweeper.device)
            installed.install_stored(UnitSource(structure, source.file, unit_forms(source, unit)), sweeper.device)
            generator = torch.Generator().manual_seed(_seed(sweeper.seed, self.number, self.position, unit, -1))
            site = UnitSite(
                structure, unit, selected, streams[:-1], sweeper.device, generator, sweeper.needs, installed
            )
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
    if sweeper.samples is not None and any(step.settings.traits.reads != "weights" for step in steps):
        tokens = sweeper.samples.inputs[0].numel() if sweeper.samples.is_text else 256
        for _, stacked in sweeper.samples.batches(max(1, BATCH_TOKENS // tokens)):
            value = stacked if sweeper.samples.is_text else stacked.to(structure.dtype)
            batches.append({name: value.to(device)})
    batches.append(probe_batch(structure, device))
    return [Stream(batch, torch.empty(0), []) for batch in batches]


def _embed(structure: Structure, streams: list[Stream]) -> None:
    """Take every batch through the stem."""
    done: list[Stream] = []
    for stream in streams:
        hidden, calls = structure.pieces.stem(stream.batch)
        shared = next((s.calls for s in done if s.hidden.shape == hidden.shape and _equal(s.calls, calls)), calls)
        stream.hidden, stream.calls = hidden, shared
        done.append(stream)


def _equal(first: list[Call], second: list[Call]) -> bool:
    """Whether blocks would be called alike, so that one copy of masks and positions serves many batches."""
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


def unit_name(structure: Structure, unit: int) -> str:
    return "stem" if unit == 0 else "head" if unit > structure.block_count else f"block {unit - 1}"


def save_probe(path: Path, structure: Structure, logits: Tensor, device: torch.device) -> None:
    batch = probe_batch(structure, device)
    save_file(
        {**{k: v.cpu().contiguous() for k, v in batch.items()}, "output": logits.float().cpu().contiguous()}, path
    )


def _seed(*parts: int) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1


def _same(tensor: Tensor) -> Tensor:
    return tensor
