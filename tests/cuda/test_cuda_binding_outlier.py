"""LLM.int8() on CUDA under torch, with the emulated library on the CPU: the bits are the CPU library's."""

from __future__ import annotations

import dataclasses

import cuda_on_cpu
import pytest
import torch
from raising import raises
from test_cuda_binding_int8 import FLOATS, assert_same_bits
from torch import nn

from compressor.errors import KernelError, ShapeError
from compressor.kernels.cpu import library as cpu_library
from compressor.kernels.cuda import ops as cuda_ops
from compressor.kernels.cuda import selftest
from compressor.kernels.cuda.interface import BAD_CALL
from compressor.kernels.ops import linear as ops
from compressor.kernels.prepared.prepare import explain, prepare
from compressor.layers.int8_split_linear import Int8SplitLinear

needs_cpu_library = pytest.mark.skipif(isinstance(cpu_library(), str), reason="the CPU library isn't there")
SHAPES = [(1, 70, 336), (7, 66, 400), (66, 65, 80), (0, 8, 16)]  # rows, outputs, inputs
# threshold, columns that are given: some are found, none by a threshold of 0, all, some are given, none are given
OUTLIERS = [(6.0, None), (0.0, None), (1e-6, None), (6.0, 5), (6.0, 0)]


@dataclasses.dataclass
class Problem:
    x: torch.Tensor
    codes: torch.Tensor
    absmax: torch.Tensor
    columns: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    threshold: float

    def run(self, **changes):
        given = dict(
            x=self.x, packed=self.codes, weight_absmax=self.absmax, outlier_columns=self.columns,
            outlier_weight=self.weight, bias=self.bias, threshold=self.threshold,
        ) | changes  # fmt: skip
        return cuda_ops.linear_int8_outlier(**given)

    def on_the_cpu(self):
        packed = ops.pack_int8_rows(self.codes, self.absmax)
        columns = None if self.columns is None else self.columns.long()
        return ops.linear_int8_outlier(self.x, packed, self.absmax, columns, self.weight, self.bias, self.threshold)


def problem(shape, dtype=torch.float16, threshold=6.0, count=None, bias=True, seed=0):
    rows, out, columns = shape
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=made).clamp(-4, 4)
    if rows:
        x[-1, -1], x[0, 5] = 20, -9
    if rows > 3:  # a row of zeros, and those that become NaN: in an outlier column, in another one
        x[1], x[2, -1], x[3, 7] = 0, torch.inf, torch.nan
    given = weight = None
    if count is not None:
        given = torch.randperm(columns, generator=made)[:count].sort()[0].int()
        weight = torch.randn(out, count, generator=made).to(dtype)
    return Problem(
        x.to(dtype),
        torch.randint(-127, 128, (out, columns), generator=made, dtype=torch.int8),
        torch.rand(out, generator=made) + 0.1,
        given,
        weight,
        torch.randn(out, generator=made).to(dtype) if bias else None,
        threshold,
    )


