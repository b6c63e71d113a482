"""The CUDA product of dense atoms with few values a row, emulated: hostile rows and entries."""

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
