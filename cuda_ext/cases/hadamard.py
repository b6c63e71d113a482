"""Rows times a Hadamard matrix: hadamard.cu."""

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


@dataclass(frozen=True)
class Case:
    """One call of compressor_hadamard; a scale of 1 / sqrt(n) keeps the length of a row."""

    rows: int
    n: int
    type: int = FLOAT32
    scale: float = 1.0
    in_place: bool = False

    def __str__(self) -> str:
        kind = ("f16", "bf16", "f32")[self.type]
        return f"hadamard-{self.rows}x{self.n}-{kind}-{self.scale:.4g}" + ("-in_place" if self.in_place else "")


CASES = (
    Case(1, 8),
    Case(131, 8, FLOAT16),
    Case(33, 32, BFLOAT16, in_place=True),
    Case(9, 128, scale=128**-0.5),
    Case(5, 256, FLOAT16, scale=0.125),
    Case(3, 512, BFLOAT16),
    Case(2, 2048, in_place=True),
    Case(2, 8192, FLOAT16, scale=8192**-0.5),
    Case(2, 16384, BFLOAT16, scale=2.0**-7, in_place=True),
    Case(1, 32768, scale=32768**-0.5),
    # a run or several in a row; of one warp, of several; of one run a thread, of two, of four
    Case(3, 12),
    Case(70, 24, FLOAT16, in_place=True),
    Case(5, 640, BFLOAT16, scale=640**-0.5),
    Case(2, 12 * 64, FLOAT16, in_place=True),
    Case(2, 28 * 128, BFLOAT16),
    Case(33, 28),
    Case(9, 36 * 4, FLOAT16),
    Case(1, 36 * 1024, scale=36864**-0.5),
    Case(2, 12 * 1024, BFLOAT16),
    Case(1, 20 * 2048, FLOAT16, scale=2.0**-8),
)
LARGE_CASES = (
    Case(4096, 4096, FLOAT16, scale=2.0**-6),
    Case(512, 32768, BFLOAT16, scale=32768**-0.5),
    Case(1000, 5120, BFLOAT16, scale=5120**-0.5),
    Case(500, 14336, FLOAT16, scale=14336**-0.5),
    Case(500, 12288, scale=12288**-0.5),
)


def factor(n: int) -> int:
    """m of n = 2^p * m, H_n = H_(2^p) (x) H_m: 1 for powers of two, else four times the odd part."""
    odd = n // (n & -n)
    return 1 if odd == 1 else 4 * odd


def paley(m: int) -> NDArray:
    """H_m, float64 of 1 and -1, for m = 12, 20 (Paley's first construction) or 28, 36 (his second).

    With chi(a) 1 for a square modulo q, -1 for others, 0 for 0. First, q = m - 1: I + S, S antisymmetric, its first row
    (0, 1, ..., 1) and S[i, j] = chi(j - i). Second, q = m / 2 - 1: C (x) [1 1; 1 -1] + I (x) [1 -1; -1 -1], C symmetric
    with the same border. For m = 1 it is 1.
    """
    if m == 1:
        return np.ones((1, 1))
    first = m in (12, 20)
    q = m - 1 if first else m // 2 - 1
    chi = np.full(q, -1.0)
    chi[[x * x % q for x in range(1, q)]] = 1
    chi[0] = 0
    core = np.zeros((q + 1, q + 1))
    core[0, 1:], core[1:, 0] = 1, -1 if first else 1
    core[1:, 1:] = chi[(np.arange(q) - np.arange(q)[:, None]) % q]
    if first:
        return core + np.eye(m)
    turned = np.array([[1, 1], [1, -1]])
    return np.kron(core, turned) + np.kron(np.eye(q + 1), np.array([[1, -1], [-1, -1]]))


def hadamard_product(x: NDArray) -> NDArray:
    """x (rows, n) times H_n, in x's type: runs of m times H_m, then log2(n / m) butterflies."""
    rows, n = x.shape
    m = factor(n)
    width, x = m, (x.reshape(rows, n // m, m) @ paley(m)).reshape(rows, n)
    while width < n:
        pairs = x.reshape(rows, n // (2 * width), 2, width)
        x = np.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], axis=2).reshape(rows, n)
        width *= 2
    return x


launcher = partial(arrays.launcher, name="compressor_hadamard")


def run(kernels: Kernels, case: Case, memory: Memory, seed: int, stream: int = 0) -> NDArray:
    """Run the case and compare; raises AssertionError. Returns y as stored, (rows, n).

    A sum passes m + log2(n / m) additions, each off by UNIT of what it adds at most; then the product with the scale,
    and one rounding to the type of y. The scale itself is float32 on both sides.
    """
    random = np.random.default_rng([seed, case.rows, case.n])
    stored = to_bits(random.standard_normal((case.rows, case.n)), case.type)
    x = memory.place(stored)
    y = x if case.in_place else memory.place(to_bits(np.full(stored.shape, np.nan), case.type))
    code = launcher(kernels)(x.address, y.address, case.rows, case.n, case.scale, case.type, stream)
    assert code == 0, f"{case}: the launcher returned {code}"
    memory.wait()
    if not case.in_place:
        assert np.array_equal(x.read(), stored), f"{case}: x was changed"
    result = np.array(y.read())
    scale = float(np.float32(case.scale))
    values = to_float64(stored, case.type)
    expected = hadamard_product(values) * scale
    m = factor(case.n)
    inside = (m + (case.n // m).bit_length() + 1) * UNIT * np.abs(values).sum(axis=1, keepdims=True) * scale
    unit = OUTPUT_UNIT.get(case.type, UNIT)
    allowed = inside + unit * (np.abs(expected) + inside) + SMALLEST.get(case.type, 0.0)
    off = np.abs(to_float64(result, case.type) - expected)
    right = off <= allowed  # NaN is never right
    assert right.all(), f"{case}, seed {seed}: {(~right).sum()} of {right.size} outputs are wrong"
    return result
