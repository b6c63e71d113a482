"""Measures a machine's limits with ceilings.cpp: memory bandwidths and the peaks of instructions."""

from __future__ import annotations

import ctypes
import statistics
import subprocess
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).parent
PEAKS = ("int8", "float", "bf16", "int8_tiles", "bf16_tiles")
PIECE = 16 * 2**20  # bytes of one read of memory


class Ceilings:
    """This machine's limits on `threads`, by ceilings.cpp.

    A buffer of four times the last cache is read in pieces of the size of a weight, one after the other: a longer read
    is disturbed more by other processes, and its median would be below the bandwidth that a matmul reaches.
    """

    def __init__(self, threads: int, cache: int, quick: bool) -> None:
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder, "ceilings.so")
            source = str(HERE / "ceilings.cpp")
            flags = ["-O3", "-std=c++17", "-shared", "-fPIC", "-pthread"]
            subprocess.run(["g++", *flags, source, "-o", str(target)], check=True)
            self._library = ctypes.CDLL(str(target))
        if not self._library.has_required():
            raise RuntimeError("the ceilings need a processor with AVX2 and FMA")
        self.threads, self.rounds = threads, 100_000 if quick else 1_000_000
        self.buffer = torch.empty(4 * cache, dtype=torch.uint8)
        self._library.use_large_pages(ctypes.c_void_p(self.buffer.data_ptr()), ctypes.c_size_t(self.buffer.numel()))
        self.buffer.random_(0, 255)
        self.target = torch.zeros_like(self.buffer)
        self._next, self.streams = 0, 4
        for name in ("read_bandwidth", "copy_bandwidth", "triad_bandwidth", *(f"{kind}_peak" for kind in PEAKS)):
            getattr(self._library, name).restype = ctypes.c_double
        found: dict[int, list[float]] = {1: [], 4: []}
        for _ in range(1 if quick else 20):
            for self.streams, speeds in found.items():
                speeds.append(self.read())
        self.streams = max(found, key=lambda streams: statistics.median(found[streams]))

    def read(self) -> float:
        size = min(PIECE, self.buffer.numel())
        self._next = self._next if self._next + size <= self.buffer.numel() else 0
        place = self.buffer.data_ptr() + self._next
        self._next += size
        return self._library.read_bandwidth(ctypes.c_void_p(place), ctypes.c_size_t(size), self.threads, self.streams)

    def copy(self) -> float:
        places = ctypes.c_void_p(self.buffer.data_ptr()), ctypes.c_void_p(self.target.data_ptr())
        return self._library.copy_bandwidth(*places, ctypes.c_size_t(self.buffer.numel()), self.threads)

    def triad(self) -> float:
        a, b, c = torch.ones(3, self.buffer.numel() // 4)
        places = (ctypes.c_void_p(array.data_ptr()) for array in (a, b, c))
        return self._library.triad_bandwidth(*places, ctypes.c_size_t(a.numel()), self.threads)

    def peak(self, kind: str) -> float:
        """kind: one of PEAKS; operations per second, 0 if the processor has no such instruction"""
        return getattr(self._library, f"{kind}_peak")(self.threads, ctypes.c_int64(self.rounds))
