"""Runs a step that changes the model's own parameters: it writes a new dense checkpoint, one part after the other.

Unlike a sweep that stores weights, it doesn't run activations through the new weights: a pass sees the activations of
the model before the step. The result is read as a separate checkpoint, from which later sweeps start.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from compressor.engine.block_io import PartSource, free_all, part_name
from compressor.engine.calibration_batch import CalibrationBatch, run_part
from compressor.engine.changed_parameter import Change, Changed
from compressor.engine.events import Emit, Progress
from compressor.engine.line_facts import LineFacts
from compressor.engine.walk import Holder, Part, part_event, walk
from compressor.errors import Notice, PassError
from compressor.model.facts import ModelFacts, Redefinition
from compressor.model.module_names import tensor_named
from compressor.model.recorded_modules import recorded_inputs
from compressor.model.redefined_structure import split_parameter
from compressor.model.residual_records import Residual, ResidualNorm, ResidualSublayer
from compressor.model.structure import Structure, read_structure
from compressor.protocol import RewritePass, State
from compressor.recipe.recipe import Step
from compressor.storage.journal import Journal
from compressor.storage.safetensors_file import Entry, read_header, write_file


@dataclass
class PartView:
    """A part of the model as a `RewritePass` sees it (`protocol.PartView`)."""

    structure: Structure
    number: int
    facts: ModelFacts
    redefinition: Redefinition
    batches: list[CalibrationBatch]
    device: torch.device
    generator: torch.Generator
    is_open: bool = True
    written: dict[str, Tensor | Changed] = field(default_factory=dict)
    warnings: list[Notice] = field(default_factory=list)
    tell: Callable[[str, float | None], None] = lambda what, share: None

    @property
    def residual(self) -> Residual:
        return self.facts.residual

    @property
    def index(self) -> int:
        return self.number - 1

    @property
    def path(self) -> str:
        return f"{self.structure.pieces.blocks_path}.{self.index}"

    @property
    def sublayers(self) -> tuple[ResidualSublayer, ...]:
        return self.residual.blocks[self.number - 1] if 1 <= self.number <= self.structure.block_count else ()

    def states(self) -> list[Tensor]:
        return [batch.hidden for batch in self.batches]

    def read(self, parameter: str) -> Tensor:
        value = self.written.get(parameter)
        if value is None:
            value = tensor_named(self.structure.model, parameter).data
        return value.made(torch.float64) if isinstance(value, Changed) else value.to(torch.float64)

    def write(self, parameter: str, value: Tensor) -> None:
        assert self.is_open, "nothing can be written while a pass surveys"
        expected = self.redefinition.shapes.get(parameter) or tuple(tensor_named(self.structure.model, parameter).shape)
        assert tuple(value.shape) == expected, f"{parameter}: {tuple(value.shape)}, {expected} was planned"
        self.written[parameter] = value

    def change(self, parameter: str, change: Change, axis: int) -> None:
        assert self.is_open, "nothing can be written while a pass surveys"
        value = self.written.get(parameter)
        if isinstance(value, Changed) and value.axis == axis:
            self.written[parameter] = value.then(change)
            return
        before = tensor_named(self.structure.model, parameter).data if value is None else self.read(parameter)
        self.written[parameter] = Changed(before, (change,), axis)

    def warn(self, code: str, where: str, message: str, /, **data: Any) -> None:
        self.warnings.append(Notice(code, where, message, data))

    def signals(self, norm: ResidualNorm) -> Iterator[Tensor]:
        return self.inputs(norm.module)

    def progress(self, what: str, share: float | None = None) -> None:
        self.tell(what, share)

    def inputs(self, module: str) -> Iterator[Tensor]:
        for (found,) in self.inputs_of([module]):
            yield found

    def inputs_of(self, modules: Sequence[str]) -> Iterator[list[Tensor]]:
        watched = {module: self.structure.model.get_submodule(module) for module in modules}
        with recorded_inputs(watched, lambda args, _: args[0].reshape(-1, args[0].shape[-1])) as seen:
            for batch in self.batches:
                seen.clear()
                run_part(self.structure, self.number, batch)
                yield list(map(dict(reversed(seen)).__getitem__, modules))  # the first input of each

    def projected(self, bases: Sequence[Tensor]) -> Iterator[Tensor]:
        for batch in self.batches:
            yield self.project(batch, bases).reshape(-1, self.residual.width)

    def project(self, batch: CalibrationBatch, bases: Sequence[Tensor]) -> Tensor:
        """The residual stream after len(bases) sublayers, projected at each, float64; with all bases: after the block.

        The block's own forward adds its branches to a stream that isn't projected. A hook gives each norm the projected
        stream instead, and adds the difference of the two again at the next sublayer.
        """
        x = batch.hidden.to(torch.float64)
        bases = [basis.to(x.device) for basis in bases]
        if not bases or not self.sublayers:
            return x
        apart: list[Tensor] = []

        def onto(number: int, value: Tensor) -> Tensor:
            return value @ bases[number] @ bases[number].t()

        def norm_input(number: int, args: tuple[Any, ...], is_first: bool) -> tuple[Any, ...] | None:
            here = args[0].to(torch.float64)
            if is_first:
                moved = here + apart[-1].view(here.shape) if apart else here  # OPT flattens batch and tokens midway
                if number == len(bases):
                    raise _Reached(moved)
                apart.append((onto(number, moved) if number else moved) - here)
            return ((here + apart[-1].view(here.shape)).to(args[0].dtype), *args[1:])

        handles = []
        for number, sublayer in enumerate(self.sublayers[: len(bases) + 1]):
            for first, norm in enumerate(sublayer.norms):
                module = self.structure.model.get_submodule(norm.module)
                hook = partial(_before, norm_input, number, first == 0)
                handles.append(module.register_forward_pre_hook(hook))
        entering = CalibrationBatch(batch.inputs, onto(0, x).to(batch.hidden.dtype), batch.calls)
        try:
            left = run_part(self.structure, self.number, entering).to(torch.float64)
            return left + apart[-1].view(left.shape)
        except _Reached as reached:
            return reached.value
        finally:
            for handle in handles:
                handle.remove()

    def advance(self, bases: Sequence[Tensor]) -> None:
        """Run the batches through the block: projected, or unchanged if there are no bases."""
        for batch in self.batches:
            if bases:
                batch.hidden = self.project(batch, bases).to(batch.hidden.dtype)
            else:
                batch.hidden = run_part(self.structure, self.number, batch)


class _Reached(Exception):
    """Ends a block's forward at the requested sublayer."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value


