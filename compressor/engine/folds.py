"""Folds the inputs of groups: in memory, or one group after the other from a file.

The second moments of all experts of a layer are often larger than the experts themselves. If the experts don't fit into
memory, the inputs of each group are written to a file while the block runs once. The fold of a group is then computed
when a pass asks for it, from the same inputs in the same order.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Generic

import torch
from torch import Tensor

from compressor.model.weights import Group, Stage
from compressor.protocol.views import Folded


@dataclass(frozen=True)
class FoldsInMemory(Generic[Folded]):
    """Results that exist (`protocol.Folds`)."""

    results: list[Folded]
    tokens: list[int]

    def __len__(self) -> int:
        return len(self.results)

    def __getitem__(self, number: int) -> Folded:
        return self.results[number]

    def __iter__(self) -> Iterator[Folded]:
        return iter(self.results)


class SpilledInputs:
    """The inputs of the groups of a stage, in a file without a name. raises OSError if the disk is full"""

    def __init__(self, folder: Path, stage: Stage) -> None:
        self.stage = stage
        self.tokens = [0] * len(stage)
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (it is closed with this object)
        self._places: list[list[tuple[int, torch.Size, torch.dtype]]] = [[] for _ in stage]

    def add(self, number: int, x: Tensor) -> None:
        """Append x (tokens, in_features) to the inputs of a group."""
        self._places[number].append((self._file.tell(), x.shape, x.dtype))
        self.tokens[number] += len(x)
        if x.numel():
            self._file.write(x.contiguous().view(-1).view(torch.uint8).numpy().data)

    def of(self, number: int) -> Iterator[Tensor]:
        """The inputs of a group, in the order in which they were added."""
        for offset, shape, dtype in self._places[number]:
            value = torch.empty(shape, dtype=dtype)
            if value.numel():
                self._file.seek(offset)
                count = self._file.readinto(value.view(-1).view(torch.uint8).numpy().data)
                assert count == value.nbytes, "nobody else can shorten a file without a name"
            yield value


@dataclass(frozen=True)
class LaterFolds(Generic[Folded]):
    """Results that are computed each time when they are asked for (`protocol.Folds`)."""

    inputs: SpilledInputs
    start: Callable[[Group], Folded]
    step: Callable[[Folded, Tensor], Folded]

    @property
    def tokens(self) -> list[int]:
        return self.inputs.tokens

    def __len__(self) -> int:
        return len(self.inputs.stage)

    def __getitem__(self, number: int) -> Folded:
        folded = self.start(self.inputs.stage[number])
        for x in self.inputs.of(number):
            folded = self.step(folded, x)
        return folded

    def __iter__(self) -> Iterator[Folded]:
        return map(self.__getitem__, range(len(self)))
