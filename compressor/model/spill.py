"""Keeps tensors in files that are mapped into memory when they are read, for hidden states that don't fit into memory.

A file is mapped only while its tensor is in use. The system may drop the pages of a mapping at any time, and they are
gone with the last tensor of the mapping.
"""

from __future__ import annotations

import math
import mmap
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True)
class Spilled:
    """A tensor in a file. The file holds nothing else."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> Tensor:
        """The tensor, mapped from its file. Whoever writes into it changes a private copy of the page."""
        if not self.nbytes:
            return torch.empty(self.shape, dtype=self.dtype)
        with self.file.open("rb") as file:
            pages = mmap.mmap(file.fileno(), self.nbytes, access=mmap.ACCESS_COPY)
        return torch.frombuffer(pages, dtype=self.dtype).view(self.shape)


@dataclass
class SpillFolder:
    """A folder of spilled tensors, each under a number of its own."""

    folder: Path

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)

    def write(self, number: int, value: Tensor) -> Spilled:
        """Keep a tensor under this number. A tensor that is still mapped from the number's earlier file stays valid."""
        spilled = Spilled(self.folder / f"{number:06d}.bin", value.dtype, value.shape)
        fresh = spilled.file.with_suffix(".new")
        with fresh.open("wb") as file:
            file.write(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        os.replace(fresh, spilled.file)
        return spilled
