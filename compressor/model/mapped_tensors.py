"""Keeps the experts of a block in a file that is mapped into memory, for blocks that don't fit into memory.

A parameter of all experts (experts, rows, columns) is one tensor in such a file, so the model's class uses it like any
other. Its forward reads one expert after the other. After each operation on such a tensor the process gives back the
pages that were read, so that only the matrices of about one expert are resident at a time. The values stay in the file,
and the system keeps as much of it in its cache as the memory allows.

The files have no name in the folder, so nothing is left of them after the last use or after a kill.
"""

from __future__ import annotations

import math
import mmap
import os
import tempfile
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

ALIGNMENT = 64  # of a tensor in a file, as torch aligns tensors in memory
FILE_BYTES = 1 << 26  # of a file for small tensors
GROUPED = torch._grouped_mm  # the operation of torch.nn.functional.grouped_mm

Empty = Callable[[tuple[int, ...], torch.dtype], Tensor]  # makes a tensor without values


def in_memory(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor without values, as an `Empty`."""
    return torch.empty(shape, dtype=dtype)


def are_experts(module: nn.Module, parameter: Tensor | None) -> bool:
    """Whether a parameter of a module has the matrices of all experts, and the class reads them one by one.

    transformers tells such classes how to run their experts, by an attribute that only they have.
    """
    return parameter is not None and parameter.dim() == 3 and hasattr(module, "is_concatenated")


def expert_parameters(model: nn.Module, names: Iterable[str]) -> set[str]:
    """Those of the parameters with these names that `are_experts`."""
    found = set()
    for name in names:
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if are_experts(module, module._parameters.get(leaf)):
            found.add(name)
    return found


class MappedTensors(TorchFunctionMode):
    """Makes tensors in mapped files. Inside this mode, pages are given back after each operation on one of them."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self._files: list[tuple[int, int, weakref.ref[mmap.mmap]]] = []  # (address, bytes, file), by address
        self._open: tuple[mmap.mmap, int] | None = None  # the file for small tensors, and how much of it is used

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor without values in a file of its own, as an `Empty`. raises OSError if the disk is full"""
        size = math.prod(shape) * dtype.itemsize
        return _tensor(self._new_file(size), 0, shape, dtype) if size else in_memory(shape, dtype)

    def keep(self, value: Tensor) -> Tensor:
        """A copy of a small tensor, in a file that many of them share. raises OSError if the disk is full"""
        size = value.nbytes
        if not size:
            return value
        if self._open is None or self._open[1] + size > len(self._open[0]):
            self._open = self._new_file(max(size, FILE_BYTES)), 0
        file, at = self._open
        self._open = file, at + -(-size // ALIGNMENT) * ALIGNMENT
        kept = _tensor(file, at, tuple(value.shape), value.dtype)
        kept.copy_(value)
        self._give_back(kept)
        return kept

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        is_property = getattr(func, "__name__", "") == "__get__"  # as a shape or a dtype; no value is read
        if is_property or not self._files:
            return func(*args, **kwargs)
        with torch._C.DisableTorchFunction():  # else a mode around this one sees each question
            used = [value for value in _tensors((*args, *kwargs.values())) if self._file_of(value) is not None]
        if used and func == GROUPED and used[0].dim() == 3:
            return self._grouped(*args, **kwargs)
        result = func(*args, **kwargs)
        for value in used:
            self._give_back(value)
        return result

    def _grouped(self, x: Tensor, weights: Tensor, offs: Tensor, **options: Any) -> Tensor:
        """A product of groups of rows with one matrix each, one group after the other; the same bits as all at once.

        x        (rows, in)
        weights  (groups, in, out)
        offs     (groups,) int32, where each group ends
        """
        found, start = [], 0
        for number, stop in enumerate(offs.tolist()):
            if stop > start:
                rows = torch.tensor([stop - start], dtype=offs.dtype)
                found.append(GROUPED(x[start:stop], weights[number : number + 1], offs=rows, **options))
                self._give_back(weights[number])
            start = stop
        return torch.cat(found) if found else x.new_zeros(0, weights.shape[2])

    def _new_file(self, size: int) -> mmap.mmap:
        with tempfile.TemporaryFile(dir=self.folder) as opened:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(opened.fileno(), 0, size)  # a write to a page without space would end the process
            else:
                os.truncate(opened.fileno(), size)
            file = mmap.mmap(opened.fileno(), size)
        address = torch.frombuffer(file, dtype=torch.uint8).data_ptr()
        self._files.append((address, size, weakref.ref(file, self._forget)))
        self._files.sort(key=lambda known: known[0])
        return file

    def _forget(self, freed: weakref.ref[mmap.mmap]) -> None:
        self._files = [known for known in self._files if known[2] is not freed]

    def _file_of(self, value: Tensor) -> tuple[int, mmap.mmap] | None:
        """The address and the file in which a tensor lies; None for any other tensor."""
        if value.device.type != "cpu" or value.layout is not torch.strided:
            return None
        address = value.data_ptr()
        at = bisect_right(self._files, address, key=lambda known: known[0]) - 1
        if at < 0 or address >= self._files[at][0] + self._files[at][1]:
            return None
        file = self._files[at][2]()
        return None if file is None else (self._files[at][0], file)

    def _give_back(self, value: Tensor) -> None:
        """Give back the pages of a tensor. What was written into them stays in the file."""
        with torch._C.DisableTorchFunction():
            found = self._file_of(value)
            if found is None or not value.numel():
                return
            start = value.data_ptr() - found[0]
            last = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
            first = start // mmap.PAGESIZE * mmap.PAGESIZE
            found[1].madvise(mmap.MADV_DONTNEED, first, start + (last + 1) * value.dtype.itemsize - first)


def _tensor(file: mmap.mmap, at: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(file, dtype=dtype, count=math.prod(shape), offset=at).view(shape)


def _tensors(values: Iterable[Any]) -> Iterable[Tensor]:
    """The tensors among these arguments, and in lists and tuples of them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
