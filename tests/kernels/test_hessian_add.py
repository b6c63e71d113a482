"""The operation that adds second moments of inputs to a hessian."""

from __future__ import annotations

import pytest
import torch
from guarded import guarded
from raising import raises

from compressor.errors import ShapeError
from compressor.kernels.cpu import Library, levels_here, library
from compressor.kernels.ops import hessian_add
from compressor.methods.quantization.hessian import Gram

BUILT = isinstance(library(), Library)
compiled = pytest.mark.skipif(not BUILT, reason=f"{library()}")
LEVELS_HERE = levels_here(library().functions) if BUILT else []
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
UNIT = 2.0**-24  # half a unit in the last place of float32
SECOND_ORDER = 1 + 2.0**-10  # (1 + u)^n - 1 < n u (1 + 2^-10) for n < 2^13


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens, width", [(0, 5), (7, 1), (33, 300)])
def test_a_hessian_keeps_and_adds_within_the_bound(tokens, width, dtype):
    made = torch.Generator().manual_seed(width)
    x = torch.randn(tokens, width, generator=made).to(dtype)
    before = torch.randn(width, width, generator=made)
    after, wide = before.clone(), x.double()
    hessian_add.hessian_add_(after, x, 0.75, 0.5)
    exact = 0.75 * before.double() + 0.5 * wide.t() @ wide
    # any order of the sum's terms, an addition more and two scalings
    allowed = (tokens + 3) * UNIT * SECOND_ORDER * (0.75 * before.abs() + 0.5 * wide.abs().t() @ wide.abs())
    assert ((after.double() - exact).abs() <= allowed).triu().sum() == width * (width + 1) // 2
    left = torch.arange(width)[None] < torch.arange(width)[:, None] // hessian_add.PANEL * hessian_add.PANEL
    assert torch.equal(after[left], before[left])
    torch.library.opcheck(torch.ops.compressor.hessian_add_.default, (before, x, 0.75, 0.5))


@compiled
@pytest.mark.parametrize("level", LEVELS_HERE)
@pytest.mark.parametrize("tokens, width", [(0, 5), (7, 1), (33, 300), (300, 50)])
def test_a_compiled_hessian_keeps_and_adds_within_the_bound_without_a_byte_beyond(tokens, width, level):
    """Into a matrix whose rows don't follow each other, with the same bits for any number of threads."""
    made = torch.Generator().manual_seed(width)
    x = torch.randn(tokens, width, generator=made).bfloat16()
    x = guarded(x) if tokens else x
    whole = torch.randn(width, width + 3, generator=made)
    before = whole[:, :width]
    wide, found = x.double(), []
    for threads in (1, 2):
        after = guarded(whole)[:, :width]
        hessian_add.add_compiled(after, x, 0.75, 0.5, level, threads)
        found.append(after)
    assert torch.equal(*found)
    exact = 0.75 * before.double() + 0.5 * wide.t() @ wide
    allowed = (tokens + 3) * UNIT * SECOND_ORDER * (0.75 * before.abs() + 0.5 * wide.abs().t() @ wide.abs())
    assert ((found[0].double() - exact).abs() <= allowed).triu().sum() == width * (width + 1) // 2
    assert torch.equal(found[0].tril(-1), before.tril(-1))


@compiled
def test_the_library_adds_bfloat16_to_float32_where_the_processor_multiplies_it():
    x, matrix = torch.zeros(2, 4).bfloat16(), torch.zeros(4, 4)
    assert hessian_add.multiplies(matrix, x) == bool(library().functions.has_bfloat16_products())
    for other in ((matrix.double(), x), (matrix, x.half()), (matrix, x.float()), (matrix[:, ::2][:2], x[:, :2])):
        assert not hessian_add.multiplies(*other)


def test_a_gram_adds_by_the_operation():
    x = torch.randn(40, 200, generator=torch.Generator().manual_seed(40))
    gram, expected = Gram.zeros(200, torch.float32, torch.device("cpu")).add(x), torch.zeros(200, 200)
    torch.ops.compressor.hessian_add_(expected, x, 1.0, 1.0)
    assert torch.equal(gram.matrix, expected) and gram.tokens == 40


def test_a_hessian_of_another_shape_is_refused():
    for matrix, x in ((torch.zeros(3, 4), torch.zeros(2, 4)), (torch.zeros(4, 4), torch.zeros(4))):
        with raises(ShapeError, op="hessian_add_", hessian=list(matrix.shape), x=list(x.shape)):
            hessian_add.hessian_add_(matrix, x, 1.0, 1.0)
    with raises(ShapeError, op="hessian_add_", hessian="torch.bfloat16", x="torch.float32"):
        hessian_add.hessian_add_(torch.zeros(4, 4).bfloat16(), torch.zeros(2, 4), 1.0, 1.0)


def test_a_hessian_that_keeps_nothing_forgets_what_is_not_a_number():
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(6))
    found = torch.full((4, 4), torch.nan)
    hessian_add.hessian_add_(found, x, 0.0, 1.0)
    assert found.isfinite().all()


def test_a_hessian_is_added_to_in_a_compiled_function():
    x = torch.randn(6, 150, generator=torch.Generator().manual_seed(6))
    expected, found = torch.ones(150, 150), torch.ones(150, 150)
    hessian_add.hessian_add_(expected, x, 0.5, 2.0)

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def add(matrix, tokens):
        torch.ops.compressor.hessian_add_(matrix, tokens, 0.5, 2.0)
        return matrix.diagonal().sum()

    assert add(found, x) == expected.diagonal().sum() and torch.equal(found, expected)
