"""The CUDA solver of GPTQ columns, emulated: the bits of the torch solver, hostile rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from compressor.kernels.cuda.interface import Kernels
from compressor.kernels.ops.gptq_columns import Columns, round_columns
from cuda_ext.cases import arrays, gptq_solve
from cuda_ext.cases.gptq_solve import HIGH, LOW, Case, Operands

CASE = Case(66, 2, 13, 20, zero_points=True)


def call(kernels: Kernels, case: Case, operands: Operands) -> list[np.ndarray]:
    """work, errors and codes after the call, (end, rows) float32"""
    empty = np.full_like(operands.work, np.nan)
    written = [arrays.GuardedArray(array) for array in (operands.work, empty, empty)]
    given = [operands.upper, operands.scale, operands.zero, operands.group_of]
    placed = [None if array is None else arrays.GuardedArray(array) for array in given]
    addresses = [None if p is None else p.address for p in [*written, *placed]]
    sizes = (case.rows, len(operands.scale), case.begin, case.stop, case.end)
    assert gptq_solve.launcher(kernels)(*addresses, *sizes, LOW, HIGH, None) == 0
    return [array.read() for array in written]


def by_torch(case: Case, operands: Operands) -> list[np.ndarray]:
    work, errors, codes = (torch.from_numpy(operands.work.copy()) for _ in range(3))
    zero = None if operands.zero is None else torch.from_numpy(operands.zero)
    part = Columns(
        work,
        errors.fill_(torch.nan),
        codes.fill_(torch.nan),
        torch.from_numpy(operands.upper),
        torch.from_numpy(operands.group_of).long(),
        torch.from_numpy(operands.scale),
        zero,
        int(LOW),
        int(HIGH),
    )
    round_columns(part, case.begin, case.stop)
    return [tensor.numpy() for tensor in (work, errors, codes)]


@pytest.mark.parametrize("case", [*gptq_solve.CASES, CASE], ids=str)
def test_codes_errors_and_updates_have_the_bits_of_torch(emulated, case):
    operands = gptq_solve.make_operands(case, seed=7)
    mine, of_torch = call(emulated, case, operands), by_torch(case, operands)
    mine[0], of_torch[0] = mine[0][case.stop :], of_torch[0][case.stop :]  # columns that are rounded need no update
    for a, b in zip(mine, of_torch, strict=True):
        assert np.array_equal(a.view(np.uint32), b.view(np.uint32))


@pytest.mark.parametrize("zero_points", [True, False])
def test_hostile_numbers_give_what_torch_gives_in_their_rows_alone(emulated, zero_points):
    """NaN, both infinities, -0, subnormal numbers and scales, a scale of 0."""
    case = Case(8, 0, 9, 12, zero_points)
    operands = gptq_solve.make_operands(case, seed=1)
    plain = call(emulated, case, operands)
    operands.work[0, :5] = [np.nan, np.inf, -np.inf, -0.0, 1e-40]
    operands.scale[:, 5], operands.scale[:, 6] = 0, 1e-40
    result, of_torch = call(emulated, case, operands), by_torch(case, operands)
    result[0], of_torch[0] = result[0][case.stop :], of_torch[0][case.stop :]
    for a, b, c in zip(result, of_torch, plain, strict=True):
        assert np.array_equal(np.isnan(a), np.isnan(b))
        number = ~np.isnan(a)
        assert np.array_equal(a[number].view(np.uint32), b[number].view(np.uint32))
        assert np.array_equal(a[:, 7], c[-len(a) :, 7], equal_nan=True)


def test_the_rows_of_a_weight_do_not_see_each_other(emulated):
    operands = gptq_solve.make_operands(CASE, seed=2)
    alone = Operands(
        operands.work[:, 65:].copy(), operands.upper, operands.scale[:, 65:].copy(), operands.zero[:, 65:].copy(),
        operands.group_of,
    )  # fmt: skip
    among = call(emulated, CASE, operands)
    for a, b in zip(among, call(emulated, Case(1, 2, 13, 20, zero_points=True), alone), strict=True):
        assert np.array_equal(a[:, 65:], b, equal_nan=True)


def test_two_calls_round_what_one_does(emulated):
    """With all groups there from the start, columns 2 to 12 at once or 2 to 6 and then the rest: the same bits."""
    operands = gptq_solve.make_operands(CASE, seed=3)
    at_once = call(emulated, CASE, operands)
    first = call(emulated, Case(66, 2, 7, 20, zero_points=True), operands)
    then = Operands(first[0], operands.upper, operands.scale, operands.zero, operands.group_of)
    second = call(emulated, Case(66, 7, 13, 20, zero_points=True), then)
    assert np.array_equal(at_once[0][13:], second[0][13:])
    for a, b, c in zip(at_once[1:], first[1:], second[1:], strict=True):
        assert np.array_equal(a[2:7], b[2:7])
        assert np.array_equal(a[7:13], c[7:13])


@pytest.mark.parametrize("group", [-1, 3, 2**30])
def test_a_column_of_an_unknown_group_gets_codes_of_nan_and_reads_nothing(emulated, group):
    operands = gptq_solve.make_operands(CASE, seed=0)
    good = call(emulated, CASE, operands)[2]
    operands.group_of[5] = group
    codes = call(emulated, CASE, operands)[2]
    assert np.isnan(codes[5:13]).all()
    assert np.array_equal(codes[2:5], good[2:5])