def _before(norm_input: Any, number: int, is_first: bool, _module: Any, args: tuple[Any, ...]) -> Any:
    return norm_input(number, args, is_first)


@dataclass
class Reshaper:
    """What a reshaping sweep needs besides its step.

    number   number of the sweep
    planned  the structure that `plan` promised
    batches  calibration batches before the embeddings; none if the step reads only weights
    """

    number: int
    structure: Structure
    planned: Structure
    facts: ModelFacts
    redefinition: Redefinition
    journal: Journal
    batches: list[CalibrationBatch]
    device: torch.device
    seeds: Callable[[int], int]  # part -> seed
    is_interrupted: Callable[[], bool]
    emit: Emit

    def holder(self, source: Callable[[int], PartSource | None], **options: Any) -> Holder:
        return Holder(self.structure, self.device, source, self.is_interrupted, **options)

    def view(self, part: int, seed_of: int) -> PartView:
        generator = torch.Generator().manual_seed(self.seeds(seed_of))
        progress = Progress(self.emit)
        return PartView(
            self.structure,
            part,
            self.facts,
            self.redefinition,
            self.batches,
            self.device,
            generator,
            tell=partial(progress, self.number, part),
        )


def run_reshape(work: Reshaper, step: Step) -> tuple[Structure, list[Path]]:
    """Run the step, or read the parts that an interrupted run finished. Returns the new model and its part files."""
    structure, journal, settings = work.structure, work.journal, step.settings
    assert isinstance(settings, RewritePass)
    state = _survey(work, settings)
    follows = work.redefinition.follows
    files = []

    def source(part: int) -> PartSource | None:
        is_done = journal.done(f"{work.number}/{part}") is not None
        return None if is_done and not follows else PartSource(structure)

    def done(part: Part, seconds: float) -> None:
        work.emit(part_event(structure, work.number, part, seconds))

    for part in walk(structure, work.batches if follows else [], work.holder(source), done):
        key = f"{work.number}/{part.number}"
        view = work.view(part.number, part.number)
        if part.number == 0:
            part.advance()  # a pass sees the output of the embeddings
        if journal.done(key) is None:
            state = _write_part(work, step, view, state)
        elif journal.done(f"{key}/state") is not None:
            state = _kept_state(work, f"{key}/state")
        if follows and part.is_block:
            bases = settings.projections(state)
            assert not bases or len(bases) == len(view.sublayers)
            part.advance(partial(view.advance, bases))
        line = journal.done(key)
        assert line is not None
        files.append(journal.path(line))
    free_all(structure)
    return _reopen(work, files), files


def _write_part(work: Reshaper, step: Step, view: PartView, state: State) -> State:
    """Let the pass write the loaded part. Commit first the state that the next part needs, then the part."""
    assert isinstance(step.settings, RewritePass)
    versions = {name: tensor._version for name, tensor in state.items()}
    try:
        after = step.settings.rewrite(view, dict(state))
    except torch.OutOfMemoryError as error:
        hint = "Set a smaller data.samples or data.length, then begin again with --fresh."
        raise PassError(
            f"{step.name} ran out of memory", hint=hint, data={"reason": "memory", "pass": step.name}
        ) from error
    is_kept = after.keys() == state.keys() and all(
        tensor is state[name] and tensor._version == versions[name] for name, tensor in after.items()
    )
    key, file = f"{work.number}/{view.number}", f"s{work.number:02d}-{view.number:05d}"
    if not is_kept:
        _keep_state(work, f"{key}/state", f"{file}-state.safetensors", after, [])
    tensors, rewritten = _part_tensors(work, view.number, view)
    entries = [Entry(name, t.dtype, tuple(t.shape), partial(_alone, t)) for name, t in tensors.items()]
    facts = LineFacts(warnings=tuple(view.warnings), rewritten=rewritten).to_json()
    work.journal.commit(key, f"{file}.safetensors", lambda path: write_file(path, entries), facts)
    return after


