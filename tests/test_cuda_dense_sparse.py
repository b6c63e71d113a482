"""The CUDA product of dense atoms with few values a row, emulated: hostile rows and entries, bad calls."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from compressor.kernels.cuda.interface import Kernels
from compressor.layers.sparse_factor_linear import SparseFactorLinear
from cuda_ext.cases import arrays, dense_sparse
from cuda_ext.cases.dense_sparse import Case, Operands

CASE = Case(3, 40, 3, 12, 16, 4)
POISON = 0x7FFF


def call(kernels: Kernels, case: Case, operands: Operands) -> np.ndarray:
    """y, float64 (M, N)"""
    given = (operands.x, operands.atoms, operands.atom_step, operands.entries, operands.step, operands.bias)
    placed = [None if array is None else arrays.GuardedArray(array) for array in given]
    y = arrays.GuardedArray(np.full((case.M, case.N), POISON, np.uint16))
    shape = (case.M, case.N, case.B, case.m, case.w, case.k)
    needed = dense_sparse.workspace_bytes(kernels, *shape)
    workspace = arrays.GuardedArray(np.full(needed // 4, np.nan, np.float32))
    addresses = [None if p is None else p.address for p in [*placed, y, workspace]]
    assert dense_sparse.launcher(kernels)(*addresses, needed, *shape, case.type, None) == 0
    return arrays.to_float64(y.read(), case.type)


@pytest.mark.parametrize("values", ["float16", "int8"])
def test_the_product_is_that_of_the_layer_of_the_same_tensors(emulated, values):
    """The layer works in float32: its own error is the kernel's bound again."""
    g = torch.Generator().manual_seed(0)
    blocks, atoms, width, out, k = 3, 20, 24, 37, 5
    index = torch.rand(out, blocks, atoms, generator=g).argsort(2)[..., :k].sort(2).values
    layer = SparseFactorLinear.pack(
        torch.randn(blocks, atoms, width, generator=g), torch.randn(out, blocks, k, generator=g), index, values
    )
    x = torch.randn(4, blocks * width, generator=g).half()
    case = Case(4, out, blocks, atoms, width, k, steps=values == "int8")
    stored = {name: layer.tensors()[f"weight_{name}"].half().numpy().view(np.uint16) for name in ("atoms", "values")}
    weight = layer.matrix(torch.float32).double()
    operands = Operands(
        x.numpy().view(np.uint16),
        stored["atoms"],
        layer.weight_atom_scale.numpy() if case.steps else None,
        dense_sparse.pack_ds1(layer.index().numpy(), stored["values"]),
        layer.weight_value_scale.numpy() if case.steps else None,
        None,
        expected=layer(x.float()).double().numpy(),
        size=(x.double().abs() @ weight.abs().T).numpy(),
    )
    # |D| |S| of the products one by one is more than |W|, by no more than the k that are added
    operands = replace(operands, size=operands.size * k)
    off = np.abs(call(emulated, case, operands) - operands.expected)
    assert (off <= 2 * dense_sparse.bound(case, operands, arrays.UNIT)).all()


@pytest.mark.parametrize("case", [CASE, replace(CASE, M=70, N=8)], ids=str)
def test_nan_and_infinity_stay_in_their_rows(emulated, case):
    operands = dense_sparse.make_operands(case, seed=0)
    operands.x[0, 3], operands.x[2, 40] = 0x7E00, 0x7C00  # NaN, +Inf
    result = call(emulated, case, operands)
    assert np.isnan(result[0]).all()
    assert not np.isfinite(result[2]).any()
    assert np.isfinite(np.delete(result, [0, 2], axis=0)).all()


def test_an_entry_that_names_no_atom_makes_its_output_nan_and_reads_nothing(emulated):
    operands = dense_sparse.make_operands(CASE, seed=0)
    good = call(emulated, CASE, operands)
    operands.entries[1, 2, 0, 5] |= 0xFFFF  # output 37
    result = call(emulated, CASE, operands)
    assert np.isnan(result[:, 37]).all()
    assert np.array_equal(np.delete(result, 37, axis=1), np.delete(good, 37, axis=1))


@pytest.mark.parametrize(("rows", "alone"), [(8, slice(2, 5)), (40, slice(32, 40))])
def test_the_rows_of_a_call_do_not_see_each_other(emulated, rows, alone):
    """The same rows alone and among others: the same bits, as long as the same kernel takes both."""
    case = replace(CASE, M=rows)
    operands = dense_sparse.make_operands(case, seed=1)
    few = replace(operands, x=operands.x[alone])
    among = call(emulated, case, operands)[alone]
    assert np.array_equal(among, call(emulated, replace(case, M=len(few.x)), few))


# what differs from a good call
BAD = {
    "negative M": dict(M=-1),
    "negative N": dict(N=-1),
    "no blocks": dict(B=0),
    "too many blocks": dict(B=65536),
    "no atoms": dict(m=0),
    "too many atoms": dict(m=4097),
    "width of 0": dict(w=0),
    "width not a multiple of 8": dict(w=20),
    "too many inputs": dict(B=65535, w=1 << 20),
    "no values": dict(k=0),
    "more values than atoms": dict(k=13),
    "float32": dict(type=2),
    "unknown type": dict(type=-1),
}


@pytest.fixture(scope="module")
def good():
    """Addresses of a good call, its bytes of workspace, and poisoned y and workspace that must stay so."""
    operands = dense_sparse.make_operands(CASE, seed=0)
    given = [arrays.GuardedArray(array) for array in (operands.x, operands.atoms, operands.entries)]
    y = arrays.GuardedArray(np.full((CASE.M, CASE.N), POISON, np.uint16))
    workspace = arrays.GuardedArray(np.full(8 * 3 * 12, np.nan, np.float32))
    x, atoms, entries = (array.address for array in given)
    yield [x, atoms, None, entries, None, None, y.address, workspace.address]
    assert (y.read() == POISON).all() and np.isnan(workspace.read()).all(), "a refused call wrote something"


def refused(kernels: Kernels, addresses: list[int | None], needed: int = 8 * 3 * 12 * 4, **changes: int) -> bool:
    shape = dict(M=CASE.M, N=CASE.N, B=CASE.B, m=CASE.m, w=CASE.w, k=CASE.k, type=0) | changes
    return dense_sparse.launcher(kernels)(*addresses, needed, *shape.values(), None) == -1


@pytest.mark.parametrize("name", BAD)
def test_bad_shapes_and_types_return_minus_one(emulated, good, name):
    assert refused(emulated, good, **BAD[name])


@pytest.mark.parametrize("operand", [0, 1, 3, 6, 7])
def test_missing_operands_return_minus_one(emulated, good, operand):
    assert refused(emulated, [None if i == operand else a for i, a in enumerate(good)])


@pytest.mark.parametrize("operand", [0, 1, 7])
def test_misaligned_operands_return_minus_one(emulated, good, operand):
    assert refused(emulated, [a and a + 8 * (i == operand) for i, a in enumerate(good)])


def test_a_workspace_that_is_too_small_returns_minus_one(emulated, good):
    assert dense_sparse.workspace_bytes(emulated, 3, 40, 3, 12, 16, 4) == 8 * 3 * 12 * 4
    assert dense_sparse.workspace_bytes(emulated, 3, 40, 3, 12, 20, 4) == -1
    assert refused(emulated, good, needed=8 * 3 * 12 * 4 - 1)


@pytest.mark.parametrize("empty", ["M", "N"])
def test_an_empty_output_touches_nothing(emulated, empty):
    assert not refused(emulated, [None] * 8, needed=0, **{empty: 0})
