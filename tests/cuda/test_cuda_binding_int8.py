"""CUDA kernels with dynamic activation quantization in torch, emulated on the CPU: the bits of the CPU library."""

from __future__ import annotations

import ctypes
import dataclasses
import itertools

import cuda_on_cpu
import numpy as np
import pytest
import torch
from raising import raises
from torch import nn

from compressor.errors import KernelError, ShapeError
from compressor.kernels.cpu import library as cpu_library
from compressor.kernels.cuda import mma1, mma8a1, selftest
from compressor.kernels.cuda import ops as cuda_ops
from compressor.kernels.cuda.interface import BAD_CALL
from compressor.kernels.ops import linear as ops
from compressor.kernels.prepared.prepare import prepare
from compressor.layers.packed_linear import PackedLinear
from cuda_ext.cases import w_a8

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
needs_cpu_library = pytest.mark.skipif(isinstance(cpu_library(), str), reason="the CPU library isn't there")
# rows, outputs, inputs, group: tails, short last groups, whole rows, wide groups, each kernel
SHAPES = [(1, 64, 64, 64), (7, 70, 200, 64), (16, 8, 328, 192), (20, 66, 328, -1), (33, 130, 72, 64), (0, 8, 64, 64)]


@dataclasses.dataclass
class Problem:
    x: torch.Tensor
    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None
    bias: torch.Tensor
    bits: int
    group: int

    def packed(self, order=None, layout="mma8a1"):
        return ops.pack_weight(self.codes, self.scale, self.zero_point, order, self.bits, self.group, layout)

    def run(self, x=None, bias=None, order=None, **changes):
        rest = dict(out_features=len(self.codes), bits=self.bits, group_size=self.group, layout="mma8a1") | changes
        packed = rest.pop("packed", None)
        packed = self.packed(order) if packed is None else packed
        return cuda_ops.linear_dynamic_int8(self.x if x is None else x, packed, bias, order, **rest)

    def on_the_cpu(self, bias=None, order=None):
        rest = (bias, order, len(self.codes), self.bits, self.group, ops.LAYOUT)
        return ops.linear_dynamic_int8(self.x, self.packed(order, ops.LAYOUT), *rest)


def problem(shape, bits=4, dtype=torch.float16, scale_dtype=torch.float16, zeros=True, seed=0):
    rows, out, columns, group = shape
    made = torch.Generator().manual_seed(seed)
    groups = ops.groups_of(columns, group)
    x = torch.randn(rows, columns, generator=made)
    if rows > 3:  # a row of zeros, and those that become NaN
        x[1], x[2, 3], x[3, -1] = 0, torch.inf, torch.nan
    return Problem(
        x.to(dtype),
        torch.randint(0, 2**bits, (out, columns), generator=made, dtype=torch.uint8),
        (torch.rand(out, groups, generator=made) * 0.02 + 0.01).to(scale_dtype),
        torch.randint(0, 2**bits, (out, groups), generator=made, dtype=torch.uint8) if zeros else None,
        torch.randn(out, generator=made).to(dtype),
        bits,
        group,
    )


def assert_same_bits(y, want):
    """NaN equals NaN, whatever its payload."""
    assert y.dtype == want.dtype and y.shape == want.shape
    assert torch.equal(y.isnan(), want.isnan())
    integer = torch.int32 if y.dtype == torch.float32 else torch.int16
    assert torch.equal(y.nan_to_num().view(integer), want.nan_to_num().view(integer))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("out, columns", [(64, 64), (1, 8), (70, 200), (130, 65)])
