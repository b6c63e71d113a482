"""Products of weights of 2, 3, 4 or 8 bits with inputs that are not quantized: w_a16.cu."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from compressor.kernels.cuda.interface import Kernels
from cuda_ext.cases import arrays
from cuda_ext.cases.arrays import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    OUTPUT_UNIT,
    SMALLEST,
    UNIT,
    Memory,
    to_bits,
    to_float64,
)

TILE = 64
LANE = np.arange(32)


def pack_mma1(codes: NDArray, bits: int) -> NDArray:
    """Codes 0 to 2^bits - 1, uint8 (N, K) -> uint32 (N / 64, K / 64, words), both rounded up; drawn in codes.h."""
    n, k = codes.shape
    padded = np.full((-(-n // TILE) * TILE, -(-k // TILE) * TILE), 1 << (bits - 1), np.uint32)
    padded[:n, :k] = codes
    tiles = padded.reshape(len(padded) // TILE, 4, 16, -1, 4, 16)  # [tile n, n / 16, n % 16, tile k, k / 16, k % 16]
    words = {2: 2, 3: 3, 4: 4, 8: 8}[bits]  # planes of 128 words
    packed = np.zeros((tiles.shape[0], tiles.shape[3], words, 4, 32), np.uint32)
    for i in range(4):
        for upper in range(2):
            # indices of two axes at once put their common axis first: [lane, tile n, n / 16, tile k, k / 16]
            part = tiles[:, :, LANE // 4 + 8 * (i % 2), :, :, LANE % 4 * 2 + 8 * (i // 2) + upper]
            part = part.transpose(1, 3, 4, 2, 0)  # [tile n, tile k, k / 16, n / 16, lane]
            for piece in range(4):
                code, half = part[:, :, piece], 16 * upper
                if bits == 4:
                    packed[:, :, piece] |= code << np.uint32(half + 4 * i)
                elif bits == 8:
                    packed[:, :, 2 * piece + i // 2] |= code << np.uint32(half + 8 * (i % 2))
                else:
                    packed[:, :, piece // 2] |= (code & 3) << np.uint32(half + 8 * (piece % 2) + 2 * i)
                if bits == 3:
                    packed[:, :, 2] |= code >> 2 << np.uint32(half + 4 * piece + i)
    return packed.reshape(*packed.shape[:2], -1)


@dataclass(frozen=True)
class Case:
    """One call of compressor_w_a16. group_size -1: one group."""

    M: int
    N: int
    K: int
    group_size: int = 64
    x_type: int = FLOAT16
    scale_type: int = FLOAT16
    zero_points: bool = False
    bias: bool = False
    positive: bool = False  # nothing cancels: x and W are positive
    bits: int = 4

    def __str__(self) -> str:
        kind = ("f16", "bf16", "f32")
        extras = [name for name in ("zero_points", "bias", "positive") if getattr(self, name)]
        types = f"{kind[self.x_type]}-{kind[self.scale_type]}"
        return "-".join([f"w{self.bits}-{self.M}x{self.N}x{self.K}", f"g{self.group_size}", types, *extras])


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
    # other widths, by each kernel
    Case(3, 66, 456, bits=2, zero_points=True, bias=True),
    Case(33, 20, 328, bits=2, x_type=BFLOAT16),
    Case(2, 72, 520, bits=3, x_type=BFLOAT16, scale_type=BFLOAT16, zero_points=True),
    Case(17, 66, 328, bits=3),
    Case(9, 70, 712, bits=8, scale_type=FLOAT32, zero_points=True, bias=True),
    Case(65, 40, 392, bits=8),
    Case(1, 66, 584, bits=8, x_type=BFLOAT16),
    Case(33, 24, 328, bits=8, x_type=BFLOAT16, zero_points=True),
)


# For a GPU only: many blocks and slices at once.
LARGE_CASES = (
    Case(1, 8192, 8192, group_size=128, zero_points=True),
    Case(16, 4096, 11008, group_size=128, x_type=BFLOAT16, scale_type=BFLOAT16),
    Case(64, 11008, 4096, group_size=64, bias=True),
    Case(300, 4096, 4096, group_size=-1, x_type=BFLOAT16, scale_type=FLOAT32, bias=True),
    Case(1, 8192, 8192, group_size=128, bits=2, zero_points=True),
    Case(16, 4096, 4096, group_size=128, bits=3, x_type=BFLOAT16),
    Case(64, 4096, 4096, group_size=128, bits=8, x_type=BFLOAT16, zero_points=True),
    Case(300, 4096, 4096, bits=8, bias=True),
)


@dataclass(frozen=True)
class Operands:
    """Arrays of a case in their quantization formats, and what has to come of them."""

    x: NDArray
    packed: NDArray
    scale: NDArray
    zero_point: NDArray | None
    bias: NDArray | None
    expected: NDArray  # float64
    size: NDArray  # float64: the sum of the products' absolute values


def make_operands(case: Case, seed: int) -> Operands:
    """Random operands; scales of 0 and zero points of both ends are among them."""
    random = np.random.default_rng([seed, case.M, case.N, case.K])
    group_size = case.group_size if case.group_size > 0 else -(-case.K // TILE) * TILE
    groups = -(-case.K // group_size)
    middle = 1 << (case.bits - 1)
    codes = random.integers(middle if case.positive else 0, 2 * middle, (case.N, case.K), dtype=np.uint8)
    scale = to_bits(random.random((groups, case.N)) * 0.02 + 0.01, case.scale_type)
    zero_point = None
    if case.zero_points:
        zero_point = random.integers(0, 2 * middle, (groups, case.N), dtype=np.uint8)
        scale[0, 0] = 0
    x = random.standard_normal((case.M, case.K))
    x = to_bits(np.abs(x) if case.positive else x, case.x_type)
    bias = to_bits(random.standard_normal(case.N), case.x_type) if case.bias else None

    group = np.arange(case.K) // group_size
    zero = np.full((groups, case.N), float(middle)) if zero_point is None else zero_point.astype(np.float64)
    weight = (codes - zero.T[:, group]) * to_float64(scale, case.scale_type).T[:, group]
    x64, b64 = to_float64(x, case.x_type), 0.0 if bias is None else to_float64(bias, case.x_type)
    return Operands(
        x,
        pack_mma1(codes, case.bits),
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


launcher = partial(arrays.launcher, name="compressor_w_a16")


def workspace_bytes(kernels: Kernels, m: int, n: int, k: int) -> int:
    """What the call needs, or -1 for a bad shape."""
    return kernels.functions["compressor_w_a16_workspace_bytes"](m, n, k)


def run(kernels: Kernels, case: Case, memory: Memory, seed: int, stream: int = 0) -> NDArray:
    """Run the case and compare; raises AssertionError. The output starts as NaN, so all of it has to be written.

    returns  y as stored, uint16 (M, N)
    """
    operands = make_operands(case, seed)
    given = (operands.x, operands.packed, operands.scale, operands.zero_point, operands.bias)
    placed = [None if array is None else memory.place(array) for array in given]
    y = memory.place(np.full((case.M, case.N), 0x7FFF, np.uint16))
    needed = workspace_bytes(kernels, case.M, case.N, case.K)
    workspace = memory.place(np.full(needed // 4, np.nan, np.float32))
    addresses = [p.address if p else None for p in [*placed, y, workspace]]
    sizes = (case.M, case.N, case.K, case.bits, case.group_size, case.x_type, case.scale_type)
    code = launcher(kernels)(*addresses, needed, *sizes, stream)
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
