"""Rows rounded to int8: quantize_rows.cu. Codes, scales and sums are the CPU library's bits."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from compressor.kernels.cuda.interface import Kernels
from cuda_ext.cases import arrays
from cuda_ext.cases.arrays import BFLOAT16, FLOAT16, FLOAT32, KINDS, Memory, assert_equal, to_bits, to_float64

TILE = 64
SMALLEST_ABSMAX = 2.0**-120


@dataclass(frozen=True)
class Case:
    """One call of compressor_quantize_rows. group_size of the sums, -1: one group; None: no sums."""

    M: int
    K: int
    type: int = FLOAT16
    group_size: int | None = None

    def __str__(self) -> str:
        return f"rows-{self.M}x{self.K}-{KINDS[self.type]}" + (f"-g{self.group_size}" if self.group_size else "")


# K below one warp's columns, of one warp, and of more than a round of the block, which has 2048; groups cut short by K.
CASES = (
    Case(1, 8),
    Case(1, 200, group_size=64),
    Case(9, 328, BFLOAT16, group_size=128),
    Case(5, 2112, FLOAT32, group_size=-1),
    Case(6, 4168, FLOAT16, group_size=192),
    Case(4, 256, FLOAT32),
)
LARGE_CASES = (Case(4096, 8192, group_size=128), Case(300, 11008, BFLOAT16, group_size=-1))


def round_rows(x: NDArray) -> tuple[NDArray, NDArray]:
    """x (M, K) float32 -> codes int8 (M, K) and the scale of each row, float32 (M): the CPU library's operations."""
    x = x.astype(np.float32)
    absmax = np.abs(x).max(axis=1)
    finite = np.isfinite(absmax)
    usable = finite & (absmax >= SMALLEST_ABSMAX)
    safe = np.where(usable, absmax, np.float32(1))
    inverse = np.float32(1) / safe * np.float32(127)
    codes = np.rint(np.where(usable[:, None], x, 0) * inverse[:, None]).astype(np.int8)
    return codes, np.where(usable, safe / np.float32(127), np.where(finite, np.float32(0), np.float32(np.nan)))


def rows_of(case: Case, seed: int) -> NDArray:
    """Random rows as stored. Calls of more than 3 rows have one of zeros, of ties, with NaN and with infinity."""
    random = np.random.default_rng([seed, case.M, case.K])
    size = 2.0 ** random.integers(-8, 8, (case.M, 1))
    x = random.standard_normal((case.M, case.K)) * size
    x[:, -1:] = 6 * size  # the last element is the largest
    if case.M > 3:
        x[0], x[1], x[2, 5], x[3, -1] = 0, random.integers(-127, 127, case.K) + 0.5, np.nan, -np.inf
        x[1, 0] = 127  # a step of 1
    return to_bits(x, case.type)


launcher = partial(arrays.launcher, name="compressor_quantize_rows")


def run(kernels: Kernels, case: Case, memory: Memory, seed: int, stream: int = 0) -> NDArray:
    """Run the case and compare; raises AssertionError. Outputs start as NaN or a pattern: all has to be written.

    returns  the codes, int8 (M, K rounded up to 64)
    """
    stored = rows_of(case, seed)
    expected, expected_scale = round_rows(to_float64(stored, case.type))
    expected = np.pad(expected, ((0, 0), (0, -case.K % TILE)))
    group_size = case.group_size if case.group_size and case.group_size > 0 else expected.shape[1]
    starts = np.arange(0, expected.shape[1], group_size)
    expected_sum = np.add.reduceat(expected.astype(np.int32), starts, axis=1)

    x, codes = memory.place(stored), memory.place(np.full(expected.shape, 0x55, np.int8))
    scale = memory.place(np.full(case.M, np.nan, np.float32))
    sums = memory.place(np.full(expected_sum.shape, 0x55555555, np.int32)) if case.group_size else None
    addresses = (x.address, codes.address, scale.address, sums.address if sums else None)
    code = launcher(kernels)(*addresses, case.M, case.K, case.group_size or -1, case.type, stream)
    assert code == 0, f"{case}: the launcher returned {code}"
    memory.wait()
    found = np.array(codes.read())
    assert_equal(f"{case}, seed {seed}, codes", found, expected)
    assert_equal(f"{case}, seed {seed}, scales", np.array(scale.read()), expected_scale)
    if sums:
        assert_equal(f"{case}, seed {seed}, sums", np.array(sums.read()), expected_sum)
    return found
