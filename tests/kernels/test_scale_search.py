"""The compiled search of scales chooses what the one in torch chooses, except between ranges of nearly equal errors."""

from __future__ import annotations

import pytest
import torch
from guarded import guarded
from raising import raises

from compressor.errors import ShapeError
from compressor.kernels.cpu import Library, levels_here, library
from compressor.kernels.ops import scale_search as op
from compressor.kernels.ops.checks import operands
from compressor.kernels.ops.scale_ranges import search_in_torch
from compressor.kernels.ops.scale_search import search_compiled

BUILT = isinstance(library(), Library)
compiled = pytest.mark.skipif(not BUILT, reason=f"{library()}")
LEVELS_HERE = levels_here(library().functions) if BUILT else []
NEARLY_EQUAL = (
    1e-5  # share of an error; float sums over a group and the polynomials of the compiled search differ by less
)


def weights(rows: int, groups: int, size: int) -> torch.Tensor:
    made = torch.Generator().manual_seed(rows + size)
    return torch.randn(rows, groups, size, generator=made) * torch.rand(rows, groups, 1, generator=made)


def errors(weight, importance, bits, scale, zero):
    """Of each group as it is rounded to the nearest codes, in float64; (out, groups)."""
    scale, zero = scale.double().unsqueeze(-1), zero.double().unsqueeze(-1)
    codes = (torch.round(weight.double() / scale) + zero).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    error = ((codes - zero) * scale - weight).abs()
    return (error.pow(2.4) if importance is None else error.square() * importance).sum(-1)


@compiled
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("rows", "groups", "size"), [(40, 4, 32), (9, 2, 128), (6, 1, 333)])
def test_compiled_scales_have_the_errors_of_those_of_torch(rows, groups, size, bits, symmetric, stored):
    weight = weights(rows, groups, size)
    for importance in (None, torch.rand(groups, size, generator=torch.Generator().manual_seed(bits))):
        slow = search_in_torch(weight, importance, bits, symmetric, True, stored)
        found = search_compiled(weight, importance, bits, symmetric, True, stored)
        mine, theirs = (errors(weight, importance, bits, *grid) for grid in (found, slow))
        same = (found[0] == slow[0]) & (found[1] == slow[1])
        assert (mine[~same] <= theirs[~same] * (1 + NEARLY_EQUAL)).all() and same.float().mean() > 0.99


@compiled
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_of_the_extremes_have_the_bits_of_torch(symmetric, stored):
    weight = weights(300, 2, 20)
    weight[:40] *= 2.0**-17  # subnormal scales in float16
    weight[40:60] *= 2.0**-126
    weight[60:80] *= 20000  # too large for float16's codes
    weight[80:82] = 0
    weight[82:90] = weight[82:90].abs()
    for bits in (2, 3, 4, 8):
        found = search_compiled(weight, None, bits, symmetric, False, stored)
        slow = search_in_torch(weight, None, bits, symmetric, False, stored)
        assert torch.equal(found[0], slow[0]) and torch.equal(found[1], slow[1])


@compiled
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("size", [1, 13, 16, 64])
def test_levels_and_threads_give_the_same_bits_and_no_byte_beyond_a_tensor_is_read(size, symmetric):
    weight, importance = guarded(weights(7, 3, size)), guarded(torch.rand(3, size))
    for heavy in (None, importance):
        first = search_compiled(weight, heavy, 4, symmetric, True, torch.bfloat16, LEVELS_HERE[0], 1)
        for level in LEVELS_HERE:
            for threads in (1, 2):
                found = search_compiled(weight, heavy, 4, symmetric, True, torch.bfloat16, level, threads)
                assert torch.equal(found[0], first[0]) and torch.equal(found[1], first[1])


def test_the_operation_is_one_that_torch_can_trace():
    weight = weights(5, 2, 32)
    arguments = (weight, None, 4, True, True, torch.bfloat16)
    expected = op.scale_search(*arguments)
    torch.library.opcheck(torch.ops.compressor.scale_search.default, arguments)
    traced = torch.compile(torch.ops.compressor.scale_search, fullgraph=True, backend="aot_eager")(*arguments)
    assert torch.equal(traced[0], expected[0]) and torch.equal(traced[1], expected[1])


def test_float64_is_searched_by_torch():
    weight = weights(5, 2, 32).double()
    found = op.scale_search(weight, None, 4, True, True, torch.float32)
    slow = search_in_torch(weight, None, 4, True, True, torch.float32)
    assert torch.equal(found[0], slow[0]) and found[0].dtype == torch.float32


@pytest.mark.parametrize("changes", [
    {"weight": torch.zeros(4, 8)}, {"weight": torch.zeros(4, 2, 0)}, {"weight": torch.zeros(4, 2, 8).bfloat16()},
    {"importance": torch.zeros(8)}, {"importance": torch.zeros(2, 8).double()}, {"bits": 1}, {"bits": 9},
    {"stored": torch.float64},
])  # fmt: skip
def test_other_operands_are_refused(changes):
    given = {"weight": torch.zeros(4, 2, 8), "importance": None, "bits": 4, "stored": torch.float32, **changes}
    told = operands(weight=given["weight"], importance=given["importance"])
    with raises(ShapeError, op=op.NAME, reason="operands", operands=told):
        op.scale_search(given["weight"], given["importance"], given["bits"], True, True, given["stored"])
