"""Operands of the CUDA kernels: where they are kept, and their quantization formats as numbers."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

FLOAT16, BFLOAT16, FLOAT32 = 0, 1, 2  # device.h: Type
KINDS = ("f16", "bf16", "f32")  # their names
UNIT = 2.0**-24  # rounding to nearest, float32
OUTPUT_UNIT = {FLOAT16: 2.0**-11, BFLOAT16: 2.0**-8}
SMALLEST = {FLOAT16: 2.0**-25, BFLOAT16: 2.0**-134}  # half of the smallest subnormal
CANARY = 0x55


class Placed(Protocol):
    """An array where kernels can reach it."""

    @property
    def address(self) -> int: ...

    def read(self) -> NDArray: ...


class Memory(Protocol):
    """Where the operands of a case are kept. `products_unit`: relative error of one addition inside an mma."""

    products_unit: float

    def place(self, array: NDArray) -> Placed: ...

    def wait(self) -> None: ...


class GuardedArray:
    """An array that ends where an unreadable page begins, with a canary before it."""

    def __init__(self, array: NDArray):
        page = mmap.PAGESIZE
        size = (array.nbytes // page + 1) * page  # at least one byte of canary
        self._map = mmap.mmap(-1, size + page)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mprotect(ctypes.c_void_p(start + size), ctypes.c_size_t(page), 0):
            raise OSError(ctypes.get_errno(), "mprotect failed")
        self._canary = np.frombuffer(self._map, np.uint8, size - array.nbytes)
        self._canary[...] = CANARY
        self._array = np.frombuffer(self._map, array.dtype, array.size, size - array.nbytes).reshape(array.shape)
        self._array[...] = array
        self.address = start + size - array.nbytes

    def read(self) -> NDArray:
        """The array; raises AssertionError if something was written before it."""
        assert (self._canary == CANARY).all(), "bytes before the array were overwritten"
        return self._array


class GuardedMemory:
    """The memory of this process: one element too far ends the process."""

    products_unit = UNIT  # the emulated mma rounds its sum once, to nearest

    def place(self, array: NDArray) -> Placed:
        return GuardedArray(array)

    def wait(self) -> None:
        pass


def launcher(kernels: Any, name: str) -> Callable[..., int]:
    """A function of the kernels (compressor.kernels.cuda.interface.Kernels) that takes None for no address."""
    function = kernels.functions[name]
    return lambda *arguments: function(*(0 if argument is None else argument for argument in arguments))


def to_bits(values: NDArray, kind: int) -> NDArray:
    """float -> the quantization format of `kind`: uint16 bits of a half or bfloat16 (ties to even), or float32."""
    values = np.asarray(values, np.float32)
    if kind == FLOAT32:
        return values
    if kind == FLOAT16:
        return values.astype(np.float16).view(np.uint16)
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def to_float64(stored: NDArray, kind: int) -> NDArray:
    """The inverse of to_bits, exact."""
    if kind == FLOAT16:
        return stored.view(np.float16).astype(np.float64)
    if kind == BFLOAT16:
        return (stored.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return stored.astype(np.float64)


def assert_equal(what: str, stored: NDArray, expected: NDArray, kind: int | None = None) -> None:
    """The same numbers, NaN where NaN is expected. `kind`: of stored floats; others are compared as they are."""
    if kind is not None:
        stored, expected = to_float64(stored, kind), to_float64(expected, kind)
    right = (stored == expected) | ((stored != stored) & (expected != expected))
    assert right.all(), f"{what}: {(~right).sum()} of {right.size} outputs are wrong"
