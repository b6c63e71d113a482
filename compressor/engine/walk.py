"""The one loop: embeddings, blocks and output head in order, each in memory while it is worked on.

    for part in walk(structure, batches, hold):
        ...                                      # the part as it is loaded, the batches as they enter it

What a walk promises:
- Parts come in order: the embeddings (0), blocks 1 to n, the output head (n + 1). Before each it is asked whether to
  stop; then a part is whole or untouched.
- A part that the caller works on is loaded and its stored layers are installed, from where `source` says it lies. The
  batches are as the parts before left them: what a later part sees is computed by the earlier ones as they now are.
- After the work the batches are taken on through the part as the work left it, unless the work did so itself
  (`Part.advance`). The embeddings make the hidden states; the output head gives nothing to go on with.
- Then every module gets its place back and the block is freed, unless all blocks stay (placement `resident`).
  Embeddings and output head stay, since they may share their weights: whoever walks frees all of it in the end.
- What has run is told to `done`, with its seconds.
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
from compressor.model.stored_weight import StoredWeight
from compressor.model.structure import Structure

Hold = Callable[[int], AbstractContextManager[Installed]]  # a part is in memory inside


@dataclass
class Part:
    """One part of the model while a walk is at it."""

    structure: Structure
    number: int
    batches: list[CalibrationBatch]
    installed: Installed
    is_advanced: bool = False

    @property
    def is_block(self) -> bool:
        return 0 < self.number <= self.structure.block_count

    @property
    def is_head(self) -> bool:
        return self.number == self.structure.block_count + 1

    def advance(self, push: Callable[[], Any] | None = None) -> None:
        """Take the batches on, once: by `push`, or else through the part as it now is."""
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
        """What the part makes of a batch; it goes no further."""
        return run_part(self.structure, self.number, batch)


def walk(
    structure: Structure, batches: list[CalibrationBatch], hold: Hold, done: Callable[[Part, float], None] | None = None
) -> Iterator[Part]:
    """Every part of the model in order, each good until the next is taken."""
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
    """The model as a sweep wrote it; without files it is still that of the checkpoint.

    files    of its parts, in order
    forms    weight name -> the format it is in, only those that are stored
    written  parameters that are dense and that a pass has given new values
    """

    files: list[Path] = field(default_factory=list)
    forms: dict[str, StoredWeight] = field(default_factory=dict)
    written: set[str] = field(default_factory=set)

    def source(self, structure: Structure, number: int) -> PartSource:
        """Where a part's tensors lie, with the formats in it."""
        whole = PartSource(structure, self.files[number] if self.files else None, self.forms)
        return PartSource(structure, whole.file, part_forms(whole, number))


def part_forms(source: PartSource, number: int) -> dict[str, StoredWeight]:
    """The forms that this part holds, of all that the source knows."""
    names = source.names(number) if source.forms else []
    return {name: form for name, form in source.forms.items() if any(t.startswith(name + ".") for t in names)}


@dataclass(frozen=True)
class Holder:
    """Loads each part that a walk comes to, and frees the blocks behind it.

    source        number of a part -> where it lies; None: nothing is to be done with it, so it isn't loaded
    stopped       what Interrupted says
    keeps_blocks  every block stays in memory
    """

    structure: Structure
    device: torch.device
    source: Callable[[int], PartSource | None]
    is_interrupted: Callable[[], bool]
    stopped: str = "stopped between two parts"
    keeps_blocks: bool = False

    @contextmanager
    def __call__(self, number: int) -> Iterator[Installed]:
        if self.is_interrupted():
            raise Interrupted(self.stopped, hint="Run the same command with --resume to continue.")
        structure, source = self.structure, self.source(number)
        installed = Installed(structure) if source is None else load_part(structure, number, source, self.device)
        try:
            yield installed
        finally:
            installed.remove()
            if source is not None and 0 < number <= structure.block_count and not self.keeps_blocks:
                free_part(structure, number)


def load_part(structure: Structure, number: int, source: PartSource, device: torch.device) -> Installed:
    """Fill the model's parameters of a part, and let its stored layers stand in for the modules they replace."""
    fill_part(structure, number, source, device)
    installed = Installed(structure)
    installed.install_stored(source, device)
    return installed


def part_event(structure: Structure, sweep: int, part: Part, seconds: float) -> PartEvent:
    """What a sweep tells of a part that it is done with."""
    return {
        "event": "unit",
        "sweep": sweep,
        "unit": part.number,
        "units": structure.block_count + 2,
        "name": part_name(structure, part.number),
        "seconds": seconds,
    }
