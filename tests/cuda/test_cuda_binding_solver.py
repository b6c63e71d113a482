"""GPTQ's columns on CUDA under the pass, with the emulated library on the CPU: the bits of torch there."""

from __future__ import annotations

import dataclasses

import cuda_on_cpu
import pytest
import torch
from gptq_problems import BAD, columns, copied, matrix, same_bits
from raising import raises
from torch._subclasses import FakeTensorMode

from compressor.errors import KernelError, ShapeError
from compressor.kernels.cuda import devices, selftest
from compressor.kernels.ops import gptq_solve
from compressor.kernels.ops.checks import operands
from compressor.kernels.ops.gptq_columns import round_columns
from compressor.kernels.ops.gptq_solve import round_compiled, solves
from compressor.methods.quantization.hessian import inverse_factor
from compressor.passes.gptq import GPTQ, column_order, solve


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("rows", [1, 64, 70])
@pytest.mark.parametrize(
    ("count", "begin", "stop"), [(1, 0, 1), (32, 0, 32), (32, 7, 18), (131, 0, 128), (300, 5, 290), (6, 5, 6)]
)
def test_columns_have_the_bits_of_torch(kernels, symmetric, rows, count, begin, stop):
    part = columns(rows + count, count, rows, symmetric)
    mine = copied(part)
    round_columns(part, begin, stop)
    round_compiled(mine, begin, stop)
    assert same_bits(part.codes[begin:stop], mine.codes[begin:stop])
    assert same_bits(part.errors[begin:stop], mine.errors[begin:stop])
    assert same_bits(part.work[stop:], mine.work[stop:])
    assert mine.codes[:begin].isnan().all() and mine.codes[stop:].isnan().all()


def test_a_part_of_a_larger_matrix_is_read_as_the_pass_cuts_it(kernels):
    """U's part is a strided slice."""
    part = columns(1, 48, 70, symmetric=False)
    wide = torch.zeros(60, 60)
    wide[5:53, 7:55] = part.upper
    mine, other = copied(part), copied(part)
    round_compiled(dataclasses.replace(mine, upper=wide[5:53, 7:55]), 0, 32)
    round_compiled(other, 0, 32)
    assert same_bits(mine.codes[:32], other.codes[:32]) and same_bits(mine.work[32:], other.work[32:])


@pytest.mark.parametrize("order", ["none", "static", "group_aware"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("rows", "inputs", "width", "block"), [(70, 192, 16, 32), (33, 330, 330, 128)])
def test_a_solve_of_the_pass_has_the_same_codes_with_the_kernel_and_in_torch(
    kernels, order, symmetric, rows, inputs, width, block, monkeypatch
):
    weight, hessian = matrix(rows, inputs)
    settings = GPTQ(symmetric=symmetric, scale_search="minmax", act_order=order, block_size=block)
    visiting = column_order(hessian.diagonal(), order, width)
    upper = inverse_factor(hessian[visiting][:, visiting], 0.01, 1.0, "w").upper.float()
    calls = []

    def counted(*arguments):
        calls.append(arguments)
        return kernels.functions["compressor_gptq_solve"](*arguments)

    functions = {**kernels.functions, "compressor_gptq_solve": counted}
    cuda_on_cpu.use(monkeypatch, dataclasses.replace(kernels, functions=functions))
    found = [solve(weight, upper, hessian.diagonal(), visiting, settings, width, torch.bfloat16)]
    launched = len(calls)
    monkeypatch.setattr(gptq_solve, "solves", lambda work: False)
    found.append(solve(weight, upper, hessian.diagonal(), visiting, settings, width, torch.bfloat16))
    assert launched >= inputs // 32 and len(calls) == launched
    for name in ("codes", "loss"):
        assert same_bits(getattr(found[0], name), getattr(found[1], name))
    assert same_bits(found[0].grid.scale, found[1].grid.scale)


def test_float64_and_devices_without_kernels_are_left_to_torch(kernels, monkeypatch):
    assert solves(torch.zeros(4, 4)) and not solves(torch.zeros(4, 4, dtype=torch.float64))
    monkeypatch.setattr(devices, "kernels_on", lambda device: "not installed")
    assert not solves(torch.zeros(4, 4))


@pytest.mark.parametrize("name", BAD)
def test_bad_parts_name_what_they_got(kernels, name):
    changes, data = BAD[name]
    part = dataclasses.replace(columns(0, 8, 5, symmetric=False), **changes)
    with raises(ShapeError, **{"reason": "operands", "operands": operands(**part.tensors()), **data}):
        round_compiled(part, 0, 8)


@pytest.mark.parametrize(("begin", "stop"), [(-1, 3), (4, 3), (0, 141)])
def test_columns_that_are_not_there_are_refused(kernels, begin, stop):
    with raises(ShapeError, reason="columns", begin=begin, stop=stop):
        round_compiled(columns(0, 140, 5, symmetric=True), begin, stop)


def test_parts_on_two_devices_are_refused(kernels):
    part = columns(0, 8, 5, symmetric=True)
    with FakeTensorMode():
        upper = torch.zeros(8, 8, device="cuda")
    places = {name: "cpu" for name, tensor in part.tensors().items() if tensor is not None} | {"upper": "cuda:0"}
    with raises(KernelError, op=gptq_solve.NAME, devices=places):
        round_compiled(dataclasses.replace(part, upper=upper), 0, 8)


def test_what_the_launcher_returns_becomes_an_error(kernels, monkeypatch):
    broken = {**kernels.functions, "compressor_gptq_solve": lambda *arguments: 2}
    cuda_on_cpu.use(monkeypatch, dataclasses.replace(kernels, functions=broken))
    call = "gptq_solve: 5 rows, columns 0 to 7 of 8"
    with raises(KernelError, reason="launch", call=call, kernels=cuda_on_cpu.NAME, code=2):
        round_compiled(columns(0, 8, 5, symmetric=True), 0, 8)


def test_the_self_test_names_what_is_wrong(kernels):
    def without_a_zero_point(*arguments):
        return kernels.functions["compressor_gptq_solve"](*arguments[:5], 0, *arguments[6:])

    broken = dataclasses.replace(
        kernels, functions={**kernels.functions, "compressor_gptq_solve": without_a_zero_point}
    )
    cpu = torch.device("cpu")
    assert selftest.solved_columns(kernels, cpu, 0, symmetric=False) == "ok"
    said = selftest.solved_columns(broken, cpu, 0, symmetric=False)
    assert said == "updates, errors, codes are not those of torch on the CPU"
