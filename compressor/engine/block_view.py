"""Shows one part of the model to a pass: its weights and their inputs. It takes the layers that the pass stores.

After a batch has given the inputs of one stage, it pauses before the matmuls of that stage (`resumable_forward`), as
far as memory allows. It resumes there when the next stage is asked for. What a pass sees never depends on this.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from compressor.engine.block_io import Installed, view
from compressor.engine.calibration_batch import CalibrationBatch, run_part
from compressor.engine.folds import FoldsInMemory, LaterFolds, SpilledInputs
from compressor.engine.line_facts import WeightRecord, check_names
from compressor.engine.resumable_forward import Diverged, RecordedForward, advance, needs, run_on
from compressor.errors import Notice
from compressor.layers import DENSE
from compressor.layers.base import Layer
from compressor.model.block_runner import Stop
from compressor.model.facts import Decision
from compressor.model.mapped_tensors import MappedTensors
from compressor.model.observed_matmul import ObservedMatmul
from compressor.model.probe_model import signature
from compressor.model.recorded_modules import first_argument, recorded_inputs
from compressor.model.stored_weight import StoredWeight, relative_distance
from compressor.model.structure import Structure
from compressor.model.weights import Group, Producer, Stage, Weight
from compressor.process.memory import return_freed_memory
from compressor.protocol.views import Folded, Folds

# (kind of block, matmul) -> the calls before that matmul, and which results are read after it
Needs = dict[tuple[Any, ...], tuple[list[Any], frozenset[tuple[int, int]]]]
Pause = Callable[[RecordedForward, Callable[[], Tensor]], ObservedMatmul | None]  # runs up to the matmuls of a stage


@dataclass
class BlockView:
    """One part of the model as a pass sees it (`protocol.BlockView`).

    calibration  the batches, with the hidden states that enter the part
    verification  the verification batch; being small, it shows cheaply which tensors the rest of the block reads
    rescalable   producers of the inputs of this part's weights
    errors       relative error of each stored weight after it is dequantized
    written      parameters that stay dense and have new values
    tell         shows the progress of the pass
    mapped       made the parameters of experts; None: they are in memory
    """

    structure: Structure
    number: int
    selected: frozenset[str]
    calibration: list[CalibrationBatch]
    verification: CalibrationBatch
    device: torch.device
    generator: torch.Generator
    needs: Needs
    installed: Installed
    decision: Decision | None = None
    selected_functions: tuple[Weight, ...] = ()
    rescalable: tuple[Producer, ...] = ()
    is_open: bool = True
    tell: Callable[[str, float | None], None] = lambda what, share: None
    mapped: MappedTensors | None = None
    put_layers: dict[str, tuple[StoredWeight, Layer]] = field(default_factory=dict)
    errors: dict[str, float | None] = field(default_factory=dict)
    written: set[str] = field(default_factory=set)
    records: list[WeightRecord] = field(default_factory=list)
    warnings: list[Notice] = field(default_factory=list)
    began: float = field(default_factory=time.perf_counter)

    @property
    def index(self) -> int:
        return self.number - 1

    @property
    def dtype(self) -> torch.dtype:
        return self.structure.dtype

    def stages(self, sequential: bool = True) -> list[Stage]:
        stages = []
        for stage in self.structure.stages(self.number):
            groups = (Group(tuple(w for w in group if w.name in self.selected)) for group in stage)
            if kept := tuple(group for group in groups if group.weights):
                stages.append(kept)
        if sequential or not stages:
            return stages
        return [tuple(group for stage in stages for group in stage)]

    def functions(self) -> list[Weight]:
        return list(self.selected_functions)

    def fold(
        self, stage: Stage, start: Callable[[Group], Folded], step: Callable[[Folded, Tensor], Folded]
    ) -> Folds[Folded]:
        if self.mapped is not None and any(group.expert is not None for group in stage):
            kept = SpilledInputs(self.mapped.folder, stage)
            for number, x in self._inputs(stage):
                kept.add(number, x)
            return LaterFolds(kept, start, step)
        folded, tokens = [start(group) for group in stage], [0] * len(stage)
        for number, x in self._inputs(stage):
            folded[number] = step(folded[number], x)
            tokens[number] += len(x)
        return FoldsInMemory(folded, tokens)

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

    def gain(self, function: Weight) -> Tensor:
        return self.structure.model.get_parameter(f"{function.parameter}.weight").data.clone()

    def put(self, weight: Weight, layer: Layer, **record: Any) -> None:
        assert self.is_open, "nothing can be put while a pass decides"
        stored_weight = StoredWeight(layer.format_name, layer.format_params(), weight)
        if weight.name in self.put_layers:
            self.installed.take_back(weight)
        self._untie(weight)
        for batch in self.calibration:  # a recorded matmul with the old weight is invalid
            if batch.recorded is not None and (weight.is_function or weight.parameter in batch.recorded.passed):
                batch.recorded = None
        if not weight.is_function:
            target = view(self.structure, weight)
            rebuilt = layer.matrix(self.dtype).to(target.device)
            # a weight that is put again has lost its first value, so its error is unknown
            again = weight.name in self.errors
            self.errors[weight.name] = None if again else relative_distance(rebuilt, target)
            target.copy_(rebuilt)
        if stored_weight.bias is not None:
            parameter = self.structure.bindings.parameter_of()[stored_weight.bias]
            self.structure.model.get_parameter(parameter).data.copy_(layer.vector(self.dtype))
        if not layer.weight_only:
            self.installed.install(weight, layer.to(self.device))
        stored = sum(tensor.nbytes for tensor in layer.tensors().values())
        if self.mapped is not None and weight.expert is not None:  # until the block is written
            kept = {suffix: self.mapped.keep(tensor) for suffix, tensor in layer.tensors().items()}
            layer = layer.from_tensors(layer.format_params(), kept)
            return_freed_memory()  # 1.5 MB of the heap stayed unused for each expert of 0.5 MB
        self.put_layers[weight.name] = (stored_weight, layer)
        self._record(weight, layer.format_name, layer.format_params(), stored, record)

    def keep(self, weight: Weight, **record: Any) -> None:
        assert self.is_open and weight.name not in self.put_layers, "a weight that was put can't be kept dense"
        self._record(weight, DENSE, {}, math.prod(weight.shape) * self.dtype.itemsize, record)

    def producers(self) -> list[Producer]:
        chosen = {weight.parameter for stage in self.stages() for group in stage for weight in group}
        return [p for p in self.rescalable if any(consumer.parameter in chosen for consumer in p.consumers)]

    def read(self, parameter: str) -> Tensor:
        return self._own_parameter(parameter).data.clone()

    def write(self, parameter: str, value: Tensor) -> None:
        target = self._own_parameter(parameter).data
        stored = [
            stored_weight.weight.name
            for stored_weight, _ in self.put_layers.values()
            if stored_weight.weight.parameter == parameter
        ]
        assert self.is_open and not stored, f"{parameter} can't be written, {stored or 'the pass decides'}"
        assert value.shape == target.shape, f"{parameter}: {tuple(value.shape)}, it is {tuple(target.shape)}"
        target.copy_(value)
        self.written.add(parameter)
        for batch in self.calibration:
            batch.recorded = None

    @property
    def batches(self) -> int:
        return len(self.calibration)

    def output(self, batch: int, stand_ins: Mapping[Weight, torch.nn.Module] | None = None) -> Tensor:
        assert 1 <= self.number <= self.structure.block_count, "only a block has an output"
        entering, index = self.calibration[batch], self.number - 1
        placed = Installed(self.structure)
        try:
            for weight, module in (stand_ins or {}).items():
                placed.place(weight, module)
            return self.structure.pieces.block(index, entering.hidden, entering.calls[index], gradients=bool(stand_ins))
        finally:
            placed.remove()

    def progress(self, what: str, share: float | None = None) -> None:
        self.tell(what, share)

    def warn(self, code: str, where: str, message: str, /, **data: Any) -> None:
        self.warnings.append(Notice(code, where, message, data))

    def left_out(self) -> list[str]:
        """Selected weights of this part that the pass has neither put nor kept."""
        chosen = [weight.name for stage in self.stages() for group in stage for weight in group]
        recorded = {record.name for record in self.records}
        return [name for name in (*chosen, *(f.name for f in self.selected_functions)) if name not in recorded]

    def _own_parameter(self, name: str) -> torch.nn.Parameter:
        assert name in self.structure.parameters_of(self.number), f"{name} is no parameter of this part"
        return self.structure.model.get_parameter(name)

    def _record(
        self, weight: Weight, format_name: str, format_params: dict[str, Any], size: int, more: dict[str, Any]
    ) -> None:
        check_names(more, weight.name)
        now = time.perf_counter()
        self.progress(weight.name, 1.0)
        self.records = [known for known in self.records if known.name != weight.name]  # a weight may be put again
        self.records.append(
            WeightRecord(
                name=weight.name,
                part=self.number,
                format_name=format_name,
                format_params=format_params,
                shape=weight.shape,
                role=weight.role,
                bytes_after=size,
                seconds=now - self.began,
                own=more,
            )
        )
        self.began = now

    def _untie(self, weight: Weight) -> None:
        """Give a tied output head its own storage before it is changed."""
        source = self.structure.bindings.tied.get(weight.parameter)
        if source is not None:
            owner, _, leaf = weight.parameter.rpartition(".")
            module = self.structure.model.get_submodule(owner)
            if module._parameters[leaf] is self.structure.model.get_parameter(source):
                module._parameters[leaf] = torch.nn.Parameter(
                    self.structure.model.get_parameter(source).data.clone(), requires_grad=False
                )

    def _inputs(self, stage: Stage) -> Iterator[tuple[int, Tensor]]:
        """(group number, input (tokens, in)) for each batch, in order. Of the embeddings: token ids (tokens,).

        Each batch runs up to the first matmul of the stage and pauses there, if the tensors that it keeps fit in
        RECORDED_SHARE. The other batches run past their earlier pause without moving it, or run from the block's input.
        """
        if self.number == 0 or stage[0].weights[0].is_function:
            yield from self._module_inputs(stage)
            return
        numbers = {(group.weights[0].parameter, group.expert): number for number, group in enumerate(stage)}
        watched = watched_parameters(self.structure, self.number)

        def number_of(call: ObservedMatmul) -> int | None:
            expert = call.row_offset // call.elements if watched[call.parameter].dim() == 3 else None
            return numbers.get((call.parameter, expert))

        def pauses(call: ObservedMatmul) -> bool:
            return number_of(call) is not None

        def pause(recorded: RecordedForward, work: Callable[[], Tensor]) -> ObservedMatmul | None:
            return advance(recorded, watched, work, pauses)

        wanted = {name for name, _ in numbers}
        limit = sum(batch.may_keep_bytes for batch in self.calibration)
        kept = sum(batch.kept_bytes for batch in self.calibration)
        here = 0  # bytes that one batch keeps at this stage
        for done, batch in enumerate(self.calibration):
            self.progress(f"inputs of {stage[0].name}", done / len(self.calibration))
            before = batch.kept_bytes
            waits = batch.recorded is not None and not batch.recorded.passed & wanted
            if waits and kept - before + here > limit:  # no room for a new pause: run on from the old one
                yield from self._ahead(batch, watched, number_of, stage)
            else:
                first = self._pause(batch, watched, pauses, wanted)
                if first is not None:
                    self._forget_unread(batch, first.parameter, pause)
                here = batch.kept_bytes
                if first is None:  # no token of this batch was routed to these experts
                    pass
                elif len(stage) == 1:
                    yield 0, first.input.reshape(-1, first.input.shape[-1])
                else:
                    yield from self._ahead(batch, watched, number_of, stage)
            if kept - before + batch.kept_bytes > limit:
                batch.recorded = None
            kept += batch.kept_bytes - before

    def _module_inputs(self, stage: Stage) -> Iterator[tuple[int, Tensor]]:
        """(group number, input of its module) for each batch and call: token ids (tokens,) of an embedding, or inputs
        (tokens, width) of a function.
        """
        modules = {
            number: self.structure.model.get_submodule(group.weights[0].parameter.removesuffix(".weight"))
            for number, group in enumerate(stage)
        }

        def flat(number: int, x: Tensor) -> Tensor:
            return x.reshape(-1, x.shape[-1]) if stage[number].weights[0].is_function else x.reshape(-1)

        with recorded_inputs(modules, first_argument) as seen:
            for batch in self.calibration:
                seen.clear()
                if self.number == 0:
                    self.structure.pieces.embeddings(batch.inputs)
                else:
                    run_part(self.structure, self.number, batch)
                yield from ((number, flat(number, x)) for number, x in seen)

    def _forget_unread(self, batch: CalibrationBatch, parameter: str, pause: Pause) -> None:
        """Keep only the tensors that the rest of the block reads, if the verification batch makes the same calls."""
        assert batch.recorded is not None
        if not 1 <= self.number <= self.structure.block_count:
            return
        block = self.structure.pieces.blocks[self.number - 1]
        relative = parameter.removeprefix(f"{self.structure.pieces.blocks_path}.{self.number - 1}.")
        kind = (signature(self.structure.model.config, block, self.number - 1), relative)
        if kind not in self.needs:
            self.needs[kind] = self._needs_of_verification_batch(pause)
        calls, leaves = self.needs[kind]
        if calls == batch.recorded.calls:
            batch.recorded.keep_only(leaves)

    def _needs_of_verification_batch(self, pause: Pause) -> tuple[list[Any], frozenset[tuple[int, int]]]:
        """The verification batch's calls before the pause, and what its forward reads after it; no calls if unknown."""
        recorded = RecordedForward()
        work = partial(run_part, self.structure, self.number, replace(self.verification, recorded=recorded))
        if pause(recorded, work) is None:  # none of its tokens was routed to these experts
            return [], frozenset()
        calls = recorded.calls
        try:
            return calls, needs(recorded, work)
        except Diverged:
            return [], frozenset()

    def _pause(
        self,
        batch: CalibrationBatch,
        watched: dict[str, Tensor],
        pauses: Callable[[ObservedMatmul], bool],
        wanted: set[str],
    ) -> ObservedMatmul | None:
        """Run the batch up to the first matmul of the stage: from its pause if that comes first, or from the start."""
        work = partial(run_part, self.structure, self.number, batch)
        if batch.recorded is not None and not batch.recorded.passed & wanted:
            try:
                return advance(batch.recorded, watched, work, pauses)
            except Diverged:
                pass  # some forwards can't be resumed; a run from the start always works
        batch.recorded = RecordedForward()
        first = advance(batch.recorded, watched, work, pauses)
        if first is None:
            batch.recorded = None
        return first

    def _ahead(
        self,
        batch: CalibrationBatch,
        watched: dict[str, Tensor],
        number_of: Callable[[ObservedMatmul], int | None],
        stage: Stage,
    ) -> Iterator[tuple[int, Tensor]]:
        """Inputs of the stage's groups, read by running past the pause. The pause of the batch stays where it is."""
        caught: dict[int, Tensor] = {}
        all_come = all(group.expert is None for group in stage)

        def visit(call: ObservedMatmul) -> None:
            number = number_of(call)
            if number is not None and number not in caught:
                caught[number] = call.input.reshape(-1, call.input.shape[-1])
            if all_come and len(caught) == len(stage):
                raise Stop

        work = partial(run_part, self.structure, self.number, batch)
        batch.recorded = batch.recorded or RecordedForward()
        try:
            run_on(batch.recorded, watched, work, visit)
        except Diverged:
            caught.clear()
            batch.recorded = RecordedForward()
            run_on(batch.recorded, watched, work, visit)
        if batch.recorded.is_spent:
            batch.recorded = None
        yield from caught.items()


def watched_parameters(structure: Structure, part: int) -> dict[str, Tensor]:
    """Parameters of a part that are multiplied by something, by name, without those whose module a layer replaces."""
    names = {weight.parameter for stage in structure.stages(part) for group in stage for weight in group}
    held = dict(structure.model.named_parameters(remove_duplicate=False))
    return {name: held[name] for name in sorted(names) if name in held}
