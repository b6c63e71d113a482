"""What low_rank_linear and sparse_factor_linear store, rebuild and multiply."""

from __future__ import annotations

import pytest
import torch
from raising import raises

from compressor.errors import ShapeError
from compressor.kernels.ops.sparse_factors import pack_index, row_bits, unpack_index
from compressor.layers.low_rank_linear import LowRankLinear
from compressor.layers.sparse_factor_linear import SparseFactorLinear


def factors(out=7, blocks=3, width=4, atoms=6, k=2, seed=0):
    draw = torch.Generator().manual_seed(seed)
    index = torch.stack([torch.randperm(atoms, generator=draw)[:k].sort().values for _ in range(out * blocks)])
    return (
        torch.randn(blocks, atoms, width, generator=draw),
        torch.randn(out, blocks, k, generator=draw),
        index.view(out, blocks, k),
    )


@pytest.mark.parametrize(("atoms", "k"), [(1, 1), (2, 1), (5, 1), (64, 8), (64, 16), (33, 20), (300, 3)])
def test_an_index_comes_back_from_its_bits(atoms, k):
    _, _, index = factors(atoms=atoms, k=k)
    rows = index.view(-1, k)
    packed = pack_index(rows, atoms)
    assert packed.dtype == torch.uint8 and len(packed) == -(-len(rows) * row_bits(atoms, k) // 8)
    assert unpack_index(packed, len(rows), atoms, k).equal(rows)


def test_bits_lie_as_the_format_says():
    assert pack_index(torch.tensor([[1, 6], [0, 5]]), 64).tolist() == [0b10000001, 0b00000001, 0b00010100]
    assert pack_index(torch.tensor([[0, 2, 3], [1, 2, 4]]), 5).tolist() == [0b11001101, 0b00000010]


def slow_matrix(atoms, values, index):
    """Σ over the stored entries, one by one."""
    blocks, _, width = atoms.shape
    result = torch.zeros(len(values), blocks * width, dtype=torch.float64)
    for row in range(len(values)):
        for b in range(blocks):
            for value, number in zip(values[row, b], index[row, b], strict=True):
                result[row, b * width : (b + 1) * width] += value.double() * atoms[b, number].double()
    return result


@pytest.mark.parametrize(("values", "tolerance"), [("float16", 2e-3), ("bfloat16", 2e-2), ("int8", 2e-2)])
def test_gathering_is_multiplying_by_the_matrix(values, tolerance):
    atoms, numbers, index = factors()
    layer = SparseFactorLinear.pack(atoms, numbers, index, values)
    layer.bias = torch.nn.Parameter(torch.randn(7, generator=torch.Generator().manual_seed(1)))
    matrix = layer.matrix(torch.float32)
    slow = slow_matrix(atoms, numbers, index)
    assert float((matrix - slow).abs().max() / slow.abs().max()) < tolerance  # the rounding of what is stored
    for shape in ((5, 12), (2, 300, 12), (12,), (0, 12)):  # more tokens than are gathered at once, one, none
        x = torch.randn(*shape, generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            found, wanted = layer(x), torch.nn.functional.linear(x, matrix, layer.bias)
        assert found.shape == wanted.shape and torch.allclose(found, wanted, rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            coarse = layer(x.to(torch.bfloat16))
        assert coarse.dtype == torch.bfloat16 and torch.allclose(coarse.float(), wanted, rtol=0.05, atol=0.2)


def test_a_stored_layer_is_rebuilt_from_its_tensors_and_refuses_damaged_ones():
    layer = SparseFactorLinear.pack(*factors(), "int8")
    again = SparseFactorLinear.from_tensors(layer.format_params(), layer.tensors())
    assert again.matrix(torch.float32).equal(layer.matrix(torch.float32))
    damaged = {**layer.tensors(), "weight_index": layer.weight_index ^ 1}
    with raises(ShapeError, tensor="weight_index", k=2, rows=21):
        SparseFactorLinear.from_tensors(layer.format_params(), damaged)
    numbers = SparseFactorLinear.pack(*factors(atoms=33), "float16")
    damaged = {**numbers.tensors(), "weight_index": numbers.weight_index | 255}
    with raises(ShapeError, tensor="weight_index", atoms=33):
        SparseFactorLinear.from_tensors(numbers.format_params(), damaged)
    with raises(ShapeError, reason="descends"):
        atoms, values, index = factors()
        SparseFactorLinear.pack(atoms, values, index.flip(2), "float16")
    with raises(ShapeError, block=5, k=2, atoms=6, inputs=12):
        SparseFactorLinear(12, 7, 5, 6, 2, "float16", torch.float32)


@pytest.mark.parametrize(("values", "tolerance"), [("float16", 2e-3), ("bfloat16", 2e-2), ("int8", 2e-2)])
def test_two_thin_products_are_one_by_the_matrix(values, tolerance):
    draw = torch.Generator().manual_seed(0)
    left, right = torch.randn(9, 3, generator=draw), torch.randn(3, 5, generator=draw)
    layer = LowRankLinear.pack(left, right, values)
    matrix = layer.matrix(torch.float32)
    assert float((matrix - left @ right).abs().max() / (left @ right).abs().max()) < tolerance
    x = torch.randn(2, 4, 5, generator=draw)
    assert torch.allclose(layer(x), torch.nn.functional.linear(x, matrix), rtol=1e-5, atol=1e-5)
    again = LowRankLinear.from_tensors(layer.format_params(), layer.tensors(), torch.ones(9))
    assert again.matrix(torch.float32).equal(matrix) and torch.allclose(again(x), layer(x) + 1)
    with raises(ShapeError, left=[9, 3], right=[2, 5]):
        LowRankLinear.pack(left, right[:2], values)
