"""Correctness cases of the CUDA library, the same on a GPU and under emulation. Needs numpy alone.

`run_w4_a16(library, case, memory, seed)` runs a case: `library` is the loaded shared object, and `memory` places arrays
where kernels can read them. That is `GuardedMemory` here, or the memory of a GPU (scripts/check_gpu.py).
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

FLOAT16, BFLOAT16, FLOAT32 = 0, 1, 2  # device.h: Type
TILE = 64
LANE = np.arange(32)
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


def to_bits(values: NDArray, kind: int) -> NDArray:
    """float -> the stored form of `kind`: uint16 bits of a half or bfloat16 (ties to even), or float32."""
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


def pack_mma1(codes: NDArray) -> NDArray:
    """Codes 0 to 15, uint8 (N, K) -> uint32 (N / 64, K / 64, 4, 4, 32), both rounded up; drawn in w_a16.cu."""
    n, k = codes.shape
    padded = np.full((-(-n // TILE) * TILE, -(-k // TILE) * TILE), 8, np.uint32)
    padded[:n, :k] = codes
    tiles = padded.reshape(len(padded) // TILE, 4, 16, -1, 4, 16)  # [tile n, n / 16, n % 16, tile k, k / 16, k % 16]
    word = np.zeros((tiles.shape[0], tiles.shape[3], 4, 4, 32), np.uint32)
    for nibble in range(8):
        further_n, further_k, upper = nibble % 2, nibble // 2 % 2, nibble // 4
        # indices of two axes at once put their common axis first: [lane, tile n, n / 16, tile k, k / 16]
        part = tiles[:, :, LANE // 4 + 8 * further_n, :, :, LANE % 4 * 2 + 8 * further_k + upper]
        word |= part.transpose(1, 3, 4, 2, 0) << np.uint32(4 * nibble)
    return word


@dataclass(frozen=True)
class Case:
    """One call of compressor_w4_a16. group_size -1: one group."""

    M: int
    N: int
    K: int
    group_size: int = 64
    x_type: int = FLOAT16
    scale_type: int = FLOAT16
    zero_points: bool = False
    bias: bool = False
    positive: bool = False  # nothing cancels: x and W are positive

    def __str__(self) -> str:
        kind = ("f16", "bf16", "f32")
        extras = [name for name in ("zero_points", "bias", "positive") if getattr(self, name)]
        types = f"{kind[self.x_type]}-{kind[self.scale_type]}"
        return "-".join([f"{self.M}x{self.N}x{self.K}", f"g{self.group_size}", types, *extras])


# Tails of M, N and K; two blocks in each dimension of the grid; groups cut short by K and by a slice. Pipelines hold
# 6 (M <= 16) and 4 tiles, so more are needed to refill them; from 16 tiles on K is sliced (M <= 64).
CASES = (
    # up to 8 rows
    Case(1, 64, 64),
    Case(1, 8, 128, group_size=128, zero_points=True),
    Case(5, 72, 200, x_type=BFLOAT16, scale_type=BFLOAT16, zero_points=True, bias=True),
    Case(3, 130, 8, group_size=-1, bias=True),
    Case(3, 66, 640, positive=True),
    Case(8, 1, 704, x_type=BFLOAT16, scale_type=BFLOAT16, positive=True),
    Case(1, 72, 1096, group_size=128, zero_points=True, bias=True),
    # up to 16
    Case(16, 64, 584, zero_points=True),
    Case(9, 70, 1544, group_size=640, x_type=BFLOAT16, scale_type=FLOAT32, zero_points=True, bias=True),
    Case(13, 65, 1024, group_size=-1),
    # up to 32
    Case(17, 130, 328, group_size=128, scale_type=FLOAT32, zero_points=True, bias=True),
    Case(17, 66, 1032, scale_type=BFLOAT16, zero_points=True, bias=True),
    Case(32, 8, 640, x_type=BFLOAT16, positive=True),
    # more
    Case(33, 70, 320, group_size=-1, x_type=BFLOAT16, scale_type=FLOAT32),
    Case(65, 72, 456, group_size=192, x_type=BFLOAT16, scale_type=FLOAT16, zero_points=True, bias=True),
    Case(70, 8, 1032, positive=True),
)


# For a GPU only: many blocks and slices at once.
LARGE_CASES = (
    Case(1, 8192, 8192, group_size=128, zero_points=True),
    Case(16, 4096, 11008, group_size=128, x_type=BFLOAT16, scale_type=BFLOAT16),
    Case(64, 11008, 4096, group_size=64, bias=True),
    Case(300, 4096, 4096, group_size=-1, x_type=BFLOAT16, scale_type=FLOAT32, bias=True),
)


@dataclass(frozen=True)
class Operands:
    """Arrays of a case in their stored forms, and what has to come of them."""

    x: NDArray
    packed: NDArray
    scale: NDArray
    zero_point: NDArray | None
    bias: NDArray | None
    expected: NDArray  # float64
    size: NDArray  # float64: the sum of the products' absolute values


def make_operands(case: Case, seed: int) -> Operands:
    """Random operands; scales of 0 and zero points of 0 and 15 are among them."""
    random = np.random.default_rng([seed, case.M, case.N, case.K])
    group_size = case.group_size if case.group_size > 0 else -(-case.K // TILE) * TILE
    groups = -(-case.K // group_size)
    codes = random.integers(8 if case.positive else 0, 16, (case.N, case.K), dtype=np.uint8)
    scale = to_bits(random.random((groups, case.N)) * 0.02 + 0.01, case.scale_type)
    zero_point = None
    if case.zero_points:
        zero_point = random.integers(0, 16, (groups, case.N), dtype=np.uint8)
        scale[0, 0] = 0
    x = random.standard_normal((case.M, case.K))
    x = to_bits(np.abs(x) if case.positive else x, case.x_type)
    bias = to_bits(random.standard_normal(case.N), case.x_type) if case.bias else None

    group = np.arange(case.K) // group_size
    zero = np.full((groups, case.N), 8.0) if zero_point is None else zero_point.astype(np.float64)
    weight = (codes - zero.T[:, group]) * to_float64(scale, case.scale_type).T[:, group]
    x64, b64 = to_float64(x, case.x_type), 0.0 if bias is None else to_float64(bias, case.x_type)
    return Operands(
        x,
        pack_mma1(codes),
        scale,
        zero_point,
        bias,
        expected=x64 @ weight.T + b64,
        size=np.abs(x64) @ np.abs(weight).T + np.abs(b64),
    )


def bound(case: Case, operands: Operands, products_unit: float) -> NDArray:
    """How far y may be from `expected`, float64 (M, N).

    Every x * (code - zero_point) is exact, and a sum passes at most K additions inside the mma, each off by
    `products_unit`; then come a product and an addition per group (one more for each slice, and a slice has 8 tiles
    or more), the bias, and the rounding to the type of y.
    """
    groups = 1 if case.group_size < 0 else -(-case.K // case.group_size)
    slices = -(-case.K // (8 * TILE))
    in_sums = (case.K * products_unit + (groups + 2 * slices + 1) * UNIT) * operands.size
    return in_sums + OUTPUT_UNIT[case.x_type] * (np.abs(operands.expected) + in_sums) + SMALLEST[case.x_type]


def launcher(library: ctypes.CDLL) -> Callable[..., int]:
    """compressor_w4_a16 of the library, with its types: seven addresses, bytes, six ints, a stream."""
    function = library.compressor_w4_a16
    function.argtypes = [ctypes.c_void_p] * 7 + [ctypes.c_int64] + [ctypes.c_int] * 6 + [ctypes.c_void_p]
    function.restype = ctypes.c_int
    return function


def workspace_bytes(library: ctypes.CDLL, m: int, n: int, k: int) -> int:
    """What the call needs, or -1 for a bad shape."""
    function = library.compressor_w4_a16_workspace_bytes
    function.argtypes = [ctypes.c_int] * 3
    function.restype = ctypes.c_int64
    return function(m, n, k)


def run_w4_a16(library: ctypes.CDLL, case: Case, memory: Memory, seed: int, stream: int | None = None) -> NDArray:
    """Run the case and compare; raises AssertionError. The output starts as NaN, so all of it has to be written.

    returns  y as stored, uint16 (M, N)
    """
    operands = make_operands(case, seed)
    given = (operands.x, operands.packed, operands.scale, operands.zero_point, operands.bias)
    placed = [None if array is None else memory.place(array) for array in given]
    y = memory.place(np.full((case.M, case.N), 0x7FFF, np.uint16))
    needed = workspace_bytes(library, case.M, case.N, case.K)
    workspace = memory.place(np.full(needed // 4, np.nan, np.float32))
    addresses = [p.address if p else None for p in [*placed, y, workspace]]
    sizes = (case.M, case.N, case.K, case.group_size, case.x_type, case.scale_type)
    code = launcher(library)(*addresses, needed, *sizes, stream)
    assert code == 0, f"{case}: the launcher returned {code}"
    memory.wait()
    workspace.read()
    stored = np.array(y.read())
    off = np.abs(to_float64(stored, case.x_type) - operands.expected)
    right = off <= bound(case, operands, memory.products_unit)  # NaN is never right
    assert right.all(), (
        f"{case}, seed {seed}: {(~right).sum()} of {right.size} outputs are wrong, by up to {np.nanmax(off)}"
    )
    return stored


@dataclass(frozen=True)
class HadamardCase:
    """One call of compressor_hadamard; a scale of 1 / sqrt(n) keeps the length of a row."""

    rows: int
    n: int
    type: int = FLOAT32
    scale: float = 1.0
    in_place: bool = False

    def __str__(self) -> str:
        kind = ("f16", "bf16", "f32")[self.type]
        return f"hadamard-{self.rows}x{self.n}-{kind}-{self.scale:.4g}" + ("-in_place" if self.in_place else "")


HADAMARD_CASES = (
    HadamardCase(1, 8),
    HadamardCase(131, 8, FLOAT16),
    HadamardCase(33, 32, BFLOAT16, in_place=True),
    HadamardCase(9, 128, scale=128**-0.5),
    HadamardCase(5, 256, FLOAT16, scale=0.125),
    HadamardCase(3, 512, BFLOAT16),
    HadamardCase(2, 2048, in_place=True),
    HadamardCase(2, 8192, FLOAT16, scale=8192**-0.5),
    HadamardCase(2, 16384, BFLOAT16, scale=2.0**-7, in_place=True),
    HadamardCase(1, 32768, scale=32768**-0.5),
)
LARGE_HADAMARD_CASES = (
    HadamardCase(4096, 4096, FLOAT16, scale=2.0**-6),
    HadamardCase(512, 32768, BFLOAT16, scale=32768**-0.5),
)


def walsh_hadamard(x: NDArray) -> NDArray:
    """x (rows, n) times Sylvester's matrix, in x's type: log2(n) butterflies."""
    rows, n = x.shape
    width = 1
    while width < n:
        pairs = x.reshape(rows, n // (2 * width), 2, width)
        x = np.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], axis=2).reshape(rows, n)
        width *= 2
    return x


def hadamard_launcher(library: ctypes.CDLL) -> Callable[..., int]:
    """compressor_hadamard of the library, with its types."""
    function = library.compressor_hadamard
    function.argtypes = [ctypes.c_void_p] * 2 + [ctypes.c_int64, ctypes.c_int, ctypes.c_float, ctypes.c_int]
    function.argtypes += [ctypes.c_void_p]
    function.restype = ctypes.c_int
    return function


def run_hadamard(
    library: ctypes.CDLL, case: HadamardCase, memory: Memory, seed: int, stream: int | None = None
) -> NDArray:
    """Run the case and compare; raises AssertionError. Returns y as stored, (rows, n).

    A sum passes log2(n) additions, each off by UNIT of what it adds at most; then the product with the scale, and one
    rounding to the type of y. The scale itself is float32 on both sides.
    """
    random = np.random.default_rng([seed, case.rows, case.n])
    stored = to_bits(random.standard_normal((case.rows, case.n)), case.type)
    x = memory.place(stored)
    y = x if case.in_place else memory.place(to_bits(np.full(stored.shape, np.nan), case.type))
    code = hadamard_launcher(library)(x.address, y.address, case.rows, case.n, case.scale, case.type, stream)
    assert code == 0, f"{case}: the launcher returned {code}"
    memory.wait()
    if not case.in_place:
        assert np.array_equal(x.read(), stored), f"{case}: x was changed"
    result = np.array(y.read())
    scale = float(np.float32(case.scale))
    values = to_float64(stored, case.type)
    expected = walsh_hadamard(values) * scale
    inside = (case.n.bit_length() + 1) * UNIT * np.abs(values).sum(axis=1, keepdims=True) * scale
    unit = OUTPUT_UNIT.get(case.type, UNIT)
    allowed = inside + unit * (np.abs(expected) + inside) + SMALLEST.get(case.type, 0.0)
    off = np.abs(to_float64(result, case.type) - expected)
    right = off <= allowed  # NaN is never right
    assert right.all(), f"{case}, seed {seed}: {(~right).sum()} of {right.size} outputs are wrong"
    return result


def run(
    library: ctypes.CDLL, case: Case | HadamardCase, memory: Memory, seed: int, stream: int | None = None
) -> NDArray:
    """Run a case of any kernel."""
    if isinstance(case, HadamardCase):
        return run_hadamard(library, case, memory, seed, stream)
    return run_w4_a16(library, case, memory, seed, stream)


# by the name of the source
ALL_CASES: dict[str, tuple[Case | HadamardCase, ...]] = {"w_a16": CASES, "hadamard": HADAMARD_CASES}
ALL_LARGE_CASES: tuple[Case | HadamardCase, ...] = (*LARGE_CASES, *LARGE_HADAMARD_CASES)
