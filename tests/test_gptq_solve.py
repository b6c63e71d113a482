"""The compiled inner loop of GPTQ gives the codes, errors and updates of the torch one, bit for bit."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from compressor.errors import KernelError
from compressor.kernels.cpu import Library, levels_here, library
from compressor.kernels.gptq_solve import Columns, round_columns, round_compiled, solves
from compressor.linalg import Gram, inverse_factor
from compressor.passes import gptq
from compressor.passes.gptq import GPTQ, column_order, solve

BUILT = isinstance(library(), Library)
compiled = pytest.mark.skipif(not BUILT, reason=f"{library()}")
LEVELS_HERE = levels_here(library().functions) if BUILT else []


def columns(seed: int, count: int, rows: int, symmetric: bool, groups: int = 3) -> Columns:
    g = torch.Generator().manual_seed(seed)
    upper = torch.triu(torch.randn(count, count, generator=g) * 0.3)
    upper.diagonal().copy_(torch.rand(count, generator=g) + 0.2)
    scale = torch.rand(groups, rows, generator=g) * 0.3 + 0.01
    zero = None if symmetric else torch.randint(-8, 8, (groups, rows), generator=g).float()
    work = torch.randn(count, rows, generator=g)
    work[:, ::5] = (torch.randint(-9, 9, work[:, ::5].shape, generator=g) + 0.5) * scale[0, ::5]  # ties
    group_of = torch.randint(0, groups, (count,), generator=g).tolist()
    empty = torch.full_like(work, torch.nan)
    return Columns(work, empty, empty.clone(), upper, group_of, scale, zero, -8, 7)


def copied(part: Columns) -> Columns:
    return dataclasses.replace(part, work=part.work.clone(), errors=part.errors.clone(), codes=part.codes.clone())


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


@compiled
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("rows", [1, 5, 16, 63, 64, 65, 200])
@pytest.mark.parametrize(("count", "begin", "stop"), [(1, 0, 1), (32, 0, 32), (32, 7, 18), (31, 0, 31), (6, 5, 6)])
@pytest.mark.parametrize("level", LEVELS_HERE)
def test_compiled_columns_have_the_bits_of_torch(symmetric, rows, count, begin, stop, level):
    part = columns(rows + count, count, rows, symmetric)
    mine = copied(part)
    round_columns(part, begin, stop)
    round_compiled(mine, begin, stop, level, threads=1 + rows % 2)
    assert same_bits(part.codes[begin:stop], mine.codes[begin:stop])
    assert same_bits(part.errors[begin:stop], mine.errors[begin:stop])
    assert same_bits(part.work[stop:], mine.work[stop:])
    assert mine.codes[:begin].isnan().all() and mine.codes[stop:].isnan().all()


def matrix(rows: int, inputs: int):
    g = torch.Generator().manual_seed(rows + inputs)
    x = torch.randn(2 * inputs, inputs, generator=g) @ torch.randn(inputs, inputs, generator=g) / inputs**0.5
    x *= torch.exp(0.8 * torch.randn(inputs, generator=g))
    return torch.randn(rows, inputs, generator=g), Gram.zeros(inputs, torch.float32, x.device).add(x).hessian()


@compiled
@pytest.mark.parametrize("order", ["none", "static", "group_aware"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("rows", "inputs", "width", "block"),
    [(64, 256, 64, 128), (70, 192, 16, 32), (33, 240, 48, 64), (130, 330, 330, 128), (7, 144, 8, 512)],
)
def test_a_solve_has_the_same_codes_with_and_without_the_library(
    order, symmetric, rows, inputs, width, block, monkeypatch
):
    weight, hessian = matrix(rows, inputs)
    settings = GPTQ(symmetric=symmetric, scale_search="minmax", act_order=order, block_size=block)
    visiting = column_order(hessian.diagonal(), order, width)
    upper = inverse_factor(hessian[visiting][:, visiting], 0.01, 1.0, "w").upper
    found = []
    for ours in (True, False):
        monkeypatch.setattr(gptq, "solves", lambda work, ours=ours: ours)
        found.append(solve(weight, upper, hessian.diagonal(), visiting, settings, width, torch.bfloat16))
    assert same_bits(found[0].codes, found[1].codes)
    assert same_bits(found[0].loss, found[1].loss)
    assert same_bits(found[0].grid.scale, found[1].grid.scale)
    assert same_bits(found[0].grid.zero_point, found[1].grid.zero_point)


def test_float64_is_solved_by_torch():
    assert not solves(torch.zeros(4, 4, dtype=torch.float64))
    assert solves(torch.zeros(4, 4)) == BUILT


@compiled
def test_the_library_refuses_what_it_cannot_read():
    part = columns(0, 8, 5, symmetric=True)
    with pytest.raises(KernelError, match="refused"):
        round_compiled(dataclasses.replace(part, group_of=[3] * 8), 0, 8)
    with pytest.raises(KernelError, match="refused"):
        round_compiled(part, 0, 9)
    with pytest.raises(KernelError, match="contiguous float32"):
        round_compiled(dataclasses.replace(part, work=part.work.double()), 0, 8)
    with pytest.raises(KernelError, match="contiguous float32"):
        round_compiled(dataclasses.replace(part, upper=part.upper.double()), 0, 8)
