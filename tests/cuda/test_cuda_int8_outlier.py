"""LLM.int8() in CUDA, emulated: the CPU library's bits, hostile rows, any outlier columns."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from compressor.kernels import cpu
from compressor.kernels.cuda.interface import Kernels
from compressor.kernels.ops import linear as ops
from cuda_ext.cases import arrays, int8_outlier

TORCH_TYPES = {arrays.FLOAT16: torch.float16, arrays.BFLOAT16: torch.bfloat16}
needs_library = pytest.mark.skipif(isinstance(cpu.library(), str), reason="the CPU library is not built")


def to_torch(stored: np.ndarray | None, kind: int) -> torch.Tensor | None:
    if stored is None:
        return None
    tensor = torch.from_numpy(np.ascontiguousarray(stored))
    return tensor if kind == arrays.FLOAT32 else tensor.view(TORCH_TYPES[kind])


def multiply(
    emulated: Kernels, operands: int8_outlier.Operands, kind: int, threshold: float = int8_outlier.THRESHOLD
) -> np.ndarray:
    """y as stored."""
    memory = arrays.GuardedMemory()
    (m, k), n = operands.x.shape, len(operands.weight)
    given = (operands.x, operands.weight, operands.absmax, operands.columns, operands.column_weight, operands.bias)
    placed = [None if array is None else memory.place(array) for array in given]
    y = memory.place(np.zeros((m, n), operands.x.dtype))
    needed = int8_outlier.workspace_bytes(emulated, m, n, k)
    workspace = memory.place(np.zeros(-(-needed // 16) * 16, np.uint8))
    addresses = [p.address if p else None for p in [*placed, y, workspace]]
    count = 0 if operands.columns is None else len(operands.columns)
    code = int8_outlier.launcher(emulated)(*addresses, needed, m, n, k, count, threshold, kind, None)
    assert code == 0
    return y.read()


def random_operands(m: int, n: int, k: int, kind: int = arrays.FLOAT32) -> int8_outlier.Operands:
    """Finite, without outliers."""
    operands = int8_outlier.make_operands(int8_outlier.Case(1, n, k, kind), seed=1)
    x = np.clip(np.random.default_rng(2).standard_normal((m, k)), -4, 4)
    return replace(operands, x=arrays.to_bits(x, kind))


@needs_library
@pytest.mark.parametrize("number", range(len(int8_outlier.CASES)))
def test_outputs_are_those_of_the_cpu_library(emulated, number):
    case = int8_outlier.CASES[number]
    operands = int8_outlier.make_operands(case, seed=4)
    threshold = case.threshold if case.columns is None else 0.0
    found = multiply(emulated, operands, case.type, threshold)
    columns = None if operands.columns is None else torch.from_numpy(operands.columns.astype(np.int64))
    absmax = torch.from_numpy(operands.absmax)
    expected = ops.linear_int8_outlier(
        to_torch(operands.x, case.type),
        ops.pack_int8_rows(torch.from_numpy(operands.weight), absmax),
        absmax,
        columns,
        to_torch(operands.column_weight, case.type),
        to_torch(operands.bias, case.type),
        threshold,
    )
    assert torch.equal(to_torch(found, case.type).nan_to_num(7777), expected.nan_to_num(7777))


@pytest.mark.parametrize("m", [1, 2, 70])
def test_a_column_is_an_outlier_from_the_threshold_on(emulated, m):
    """An int8 weight of 0 except in one column: its values come through exactly as an outlier, rounded below that."""
    k, column = 80, 37
    weight, absmax = np.zeros((8, k), np.int8), np.full(8, 127, np.float32)
    weight[:, column] = np.arange(8)
    x = np.full((m, k), 1, np.float32)
    x[-1, column] = 6
    operands = int8_outlier.Operands(x, weight, absmax, None, None, None, x)
    assert np.array_equal(multiply(emulated, operands, arrays.FLOAT32), x[:, column, None] * np.arange(8))
    above = multiply(emulated, operands, arrays.FLOAT32, threshold=np.nextafter(np.float32(6), np.float32(7)))
    steps = np.abs(x).max(axis=1) / 127
    rounded = np.rint(x[:, column] / steps) * steps
    # four roundings of 2^-24 at most, of the step and of the product on each side
    assert np.allclose(above, rounded[:, None] * np.arange(8), rtol=2**-22, atol=0)


@pytest.mark.parametrize(("m", "bad"), [(1, np.nan), (1, np.inf), (5, np.nan), (66, np.inf)])
def test_nan_and_infinity_stay_in_their_rows(emulated, m, bad):
    """Infinity is an outlier, too, so its column is multiplied in x's type for all rows, and they stay finite."""
    operands = random_operands(m, 66, 144)
    operands.x[m // 2, 77] = bad
    result = multiply(emulated, operands, arrays.FLOAT32)
    broken = np.arange(m) == m // 2
    assert np.isnan(result[broken]).all()
    assert np.isfinite(result[~broken]).all()


@pytest.mark.parametrize("m", [1, 3])
def test_columns_outside_of_x_are_left_out(emulated, m):
    operands = random_operands(m, 8, 64)
    weight = np.ones((8, 4), np.float32)
    inside = replace(operands, columns=np.array([5], np.int32), column_weight=weight[:, :1].copy())
    around = replace(operands, columns=np.array([-(2**31), -1, 5, 64], np.int32), column_weight=weight)
    results = [multiply(emulated, given, arrays.FLOAT32, 0.0) for given in (inside, around)]
    assert np.array_equal(*results)


def test_a_row_has_the_same_bits_alone_and_among_others(emulated):
    """Columns are given, so that other rows don't decide: one kernel takes a row alone, three take more."""
    operands = int8_outlier.make_operands(int8_outlier.Case(70, 66, 336, columns=9, bias=True), seed=3)
    results = [multiply(emulated, replace(operands, x=operands.x[:m]), 0, 0.0)[:1] for m in (1, 2, 64, 70)]
    assert all(np.array_equal(result, results[0]) for result in results)
