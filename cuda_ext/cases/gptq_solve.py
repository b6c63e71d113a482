"""Columns of a GPTQ sub-block, rounded one by one: gptq_solve.cu."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from compressor.kernels.cuda.interface import Kernels
from cuda_ext.cases import arrays
from cuda_ext.cases.arrays import Memory

MAX_COLUMNS = 128
LOW, HIGH = -8.0, 7.0


@dataclass(frozen=True)
class Case:
    """One call of compressor_gptq_solve: columns begin to stop - 1 are rounded, those to end - 1 updated."""

    rows: int
    begin: int
    stop: int
    end: int
    zero_points: bool = False

    def __str__(self) -> str:
        kind = "zero_points" if self.zero_points else "symmetric"
        return f"gptq_solve-{self.rows}x{self.begin}..{self.stop}..{self.end}-{kind}"


# Panels have 8 columns, blocks 64 rows: tails of both, a begin within a sub-block, later columns that are updated.
CASES = (
    Case(1, 0, 1, 1),
    Case(5, 0, 32, 32),
    Case(65, 0, 32, 32, zero_points=True),
    Case(130, 7, 18, 32),
    Case(64, 3, 30, 37, zero_points=True),
    Case(67, 0, 128, 131),
    Case(3, 5, 6, 70, zero_points=True),
)
# For a GPU only.
LARGE_CASES = (
    Case(4096, 0, 32, 32, zero_points=True),
    Case(11008, 32, 64, 128),
)


@dataclass(frozen=True)
class Operands:
    """Arrays of a case as they are before the call; zero is None if symmetric."""

    work: NDArray  # (end, rows) float32, as all but group_of
    upper: NDArray  # (end, end)
    scale: NDArray  # (groups, rows)
    zero: NDArray | None
    group_of: NDArray  # (end,) int32


def make_operands(case: Case, seed: int) -> Operands:
    """Random operands; in the first column to round every row is a tie, the only place where there can be many."""
    random = np.random.default_rng([seed, case.rows, case.begin, case.end])
    groups = 3
    # all of U is filled, so that the part that isn't of U would be noticed
    upper = (random.standard_normal((case.end, case.end)) * 0.3).astype(np.float32)
    np.fill_diagonal(upper, (random.random(case.end) + 0.2).astype(np.float32))
    scale = (random.random((groups, case.rows)) * 0.3 + 0.01).astype(np.float32)
    zero = random.integers(-8, 8, (groups, case.rows)).astype(np.float32) if case.zero_points else None
    work = random.standard_normal((case.end, case.rows)).astype(np.float32)
    group_of = (np.arange(case.end) % groups).astype(np.int32)
    ties = random.integers(-6, 6, case.rows).astype(np.float32) + np.float32(0.5)
    scale[group_of[case.begin]] = np.float32(2.0) ** random.integers(-6, -2, case.rows)  # so that ties are exact
    work[case.begin] = ties * scale[group_of[case.begin]]
    return Operands(work, upper, scale, zero, group_of)


def solve(case: Case, operands: Operands) -> tuple[NDArray, NDArray, NDArray]:
    """work, errors, codes (end, rows) float32 after the call: each operation a rounding, column after column.

    Errors and codes of columns that aren't rounded are NaN. The same as `gptq_columns.round_columns`,
    which a test compares with the kernel too.
    """
    work = operands.work.copy()
    errors, codes = np.full_like(work, np.nan), np.full_like(work, np.nan)
    for j in range(case.begin, case.stop):
        scale = operands.scale[operands.group_of[j]]
        code = np.rint(work[j] / scale)
        if operands.zero is None:
            codes[j] = np.clip(code, np.float32(LOW), np.float32(HIGH))
            level = codes[j]
        else:
            zero = operands.zero[operands.group_of[j]]
            codes[j] = np.clip(code + zero, np.float32(LOW), np.float32(HIGH))
            level = codes[j] - zero
        errors[j] = (work[j] - level * scale) / operands.upper[j, j]
        work[j + 1 :] -= operands.upper[j, j + 1 :, None] * errors[j]
    return work, errors, codes


launcher = partial(arrays.launcher, name="compressor_gptq_solve")


def run(kernels: Kernels, case: Case, memory: Memory, seed: int, stream: int = 0) -> NDArray:
    """Run the case and compare bit for bit; raises AssertionError. Returns work, errors and codes, (3, end, rows)."""
    operands = make_operands(case, seed)
    work = memory.place(operands.work)
    errors, codes = (memory.place(np.full_like(operands.work, np.nan)) for _ in range(2))
    zero = None if operands.zero is None else memory.place(operands.zero)
    upper, scale, group_of = (memory.place(a) for a in (operands.upper, operands.scale, operands.group_of))
    placed = (work, errors, codes, upper, scale, zero, group_of)
    addresses = [None if p is None else p.address for p in placed]
    sizes = (case.rows, len(operands.scale), case.begin, case.stop, case.end)
    code = launcher(kernels)(*addresses, *sizes, LOW, HIGH, stream)
    assert code == 0, f"{case}: the launcher returned {code}"
    memory.wait()
    result = np.stack([work.read(), errors.read(), codes.read()])
    expected = np.stack(solve(case, operands))
    expected[0, : case.stop] = operands.work[: case.stop]  # what is rounded needs no update in memory
    right = result.view(np.uint32) == expected.view(np.uint32)
    assert right.all(), f"{case}, seed {seed}: {(~right).sum()} of {right.size} outputs are wrong"
    return result
