"""The compiled inner loop of GPTQ gives the codes, errors and updates of the torch one, bit for bit."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from gptq_problems import BAD, columns, copied, matrix, same_bits
from guarded import guarded
from raising import raises

from compressor.errors import ShapeError
from compressor.kernels.cpu import Library, levels_here, library
from compressor.kernels.ops import gptq_solve
from compressor.kernels.ops.checks import operands
from compressor.kernels.ops.gptq_columns import Columns, round_columns
from compressor.kernels.ops.gptq_solve import round_compiled, solves
from compressor.methods.quantization.hessian import inverse_factor
from compressor.passes.gptq import GPTQ, column_order, solve

BUILT = isinstance(library(), Library)
compiled = pytest.mark.skipif(not BUILT, reason=f"{library()}")
LEVELS_HERE = levels_here(library().functions) if BUILT else []


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


@compiled
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("rows", [1, 5, 64, 65, 130])
def test_no_byte_beyond_a_tensor_is_read_or_written(symmetric, rows):
    for count, begin, stop in [(1, 0, 1), (5, 1, 3), (37, 0, 37), (37, 5, 30)]:
        made = columns(rows + count, count, rows, symmetric)
        expected = copied(made)
        round_columns(expected, begin, stop)
        for level in LEVELS_HERE:
            part = dataclasses.replace(
                made, **{name: guarded(t) for name, t in made.tensors().items() if t is not None}
            )
            at = {name: 0 if t is None else t.data_ptr() for name, t in part.tensors().items()}
            assert not library().functions.gptq_solve(
                level, 1, at["work"], at["errors"], at["codes"], at["upper"], at["scale"], at["zero_point"],
                at["group_of"], rows, len(part.scale), begin, stop, count, float(part.low), float(part.high),
            )  # fmt: skip
            assert same_bits(part.codes[begin:stop], expected.codes[begin:stop])
            assert same_bits(part.errors[begin:stop], expected.errors[begin:stop])
            assert same_bits(part.work[:begin], made.work[:begin]) and same_bits(part.work[stop:], expected.work[stop:])
            for written in (part.codes, part.errors):
                assert written[:begin].isnan().all() and written[stop:].isnan().all()


def same_but_for_kinds_of_nan(a: torch.Tensor, b: torch.Tensor) -> bool:
    kept = ~a.isnan()
    return torch.equal(kept, ~b.isnan()) and same_bits(a[kept], b[kept])


@compiled
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("rows", [20, 70])
@pytest.mark.parametrize("level", LEVELS_HERE)
def test_nan_inf_and_a_scale_of_0_give_what_torch_gives_in_their_rows_alone(symmetric, rows, level):
    clean = columns(rows, 32, rows, symmetric)
    broken = dataclasses.replace(copied(clean), scale=clean.scale.clone())
    broken.work[10, [1, 2, 6, 9]] = torch.tensor([torch.nan, torch.inf, -torch.inf, torch.inf])
    broken.scale[:, [9, 11]] = 0
    broken.work[3, 11] = 0  # 0 / 0
    broken.scale[1, 17] = 0
    mine, alone = copied(broken), copied(clean)
    round_columns(broken, 3, 29)
    round_compiled(mine, 3, 29, level, threads=2)
    round_compiled(alone, 3, 29, level, threads=2)
    kept = [row for row in range(rows) if row not in (1, 2, 6, 9, 11, 17)]
    for name, there in (("codes", slice(3, 29)), ("errors", slice(3, 29)), ("work", slice(29, 32))):
        found, expected, before = (getattr(part, name)[there] for part in (mine, broken, alone))
        assert same_but_for_kinds_of_nan(found, expected)
        assert same_bits(found[:, kept], before[:, kept])
    assert not mine.errors[10:29, [1, 2, 6, 9, 11]].isfinite().any() and mine.work[29:, 17].isfinite().all()


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
        monkeypatch.setattr(gptq_solve, "solves", lambda work, ours=ours: ours)
        found.append(solve(weight, upper, hessian.diagonal(), visiting, settings, width, torch.bfloat16))
    assert torch.equal(found[0].codes, found[1].codes)
    assert same_bits(found[0].loss, found[1].loss)
    assert same_bits(found[0].grid.scale, found[1].grid.scale)
    assert same_bits(found[0].grid.zero_point, found[1].grid.zero_point)


def arguments(part: Columns, begin: int, stop: int):
    return *part.tensors().values(), begin, stop, part.low, part.high


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_operation_rounds_as_torch_does_and_is_one_that_torch_can_trace(dtype, symmetric):
    part = columns(3, 24, 70, symmetric)
    kept = {name: t.to(dtype) for name, t in part.tensors().items() if t is not None and t.is_floating_point()}
    part = dataclasses.replace(part, **kept)
    mine, traced = copied(part), copied(part)
    round_columns(part, 3, 17)
    torch.ops.compressor.gptq_solve_(*arguments(mine, 3, 17))

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def compiled_call(*given):
        torch.ops.compressor.gptq_solve_(*given)
        return given[0][17:].sum()

    assert compiled_call(*arguments(traced, 3, 17)) == part.work[17:].sum()
    for found in (mine, traced):
        assert torch.equal(found.codes[3:17], part.codes[3:17]) and torch.equal(found.errors[3:17], part.errors[3:17])
        assert torch.equal(found.work[17:], part.work[17:])
        assert found.codes[:3].isnan().all() and found.codes[17:].isnan().all()
    torch.library.opcheck(torch.ops.compressor.gptq_solve_.default, arguments(finite(mine), 3, 17))


def finite(part: Columns) -> Columns:
    """opcheck compares what two calls leave behind, and NaN is never equal to itself."""
    return dataclasses.replace(part, errors=torch.zeros_like(part.errors), codes=torch.zeros_like(part.codes))


def test_rows_of_no_weight_and_columns_of_no_range_change_nothing():
    part = columns(0, 8, 5, symmetric=True)
    before = part.work.clone()
    gptq_solve.gptq_solve_(*arguments(part, 4, 4))
    assert torch.equal(part.work, before) and part.codes.isnan().all()
    none = {
        name: t[:, :0].contiguous()
        for name, t in part.tensors().items()
        if name in ("work", "errors", "codes", "scale")
    }
    gptq_solve.gptq_solve_(*arguments(dataclasses.replace(part, **none), 0, 8))


def test_float64_is_solved_by_torch():
    assert not solves(torch.zeros(4, 4, dtype=torch.float64))
    assert solves(torch.zeros(4, 4)) == BUILT


@pytest.mark.parametrize("by_torch", [True, False])
@pytest.mark.parametrize("name", BAD)
def test_bad_parts_name_what_they_got(name, by_torch, monkeypatch):
    if by_torch:
        monkeypatch.setattr(gptq_solve, "solves", lambda work: False)
    changes, data = BAD[name]
    part = dataclasses.replace(columns(0, 8, 5, symmetric=False), **changes)
    told = {"op": gptq_solve.NAME, "reason": "operands", "operands": operands(**part.tensors()), **data}
    with raises(ShapeError, **told):
        gptq_solve.gptq_solve_(*arguments(part, 0, 8))


@pytest.mark.parametrize(("begin", "stop"), [(-1, 3), (4, 3), (0, 9)])
def test_columns_that_are_not_there_are_refused(begin, stop):
    with raises(ShapeError, op=gptq_solve.NAME, reason="columns", begin=begin, stop=stop):
        gptq_solve.gptq_solve_(*arguments(columns(0, 8, 5, symmetric=True), begin, stop))


@compiled
def test_the_library_takes_float32_without_gradients_on_the_cpu():
    part = columns(0, 8, 5, symmetric=True)
    wide = {name: t.double() for name, t in part.tensors().items() if t is not None and t.is_floating_point()}
    with raises(ShapeError, op=gptq_solve.NAME, reason="float32-only"):
        round_compiled(dataclasses.replace(part, **wide), 0, 8)
    with pytest.raises(RuntimeError, match="work"):
        round_compiled(dataclasses.replace(part, work=part.work.requires_grad_()), 0, 8)


@compiled
def test_a_strided_factor_is_read_as_it_lies():
    part = columns(1, 8, 70, symmetric=False)
    mine, wide = copied(part), torch.zeros(20, 20)
    wide[5:13, 7:15] = part.upper
    scale = part.scale.t().contiguous().t()
    round_compiled(part, 0, 6)
    round_compiled(dataclasses.replace(mine, upper=wide[5:13, 7:15], scale=scale), 0, 6)
    assert same_bits(part.codes[:6], mine.codes[:6]) and same_bits(part.work[6:], mine.work[6:])
