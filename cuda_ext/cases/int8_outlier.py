"""LLM.int8(): int8_outlier.cu. Outputs are the model's bits, which are the CPU library's."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from compressor.kernels.cuda.interface import Kernels
from cuda_ext.cases import arrays
from cuda_ext.cases.arrays import BFLOAT16, FLOAT16, FLOAT32, KINDS, Memory, assert_equal, to_bits, to_float64
from cuda_ext.cases.quantize_rows import round_rows

THRESHOLD = 6.0  # of the paper


@dataclass(frozen=True)
class Case:
    """One call of compressor_int8_outlier.

    large    columns of x with elements above the threshold
    columns  how many columns are given; None: the threshold finds them
    """

    M: int
    N: int
    K: int
    type: int = FLOAT16
    threshold: float = THRESHOLD
    large: int = 3
    columns: int | None = None
    bias: bool = False

    def __str__(self) -> str:
        found = f"t{self.threshold:g}-{self.large}" if self.columns is None else f"given{self.columns}"
        name = f"llm_int8-{self.M}x{self.N}x{self.K}-{KINDS[self.type]}-{found}"
        return name + ("-bias" if self.bias else "")


# Tails of M, N and K, two blocks in each dimension of a grid: 64 rows or outputs, 2048 columns when flags are set, 64
# rows of a slice; more than 4 tiles of K; one row keeps the codes of 16384 columns. None, some or all columns are
# outliers.
CASES = (
    # one row
    Case(1, 8, 16),
    Case(1, 70, 1040, BFLOAT16, large=9, bias=True),
    Case(1, 66, 272, FLOAT32, large=6),
    Case(1, 5, 16464, large=11, bias=True),
    Case(1, 65, 96, threshold=1e-6, bias=True),
    Case(1, 65, 144, threshold=0.0),
    Case(1, 68, 336, BFLOAT16, columns=7, bias=True),
    # more
    Case(2, 8, 16, large=1),
    Case(5, 66, 400, bias=True),
    Case(3, 20, 2128, BFLOAT16, large=12),
    Case(70, 70, 336, FLOAT32, large=40, bias=True),
    Case(7, 65, 80, threshold=1e-6),
    Case(6, 66, 144, BFLOAT16, threshold=0.0, bias=True),
    Case(66, 40, 464, columns=9),
    Case(9, 66, 1168, FLOAT32, columns=20, bias=True),
)

# For a GPU only: many blocks at once.
LARGE_CASES = (
    Case(1, 8192, 8192, large=8, bias=True),
    Case(1, 11008, 4096, BFLOAT16, columns=16),
    Case(16, 4096, 11008, large=8),
    Case(300, 4096, 4096, BFLOAT16, large=20, bias=True),
)


@dataclass(frozen=True)
class Operands:
    """Arrays of a case in their quantization formats, and what has to come of them."""

    x: NDArray
    weight: NDArray  # int8 (N, K)
    absmax: NDArray  # float32 (N)
    columns: NDArray | None  # int32
    column_weight: NDArray | None
    bias: NDArray | None
    expected: NDArray  # (M, N) in the quantization format of the case's type


def make_operands(case: Case, seed: int) -> Operands:
    """Random operands. The columns `large` are large in one row each; the last column is the first of them.

    Calls of more than 3 rows have one of zeros and two with an infinity, in an outlier column and in another one.
    """
    random = np.random.default_rng([seed, case.M, case.N, case.K])
    weight = random.integers(-127, 128, (case.N, case.K), dtype=np.int8)
    absmax = random.random(case.N).astype(np.float32) + np.float32(0.1)
    absmax[0] = 0
    x = np.clip(random.standard_normal((case.M, case.K)), -4, 4)
    large = np.unique(np.append(random.permutation(case.K)[: case.large - 1], case.K - 1))
    for i, k in enumerate(large):
        x[case.M - 1 - i % case.M, k] = 20 + i
    if case.M > 3:
        x[1], x[2, large[0]], x[3, (large[0] + 1) % case.K] = 0, np.inf, -np.inf
    x = to_bits(x, case.type)
    bias = to_bits(random.standard_normal(case.N), case.type) if case.bias else None
    columns = column_weight = None
    if case.columns is not None:
        columns = np.sort(random.permutation(case.K)[: case.columns]).astype(np.int32)
        weight[:, columns] = 0
        column_weight = to_bits(random.standard_normal((case.N, case.columns)), case.type)
    expected = model(to_float64(x, case.type), weight, absmax, case, columns, column_weight, bias)
    return Operands(x, weight, absmax, columns, column_weight, bias, to_bits(expected, case.type))


def model(
    x: NDArray,
    weight: NDArray,
    absmax: NDArray,
    case: Case,
    columns: NDArray | None,
    column_weight: NDArray | None,
    bias: NDArray | None,
) -> NDArray:
    """y (M, N) float32, in the operations of compressor/kernels/cpu/int8_outlier.cpp, each rounded."""
    x, byte = x.astype(np.float32), np.float32(127)
    if columns is None:
        columns = (
            np.flatnonzero((np.abs(x) >= np.float32(case.threshold)).any(axis=0)) if case.threshold else np.array([])
        )
        columns = columns.astype(np.int32)
        exact = weight[:, columns].astype(np.float32) * absmax[:, None] / byte
        column_weight = to_bits(exact, case.type)
    assert column_weight is not None, "columns that are given have their weight"
    rest = x.copy()
    rest[:, columns] = 0
    codes, step = round_rows(rest)
    step = np.where(np.isfinite(x).all(axis=1), step, np.float32(np.nan))
    sums = codes.astype(np.float64) @ weight.astype(np.float64).T  # integers: exact
    y = sums.astype(np.float32) * (absmax / byte) * step[:, None]
    with np.errstate(invalid="ignore"):  # infinity times 0, in rows that are NaN anyway
        for c, k in enumerate(columns):
            y = y + x[:, k, None] * to_float64(column_weight[:, c], case.type).astype(np.float32)
    return y if bias is None else y + to_float64(bias, case.type).astype(np.float32)


launcher = partial(arrays.launcher, name="compressor_int8_outlier")


def workspace_bytes(kernels: Kernels, m: int, n: int, k: int) -> int:
    """What the call needs, or -1 for a bad shape."""
    return kernels.functions["compressor_int8_outlier_workspace_bytes"](m, n, k)


def run(kernels: Kernels, case: Case, memory: Memory, seed: int, stream: int = 0) -> NDArray:
    """Run the case and compare; raises AssertionError. The output starts as NaN, so all of it has to be written.

    returns  y as stored, (M, N)
    """
    operands = make_operands(case, seed)
    given = (operands.x, operands.weight, operands.absmax, operands.columns, operands.column_weight, operands.bias)
    placed = [None if array is None else memory.place(array) for array in given]
    y = memory.place(to_bits(np.full((case.M, case.N), np.nan), case.type))
    needed = workspace_bytes(kernels, case.M, case.N, case.K)
    # a workspace starts at a multiple of 16 bytes, and guarded arrays end where a page does
    workspace = memory.place(np.full(-(-needed // 16) * 16, 0xFF, np.uint8))
    addresses = [p.address if p else None for p in [*placed, y, workspace]]
    code = launcher(kernels)(
        *(*addresses, needed, case.M, case.N, case.K, case.columns or 0),
        *(case.threshold if case.columns is None else 0.0, case.type, stream),
    )
    assert code == 0, f"{case}: the launcher returned {code}"
    memory.wait()
    workspace.read()
    stored = np.array(y.read())
    assert_equal(f"{case}, seed {seed}", stored, operands.expected, case.type)
    return stored
