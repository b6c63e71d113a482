"""Shows the whole model to a pass that makes a choice before its sweep.

A `WeightPass` gets one part after the other. A pass that redefines the model gets single parts, calibration batches
and gradients, and may save its progress. Its choice decides the plan (`plan.decided_plan`) before the sweep that
carries it out (`rewrite_sweep`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Generator, Tensor, device, nn

from compressor.engine.block_io import Installed, PartSource, free_part, part_name
from compressor.engine.block_view import BlockView
from compressor.engine.calibration_batch import CalibrationBatch, embed
from compressor.engine.line_facts import SavedFacts
from compressor.engine.rewrite_sweep import PartView
from compressor.engine.walk import Part, load_part, walk
from compressor.errors import Interrupted, Notice
from compressor.model.facts import ModelFacts, Redefinition
from compressor.model.structure import Structure
from compressor.storage.journal import Journal


@dataclass(frozen=True)
class WholeModelView:
    """The model as earlier sweeps left it (`protocol.WholeModel`).

    begin  begins a walk through the model
    view   makes the view of a part for the step that decides
    """

    begin: Callable[[], Iterator[Part]]
    view: Callable[[Part], BlockView]

    def views(self) -> Iterator[BlockView]:
        for part in self.begin():
            view = self.view(part)
            view.is_open = False
            yield view


@dataclass
class ModelView:
    """The model before a step that redefines it (`protocol.RunnableModel`).

    number     number of the sweep
    resident   keep every block in memory after it is loaded
    source     where a part's tensors lie; None: in the checkpoint
    tell       shows the progress in a part
    generator  makes a generator from parts of a seed; the sweep itself uses other seeds
    """

    number: int
    facts: ModelFacts
    structure: Structure
    calibration: list[CalibrationBatch]
    labels_of: list[Tensor | None]
    device: device
    seeded: Callable[[int], Generator]
    journal: Journal
    resident: bool
    is_interrupted: Callable[[], bool]
    warnings: list[Notice] = field(default_factory=list)
    source: Callable[[int], PartSource] | None = None
    tell: Callable[[int, str, float | None], None] = lambda part, what, share: None
    _in_memory: dict[int, Installed] = field(default_factory=dict)
    _users: dict[int, int] = field(default_factory=dict)
    _is_embedded: bool = False
    _part: int = 0
    _keepable_bytes: int = 0
    _kept: dict[int, int] = field(default_factory=dict)  # block that stays in memory -> its bytes
    _work: tuple[str, float | None] | None = None

    def __post_init__(self) -> None:
        self.generator = self.seeded(-1)

    @property
    def parts(self) -> int:
        return self.structure.block_count + 2

    @property
    def batches(self) -> int:
        return len(self.calibration)

    def labels(self, batch: int) -> Tensor | None:
        return self.labels_of[batch]

    def module(self, path: str) -> nn.Module:
        return self.structure.model.get_submodule(path)

    @contextmanager
    def loaded(self, part: int) -> Iterator[None]:
        if self.is_interrupted():
            raise Interrupted(
                "stopped while choosing shapes",
                hint="Run the same command with --resume to continue.",
                data={"stage": "choosing-shapes"},
            )
        self._part = part
        if part not in self._in_memory:
            source = PartSource(self.structure) if self.source is None else self.source(part)
            self._in_memory[part] = load_part(self.structure, part, source, self.device)
        self._users[part] = self._users.get(part, 0) + 1
        try:
            yield
        finally:
            self._users[part] -= 1
            if not self._users[part] and not self._stays(part):
                self._in_memory.pop(part).remove()
                free_part(self.structure, part)

    def keep_blocks(self, nbytes: int) -> None:
        self._keepable_bytes = nbytes

    def _stays(self, part: int) -> bool:
        """Whether a part stays in memory that nobody uses; a block that does is counted from now on."""
        is_block = 0 < part <= self.structure.block_count
        if not is_block or self.resident or part in self._kept:
            return True
        block = self.structure.pieces.blocks[part - 1]  # its layers may be compressed
        size = sum(tensor.nbytes for tensor in [*block.parameters(), *block.buffers()])
        if sum(self._kept.values()) + size > self._keepable_bytes:
            return False
        self._kept[part] = size
        return True

    @contextmanager
    def _hold(self, part: int) -> Iterator[Installed]:
        with self.loaded(part):
            yield self._in_memory[part]

    def embeddings(self, batch: int) -> Tensor:
        self._embed()
        return self.calibration[batch].hidden

    def run(self, part: int, batch: int, hidden: Tensor) -> Tensor:
        self._embed()  # the embeddings give the arguments of the blocks
        self.tell(part, *(self._work or (part_name(self.structure, part), None)))
        call = self.calibration[batch].calls[part - 1]
        return self.structure.pieces.block(part - 1, hidden, call, gradients=True)

    def output_head(self, batch: int, hidden: Tensor, samples: slice = slice(None)) -> Tensor:
        chosen = {name: value[samples] for name, value in self.calibration[batch].inputs.items()}
        with self.loaded(0), self.loaded(self.parts - 1):
            return self.structure.pieces.output_head(chosen, hidden, gradients=True)

    def views(self, bases: Callable[[PartView], list[Tensor]] | None = None) -> Iterator[PartView]:
        self._embed()
        batches = [replace(batch) for batch in self.calibration]
        for part in walk(self.structure, batches, self._hold):
            self.tell(part.number, part_name(self.structure, part.number), None)
            view = PartView(
                self.structure,
                part.number,
                self.facts,
                Redefinition(),
                batches,
                self.device,
                self.seeded(part.number),
                is_open=False,
                warnings=self.warnings,
            )
            yield view
            if part.number == 0:
                part.advance(lambda: None)  # every batch has run through the embeddings already
            elif bases is not None and view.sublayers:
                part.advance(partial(view.advance, bases(view)))

    def close(self) -> None:
        """Restore the model's modules."""
        while self._in_memory:
            self._in_memory.popitem()[1].remove()

    def save(self, step: int, tensors: dict[str, Tensor]) -> None:
        key = f"{self.number}/choice"
        held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        last = self.journal.done(key)
        slot = 0 if last is None else 1 - SavedFacts.of(last).slot  # the last file stays until the next is complete
        facts = SavedFacts(step, slot).to_json()
        name = f"s{self.number:02d}-choice-{slot}.safetensors"

        def write(path: Path) -> None:
            save_file(held, path)

        self.journal.commit(key, name, write, facts)

    def saved(self) -> tuple[int, dict[str, Tensor]] | None:
        line = self.journal.done(f"{self.number}/choice")
        return None if line is None else (SavedFacts.of(line).step, load_file(self.journal.path(line)))

    def progress(self, what: str, share: float | None = None) -> None:
        self._work = (what, share)
        self.tell(self._part, what, share)

    def warn(self, code: str, where: str, message: str, /, **data: Any) -> None:
        self.warnings.append(Notice(code, where, message, data))

    def _embed(self) -> None:
        if not self._is_embedded:
            with self.loaded(0):
                embed(self.structure, self.calibration)
            self._is_embedded = True
