"""Products with sparse combinations of dense atoms on CUDA under torch, with the emulated library on the CPU."""

from __future__ import annotations

import dataclasses

import cuda_on_cpu
import numpy as np
import pytest
import torch
from raising import raises
from torch import nn
from torch._subclasses import FakeTensorMode

from compressor.errors import KernelError, ShapeError
from compressor.kernels.cuda import ds1, selftest
from compressor.kernels.cuda import ops as cuda_ops
from compressor.kernels.cuda.interface import BAD_CALL
from compressor.kernels.prepared.dispatch import FactorWeight, choose
from compressor.kernels.prepared.prepare import explain, prepare
from compressor.layers.sparse_factor_linear import SparseFactorLinear
from cuda_ext.cases import dense_sparse

UNIT, OUTPUT_UNIT = 2.0**-24, {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# rows, outputs, blocks, atoms, width, k: tails of all, each kernel, too many atoms for 8 rows at once, no rows
SHAPES = [
    (1, 70, 3, 20, 16, 5),
    (3, 33, 2, 66, 72, 7),
    (20, 40, 2, 130, 200, 3),
    (70, 66, 3, 20, 16, 5),
    (5, 8, 2, 513, 8, 2),
    (0, 8, 2, 9, 8, 9),
]


@dataclasses.dataclass
class Problem:
    x: torch.Tensor
    dense: torch.Tensor
    index: torch.Tensor  # (out, blocks, k) uint16
    value: torch.Tensor
    bias: torch.Tensor | None

    def run(self, **changes):
        given = vars(self) | {"index": ds1.pack(self.index, self.value, self.dense.shape[1])} | changes
        return cuda_ops.linear_dense_sparse(**given)

    def exact(self):
        """The product and the sum of its terms' absolute values, (rows, out) float64."""
        blocks, atoms, width = self.dense.shape
        spread = torch.zeros(len(self.value), blocks, atoms, dtype=torch.float64)
        spread.scatter_(2, self.index.long(), self.value.double())
        operands = self.x.double().view(-1, blocks, width), self.dense.double(), spread
        added = torch.zeros(()) if self.bias is None else self.bias.double()
        products = (torch.einsum("rbw,baw,oba->ro", *tensors) for tensors in (operands, [t.abs() for t in operands]))
        return [product + term for product, term in zip(products, (added, added.abs()), strict=True)]

    def check(self, y):
        """The bound of cuda_ext/cases/dense_sparse.py: the additions inside the mma, whole tiles of 64 columns; one fma
        for each value, 8 parts, the step of 1 and the bias; one rounding."""
        exact, size = self.exact()
        blocks, _, width = self.dense.shape
        inside = (-(-width // 64) * 64 + blocks * self.value.shape[2] + 8 + 2) * UNIT * size
        allowed = inside + OUTPUT_UNIT[y.dtype] * (exact.abs() + inside) + 2.0**-25
        assert y.dtype == self.x.dtype and y.shape == exact.shape
        assert ((y.double() - exact).abs() <= allowed).all()  # NaN is never right


def problem(shape, dtype=torch.float16, bias=True, seed=0):
    rows, out, blocks, atoms, width, k = shape
    made = torch.Generator().manual_seed(seed)
    index = torch.rand(out, blocks, atoms, generator=made).argsort(2)[..., :k].sort(2).values
    return Problem(
        torch.randn(rows, blocks * width, generator=made).to(dtype),
        torch.randn(blocks, atoms, width, generator=made).to(dtype),
        index.to(torch.uint16),
        torch.randn(out, blocks, k, generator=made).to(dtype),
        torch.randn(out, generator=made).to(dtype) if bias else None,
    )


@pytest.mark.parametrize("out, blocks, k", [(32, 1, 1), (70, 3, 5), (1, 2, 9), (0, 2, 1)])
@pytest.mark.parametrize("dtype", OUTPUT_UNIT)
def test_torch_packs_the_words_that_the_kernels_cases_pack(out, blocks, k, dtype):
    case = problem((1, out, blocks, 9, 8, k), dtype)
    words = ds1.pack(case.index, case.value, 9)
    want = dense_sparse.pack_ds1(case.index.numpy(), case.value.view(torch.int16).numpy().view(np.uint16))
    assert np.array_equal(words.numpy().view(np.uint32), want) and words.shape == ds1.packed_shape(out, blocks, k)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", OUTPUT_UNIT)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_product_is_within_the_bound_of_float64(kernels, shape, dtype, bias):
    case = problem(shape, dtype, bias)
    case.check(case.run())


def test_strided_and_misaligned_operands_give_the_bits_of_contiguous_ones(kernels):
    case = problem((6, 70, 3, 20, 16, 5))
    want = case.run()
    wide = torch.zeros(6, 51, dtype=case.x.dtype)
    wide[:, 3:] = case.x
    moved = torch.zeros(case.dense.numel() + 1, dtype=case.dense.dtype)
    moved[1:] = case.dense.ravel()
    packed = ds1.pack(case.index, case.value, 20)
    changes = {
        "x": wide[:, 3:],
        "dense": moved[1:].view_as(case.dense),
        "index": torch.stack((packed, packed), -1)[..., 0],
        "bias": torch.stack((case.bias, case.bias), 1)[:, 0],
    }
    for name, tensor in changes.items():
        assert torch.equal(case.run(**{name: tensor}), want)
    assert torch.equal(case.run(x=case.x.view(2, 3, 48)), want.view(2, 3, 70))


def test_a_word_that_names_no_atom_makes_its_output_nan(kernels):
    case = problem((3, 33, 3, 20, 16, 5))
    packed = ds1.pack(case.index, case.value, 20)
    packed[1, 2, 4, 0] = packed[1, 2, 4, 0] & ~0xFFFF | 20
    y = case.run(index=packed)
    assert y[:, 32].isnan().all() and torch.equal(y[:, :32], case.run()[:, :32])


BAD = {
    "float32 inputs": (dict(x=torch.zeros(2, 48), bias=None), dict(x="torch.float32 (2, 48)")),
    "inputs of another type": (dict(x=torch.zeros(2, 48).bfloat16(), bias=None), dict(x="torch.bfloat16 (2, 48)")),
    "other columns": (dict(x=torch.zeros(2, 40).half()), dict(x="torch.float16 (2, 40)")),
    "no rows": (dict(x=torch.tensor(1.0).half()), dict(x="torch.float16 ()")),
    "atoms of another type": (dict(dense=torch.zeros(3, 20, 16).bfloat16()), dict(dense="torch.bfloat16 (3, 20, 16)")),
    "atoms of other blocks": (dict(dense=torch.zeros(2, 20, 24).half()), dict(dense="torch.float16 (2, 20, 24)")),
    "values of other blocks": (dict(value=torch.zeros(70, 2, 5).half()), dict(value="torch.float16 (70, 2, 5)")),
    "values of other outputs": (
        dict(value=torch.zeros(97, 3, 5).half(), bias=None),
        dict(value="torch.float16 (97, 3, 5)"),
    ),
    "the index of the CPU": (
        dict(index=torch.zeros(70, 3, 5, dtype=torch.uint16)),
        dict(index="torch.uint16 (70, 3, 5)"),
    ),
    "fewer values": (dict(value=torch.zeros(70, 3, 4).half()), dict(value="torch.float16 (70, 3, 4)")),
    "fewer atoms than values": (dict(dense=torch.zeros(3, 4, 16).half()), dict(dense="torch.float16 (3, 4, 16)")),
    "a bias of another type": (dict(bias=torch.zeros(70)), dict(bias="torch.float32 (70,)")),
    "a short bias": (dict(bias=torch.zeros(69).half()), dict(bias="torch.float16 (69,)")),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_calls_name_what_they_got(kernels, name):
    changes, said = BAD[name]
    with raises(ShapeError, **{"reason": "operands", "operation": "linear_dense_sparse"} | said):
        problem((2, 70, 3, 20, 16, 5)).run(**{"bias": torch.zeros(70).half()} | changes)


def test_rows_that_an_int_would_cut_off_are_refused(kernels):
    case = problem((1, 1, 1, 8, 8, 1))
    with raises(ShapeError, reason="rows", rows=2**30 + 1, most=2**30):
        case.run(x=case.x.expand(2**30 + 1, 8))


def test_factors_that_are_no_factors_are_not_packed():
    case = problem((2, 70, 3, 20, 16, 5))
    with raises(ShapeError, reason="no-such-atom", atom=19, atoms=19):
        ds1.pack(torch.full_like(case.index, 19), case.value, 19)
    for index, value in (
        (case.index.int(), case.value),
        (case.index, case.value.float()),
        (case.index[1:], case.value),
    ):
        with raises(ShapeError, reason="operands", index=f"{index.dtype} {tuple(index.shape)}"):
            ds1.pack(index, value, 20)


def test_what_the_launcher_returns_becomes_an_error(kernels, monkeypatch):
    for code, error, reason in ((2, KernelError, "launch"), (BAD_CALL, ShapeError, "bad-call")):
        broken = {**kernels.functions, "compressor_dense_sparse": lambda *a, code=code: code}
        cuda_on_cpu.use(monkeypatch, dataclasses.replace(kernels, functions=broken))
        with raises(error, reason=reason, kernels=cuda_on_cpu.NAME, code=code):
            problem((2, 70, 3, 20, 16, 5)).run()


def test_tensors_that_are_not_on_a_cuda_device_are_refused():
    with pytest.raises(KernelError):
        problem((2, 70, 3, 20, 16, 5)).run()


@pytest.mark.parametrize("rows", [1, 66])
def test_the_self_test_names_wrong_products(kernels, rows):
    def without_bias(*arguments):
        return kernels.functions["compressor_dense_sparse"](*arguments[:5], 0, *arguments[6:])

    broken = dataclasses.replace(kernels, functions={**kernels.functions, "compressor_dense_sparse": without_bias})
    for found, said in ((kernels, "ok"), (broken, "outputs are wrong")):
        assert said in selftest.factor_product(found, torch.device("cpu"), 0, torch.float16, rows)


REFUSED = {
    "float32 factors": (dict(dtype=torch.float32), None, "factors and inputs are float32"),
    "inputs of another type": ({}, torch.bfloat16, "factors and inputs are bfloat16, float16"),
    "blocks of odd width": (dict(width=12), None, "blocks of 12 inputs, a multiple of 8 is wanted"),
    "too many atoms": (dict(atoms=4097), None, "5 of 4097 atoms, at most 4096 are wanted"),
    "too many blocks": (dict(blocks=65536), None, "is larger than"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_factors_that_no_cuda_kernel_takes_stay_with_the_reason(name):
    changes, inputs, said = REFUSED[name]
    sizes = dict(blocks=3, atoms=20, width=16, dtype=torch.float16) | changes
    with FakeTensorMode():
        atoms = torch.zeros(sizes["blocks"], sizes["atoms"], sizes["width"], dtype=sizes["dtype"], device="cuda")
        values = torch.zeros(70, sizes["blocks"], 5, dtype=sizes["dtype"], device="cuda")
        choice = choose(FactorWeight(atoms, values, torch.zeros_like(values, dtype=torch.uint16)), None, inputs)
    assert choice.is_fallback and said in choice.skipped[0]


@pytest.mark.parametrize("dtype", OUTPUT_UNIT)
def test_a_prepared_layer_multiplies_as_its_quantization_format(kernels, dtype):
    case = problem((19, 70, 3, 20, 16, 5), dtype)
    kind = str(dtype).removeprefix("torch.")
    layer = SparseFactorLinear.pack(case.dense.float(), case.value.float(), case.index.long(), kind)
    layer.bias, layer.dtype = nn.Parameter(case.bias, requires_grad=False), dtype
    model = nn.Sequential(layer)
    names = list(model.state_dict())
    choice = prepare(model, strict=True)["0"]
    assert (choice.kernel, choice.op, choice.layout) == (cuda_on_cpu.NAME, "linear_dense_sparse", "ds1")
    case.check(model(case.x))
    assert list(model.state_dict()) == names
    assert model[0].values.data_ptr() == model[0].weight_values.data_ptr()  # one copy of what isn't read, not two
    # 16 bits of 3 x 20 x 16 atoms and 32 of each of 3 x 5 values of 96 outputs, over 70 x 48
    assert f"5 of 20 atoms   {cuda_on_cpu.NAME}   linear_dense_sparse   {(16 * 960 + 32 * 1440) / 3360:.2f}" in explain(
        model
    )


def test_a_state_dict_of_other_factors_is_packed_anew(kernels):
    def model(seed):
        case = problem((1, 70, 3, 20, 16, 5), seed=seed)
        layer = SparseFactorLinear.pack(case.dense.float(), case.value.float(), case.index.long(), "float16")
        layer.dtype, layer.bias = torch.float16, nn.Parameter(case.bias, requires_grad=False)
        return nn.Sequential(layer)

    ours, other, x = model(0), model(1), torch.randn(4, 48).half()
    prepare(ours, strict=True)
    before = ours(x)
    ours.load_state_dict(other.state_dict())
    prepare(other, strict=True)
    assert torch.equal(ours(x), other(x)) and not torch.equal(ours(x), before)


def test_shapes_for_tracing_are_the_real_ones():
    case = problem((2, 70, 3, 20, 16, 5))
    given = (case.x, case.dense, ds1.pack(case.index, case.value, 20), case.value, case.bias)
    y = torch.ops.compressor.linear_dense_sparse(*(tensor.to("meta") for tensor in given))
    assert y.shape == (2, 70) and y.dtype == torch.float16
