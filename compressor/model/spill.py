"""Keeps tensors in files that are mapped into memory when they are read, for hidden states that don't fit into memory.

A file is mapped only while its tensor is in use. The system may drop the pages of a mapping at any time, and they are
gone with the last tensor of the mapping.
"""

from __future__ import annotations

import math
import mmap
import os
import weakref
from itertools import count
from pathlib import Path

import torch
from torch import Tensor


class Spilled:
    """A tensor in a file of its own, which is deleted with this object."""

    def __init__(self, file: Path, value: Tensor) -> None:
        self.file, self.dtype, self.shape, self.device = file, value.dtype, value.shape, value.device
        with file.open("wb") as opened:
            opened.write(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        weakref.finalize(self, _delete, file)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> Tensor:
        """The tensor, mapped from its file. Whoever writes into it changes a private copy of the page."""
        with self.file.open("rb") as opened:
            pages = mmap.mmap(opened.fileno(), self.nbytes, access=mmap.ACCESS_COPY)
        return torch.frombuffer(pages, dtype=self.dtype).view(self.shape).to(self.device)


class SpillFolder:
    """A folder of spilled tensors. It may exist; what an earlier run left there is deleted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob("*.spilled"):
            left.unlink()
        self._numbers = count()

    def keep(self, value: Tensor) -> Tensor | Spilled:
        """The tensor in a file; an empty tensor as it is."""
        return Spilled(self.folder / f"{next(self._numbers)}.spilled", value) if value.numel() else value


def kept(held: Tensor | Spilled) -> Tensor:
    """The tensor that `SpillFolder.keep` kept, or that was kept in memory."""
    return held.read() if isinstance(held, Spilled) else held


def _delete(file: Path) -> None:
    if file.exists():
        os.unlink(file)
