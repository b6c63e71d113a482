"""Kernels in models: what is chosen and why, what a prepared model keeps, and calls that layers share."""

from __future__ import annotations

import copy
import dataclasses
import io
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from raising import raises
from torch import nn

from compressor.errors import KernelError, ShapeError
from compressor.kernels.cpu import LEVELS, Library, library
from compressor.kernels.ops import linear as ops
from compressor.kernels.ops.blocks import block_counts
from compressor.kernels.ops.dense_product import MOST_ROWS, linear_dense
from compressor.kernels.ops.dense_sparse import linear_dense_sparse
from compressor.kernels.ops.int8_split import round_rows
from compressor.kernels.prepared import dispatch, prepared_dense, stock
from compressor.kernels.prepared.linear_call import LinearCall
from compressor.kernels.prepared.prepare import chosen_kernels, explain, prepare
from compressor.kernels.prepared.prepared_linear import PreparedInteger
from compressor.layers.block_linear import BlockLinear
from compressor.layers.packed_linear import PackedLinear
from compressor.layers.sparse_factor_linear import SparseFactorLinear

pytestmark = pytest.mark.skipif(not isinstance(library(), Library), reason=f"{library()}")


def packed_layer(out=24, columns=64, bits=4, group=32, symmetric=False, index=None, bias=True):
    made = torch.Generator().manual_seed(5)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    groups = ops.groups_of(columns, group)
    return PackedLinear.pack(
        torch.randint(low, high, (out, columns), generator=made, dtype=torch.int8),
        torch.rand(out, groups, generator=made) * 0.1,
        None if symmetric else torch.randint(low, high, (out, groups), generator=made, dtype=torch.int8),
        bits=bits, group_size=group, symmetric=symmetric, index=index,
        bias=torch.randn(out, generator=made) if bias else None,
    )  # fmt: skip


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_prepared_layer_multiplies_as_its_quantization_format(bits, symmetric):
    model = nn.Sequential(packed_layer(bits=bits, symmetric=symmetric), nn.ReLU())
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    expected = model(x)
    choices = prepare(model, strict=True)
    assert type(model[0]) is PreparedInteger and choices["0"].op == "linear_weight_only"
    assert torch.allclose(model(x), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rows", [1, 3, 20])
@pytest.mark.parametrize("format_name", ["packed", "blocks", "atoms"])
@pytest.mark.parametrize("flushes", [False, True])
def test_kernels_read_subnormal_float16_numbers(format_name, rows, flushes):
    """Also where the process treats float32's own subnormals as zero: float16's aren't among those."""
    made = torch.Generator().manual_seed(6)
    codes = torch.randint(-8, 8, (24, 64), generator=made, dtype=torch.int8)
    small = torch.randint(1, 900, (24, 2), generator=made) * 2.0**-24  # up to 5.4e-5, the least normal one is 6.1e-5
    if format_name == "packed":
        layer = PackedLinear.pack(codes, small.half(), None, bits=4, group_size=32, symmetric=True)
    elif format_name == "blocks":
        layer = BlockLinear.pack(codes, small.half(), bits=4, block=(1, 32))
    else:
        atoms, values = small.half().reshape(2, 3, 8), small.half().reshape(-1)[: 24 * 2].reshape(24, 2, 1)
        index = torch.randint(0, 3, (24, 2, 1), generator=made)
        layer = SparseFactorLinear.pack(atoms * 2048, values, index, "float16")
    x = torch.randn(rows, layer.in_features, generator=made) * 1e4
    expected = x.double() @ layer.matrix(torch.float32).double().t()
    model = nn.Sequential(layer)
    prepare(model, strict=True)
    assert flushes is False or torch.set_flush_denormal(True)
    try:
        found = model(x)
    finally:
        torch.set_flush_denormal(False)
    assert float(expected.abs().min()) > 0
    assert torch.allclose(found.double(), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_rounded_inputs_are_chosen_by_name():
    model = nn.ModuleDict({"four": packed_layer(bits=4), "three": packed_layer(bits=3)})
    assert {choice.op for choice in prepare(model, activations="int8").values()} == {"linear_dynamic_int8"}
    with raises(KernelError, reason="activations", activations="int4"):
        prepare(nn.Sequential(packed_layer(bits=3)), activations="int4")


def test_a_group_index_becomes_a_permutation():
    index = torch.randperm(64, generator=torch.Generator().manual_seed(2)) // 32
    layer = packed_layer(index=index)
    model = nn.Sequential(layer)
    x = torch.randn(2, 5, 64)
    expected = layer(x)
    prepare(model, strict=True)
    assert torch.allclose(model(x), expected, atol=1e-4, rtol=1e-4)


def test_a_group_index_of_minus_one_is_the_columns_own_order_and_some_of_it_is_no_kernels():
    layer = packed_layer()
    no_order = torch.full((64,), -1, dtype=torch.int32)
    weight = stock._packed(layer.format_params(), layer.tensors() | {"weight_g_idx": no_order})
    assert weight.group_index is None and dispatch.choose(weight, None).op == "linear_weight_only"
    index = (torch.arange(64) // 32).index_fill(0, torch.tensor([3]), -1)
    choice = dispatch.choose(dataclasses.replace(weight, group_index=index), None)
    assert choice.op is None and any("columns of no group" in reason for reason in choice.skipped)


def test_groups_of_unequal_size_are_left_to_the_reference_and_explained():
    index = (torch.arange(64) >= 20).int()
    model = nn.Sequential(packed_layer(index=index))
    with pytest.warns(UserWarning, match="20 to 44"):
        prepare(model)
    assert "reference" in explain(model) and "20 to 44 columns" in explain(model)


def test_explain_names_kernel_and_what_was_not_used():
    model = nn.Sequential(packed_layer())
    prepare(model)
    first, second = explain(model).splitlines()
    assert first.startswith(f"0   W4 g32   cpu library, {LEVELS[library().level]}   linear_weight_only")
    assert "nvrtc (no CUDA device)" in second


def test_state_dict_deepcopy_and_pickle_keep_a_prepared_model():
    model, other = nn.Sequential(packed_layer()), nn.Sequential(packed_layer())
    names = list(model.state_dict())
    x = torch.randn(2, 64)
    prepare(model)
    assert list(model.state_dict()) == names
    other[0].weight_scale *= 3
    other[0].bias.data += 1
    copied = copy.deepcopy(model)
    model.load_state_dict(other.state_dict())
    prepare(other)
    assert torch.equal(model(x), other(x)) and not torch.equal(model(x), copied(x))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), model(x))


def test_a_prepared_model_compiles_with_any_number_of_rows():
    model = nn.Sequential(packed_layer(), nn.ReLU())
    prepare(model)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (1, 2, 7):
        x = torch.randn(rows, 64)
        with torch.no_grad():
            assert torch.equal(compiled(x), model(x))


class Tied(nn.Module):
    """An embedding, a layer in 4 bits and a head that has the embedding's weight."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        made = torch.Generator().manual_seed(7)
        self.embedding = nn.Embedding(40, 64)
        self.embedding.weight.data.copy_(torch.randn(40, 64, generator=made))
        self.middle, self.head = packed_layer(out=64), nn.Linear(64, 40, bias=False)
        self.head.weight = self.embedding.weight
        self.to(dtype)

    def forward(self, tokens):
        return self.head(self.middle(self.embedding(tokens)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_layer_that_stays_dense_multiplies_few_rows_by_the_library_and_stays_tied(dtype, monkeypatch):
    products = []
    monkeypatch.setattr(
        prepared_dense, "linear_dense", lambda *given: products.append(len(given[0])) or linear_dense(*given)
    )
    model = Tied(dtype)
    names, tokens = list(model.state_dict()), torch.arange(40)
    hidden = torch.randn(MOST_ROWS[dtype] + 1, 64, generator=torch.Generator().manual_seed(8)).to(dtype)
    assert set(prepare(model, strict=True)) == {"middle"}
    assert isinstance(model.head, nn.Linear) and model.head.weight is model.embedding.weight
    assert list(model.state_dict()) == names
    line = next(line for line in explain(model).splitlines() if line.startswith("head"))
    level = LEVELS[library().level]
    assert line.split("   ")[1:4] == [f"dense {str(dtype)[6:]}", f"cpu library, {level}", "linear_dense"]
    assert any(row["op"] == "dense" for row in chosen_kernels(model))
    with torch.no_grad():
        few, many = model.head(hidden[:-1]), model.head(hidden)
    assert products == [len(hidden) - 1]
    assert torch.equal(many, F.linear(hidden, model.embedding.weight))
    assert torch.allclose(few.double(), hidden[:-1].double() @ model.head.weight.double().t(), rtol=0.01, atol=0.05)
    copied = copy.deepcopy(model)
    copied.embedding.weight.data *= 2
    with torch.no_grad():
        assert torch.equal(copied.head(hidden[:3]), 2 * model.head(hidden[:3]))
        assert copied(tokens[:3]).shape == (3, 40)


def test_a_dense_layer_keeps_its_gradient_and_compiles():
    model = Tied()
    prepare(model)
    x = torch.randn(2, 64, requires_grad=True)
    model.head(x).sum().backward()
    assert torch.allclose(x.grad, model.head.weight.sum(0).expand(2, 64), atol=1e-5)
    compiled = torch.compile(model.head, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.allclose(compiled(x), model.head(x), atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert model.head(x).dtype == torch.bfloat16


def test_a_dense_layer_with_hooks_is_left_alone():
    model = Tied()
    seen = []
    model.head.register_forward_hook(lambda *_: seen.append(1))
    prepare(model)
    model(torch.arange(3))
    assert type(model.head) is nn.Linear and seen == [1]


def test_a_dense_linear_without_prepared_ones_is_left_alone():
    model = nn.Sequential(nn.Linear(4, 4))
    assert prepare(model, strict=True) == {} and explain(model) == ""
    assert torch.equal(model(torch.ones(1, 4)), F.linear(torch.ones(1, 4), model[0].weight, model[0].bias))


@pytest.mark.parametrize("bits, block", [(4, (2, 8)), (8, (64, 64)), (4, (1, 16)), (8, (3, 100))])
def test_blocks_of_bct_need_no_kernel_of_their_own(bits, block):
    made = torch.Generator().manual_seed(6)
    most = 2 ** (bits - 1) - 1
    codes = torch.randint(-most, most + 1, (70, 45), generator=made, dtype=torch.int8)
    exponent = torch.randint(-9, -3, block_counts((70, 45), block), generator=made, dtype=torch.int8)
    layer = BlockLinear.pack(codes, exponent, bits=bits, block=block)
    x = torch.randn(3, 45, generator=made)
    model, expected = nn.Sequential(layer), layer(x)
    assert prepare(model, strict=True)["0"].op == "linear_weight_only"
    assert torch.allclose(model(x), expected, atol=1e-4, rtol=1e-4)


def test_blocks_that_no_kernel_takes_stay_with_the_reason():
    layer = BlockLinear.pack(
        torch.ones(8, 24, dtype=torch.int8), torch.zeros(4, 4, dtype=torch.int8), bits=4, block=(2, 6)
    )
    model = nn.Sequential(layer)
    with pytest.warns(UserWarning, match=r"\b6 columns"):
        prepare(model)
    assert model[0] is layer


def test_layers_of_bitsandbytes_get_the_kernel_of_llm_int8():
    bnb = pytest.importorskip("bitsandbytes")
    theirs = bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False, threshold=6.0)
    theirs.weight = bnb.nn.Int8Params(torch.randn(32, 64), requires_grad=False, has_fp16_weights=False)
    model = nn.Sequential(theirs.to("cpu"))
    names = set(model.state_dict())
    x = torch.randn(5, 64).bfloat16()
    x[:, 3] = 9
    expected = model(x).float()
    assert prepare(model, strict=True)["0"].op == "linear_int8_outlier" and set(model.state_dict()) == names
    assert (model(x).float() - expected).norm() < 0.01 * expected.norm()  # they round three times to bfloat16


def factor_layer(values, dtype=torch.float32):
    made = torch.Generator().manual_seed(7)
    index = torch.rand(70, 3, 20, generator=made).topk(5, 2).indices.sort(2).values
    atoms, kept = torch.randn(3, 20, 16, generator=made), torch.randn(70, 3, 5, generator=made)
    layer = SparseFactorLinear.pack(atoms, kept, index, values)
    layer.bias, layer.dtype = nn.Parameter(torch.randn(70, generator=made).to(dtype), requires_grad=False), dtype
    return layer


@pytest.mark.parametrize("values", ["float16", "bfloat16", "int8"])
def test_factors_are_multiplied_as_their_quantization_format(values):
    model, other = nn.Sequential(factor_layer(values)), factor_layer(values)
    names = set(model.state_dict())
    assert prepare(model, strict=True)["0"].op == "linear_dense_sparse" and set(model.state_dict()) == names
    assert "5 of 20 atoms" in explain(model)
    for shape in ((1, 48), (2, 17, 48), (0, 48)):
        x = torch.randn(shape)
        assert torch.allclose(model(x), other(x), atol=1e-4, rtol=1e-4)
    x = torch.randn(4, 48)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), model(x))
    changed = other.weight_value_scale if values == "int8" else other.weight_values
    changed *= 2
    model.load_state_dict({f"0.{name}": value for name, value in other.state_dict().items()})
    assert torch.allclose(model(x), other(x), atol=1e-4, rtol=1e-4)
    assert torch.equal(copy.deepcopy(model)(x), model(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_factors_have_the_bits_of_their_dequantized_values(dtype):
    layer = factor_layer("int8", dtype)
    model = nn.Sequential(layer)
    prepare(model, strict=True)
    atoms, values = layer.factors(torch.float32)
    for rows in (1, 3, 9, 17):
        x = torch.randn(rows, 48, generator=torch.Generator().manual_seed(rows)).to(dtype)
        expected = linear_dense_sparse(x, atoms, layer.index().to(torch.uint16), values, layer.bias.detach())
        assert torch.equal(model(x), expected)
    # codes of 1 byte, indices of 2, scales of 4
    stored = 3 * 20 * 16 + 70 * 3 * 5 + 2 * 70 * 3 * 5 + 4 * (3 * 20 + 70)
    assert f"{8 * stored / (70 * 48):.2f} bits a weight" in explain(model)


def test_groups_whose_sums_overflow_int32_are_refused():
    wide = dispatch.IntegerWeight(torch.zeros(1, 65800, dtype=torch.uint8), torch.ones(1, 1), None, 8, -1)
    assert "int32 can't hold their sums" in dispatch.choose(wide, None).skipped[1]


class Attention(nn.Module):
    """Three layers of one input, and one of another."""

    def __init__(self, **different):
        super().__init__()
        self.q_proj, self.k_proj = packed_layer(out=70), packed_layer(out=24)
        self.v_proj = packed_layer(**({"out": 24} | different))
        self.o_proj = packed_layer(out=64)

    def forward(self, x, y=None):
        return self.q_proj(x), self.k_proj(x if y is None else y), self.v_proj(x if y is None else y)


@pytest.fixture
def calls(monkeypatch):
    """The number of weights in each call that layers shared."""
    found, multiply = [], LinearCall.__call__

    def counted(call, x):
        found.extend([len(call.layers)] * (len(call.layers) > 1))
        return multiply(call, x)

    monkeypatch.setattr(LinearCall, "__call__", counted)
    return found


@pytest.mark.parametrize("activations", [None, "int8"])
def test_layers_of_one_input_are_multiplied_in_one_call_with_the_same_bits(calls, activations):
    model, alone = Attention(), Attention()
    prepare(model, activations=activations)
    prepare(alone, activations=activations)
    for layer in alone.children():
        layer.shared = None
    for shape in ((1, 1, 64), (2, 5, 64), (0, 64), (64,)):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(shape).to(dtype)
            assert all(map(torch.equal, model(x), alone(x)))
    assert calls == [3] * 8
    assert explain(model).count("one call for 3") == 3
    assert model.o_proj.shared is None


def test_an_input_that_was_changed_in_between_is_multiplied_again(calls):
    model, x = Attention(), torch.randn(2, 64)
    prepare(model)
    model.q_proj(x)
    x.mul_(2)
    expected = Attention().k_proj(x)
    assert torch.allclose(model.k_proj(x), expected, atol=1e-4, rtol=1e-4)
    assert calls == [3] and "one call" not in explain(model)


def test_layers_that_get_different_inputs_multiply_apart_for_good(calls):
    model, x, y = Attention(), torch.randn(2, 64), torch.randn(3, 64)
    expected = model(x, y)
    prepare(model)
    for _ in range(2):
        assert all(torch.allclose(a, b, atol=1e-4, rtol=1e-4) for a, b in zip(model(x, y), expected, strict=True))
    assert calls == [3]


def test_inference_tensors_are_multiplied_apart(calls):
    model = Attention()
    prepare(model)
    with torch.inference_mode():
        x = torch.randn(2, 64)
        model(x)
    assert calls == []


@pytest.mark.parametrize("different", [{"bits": 8}, {"group": 64}, {"index": torch.arange(64) // 32}])
def test_layers_of_unlike_formats_share_no_call(calls, different):
    model = Attention(**different)
    prepare(model)
    model(torch.randn(2, 64))
    assert calls == []


def test_threads_and_copies_do_not_see_each_others_outputs(calls):
    model = Attention()
    prepare(model)
    copied = copy.deepcopy(model)
    inputs = [torch.randn(3, 64) for _ in range(50)]
    expected = [copied(x) for x in inputs]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(model, inputs))
    assert all(all(map(torch.equal, a, b)) for a, b in zip(results, expected, strict=True))
    assert calls == [3] * 100 and not model.q_proj.shared[0].waiting
    assert copied.q_proj.shared[0].layers[0] is copied.q_proj


def test_what_is_looked_up_is_of_the_weights_that_a_layer_has_now():
    model, other = Attention(), Attention(bits=4)
    for layer in other.children():
        layer.weight_scale.mul_(2)
    prepare(model)
    x = torch.randn(3, 64)
    before = model(x)
    copied = copy.deepcopy(model)
    model.load_state_dict(other.state_dict())
    prepare(other)
    assert all(map(torch.equal, model(x), other(x))) and torch.equal(model.o_proj(x), other.o_proj(x))
    assert all(map(torch.equal, copied(x), before))
    packed = copied.q_proj.packed.data_ptr()
    copied.bfloat16()
    copied.q_proj.packed = copied.q_proj.packed.clone()  # as a move to another place makes it
    copied._apply(lambda tensor: tensor)
    assert copied.q_proj.packed.data_ptr() != packed and copied.q_proj.bias.dtype == torch.bfloat16
    found = copied(x)
    assert all(torch.allclose(a, b, atol=0.02) for a, b in zip(found, before, strict=True))  # biases were rounded
    assert copied.q_proj.shared[0].call.bound.weights[0] is copied.q_proj.packed


@pytest.mark.parametrize("x", [torch.randn(2, 63), torch.randn(64, 2), torch.randint(9, (2, 64)), torch.tensor(1.0)])
def test_inputs_that_do_not_fit_are_refused_with_shape_and_dtype(x):
    model = Attention()
    prepare(model)
    for layer in model.children():
        with raises(ShapeError, op="linear_weight_only", dtype=str(x.dtype), shape=list(x.shape), columns=64):
            layer(x)
    with raises(KernelError, op="linear_weight_only", device="meta"):
        model.o_proj(torch.randn(2, 64, device="meta"))


def test_a_backward_pass_through_a_prepared_layer_is_an_error_not_a_gradient_that_lacks_it():
    model = Attention()
    prepare(model)
    x = torch.randn(64, 2, requires_grad=True)
    for layer in model.children():
        y = layer(x.T)
        with torch.no_grad():
            assert torch.equal(y, layer(x.T)) and not layer(x.T).requires_grad
        with pytest.raises(RuntimeError, match="linear_weight_only"):
            (x.T[:, : y.shape[1]] + y[:, : x.shape[0]]).sum().backward()
    assert x.grad is None


def test_a_model_whose_layers_share_calls_compiles_to_the_same_bits():
    model = Attention()
    prepare(model)
    x = torch.randn(3, 64)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert all(map(torch.equal, compiled(x), model(x)))


class InFloat32(nn.Module):
    """A layer in a model of float32."""

    def __init__(self, **shape):
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(64), packed_layer(**shape)

    def forward(self, x):
        return self.layer(self.norm(x))


@pytest.fixture
def without_library(monkeypatch):
    monkeypatch.setattr(dispatch, "tried_library", lambda: "cpu library not built: no compiler")


TORCH_TAKES = [
    ({"bits": 4, "out": 32}, None, "torch_int4"),
    ({"bits": 4, "out": 32, "symmetric": True, "index": torch.arange(64) % 2}, None, "torch_int4"),
    ({"bits": 8, "group": -1, "symmetric": True}, None, "torch_int8"),
    ({"bits": 8, "group": -1, "symmetric": True, "bias": False}, "int8", "torch_int8_rows"),
]


@pytest.mark.parametrize(("shape", "activations", "layout"), TORCH_TAKES)
def test_without_the_library_a_torch_op_of_the_same_meaning_multiplies(without_library, shape, activations, layout):
    model, other = InFloat32(**shape), InFloat32(**shape)
    with pytest.warns(UserWarning, match="no compiler"):
        (choice,) = prepare(model, activations=activations).values()
    assert (choice.kernel, choice.layout) == ("torch op", layout) and "torch op" in explain(model)
    for rows in ((3,), (2, 40), (0,)):
        x = torch.randn(*rows, 64)
        expected = other(x)
        if activations:
            codes, absmax = round_rows(other.norm(x).reshape(-1, 64))
            inputs = codes.double() * absmax.double().unsqueeze(1) / 127
            expected = (inputs @ other.layer.matrix(torch.float64).t()).float().view_as(expected)
        assert torch.allclose(model(x), expected, atol=1e-4, rtol=1e-4)
    x = torch.randn(3, 64)
    with torch.no_grad():
        assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))
    with raises(KernelError, where="layer", reason="fallback", kernel="torch op") as failure:
        prepare(InFloat32(**shape), activations=activations, strict=True)
    assert any("no compiler" in skipped for skipped in failure.value.data["skipped"])


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ({"bits": 3}, "linear_weight_only of 3 bits"),
        ({"out": 24}, "24 x 64"),
        ({"bits": 8, "group": -1}, "zero points"),
    ],
)
def test_without_the_library_what_torch_lacks_goes_to_the_reference(without_library, shape, reason):
    model = InFloat32(**shape)
    with pytest.warns(UserWarning, match=reason):
        assert prepare(model)["layer"].op is None


def test_without_the_library_16_bit_inputs_are_left_to_the_reference(without_library):
    model = InFloat32(out=32).bfloat16()
    with pytest.warns(UserWarning, match=r"torch\.bfloat16"):
        assert prepare(model)["layer"].op is None
