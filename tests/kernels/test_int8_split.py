"""LLM.int8() as it runs: against plain float64 arithmetic, with the split, without it, and with calibrated columns."""

from __future__ import annotations

import pytest
import torch
from raising import raises

from compressor.errors import ShapeError
from compressor.kernels.ops import int8_split
from compressor.kernels.ops.int8_split import dequantize_rows, float32_matmul, int8_matmul, round_rows
from compressor.layers.int8_split_linear import Int8SplitLinear

# the worked example: 0.3, -0.4 and the like are their nearest float16
X = torch.tensor([[1, -0.5, 8, 0.25], [0.3, 2, -0.4, -1.5], [-0.7, 0.1, 6, 0.9]], dtype=torch.float16)
W = torch.tensor([[0.5, -1, 0.2, 0.05], [1.2, 0.3, -0.7, 0.9], [-0.4, 0.8, 0.1, -0.6]], dtype=torch.float16)


def layer_of(w, threshold=6.0, columns=None, bias=None):
    columns = columns if columns is None else torch.tensor(columns)
    layer = Int8SplitLinear.pack(w.float(), threshold, w.dtype, columns)
    layer.bias = None if bias is None else torch.nn.Parameter(bias, requires_grad=False)
    return layer.eval()


def plain_model(x, w, threshold, exact_columns=None):
    """LLM.int8() as the paper writes it, in float64 and int64; `exact_columns` are calibrated, and unrounded."""
    x, w = x.double(), w.double()
    if exact_columns is None:
        apart = (x.abs() >= threshold).any(0) if threshold else torch.zeros(x.shape[1], dtype=torch.bool)
    else:
        apart = torch.zeros(x.shape[1], dtype=torch.bool)
        apart[exact_columns] = True
    kept = w if exact_columns is None else w.masked_fill(apart, 0)
    scale_w = kept.abs().amax(1)
    codes_w = (kept * (127 / scale_w).unsqueeze(1)).nan_to_num().round()
    rest = x.masked_fill(apart, 0)
    scale_x = rest.abs().amax(1)
    codes_x = (rest * (127 / scale_x).unsqueeze(1)).nan_to_num().round()
    product = (codes_x.long() @ codes_w.long().t()).double() * scale_x.unsqueeze(1) * scale_w / 127**2
    columns = w[:, apart] if exact_columns is not None else (codes_w * scale_w.unsqueeze(1) / 127)[:, apart]
    return product + x[:, apart] @ columns.t()


def close(found, expected, steps=8):
    """Equal except for float32 rounding: scales (2), products (3), sum of the two parts; none is larger than the
    result's largest entry times 2⁻²⁴.
    """
    return float((found.double() - expected).abs().max()) <= steps * 2**-24 * float(expected.abs().max())


def test_the_worked_example_comes_out():
    layer = layer_of(W)
    assert layer.weight.tolist() == [[64, -127, 25, 6], [127, 32, -74, 95], [-64, 127, 16, -95]]
    assert layer.SCB.tolist() == pytest.approx([1, 1.200195313, 0.799804688])
    codes, absmax = round_rows(X.float().index_fill(1, torch.tensor([2]), 0))
    assert absmax.tolist() == pytest.approx([1, 2, 0.899902344])
    assert codes.tolist() == [[127, -64, 0, 32], [19, 127, 0, -95], [-99, 14, 0, 127]]
    expected = [[16448, 17121, -19296], [-15483, -2548, 23938], [-7352, -60, -3951]]
    assert int8_matmul(codes, layer.weight).tolist() == expected
    dequantized = [[2.594581, -4.320599, -0.150747], [-1.998617, -0.099543, 2.333779], [0.770904, -4.199976, 0.428266]]
    exact = [[2.619387, -4.327550, -0.157045], [-1.999857, -0.099195, 2.334094], [0.789509, -4.205190, 0.423543]]
    without = [[2.598549, -4.311149, -0.153921], [-1.997396, -0.103880, 2.334404], [0.771902, -4.212031, 0.428738]]
    # one rounding to float16 at the end, half a unit of 2⁻⁹ for values up to 4.33, on figures of six decimals; the
    # dequantized columns are rounded to float16 too, and meet activations up to 8: half a unit of 2⁻¹² of 0.75, times 8
    for found, figures in (
        (layer(X), dequantized),
        (layer_of(W, threshold=0.0)(X), without),
    ):
        assert float((found.double() - torch.tensor(figures, dtype=torch.float64)).abs().max()) < 2**-9 + 2**-10
    # our rounding of calibrated weights takes their row scale without the columns; the example's keeps it
    kept = layer_of(W)
    found = int8_split.rounded_product(X, kept.weight, kept.SCB, torch.tensor([2]))
    found += int8_split.columns_product(X[:, [2]], W[:, [2]])
    assert torch.allclose(found.double(), torch.tensor(exact, dtype=torch.float64), atol=1e-6)


