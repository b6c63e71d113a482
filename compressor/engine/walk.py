"""The one loop over a model: embeddings, blocks and output head in order, each in memory while it is used.

    for part in walk(structure, batches, hold):
        ...                                      # the part is loaded, and the batches have the inputs of the part

A walk guarantees:
- Parts come in order: the embeddings (0), blocks 1 to n, the output head (n + 1). Before each part the walk checks
  whether to stop, so a part is either finished or unchanged.
- A part that the caller uses is loaded from where `source` points to, and its stored layers are installed. The batches
  have been through all earlier parts as those are now.
- After the caller's work the batches run through the changed part, unless the work did this itself (`Part.advance`).
  The embeddings make the hidden states. After the output head there is nothing to run.
- Then every replaced module is restored and the block is freed, unless all blocks stay (placement `resident`).
  Embeddings and output head stay in memory, since they may share weights, or the embeddings are freed with the blocks
  and loaded again before the output head (`Holder.keeps_embeddings`). The caller frees everything at the end.
- `done` is called for each part that has run, with its seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.engine.block_io import Installed, PartSource, fill_part, free_part, part_name
from compressor.engine.calibration_batch import CalibrationBatch, embed, finish_part, run_part
from compressor.engine.events import PartEvent
from compressor.errors import Interrupted
from compressor.model.mapped_tensors import MappedTensors
from compressor.model.stored_weight import StoredWeight
from compressor.model.structure import Structure

Hold = Callable[[int], AbstractContextManager[Installed]]  # the part is in memory inside this context


@dataclass
class Part:
    """One part of the model during a walk."""

    structure: Structure
    number: int
    batches: list[CalibrationBatch]
    installed: Installed
    is_advanced: bool = False

    @property
    def is_block(self) -> bool:
        return 0 < self.number <= self.structure.block_count

    @property
    def is_output_head(self) -> bool:
        return self.number == self.structure.block_count + 1

    def advance(self, push: Callable[[], Any] | None = None) -> None:
        """Run the batches through the part as it is now, or call `push` instead. This is done once."""
        assert not self.is_advanced, "the batches have left this part"
        self.is_advanced = True
        if push is not None:
            push()
        elif self.number == 0:
            embed(self.structure, self.batches)
        elif self.is_block:
            for batch in self.batches:
                batch.hidden = finish_part(self.structure, self.number, batch)

    def output(self, batch: CalibrationBatch) -> Tensor:
        """Output of the part for a batch, without moving the batch."""
        return run_part(self.structure, self.number, batch)


def walk(
    structure: Structure, batches: list[CalibrationBatch], hold: Hold, done: Callable[[Part, float], None] | None = None
) -> Iterator[Part]:
    """Every part of the model in order. Each is valid until the next one is taken."""
    for number in range(structure.block_count + 2):
        began = time.perf_counter()
        with hold(number) as installed:
            part = Part(structure, number, batches, installed)
            yield part
            if not part.is_advanced:
                part.advance()
        if done is not None:
            done(part, time.perf_counter() - began)


@dataclass(frozen=True)
class Written:
    """The model that a sweep wrote. Without files it is still the model of the checkpoint.

    files    part files, in order
    formats  weight name -> its format, only weights that are stored
    written  dense parameters that a pass has given new values
    """

    files: list[Path] = field(default_factory=list)
    formats: dict[str, StoredWeight] = field(default_factory=dict)
    written: set[str] = field(default_factory=set)

    def source(self, structure: Structure, number: int) -> PartSource:
        """Where a part's tensors lie, and the formats in it."""
        whole = PartSource(structure, self.files[number] if self.files else None, self.formats)
        return PartSource(structure, whole.file, part_formats(whole, number))


def part_formats(source: PartSource, number: int) -> dict[str, StoredWeight]:
    """The formats in this part, out of all formats that the source knows."""
    names = source.names(number) if source.formats else []
    return {name: stored for name, stored in source.formats.items() if any(t.startswith(name + ".") for t in names)}


@dataclass(frozen=True)
class Holder:
    """Loads each part of a walk, and frees the blocks that were used.

    source            number of a part -> where it lies; None: the part isn't used, so it isn't loaded
    stopped           message of Interrupted
    keeps_blocks      every block stays in memory
    keeps_embeddings  the embeddings stay in memory; if not, their source at the output head is as they are then
    mapped            makes the parameters of experts; None: they are in memory
    """

    structure: Structure
    device: torch.device
    source: Callable[[int], PartSource | None]
    is_interrupted: Callable[[], bool]
    stopped: str = "stopped between two parts"
    keeps_blocks: bool = False
    keeps_embeddings: bool = True
    mapped: MappedTensors | None = None

    @contextmanager
    def __call__(self, number: int) -> Iterator[Installed]:
        if self.is_interrupted():
            raise Interrupted(self.stopped, hint="Run the same command with --resume to continue.")
        structure, source = self.structure, self.source(number)
        if number > structure.block_count and not self.keeps_embeddings:
            embeddings = self.source(0)
            assert embeddings is not None
            fill_part(structure, 0, embeddings, self.device)
        installed = Installed(structure)
        if source is not None:
            installed = load_part(structure, number, source, self.device, self.mapped)
        try:
            yield installed
        finally:
            installed.remove()
            stays = self.keeps_blocks if number else self.keeps_embeddings
            if source is not None and number <= structure.block_count and not stays:
                free_part(structure, number)


def load_part(
    structure: Structure,
    number: int,
    source: PartSource,
    device: torch.device,
    mapped: MappedTensors | None = None,
) -> Installed:
    """Fill the model's parameters of a part (`fill_part`), and replace modules by its stored layers."""
    fill_part(structure, number, source, device, mapped=mapped)
    installed = Installed(structure)
    installed.install_stored(source, device)
    return installed


def part_event(structure: Structure, sweep: int, part: Part, seconds: float) -> PartEvent:
    """The event of a part that a sweep has finished."""
    return {
        "event": "part",
        "sweep": sweep,
        "part": part.number,
        "parts": structure.block_count + 2,
        "name": part_name(structure, part.number),
        "seconds": seconds,
    }