def test_torch_packs_the_words_that_the_kernels_cases_pack(out, columns, bits):
    made = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 2**bits, (out, columns), generator=made, dtype=torch.uint8)
    words = mma8a1.pack_codes(codes, bits).numpy().view(np.uint32)
    assert np.array_equal(words, w_a8.pack_mma8a1(codes.numpy(), bits).ravel())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize("scale_dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_unpacking_undoes_packing(shape, scale_dtype, zeros, bits):
    case = problem(shape, bits, scale_dtype=scale_dtype, zeros=zeros)
    _, out, columns, group = shape
    codes, scale, zero_point = torch.ops.compressor.unpack_weight(case.packed(), out, columns, bits, group, "mma8a1")
    assert torch.equal(codes, case.codes) and torch.equal(scale, case.scale.float())
    assert torch.equal(zero_point, case.zero_point if zeros else torch.full_like(zero_point, 2 ** (bits - 1)))


def test_a_packed_weight_has_the_size_of_layout_mma1_whose_growth_is_tested():
    for shape in itertools.product((1, 70), (8, 1096), (64, -1), FLOATS, (False, True), (4, 8)):
        assert mma8a1.packed_bytes(*shape) == mma1.packed_bytes(*shape)


@pytest.mark.parametrize("bits", [4, 8])
def test_shapes_for_tracing_are_the_real_ones(bits):
    case = problem((2, 70, 200, 64), bits)
    shapes = [tensor.to("meta") for tensor in (case.codes, case.scale, case.zero_point)]
    packed = torch.ops.compressor.pack_weight(*shapes, None, bits, 64, "mma8a1")
    assert packed.shape == case.packed().shape and packed.dtype == torch.uint8
    y = torch.ops.compressor.linear_dynamic_int8(case.x.to("meta"), packed, None, None, 70, bits, 64, "mma8a1")
    assert y.shape == (2, 70) and y.dtype == torch.float16


@needs_cpu_library
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_product_has_the_bits_of_the_cpu_library(kernels, shape, dtype, zeros, bits):
    scale_dtype = FLOATS[(FLOATS.index(dtype) + zeros) % 3]
    case = problem(shape, bits, dtype, scale_dtype, zeros)
    bias = case.bias if shape[0] % 2 else None
    assert_same_bits(case.run(bias=bias), case.on_the_cpu(bias=bias))


@needs_cpu_library
def test_4_bit_products_of_more_than_128_rows_have_the_bits_of_the_cpu_library(kernels):
    for group in (64, 192):
        case = problem((129, 8, 200, group), dtype=torch.bfloat16)
        assert_same_bits(case.run(bias=case.bias), case.on_the_cpu(bias=case.bias))


@needs_cpu_library
def test_a_permutation_gathers_the_inputs_in_packed_order(kernels):
    case = problem((7, 70, 256, 64), bits=8)
    order = torch.randperm(256, generator=torch.Generator().manual_seed(1))
    assert_same_bits(case.run(order=order), case.on_the_cpu(order=order))
    assert not torch.equal(case.run(order=order)[0], case.run()[0])


def test_strided_and_misaligned_operands_give_the_bits_of_contiguous_ones(kernels):
    case = problem((6, 70, 200, 64))
    want = case.run(bias=case.bias)
    wide = torch.zeros(6, 203, dtype=case.x.dtype)
    wide[:, 3:] = case.x
    for x in (wide[:, 3:], case.x.t().contiguous().t()):
        assert_same_bits(case.run(x, case.bias), want)
    packed = case.packed()
    moved = torch.zeros(packed.numel() + 1, dtype=torch.uint8)
    moved[1:] = packed
    assert_same_bits(case.run(bias=case.bias, packed=moved[1:]), want)
    assert_same_bits(case.run(case.x.view(2, 3, 200), case.bias), want.view(2, 3, 70))


BAD = {
    "float64 inputs": (dict(x=torch.zeros(2, 200).double()), dict(x="torch.float64 (2, 200)")),
    "other columns": (dict(x=torch.zeros(2, 192)), dict(x="torch.float32 (2, 192)")),
    "columns no multiple of 8": (dict(x=torch.zeros(2, 196)), dict(x="torch.float32 (2, 196)")),
    "no rows": (dict(x=torch.tensor(1.0)), dict(x="torch.float32 ()")),
    "other outputs": (dict(out_features=71), dict(out_features=71)),
    "8 bits": (dict(bits=8), dict(bits=8)),
    "3 bits": (dict(bits=3), dict(bits=3)),
    "groups of 96": (dict(group_size=96), dict(group_size=96)),
    "the layout of weight-only products": (dict(layout="mma1"), dict(layout="mma1")),
    "bias of another type": (dict(bias=torch.zeros(70)), dict(reason="bias", bias="torch.float32 (70,)")),
    "a packed weight of another type": (dict(packed=torch.zeros(8)), dict(packed="torch.float32 (8,)")),
    "a permutation of int32": (
        dict(order=torch.arange(200, dtype=torch.int32)),
        dict(reason="permutation", permutation="torch.int32 (200,)"),
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_calls_name_what_they_got(kernels, name):
    changes, said = BAD[name]
    case = problem((2, 70, 200, 64))
    if "order" in changes:
        changes = changes | {"packed": case.packed()}
    with raises(ShapeError, **{"reason": "operands", "operation": "linear_dynamic_int8"} | said):
        case.run(**changes)


def test_bad_weights_are_not_packed():
    codes = torch.zeros(2, 200, dtype=torch.uint8)
    for bits, group in ((3, 64), (4, 40)):
        with raises(ShapeError, reason="not-packed", bits=bits, group_size=group):
            ops.pack_weight(codes, torch.ones(2, ops.groups_of(200, group)), None, None, bits, group, "mma8a1")
    assert "at most" in mma8a1.refusal((1 << 24) + 8, 4, 64)
    for bits, most in ((4, 131008), (8, 65792)):  # w_a8.cu: widest
        assert mma8a1.refusal(most, bits, -1) is None and "int32" in mma8a1.refusal(most + 8, bits, -1)


def test_either_launcher_s_code_becomes_an_error(kernels, monkeypatch):
    case = problem((2, 70, 200, 64))
    for name in ("compressor_quantize_rows", "compressor_w_a8"):
        for code, error, reason in ((2, KernelError, "launch"), (BAD_CALL, ShapeError, "bad-call")):
            broken = {**kernels.functions, name: lambda *a, code=code: code}
            cuda_on_cpu.use(monkeypatch, dataclasses.replace(kernels, functions=broken))
            with raises(error, reason=reason, kernels=cuda_on_cpu.NAME, code=code):
                case.run()


def test_the_self_test_names_wrong_products_and_wrong_codes(kernels):
    def without_bias(*arguments):
        return kernels.functions["compressor_w_a8"](*arguments[:6], 0, *arguments[7:])

    def one_code_off(x, codes, *rest):
        outcome = kernels.functions["compressor_quantize_rows"](x, codes, *rest)
        ctypes.c_int8.from_address(codes).value ^= 1
        return outcome

    wrong = {
        "compressor_w_a8": (without_bias, "outputs are wrong"),
        "compressor_quantize_rows": (one_code_off, "1 of 1280 codes"),
    }
    for name, (broken, said) in wrong.items():
        functions = {**kernels.functions, name: broken}
        found = dataclasses.replace(kernels, functions=functions)
        assert said in selftest.int8_product(found, torch.device("cpu"), 0, torch.float32, 4, 5, 200, 128)


@needs_cpu_library
@pytest.mark.parametrize("bits, group", [(4, 64), (8, -1)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_prepared_layer_has_the_bits_of_one_prepared_on_the_cpu(emulated, monkeypatch, dtype, bits, group):
    def layer():
        made = torch.Generator().manual_seed(0)
        half = 2 ** (bits - 1)
        groups = 1 if group == -1 else 256 // group
        return nn.Sequential(
            PackedLinear.pack(
                torch.randint(-half, half, (70, 256), generator=made, dtype=torch.int8),
                (torch.rand(70, groups, generator=made) * 0.02 + 0.01).to(dtype),
                None, bits=bits, group_size=group, symmetric=True, index=None,
                bias=torch.randn(70, generator=made).to(dtype),
            )
        )  # fmt: skip

    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(1)).to(dtype)
    model = layer()
    assert prepare(model, activations="int8")["0"].layout == ops.LAYOUT
    want = model(x)
    cuda_on_cpu.use(monkeypatch, emulated)
    model = layer()
    choice = prepare(model, activations="int8", strict=True)["0"]
    assert (choice.kernel, choice.op, choice.layout) == (cuda_on_cpu.NAME, "linear_dynamic_int8", "mma8a1")
    assert_same_bits(model(x), want)


def test_every_bound_operation_has_a_layout_and_types_of_its_inputs():
    assert cuda_ops.RUN.keys() == cuda_ops.LAYOUTS.keys() == cuda_ops.INPUTS.keys()