@pytest.mark.parametrize("inputs", [1, 2, 31, 1024, 1025, 4097, 65536])
def test_integer_sums_are_exact(inputs):
    generator = torch.Generator().manual_seed(inputs)
    first = torch.randint(-127, 128, (5, inputs), generator=generator, dtype=torch.int8)
    second = torch.randint(-127, 128, (3, inputs), generator=generator, dtype=torch.int8)
    first[0], second[0], second[1] = 127, 127, -127  # the largest sums there can be
    expected = first.long() @ second.long().t()
    for multiply in (int8_matmul, float32_matmul):
        assert torch.equal(multiply(first, second).long(), expected)


def test_without_torchs_integer_product_the_same_comes_out(monkeypatch):
    x, layer = torch.randn(9, 300), layer_of(torch.randn(20, 300))
    first = layer(x)
    monkeypatch.setattr(int8_split, "int_mm_is_exact", lambda: False)
    assert torch.equal(layer(x), first)


@pytest.mark.parametrize("threshold", [6.0, 0.0])
@pytest.mark.parametrize("shape", [(1, 48, 32), (2, 7, 5), (33, 130, 65), (16, 2100, 3)])
def test_it_is_the_papers_arithmetic(shape, threshold):
    tokens, inputs, outputs = shape
    torch.manual_seed(tokens)
    x, w = torch.randn(tokens, inputs), torch.randn(outputs, inputs)
    x[0, 3], x[-1, 1] = 60, -6  # a value of exactly the threshold counts, and negative ones do
    layer = layer_of(w, threshold)
    assert close(layer(x), plain_model(x, w, threshold), steps=8 + inputs // 64)
    columns = [1, 3]
    fixed = layer_of(w, threshold or 6.0, columns)
    assert close(fixed(x), plain_model(x, w, threshold, columns))
    integers = layer_of(w, 0.0)  # no split: nothing but scales is rounded
    assert close(integers(x), plain_model(x, w, 0.0), steps=5)


def test_rows_are_rounded_to_half_a_step_of_their_own():
    torch.manual_seed(0)
    w = torch.randn(40, 96) * torch.logspace(-30, 30, 40).unsqueeze(1)
    w[3] = 0
    codes, absmax = round_rows(w)
    assert codes[3].eq(0).all() and absmax[3] == 0
    assert codes.min() >= -127 and codes.abs().amax(1).tolist() == [0 if row == 3 else 127 for row in range(40)]
    error = (dequantize_rows(codes, absmax) - w).abs()
    assert (error <= (absmax / 254 * (1 + 1e-5)).unsqueeze(1)).all()
    tiny, none = round_rows(torch.full((1, 4), 1e-38))
    assert tiny.eq(0).all() and none.eq(0).all()  # 127 / 1e-38 is no float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 2, 33])
def test_outlier_columns_are_exact(dtype, tokens):
    """A weight that is zero elsewhere gives the 16-bit product, rounded once; few terms leave one answer."""
    torch.manual_seed(tokens)
    w = torch.zeros(24, 64, dtype=dtype)
    w[:, [5, 40]] = torch.randn(24, 2).to(dtype)
    x = torch.randn(tokens, 64).to(dtype)
    x[:, [5, 40]] *= 60
    expected = (x.double() @ w.double().t()).to(dtype)
    found = layer_of(w, columns=[5, 40])(x)
    # float32 sums of two products differ from the exact ones by 2 * 2⁻²⁴; the cast is one of two neighbours
    allowed = torch.finfo(dtype).eps * expected.abs().double() + 2**-22 * x.abs().double() @ w.abs().double().t()
    assert ((found.double() - expected.double()).abs() <= allowed).all()
    if dtype is not torch.float32:
        assert (found == expected).float().mean() > 0.99


def test_all_columns_may_be_outliers_and_tokens_zero_or_none():
    torch.manual_seed(0)
    w, bias = torch.randn(12, 20), torch.randn(12)
    layer = layer_of(w, bias=bias)
    x = torch.full((3, 20), 7.0)
    assert close(layer(x), x.double() @ layer.matrix(torch.float64).t() + bias.double(), steps=24)
    x[1] = 0
    assert torch.equal(layer(x)[1], bias)
    assert layer(torch.zeros(0, 20)).shape == (0, 12) and layer(torch.zeros(2, 0, 20)).shape == (2, 0, 12)
    flat = torch.randn(20)
    assert torch.equal(layer(flat), layer(flat.view(1, 20))[0])
    assert torch.equal(layer(flat), layer(flat.view(1, 1, 20))[0, 0])


@pytest.mark.parametrize("columns", [None, [2, 7]])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_token_that_is_no_number_gives_none_and_leaves_others_alone(value, columns):
    torch.manual_seed(0)
    layer = layer_of(torch.randn(12, 20), columns=columns)
    x = torch.randn(4, 20)
    x[2, 7] = value
    found = layer(x)
    assert found[2].isnan().all() and found[[0, 1, 3]].isfinite().all()
    x[2, 7], x[2, 3] = 0, value
    assert layer(x)[2].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_calibrated_columns_make_a_token_independent_of_its_batch(dtype):
    torch.manual_seed(0)
    w, x = torch.randn(70, 200).to(dtype), torch.randn(65, 200).to(dtype)
    x[3, 10] = x[20, 11] = 40
    layer = layer_of(w, columns=[10, 50, 199])
    whole = layer(x)
    for size in (1, 2, 7, 16, 33):
        assert torch.equal(torch.cat([layer(part) for part in x.split(size)]), whole)
    dynamic = layer_of(w)
    assert not torch.equal(torch.cat([dynamic(part) for part in x.split(1)]), dynamic(x))  # as the docs say


def test_powers_of_two_and_permutations_pass_through():
    torch.manual_seed(0)
    w, x = torch.randn(30, 90), torch.randn(12, 90)
    x[0, 4] = 9
    layer = layer_of(w)
    expected = layer(x)
    assert torch.equal(layer_of(w, threshold=12.0)(2 * x), 2 * expected)
    order = torch.randperm(30)
    assert torch.equal(layer_of(w[order])(x), expected[:, order])
    tokens, inputs = torch.randperm(12), torch.randperm(90)
    assert torch.equal(layer(x[tokens]), expected[tokens])
    assert close(layer_of(w[:, inputs])(x[:, inputs]), expected.double())


def test_a_planted_outlier_costs_little_with_the_split_and_much_without():
    torch.manual_seed(0)
    x, w = torch.randn(16, 256), torch.randn(64, 256)
    x[:, 17] = 60 * x[:, 17].sign()
    exact = x.double() @ w.double().t()
    error = {
        name: float((layer(x) - exact).square().mean().sqrt())
        for name, layer in (
            ("without", layer_of(w, threshold=0.0)),
            ("dynamic", layer_of(w)),
            ("calibrated", layer_of(w, columns=[17])),
        )
    }
    assert error["without"] > 6 * error["calibrated"]
    assert error["without"] > 2.5 * error["dynamic"]


def test_stored_tensors_rebuild_the_layer_and_wrong_ones_are_refused():
    torch.manual_seed(0)
    layer = layer_of(torch.randn(8, 32).bfloat16(), columns=[3, 30])
    format_params, tensors = layer.format_params(), layer.tensors()
    assert format_params == {"threshold": 6.0, "outliers": "calibrated", "outlier_columns": 2}
    again = Int8SplitLinear.from_tensors(format_params, tensors)
    x = torch.randn(5, 32).bfloat16()
    assert torch.equal(again(x), layer(x)) and again.format_params() == format_params
    planned = Int8SplitLinear.planned((8, 32), format_params, torch.bfloat16)
    assert planned == {name: (value.dtype, tuple(value.shape)) for name, value in tensors.items()}
    assert (layer.weight[:, [3, 30]] == 0).all()
    broken = [
        ("SCB", torch.ones(9), {"tensor": "SCB", "shape": [9], "expected": [8]}),
        ("SCB", torch.ones(8).bfloat16(), {"tensor": "SCB", "dtype": "torch.bfloat16"}),
        ("weight_format", torch.ones((), dtype=torch.uint8), {"tensor": "weight_format", "value": 1}),
        ("outlier_columns", torch.tensor([30, 3], dtype=torch.int32), {"tensor": "outlier_columns", "inputs": 32}),
        ("outlier_columns", torch.tensor([3, 32], dtype=torch.int32), {"tensor": "outlier_columns", "inputs": 32}),
        ("surplus", torch.ones(1), {"names": sorted([*tensors, "surplus"]), "expected": sorted(tensors)}),
    ]
    for name, value, data in broken:
        with raises(ShapeError, **data):
            Int8SplitLinear.from_tensors(format_params, {**tensors, name: value})
    with raises(ShapeError, inputs=133145, limit=133144), torch.device("meta"):
        Int8SplitLinear(133145, 2, 6.0, torch.float32)


def test_training_through_it_is_refused():
    layer = layer_of(torch.randn(4, 8))
    x = torch.randn(2, 8, requires_grad=True)
    assert not layer(x).requires_grad and torch.equal(layer(x), layer(x.detach()))
    assert layer_of(torch.randn(4, 8), columns=[1])(x).shape == (2, 4)
    layer.train()
    with pytest.raises(RuntimeError, match="int8_split_linear"):
        layer(x)
