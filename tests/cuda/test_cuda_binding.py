"""CUDA kernels under torch, with the emulated library on the CPU: layout, operation, dispatch, prepared layers."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import io
import itertools

import cuda_on_cpu
import numpy as np
import pytest
import torch
from raising import raises
from torch import nn
from torch._subclasses import FakeTensorMode

from compressor.errors import KernelError, ShapeError
from compressor.kernels.cuda import devices, mma1, plans
from compressor.kernels.cuda import ops as cuda_ops
from compressor.kernels.cuda.interface import BAD_CALL
from compressor.kernels.cuda.selftest import self_test
from compressor.kernels.ops import linear as ops
from compressor.kernels.prepared.dispatch import IntegerWeight, OutlierWeight, choose
from compressor.kernels.prepared.prepare import explain, prepare
from compressor.layers.packed_linear import PackedLinear
from cuda_ext.cases import hadamard, w_a16

UNIT = 2.0**-24  # half a unit in the last place of float32
OUTPUT_UNIT = {torch.float32: UNIT, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
HALVES = (torch.float16, torch.bfloat16)
SCALES = (*HALVES, torch.float32)
BITS = (2, 3, 4, 8)
# rows, outputs, inputs, group: tails, short last groups, whole rows, K in slices, each of the four kernels
SHAPES = [(1, 64, 64, 64), (3, 70, 200, 64), (16, 8, 1096, 128), (20, 66, 328, -1), (33, 130, 72, 64), (0, 8, 64, 64)]


@dataclasses.dataclass
class Problem:
    x: torch.Tensor
    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None
    bias: torch.Tensor
    group: int
    bits: int

    def packed(self, order=None):
        return ops.pack_weight(self.codes, self.scale, self.zero_point, order, self.bits, self.group, "mma1")

    def run(self, x=None, bias=None, order=None, **changes):
        rest = dict(out_features=len(self.codes), bits=self.bits, group_size=self.group, layout="mma1") | changes
        packed = rest.pop("packed", None)
        packed = self.packed(order) if packed is None else packed
        return cuda_ops.linear_weight_only(self.x if x is None else x, packed, bias, order, **rest)

    def weight(self):
        """(out, in) float64, of columns as they are packed"""
        columns = self.codes.shape[1]
        index = torch.arange(columns) // (columns if self.group == -1 else self.group)
        middle = torch.full_like(self.scale, 2 ** (self.bits - 1))
        zeros = (middle if self.zero_point is None else self.zero_point).double()
        return (self.codes.double() - zeros[:, index]) * self.scale.double()[:, index]

    def check(self, y, x, weight, bias=None):
        """y against float64, within the bound of cuda_ext/cases/w_a16.py: K additions inside the mma; for each group
        and slice (of 8 tiles of 64 columns, or more) a product and an addition; the bias; one rounding."""
        added = 0 if bias is None else bias.double()
        exact = x.double() @ weight.t() + added
        size = x.double().abs() @ weight.abs().t() + (0 if bias is None else bias.double().abs())
        columns = self.codes.shape[1]
        inside = (columns + self.scale.shape[1] + 2 * -(-columns // 512) + 1) * UNIT * size
        allowed = inside + OUTPUT_UNIT[y.dtype] * (exact.abs() + inside) + 2.0**-25
        assert y.dtype == x.dtype and y.shape == exact.shape
        assert ((y.double() - exact).abs() <= allowed).all()  # NaN is never right


def problem(shape, dtype=torch.float16, scale_dtype=torch.float16, zeros=True, seed=0, bits=4):
    rows, out, columns, group = shape
    made = torch.Generator().manual_seed(seed)
    groups = ops.groups_of(columns, group)
    return Problem(
        torch.randn(rows, columns, generator=made).to(dtype),
        torch.randint(0, 2**bits, (out, columns), generator=made, dtype=torch.uint8),
        (torch.rand(out, groups, generator=made) * 0.02 + 0.01).to(scale_dtype),
        torch.randint(0, 2**bits, (out, groups), generator=made, dtype=torch.uint8) if zeros else None,
        torch.randn(out, generator=made).to(dtype),
        group,
        bits,
    )


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("out, columns", [(64, 64), (1, 8), (70, 200), (130, 65)])
def test_torch_packs_the_words_that_the_kernels_cases_pack(out, columns, bits):
    made = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 2**bits, (out, columns), generator=made, dtype=torch.uint8)
    words = mma1.pack_codes(codes, bits).numpy().view(np.uint32)
    assert np.array_equal(words, w_a16.pack_mma1(codes.numpy(), bits).ravel())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize("scale_dtype", SCALES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_unpacking_undoes_packing(shape, scale_dtype, zeros, bits):
    case = problem(shape, scale_dtype=scale_dtype, zeros=zeros, bits=bits)
    _, out, columns, group = shape
    codes, scale, zero_point = torch.ops.compressor.unpack_weight(case.packed(), out, columns, bits, group, "mma1")
    assert torch.equal(codes, case.codes) and torch.equal(scale, case.scale.float())
    assert torch.equal(zero_point, case.zero_point if zeros else torch.full_like(zero_point, 2 ** (bits - 1)))


def is_ascending(sizes):
    return all(one < other for one, other in itertools.pairwise(sizes))


@pytest.mark.parametrize("bits", BITS)
def test_the_size_of_a_packed_weight_grows_with_its_outputs_columns_and_groups(bits):
    for dtype, zeros in itertools.product(SCALES, (False, True)):
        for columns, group in ((1096, 64), (256, 64), (8, -1)):
            assert is_ascending(mma1.packed_bytes(out, columns, group, dtype, zeros, bits) for out in range(1, 300))
        for out in (1, 3, 64, 70):
            for group in (64, 192, -1):
                assert is_ascending(mma1.packed_bytes(out, k, group, dtype, zeros, bits) for k in range(1, 301))
            groups = (4096, 2048, 1024, 512, 256, 128, 64)
            assert is_ascending(mma1.packed_bytes(out, 4096, group, dtype, zeros, bits) for group in groups)


def test_the_size_of_a_packed_weight_grows_with_its_bits():
    for shape in itertools.product((1, 64, 70), (8, 1096), (64, -1), SCALES, (False, True)):
        assert is_ascending(mma1.packed_bytes(*shape, bits) for bits in BITS)


@pytest.mark.parametrize("bits", BITS)
def test_the_size_of_a_packed_weight_says_what_its_scales_are(bits):
    for out, columns, group in [(n, k, g) for n in (1, 3, 64, 70) for k in (8, 64, 200, 1096) for g in (64, 128, -1)]:
        sizes = {}
        for dtype in SCALES:
            for zeros in (False, True):
                size = mma1.packed_bytes(out, columns, group, dtype, zeros, bits)
                found = mma1.sections(size, out, columns, group, bits)
                assert mma1.TORCH[found.scale_type] == dtype and (found.zero_at is not None) == zeros
                sizes[size] = (dtype, zeros)
        assert len(sizes) == 6
        other = {size + off for size in sizes for off in (8, -8)} | {
            size // 8 * 8 + end for size in sizes for end in (6, 7)
        }
        assert all(mma1.sections(size, out, columns, group, bits) is None for size in other - set(sizes))


@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_product_is_within_the_bound_of_float64(kernels, shape, dtype, zeros):
    for scale_dtype in SCALES:
        case = problem(shape, dtype, scale_dtype, zeros)
        case.check(case.run(), case.x, case.weight())
        case.check(case.run(bias=case.bias), case.x, case.weight(), case.bias)


@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_product_of_other_widths_is_within_the_bound_of_float64(kernels, shape, dtype, bits):
    for zeros, scale_dtype in ((True, torch.float32), (False, dtype)):
        case = problem(shape, dtype, scale_dtype, zeros, bits=bits)
        case.check(case.run(bias=case.bias), case.x, case.weight(), case.bias)


def test_a_permutation_gathers_the_inputs_in_packed_order(kernels):
    case = problem((5, 70, 256, 64))
    order = torch.randperm(256, generator=torch.Generator().manual_seed(1))
    inverse = torch.argsort(order)
    packed_order = dataclasses.replace(case, codes=case.codes[:, order])  # groups are of columns in packed order
    case.check(case.run(order=order), case.x, packed_order.weight()[:, inverse])


def test_strided_and_misaligned_inputs_give_the_bits_of_contiguous_ones(kernels):
    case = problem((6, 70, 200, 64))
    want = case.run(bias=case.bias)
    wide = torch.zeros(6, 203, dtype=case.x.dtype)
    wide[:, 3:] = case.x
    flat = torch.zeros(6 * 200 + 1, dtype=case.x.dtype)
    flat[1:] = case.x.ravel()
    off_by_one = flat[1:].view(6, 200)
    assert off_by_one.data_ptr() % 16 and off_by_one.is_contiguous()
    for x in (wide[:, 3:], case.x.t().contiguous().t(), off_by_one):
        assert torch.equal(case.run(x, case.bias), want)
    strided_bias = torch.stack((case.bias, case.bias), 1)[:, 0]
    assert torch.equal(case.run(bias=strided_bias), want)
    assert torch.equal(case.run(case.x.view(2, 3, 200), case.bias), want.view(2, 3, 70))
    one = case.run(case.x[:1].expand(6, 200))
    assert torch.equal(one, one[:1].expand(6, 70))


def test_a_misaligned_packed_weight_gives_the_same_bits(kernels):
    case = problem((6, 70, 200, 64))
    packed = case.packed()
    moved = torch.zeros(packed.numel() + 1, dtype=torch.uint8)
    moved[1:] = packed
    assert torch.equal(case.run(packed=moved[1:]), case.run())


BAD = {
    "float32 inputs": (dict(x=torch.zeros(2, 200)), dict(x="torch.float32 (2, 200)")),
    "other columns": (dict(x=torch.zeros(2, 192).half()), dict(x="torch.float16 (2, 192)")),
    "columns no multiple of 8": (dict(x=torch.zeros(2, 196).half()), dict(x="torch.float16 (2, 196)")),
    "no rows": (dict(x=torch.tensor(1.0).half()), dict(x="torch.float16 ()")),
    "other outputs": (dict(out_features=71), dict(out_features=71)),
    "8 bits": (dict(bits=8), dict(bits=8)),
    "groups of 96": (dict(group_size=96), dict(group_size=96)),
    "the layout of the CPU": (dict(layout="cpu2"), dict(layout="cpu2")),
    "bias of another type": (dict(bias=torch.zeros(70)), dict(reason="bias", bias="torch.float32 (70,)")),
    "a short bias": (dict(bias=torch.zeros(69).half()), dict(reason="bias", bias="torch.float16 (69,)")),
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
    with raises(ShapeError, **{"reason": "operands", "operation": "linear_weight_only"} | said):
        case.run(**changes)


def test_sizes_that_an_int_would_cut_off_are_refused(kernels):
    with raises(ShapeError, reason="rows", rows=2**31):
        case = problem((1, 1, 8, 64))
        case.run(torch.zeros(1, 8, dtype=torch.float16).expand(2**31, 8))
    for out, columns in ((65535 * 64 + 1, 64), (64, (1 << 30) + 8)):
        assert "is larger than" in cuda_ops.refusal("linear_weight_only", out, columns, 4, 64, None)


def test_bad_weights_are_not_packed():
    case = problem((2, 70, 200, 64))
    for bits, group in ((5, 64), (4, 40)):
        scale = case.scale if group == 64 else torch.ones(70, 5)
        with raises(ShapeError, reason="not-packed", bits=bits, group_size=group):
            ops.pack_weight(case.codes & 7, scale, None, None, bits, group, "mma1")
    with pytest.raises(ShapeError):
        ops.pack_weight(case.codes, case.scale, None, None, 4, 64, "cpu1")
    with pytest.raises(ShapeError):
        ops.pack_weight(case.codes | 16, case.scale, None, None, 4, 64, "mma1")


def test_tensors_that_are_not_on_a_cuda_device_are_refused():
    case = problem((2, 70, 200, 64))
    with pytest.raises(KernelError):
        case.run()
    with pytest.raises(KernelError):
        cuda_ops.hadamard(case.x, 1.0)
    with FakeTensorMode(), pytest.raises(KernelError):
        codes = torch.zeros(70, 200, dtype=torch.uint8, device="cuda")
        ops.unpack_weight(codes, 70, 200, 4, 64, "cpu2")


def test_a_product_has_no_gradient(kernels):
    case = problem((2, 70, 200, 64))
    with pytest.raises(RuntimeError, match=r"no gradient \(x wants one\)"):
        case.run(case.x.clone().requires_grad_())


def test_what_a_launcher_returns_becomes_an_error_with_the_text(kernels, monkeypatch):
    case = problem((2, 70, 200, 64))
    for code, error, reason in ((2, KernelError, "launch"), (BAD_CALL, ShapeError, "bad-call")):
        broken = {**kernels.functions, "compressor_w_a16": lambda *a, code=code: code}
        cuda_on_cpu.use(monkeypatch, dataclasses.replace(kernels, functions=broken))
        with raises(error, reason=reason, kernels=cuda_on_cpu.NAME, code=code):
            case.run()


@pytest.mark.parametrize("dtype", SCALES)
@pytest.mark.parametrize("rows, n", [(3, 8), (5, 256), (2, 8192), (0, 64), (3, 12), (2, 640), (5, 112), (1, 4608)])
def test_hadamard_is_within_the_bound_of_float64(kernels, rows, n, dtype):
    x = torch.randn(rows, n, generator=torch.Generator().manual_seed(0)).to(dtype)
    y = cuda_ops.hadamard(x, n**-0.5)
    exact = torch.from_numpy(hadamard.hadamard_product(x.double().numpy())) * np.float32(n**-0.5).item()
    # m + log2(n / m) additions and the scale, each off by UNIT of what it adds at most; then the rounding
    m = hadamard.factor(n)
    inside = (m + (n // m).bit_length() + 1) * UNIT * x.double().abs().sum(1, keepdim=True) * n**-0.5
    allowed = inside + OUTPUT_UNIT[dtype] * (exact.abs() + inside) + 2.0**-25
    assert y.dtype == dtype and ((y.double() - exact).abs() <= allowed).all()
    assert torch.equal(cuda_ops.hadamard(x.t().contiguous().t(), n**-0.5), y)


def test_hadamard_takes_the_sizes_that_its_docstring_names(kernels):
    taken = [n for n in range(1, 100_000) if plans.hadamard_factor(n)]
    powers = {2**p for p in range(3, 16)}
    most = {12: 11, 20: 11, 28: 10, 36: 10}
    assert set(taken) == powers | {m << p for m, top in most.items() for p in range(top + 1)}
    assert max(m << top for m, top in most.items()) == 40960
    x = torch.zeros(1, 40960)
    assert torch.equal(cuda_ops.hadamard(x, 1.0), x)


@pytest.mark.parametrize("x", [torch.zeros(2, 44), torch.zeros(2, 4), torch.zeros(2, 8).double(), torch.tensor(1.0)])
def test_hadamard_names_what_it_got(kernels, x):
    with raises(ShapeError, reason="operands", operation="hadamard", x=f"{x.dtype} {tuple(x.shape)}"):
        cuda_ops.hadamard(x, 1.0)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("layout", ["cpu2", "mma1"])
@pytest.mark.parametrize("zeros", [True, False])
def test_shapes_for_tracing_are_those_of_either_layout(layout, zeros, bits):
    case = problem((2, 70, 200, 64), zeros=zeros, bits=bits)
    arguments = (case.codes, case.scale, case.zero_point)
    real = ops.pack_weight(*arguments, None, bits, 64, layout)
    shapes = [None if a is None else a.to("meta") for a in arguments]
    packed = torch.ops.compressor.pack_weight(*shapes, None, bits, 64, layout)
    assert packed.shape == real.shape and packed.dtype == real.dtype
    y = torch.ops.compressor.linear_weight_only(case.x.to("meta"), packed, None, None, 70, bits, 64, layout)
    assert y.shape == (2, 70) and y.dtype == torch.float16


def test_cuda_tensors_have_their_own_functions_in_the_registry():
    importlib.import_module("compressor.kernels.ops.hadamard")
    for name in ("pack_weight", "unpack_weight", "hadamard", *cuda_ops.RUN):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"compressor::{name}", "CUDA")


def test_the_self_test_passes_on_sound_kernels_and_names_what_is_wrong(kernels):
    cpu = torch.device("cpu")
    sound = self_test(kernels, cpu, 0)
    assert set(sound.values()) == {"ok"} and len(sound) == 46

    def without_bias(*arguments):
        return kernels.functions["compressor_w_a16"](*arguments[:4], 0, *arguments[5:])

    broken = {**kernels.functions, "compressor_w_a16": without_bias, "compressor_hadamard": lambda *a: 2}
    found = self_test(dataclasses.replace(kernels, functions=broken), cpu, 0)
    products = {name: said for name, said in found.items() if "_a16 " in name}
    assert {name[:2] for name in products} == {f"w{bits}" for bits in BITS}
    assert all("outputs are wrong" in said for said in products.values())
    assert all("error 2: an error" in said for name, said in found.items() if name.startswith("hadamard"))
    with raises(KernelError, reason="self-test", kernels=cuda_on_cpu.NAME, device="cpu") as caught:
        devices.tried(dataclasses.replace(kernels, functions=broken), cpu)
    assert set(caught.value.data["wrong"]) == {*products, *(name for name in found if name.startswith("hadamard"))}


def weight_on_cuda(bits=4, group=64, columns=256, **changes):
    """Inside FakeTensorMode: an IntegerWeight of 70 outputs that says it is on a GPU."""
    codes = torch.zeros(70, columns, dtype=torch.uint8, device="cuda")
    scale = torch.ones(70, ops.groups_of(columns, group), device="cuda")
    return dataclasses.replace(IntegerWeight(codes, scale, None, bits, group), **changes)


REFUSED = {
    "other bits": (dict(bits=5), {}, "holds 2, 3, 4 or 8 bits, these are 5"),
    "small groups": (dict(group=32), {}, "groups of 32 columns, a multiple of 64 is wanted"),
    "odd columns": (dict(columns=260, group=-1), {}, "260 inputs, a multiple of 8 is wanted"),
    "other bits for rounded inputs": (dict(bits=3), dict(activations="int8"), "holds 4 or 8 bits, these are 3"),
    "small groups for rounded inputs": (dict(group=32), dict(activations="int8"), "groups of 32 columns"),
    "odd columns for rounded inputs": (dict(columns=260, group=-1), dict(activations="int8"), "260 inputs"),
    "sums beyond int32": (dict(bits=8, columns=65800, group=-1), dict(activations="int8"), "can't hold their sums"),
    "float32 inputs": ({}, dict(inputs=torch.float32), "inputs are torch.float32"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_weights_that_no_cuda_kernel_takes_stay_with_the_reason(monkeypatch, name):
    made, asked, said = REFUSED[name]
    monkeypatch.setattr(devices, "kernels_on", lambda device: pytest.fail("was tried"))
    with FakeTensorMode():
        choice = choose(weight_on_cuda(**made), **{"activations": None} | asked)
    assert choice.is_fallback
    assert [text.split(" (")[0] for text in choice.skipped[:2]] == ["nvrtc", "cpu library"]
    assert said in choice.skipped[0] and "weights are on cuda" in choice.skipped[1]


@pytest.mark.parametrize("columns, said", [(72, "multiple of 16"), (65552, "is larger than")])
def test_llm_int8_that_no_cuda_kernel_takes_stays_with_the_reason(columns, said):
    with FakeTensorMode():
        codes = torch.zeros(70, columns, dtype=torch.int8, device="cuda")
        choice = choose(OutlierWeight(codes, torch.ones(70, device="cuda"), 6.0, None, None), None)
    assert choice.is_fallback and said in choice.skipped[0]


def test_a_device_with_kernels_uses_them_and_one_without_says_why(kernels, monkeypatch):
    with FakeTensorMode():
        weight = weight_on_cuda()
        monkeypatch.setattr(devices, "is_cuda", lambda device: device.type == "cuda")
        there = choose(weight, None, torch.float16)
        monkeypatch.setattr(devices, "kernels_on", lambda device: "not here")
        missing = choose(weight, None, torch.float16)
    assert (there.kernel, there.op, there.layout, there.skipped) == (cuda_on_cpu.NAME, "linear_weight_only", "mma1", ())
    assert missing.is_fallback and missing.skipped[0] == "nvrtc (not here)"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_the_reason_is_that_there_is_none():
    case = problem((2, 70, 200, 64))
    choice = choose(IntegerWeight(case.codes, case.scale, case.zero_point, 4, 64), None)
    assert choice.skipped[0] == "nvrtc (no CUDA device)"
    assert choice.layout in ("cpu2", None)


def layer_of(out=70, columns=256, dtype=torch.float16, symmetric=False, index=None, bias=True, seed=0, bits=4):
    made = torch.Generator().manual_seed(seed)
    groups, half = columns // 64, 2 ** (bits - 1)
    return PackedLinear.pack(
        torch.randint(-half, half, (out, columns), generator=made, dtype=torch.int8),
        (torch.rand(out, groups, generator=made) * 0.02 + 0.01).to(dtype),
        None if symmetric else torch.randint(-half, half, (out, groups), generator=made, dtype=torch.int8),
        bits=bits, group_size=64, symmetric=symmetric, index=index,
        bias=torch.randn(out, generator=made).to(dtype) if bias else None,
    )  # fmt: skip


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
def test_a_prepared_layer_multiplies_as_its_quantization_format(kernels, dtype, symmetric, act_order, bits):
    index = torch.randperm(256, generator=torch.Generator().manual_seed(2)) // 64 if act_order else None
    layer = layer_of(dtype=dtype, symmetric=symmetric, index=index, bits=bits)
    # exact: rows of the identity, and the product of a code and a scale of 16 bits in float32
    plain = layer_of(dtype=dtype, symmetric=symmetric, index=index, bias=False, bits=bits)
    weight = plain.float()(torch.eye(256)).t().double()
    model = nn.Sequential(layer)
    choice = prepare(model, strict=True)["0"]
    assert (choice.kernel, choice.op, choice.layout) == (cuda_on_cpu.NAME, "linear_weight_only", "mma1")
    case = problem((19, 70, 256, 64), dtype)
    case.check(model(case.x), case.x, weight, layer.bias.detach())


def test_a_model_in_float32_gets_no_cuda_kernel_and_says_why(kernels):
    choice = prepare(nn.Sequential(layer_of(dtype=torch.float32)))["0"]
    assert choice.layout != "mma1"  # on a GPU it would be the reference; here the CPU library takes over
    assert choice.skipped[0] == "nvrtc (inputs are torch.float32, float16 or bfloat16 is wanted)"


def test_groups_of_unequal_size_get_no_cuda_kernel_and_say_why(kernels):
    index = (torch.arange(256) >= 20).int() + (torch.arange(256) >= 100).int() + (torch.arange(256) >= 150).int()
    with pytest.warns(UserWarning, match="20 to 106 columns a group"):
        choice = prepare(nn.Sequential(layer_of(index=index)))["0"]
    assert choice.is_fallback and "20 to 106 columns a group" in choice.skipped[0]


def test_q_k_and_v_are_not_shared_with_kernels_that_take_one_weight(kernels):
    names = ("q_proj", "k_proj", "v_proj")
    model = nn.ModuleDict({name: layer_of(seed=number) for number, name in enumerate(names)})
    alone = [nn.Sequential(layer_of(seed=number)) for number in range(3)]
    prepare(model)
    x = torch.randn(2, 256).half()
    for name, other in zip(names, alone):
        prepare(other)
        assert model[name].shared is None and torch.equal(model[name](x), other(x))


def test_explain_names_the_cuda_kernels(kernels):
    model = nn.Sequential(layer_of())
    prepare(model)
    # 4 bits of 128 outputs; 16 + 8 a group of 64; 8 (5 + 63 + 4) bytes more tell the shape
    assert (
        explain(model).splitlines()[0].startswith(f"0   W4 g64   {cuda_on_cpu.NAME}   linear_weight_only   7.95 bits")
    )


def test_state_dict_deepcopy_and_pickle_keep_a_prepared_model(kernels):
    model, other = nn.Sequential(layer_of()), nn.Sequential(layer_of(seed=1))
    names, x = list(model.state_dict()), torch.randn(2, 256).half()
    prepare(model)
    assert list(model.state_dict()) == names
    copied, loaded = copy.deepcopy(model), other.state_dict()
    assert torch.equal(copied(x), model(x))
    model.load_state_dict(loaded)
    prepare(other)
    assert torch.equal(model(x), other(x)) and not torch.equal(model(x), copied(x))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), model(x))


def test_every_plan_has_a_launcher(kernels):
    assert kernels.functions.keys() == plans.PLANS.keys() | plans.SIZES.keys()