@needs_cpu_library
@pytest.mark.parametrize("outliers", OUTLIERS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_product_has_the_bits_of_the_cpu_library(kernels, shape, dtype, outliers):
    case = problem(shape, dtype, *outliers, bias=outliers[0] > 1)
    assert_same_bits(case.run(), case.on_the_cpu())


def test_outlier_columns_change_the_result(kernels):
    case = problem((1, 70, 336))
    assert not torch.equal(case.run(), case.run(threshold=0.0))


def test_strided_and_misaligned_operands_give_the_bits_of_contiguous_ones(kernels):
    case = problem((6, 70, 208), count=5)
    want = case.run()
    wide = torch.zeros(6, 211, dtype=case.x.dtype)
    wide[:, 3:] = case.x
    moved = torch.zeros(70 * 208 + 1, dtype=torch.int8)
    moved[1:] = case.codes.ravel()
    pairs = {
        name: torch.stack((t, t), -1)[..., 0] for name, t in (("outlier_weight", case.weight), ("bias", case.bias))
    }
    pairs["outlier_columns"] = torch.stack((case.columns, case.columns), 1)[:, 0]
    assert not any(tensor.is_contiguous() for tensor in pairs.values())
    assert_same_bits(case.run(x=wide[:, 3:], packed=moved[1:].view(70, 208), **pairs), want)
    assert_same_bits(case.run(x=case.x.view(2, 3, 208)), want.view(2, 3, 70))


def test_columns_outside_of_x_are_left_out(kernels):
    case = problem((2, 70, 336), count=3)
    case.columns = torch.tensor([4, 9, 20], dtype=torch.int32)
    beyond = case.run(outlier_columns=torch.tensor([4, 9, 2**31 - 1], dtype=torch.int32))
    two = case.run(outlier_columns=case.columns[:2], outlier_weight=case.weight[:, :2])
    assert_same_bits(beyond, two)


BAD = {
    "float64 inputs": (dict(x=torch.zeros(2, 208).double()), dict(x="torch.float64 (2, 208)")),
    "other columns": (dict(x=torch.zeros(2, 192).half()), dict(x="torch.float16 (2, 192)")),
    "columns no multiple of 16": (dict(x=torch.zeros(2, 200).half()), dict(x="torch.float16 (2, 200)")),
    "no rows": (dict(x=torch.tensor(1.0)), dict(x="torch.float32 ()")),
    "the weight of the CPU": (
        dict(packed=torch.zeros(70 * 208, dtype=torch.uint8)),
        dict(packed="torch.uint8 (14560,)"),
    ),
    "a short absmax": (dict(weight_absmax=torch.zeros(69)), dict(weight_absmax="torch.float32 (69,)")),
    "absmax of another type": (dict(weight_absmax=torch.zeros(70).half()), dict(weight_absmax="torch.float16 (70,)")),
    "columns of int64": (dict(outlier_columns=torch.zeros(5).long()), dict(outlier_columns="torch.int64 (5,)")),
    "columns without a weight": (dict(outlier_weight=None), dict(outlier_weight=None)),
    "a weight of fewer columns": (
        dict(outlier_weight=torch.zeros(70, 4).half()),
        dict(outlier_weight="torch.float16 (70, 4)"),
    ),
    "a weight of another type": (dict(outlier_weight=torch.zeros(70, 5)), dict(outlier_weight="torch.float32 (70, 5)")),
    "a bias of another type": (dict(bias=torch.zeros(70)), dict(bias="torch.float32 (70,)")),
    "a negative threshold": (dict(threshold=-1.0), dict(reason="threshold", threshold="-1.0")),
    "no number as threshold": (dict(threshold=float("nan")), dict(reason="threshold", threshold="nan")),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_calls_name_what_they_got(kernels, name):
    changes, said = BAD[name]
    with raises(ShapeError, **{"reason": "operands", "operation": "linear_int8_outlier"} | said):
        problem((2, 70, 208), count=5).run(**changes)


def test_more_columns_than_inputs_are_refused(kernels):
    case = problem((2, 8, 16))
    with raises(ShapeError, reason="operands", outlier_columns="torch.int32 (17,)"):
        case.run(outlier_columns=torch.zeros(17, dtype=torch.int32), outlier_weight=torch.zeros(8, 17).half())


def test_what_the_launcher_returns_becomes_an_error(kernels, monkeypatch):
    for code, error, reason in ((2, KernelError, "launch"), (BAD_CALL, ShapeError, "bad-call")):
        broken = {**kernels.functions, "compressor_int8_outlier": lambda *a, code=code: code}
        cuda_on_cpu.use(monkeypatch, dataclasses.replace(kernels, functions=broken))
        with raises(error, reason=reason, kernels=cuda_on_cpu.NAME, code=code):
            problem((2, 70, 208)).run()


def test_tensors_that_are_not_on_a_cuda_device_are_refused():
    with pytest.raises(KernelError):
        problem((2, 70, 208)).run()


@pytest.mark.parametrize("calibrated", [False, True])
def test_the_self_test_names_wrong_products(kernels, calibrated):
    def without_outliers(*arguments):
        changed = list(arguments)
        changed[3] = changed[4] = changed[12] = 0
        changed[13] = 0.0
        return kernels.functions["compressor_int8_outlier"](*changed)

    functions = {**kernels.functions, "compressor_int8_outlier": without_outliers}
    broken = dataclasses.replace(kernels, functions=functions)
    for found, said in ((kernels, "ok"), (broken, "outputs are wrong")):
        assert said in selftest.outlier_product(found, torch.device("cpu"), 0, torch.float16, 5, calibrated)


@needs_cpu_library
@pytest.mark.parametrize("columns", [None, [3, 70, 255], []])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_prepared_layer_has_the_bits_of_one_prepared_on_the_cpu(emulated, monkeypatch, dtype, columns):
    made = torch.Generator().manual_seed(0)
    matrix, x = torch.randn(70, 256, generator=made), torch.randn(5, 256, generator=made)
    x[1, 3] = 30
    x, given = x.to(dtype), None if columns is None else torch.tensor(columns, dtype=torch.int64)

    def model():
        return nn.Sequential(Int8SplitLinear.pack(matrix, 6.0, dtype, given))

    on_the_cpu = model()
    assert prepare(on_the_cpu)["0"].layout == ops.LAYOUT
    want = on_the_cpu(x)
    cuda_on_cpu.use(monkeypatch, emulated)
    ours = model()
    names = list(ours.state_dict())
    choice = prepare(ours, strict=True)["0"]
    assert (choice.kernel, choice.op, choice.layout) == (cuda_on_cpu.NAME, "linear_int8_outlier", "int8_rows")
    assert_same_bits(ours(x), want)
    assert list(ours.state_dict()) == names
    assert ours[0].packed.data_ptr() == ours[0].weight.data_ptr()  # one copy of the weight, not two
    assert "8.00 bits a weight" in explain(ours)


def test_shapes_for_tracing_are_the_real_ones():
    case = problem((2, 70, 208), count=5)
    given = (case.x, case.codes, case.absmax, case.columns, case.weight, case.bias)
    y = torch.ops.compressor.linear_int8_outlier(*(tensor.to("meta") for tensor in given), 6.0)
    assert y.shape == (2, 70) and y.dtype == torch.float16