def _keep_state(work: Reshaper, key: str, file: str, state: State, warnings: list[Notice]) -> None:
    held = {name: tensor.cpu().contiguous() for name, tensor in state.items()} or {"nothing": torch.zeros(0)}
    facts = LineFacts(warnings=tuple(warnings)).to_json()
    work.journal.commit(key, file, lambda path: save_file(held, path), facts)


def _kept_state(work: Reshaper, key: str) -> State:
    line = work.journal.done(key)
    assert line is not None  # it is committed before the part that needs it
    return {name: t for name, t in load_file(work.journal.path(line)).items() if name != "nothing"}


def _survey(work: Reshaper, settings: RewritePass) -> State:
    """The survey of the whole model by the pass, read from the journal if it is there."""
    key = f"{work.number}/survey"
    if work.journal.done(key) is None:
        warnings: list[Notice] = []
        state = settings.survey(_views(work, warnings))
        free_all(work.structure)
        _keep_state(work, key, f"s{work.number:02d}-survey.safetensors", state, warnings)
    return _kept_state(work, key)


def _views(work: Reshaper, warnings: list[Notice]) -> Iterator[PartView]:
    """Every part of the unchanged model, one in memory at a time; with activations if there are calibration batches."""
    structure = work.structure
    hold = work.holder(lambda part: PartSource(structure), stopped="stopped while surveying")
    progress = Progress(work.emit)
    for part in walk(structure, work.batches, hold):
        progress(work.number, part.number, f"survey of {part_name(structure, part.number)}")
        view = work.view(part.number, -1)
        view.is_open, view.warnings = False, warnings
        if part.number == 0:
            part.advance()  # a pass sees the output of the embeddings
        yield view


def _part_tensors(work: Reshaper, part: int, view: PartView) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Every tensor of this part in the new model, by checkpoint name, in the dtype of its parameter; and the names of
    those that the pass has written.
    """
    planned = work.planned
    tensors: dict[str, Tensor] = {}
    written: list[str] = []
    for name, now in _parameters_of(work, part).items():
        value = view.written[name] if name in view.written else tensor_named(work.structure.model, name).data
        dtype = planned.bindings.dtypes[now]
        value = value.made(dtype) if isinstance(value, Changed) else value.to(dtype)
        pieces = split_parameter(planned, now, value)
        tensors |= {tensor: piece.cpu().contiguous() for tensor, piece in pieces.items()}
        written += pieces if name in view.written else ()
    for tensor, piece in tensors.items():
        expected = planned.checkpoint.tensors[tensor].shape
        assert tuple(piece.shape) == expected, f"{tensor}: {tuple(piece.shape)}, {expected} was planned"
    return dict(sorted(tensors.items())), tuple(sorted(written))


def _parameters_of(work: Reshaper, part: int) -> dict[str, str]:
    """The parameters of a part that stay: name before -> name after. Names change if blocks are removed."""
    kept, path = work.redefinition.blocks, work.structure.pieces.blocks_path
    if kept is None:
        return {name: name for name in work.planned.parameters_of(part)}
    if part == work.structure.block_count + 1:
        return {name: name for name in work.planned.parameters_of(len(kept) + 1)}
    if part == 0 or part - 1 not in kept:
        return {name: name for name in work.planned.parameters_of(0)} if part == 0 else {}
    number = kept.index(part - 1)
    names = work.planned.parameters_of(number + 1)
    return {f"{path}.{part - 1}.{name.removeprefix(f'{path}.{number}.')}": name for name in names}


def _reopen(work: Reshaper, files: list[Path]) -> Structure:
    """The part files, linked into a directory, read as a checkpoint like any other."""
    folder = work.journal.work / "parts" / f"s{work.number:02d}"
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir()
    placed: dict[str, str] = {}
    for file in files:
        target = folder / file.name
        try:
            os.link(file, target)
        except OSError:  # a file system without hard links; disk_bytes counts the copy
            shutil.copyfile(file, target)
        placed |= dict.fromkeys(read_header(target), file.name)
    index = {"metadata": {}, "weight_map": dict(sorted(placed.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(work.planned.checkpoint.config))
    structure = read_structure(folder)
    # tokenizer, licence and similar files still lie in the directory of the source
    origin = replace(structure.checkpoint, directory=work.structure.checkpoint.directory)
    return replace(structure, checkpoint=origin)


def _alone(tensor: Tensor) -> list[Tensor]:
    return [tensor]
