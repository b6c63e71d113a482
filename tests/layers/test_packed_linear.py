"""Packed codes: the worked examples, the owner's own packer, and the layer as a drop-in."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from raising import raises

from compressor.errors import ShapeError
from compressor.kernels.ops.pack_codes import pack_codes, unpack_codes
from compressor.layers.packed_linear import PackedLinear

WORKED = [
    (8, [-8, -7, -1, 0, 1, 2, 6, 7], [-2139129480, -2021227903]),
    (4, [-8, -7, -1, 0, 1, 2, 6, 7], [-22444272]),
    (3, [-4, -4, -1, 0, 1, 2, 3, 3], [16734400]),
    (2, [-2, -2, -1, 0, 1, 1, 1, 1], [65424]),
]


def make(bits=4, symmetric=True, group_size=32, out=5, columns=64, dtype=torch.bfloat16, bias=None):
    generator = torch.Generator().manual_seed(bits)
    half = 2 ** (bits - 1)
    groups = 1 if group_size == -1 else columns // group_size
    codes = torch.randint(-half, half, (out, columns), generator=generator).to(torch.int8)
    scale = (torch.rand(out, groups, generator=generator) + 0.1).to(dtype)
    zero = None if symmetric else torch.randint(-half, half, (out, groups), generator=generator).to(torch.int8)
    layer = PackedLinear.pack(codes, scale, zero, bits=bits, group_size=group_size, symmetric=symmetric, bias=bias)
    return layer, codes, scale, zero


@pytest.mark.parametrize(("bits", "codes", "words"), WORKED)
def test_worked_examples_of_the_format(bits, codes, words):
    unsigned = (torch.tensor([codes]) + 2 ** (bits - 1)).to(torch.uint8)
    assert pack_codes(unsigned, bits).tolist() == [words]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("columns", [1, 5, 8, 31, 32, 33, 70])
def test_packing_equals_the_owners_for_every_width_and_length(bits, columns):
    generator = torch.Generator().manual_seed(columns)
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (3, columns), generator=generator).to(torch.int8)
    unsigned = (codes.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8)
    packed = pack_codes(unsigned, bits)
    assert torch.equal(packed, pack_to_int32(codes, bits))
    assert torch.equal(packed[:1], pack_codes(unsigned.t().contiguous().t()[:1], bits))  # one row with gaps
    assert torch.equal(unpack_from_int32(packed, bits, torch.Size([3, columns])), codes)
    assert torch.equal(unpack_codes(packed, bits, columns).to(torch.int16) - 2 ** (bits - 1), codes.to(torch.int16))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [-1, 32])
def test_a_layer_gives_back_what_was_packed(bits, symmetric, group_size):
    layer, codes, scale, zero = make(bits, symmetric, group_size)
    assert torch.equal(layer.codes(), codes)
    again = PackedLinear.from_tensors(layer.format_params(), layer.tensors())
    width = 64 if group_size == -1 else group_size
    shift = 0 if zero is None else zero.repeat_interleave(width, 1).to(torch.bfloat16)
    expected = (codes.to(torch.bfloat16) - shift) * scale.repeat_interleave(width, 1)
    assert torch.equal(again.matrix(torch.bfloat16), expected)
    if zero is not None:
        assert torch.equal(layer.zero_points(), zero)


def test_forward_is_the_dense_multiply_with_its_bias():
    bias = torch.randn(5, generator=torch.Generator().manual_seed(0)).bfloat16()
    layer, *_ = make(bias=bias)
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert torch.equal(layer(x), torch.nn.functional.linear(x, layer.matrix(torch.bfloat16), bias))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_planned_shapes_are_those_that_are_stored(bits, symmetric):
    layer, *_ = make(bits, symmetric)
    planned = PackedLinear.planned((5, 64), layer.format_params(), torch.bfloat16)
    assert planned == {name: (value.dtype, tuple(value.shape)) for name, value in layer.tensors().items()}


def test_scales_that_do_not_fit_are_refused():
    codes = torch.zeros(4, 64, dtype=torch.int8)
    with raises(ShapeError, tensor="scale", shape=[4, 3], codes=[4, 64], group_size=32):
        PackedLinear.pack(codes, torch.ones(4, 3), None, bits=4, group_size=32, symmetric=True)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_stored_index_says_the_group_of_each_input(symmetric):
    _, codes, scale, zero = make(symmetric=symmetric)
    index = torch.randperm(64, generator=torch.Generator().manual_seed(3)) // 32
    layer = PackedLinear.pack(codes, scale, zero, bits=4, group_size=32, symmetric=symmetric, index=index)
    assert layer.format_params() == {"bits": 4, "group_size": 32, "symmetric": symmetric, "act_order_index": True}
    assert layer.tensors()["weight_g_idx"].dtype == torch.int32
    again = PackedLinear.from_tensors(layer.format_params(), layer.tensors())
    expected = torch.empty(5, 64, dtype=torch.bfloat16)
    for row in range(5):
        for column in range(64):
            group = index[column]
            shift = 0 if zero is None else zero[row, group].bfloat16()
            expected[row, column] = (codes[row, column].bfloat16() - shift) * scale[row, group]
    assert torch.equal(again.matrix(torch.bfloat16), expected)
    planned = PackedLinear.planned((5, 64), layer.format_params(), torch.bfloat16)
    assert planned == {name: (value.dtype, tuple(value.shape)) for name, value in layer.tensors().items()}


def test_without_an_index_neither_spec_nor_tensors_mention_it():
    layer, *_ = make()
    assert layer.format_params() == {"bits": 4, "group_size": 32, "symmetric": True}
    assert set(layer.tensors()) == {"weight_packed", "weight_scale", "weight_shape"}


@pytest.mark.parametrize("index", [[2] * 64, [-1] * 64, [0] * 63])
def test_an_index_of_groups_that_do_not_exist_is_refused(index):
    _, codes, scale, _ = make()
    with raises(ShapeError, tensor="weight_g_idx", shape=[len(index)], groups=2, inputs=64):
        PackedLinear.pack(codes, scale, None, bits=4, group_size=32, symmetric=True, index=torch.tensor(index))
    stored = PackedLinear.pack(codes, scale, None, bits=4, group_size=32, symmetric=True, index=torch.arange(64) // 32)
    tensors = {**stored.tensors(), "weight_g_idx": torch.tensor(index, dtype=torch.int32)}
    with raises(ShapeError, tensor="weight_g_idx", shape=[len(index)]):
        PackedLinear.from_tensors(stored.format_params(), tensors)
