"""Prepared layers where something follows them: tracers, fake tensors, hooks, casts, and a second preparation."""

from __future__ import annotations

import pytest
import torch
from raising import raises
from test_prepared import packed_layer
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from compressor.errors import KernelError
from compressor.kernels.cpu import Library, library
from compressor.kernels.prepared.prepare import explain, prepare
from compressor.kernels.prepared.prepared_dense import PreparedDense
from compressor.kernels.prepared.prepared_linear import PreparedInteger
from compressor.layers.int8_split_linear import Int8SplitLinear
from compressor.layers.packed_linear import PackedLinear
from compressor.layers.sparse_factor_linear import SparseFactorLinear

pytestmark = pytest.mark.skipif(not isinstance(library(), Library), reason=f"{library()}")
OPS = ["linear_weight_only", "linear_int8_outlier", "linear_dense_sparse"]


def each_kind(prepared=True):
    """64 -> 24 -> 64 -> 32 -> 8: layers that multiply in different ways, and one that stays dense."""
    made = torch.Generator().manual_seed(6)
    int8 = Int8SplitLinear.pack(torch.randn(64, 24, generator=made), 6.0, torch.float32, torch.tensor([3]))
    index = torch.rand(32, 2, 9, generator=made).argsort(2)[..., :4].sort(2).values
    atoms, values = torch.randn(2, 9, 32, generator=made), torch.randn(32, 2, 4, generator=made)
    dense = nn.Linear(32, 8, bias=False)
    dense.weight.data.normal_(generator=made)
    model = nn.Sequential(packed_layer(), int8, SparseFactorLinear.pack(atoms, values, index, "int8"), dense)
    model.requires_grad_(False)
    if prepared:
        assert [choice.op for choice in prepare(model, strict=True).values()] == OPS
        assert type(model[3]) is PreparedDense
    return model


def some(rows=3, seed=0):
    return torch.randn(rows, 64, generator=torch.Generator().manual_seed(seed))


def test_fake_tensors_go_through_with_their_shapes():
    model = each_kind()
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert model(torch.randn(5, 64)).shape == (5, 8)


@pytest.mark.parametrize("kind", ["real", "symbolic"])
def test_a_traced_graph_computes_what_the_model_does(kind):
    model, x = each_kind(), some()
    graph = make_fx(model, tracing_mode=kind, _allow_non_fake_inputs=True)(x)
    called = {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}
    assert {f"compressor.{name}.default" for name in OPS} <= called
    assert torch.allclose(graph(some(seed=1)), model(some(seed=1)), atol=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_trace_computes_what_the_model_does():
    model = each_kind()
    traced = torch.jit.trace(lambda x: model(x), some(), check_trace=False)
    assert torch.allclose(traced(some(seed=1)), model(some(seed=1)), atol=1e-4)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_a_batched_call_computes_what_the_model_does():
    model = each_kind()
    x = torch.stack([some(seed=seed) for seed in range(4)])
    meant = model(x)  # all rows at once, which some levels sum in another order than a few
    assert torch.allclose(torch.vmap(model)(x), meant, rtol=0, atol=1e-6 * float(meant.abs().max()))


def test_casting_a_prepared_model_leaves_what_kernels_read_as_float32():
    """LLM.int8() and int8 factors have scales in float32, whatever the type of the model."""
    model, reference = each_kind(), each_kind(prepared=False)
    x = some()
    for dtype in (torch.bfloat16, torch.float16):
        cast, other = model.to(dtype), reference.to(dtype)
        assert cast[1].absmax.dtype == cast[2].value_scale.dtype == cast[2].atom_scale.dtype == torch.float32
        found, expected = cast(x.to(dtype)), other(x.to(dtype))
        assert found.dtype == dtype
        assert float((found - expected).float().norm() / expected.float().norm()) < 0.03


def test_a_second_preparation_counts():
    model, x = each_kind(), some()
    layers = list(model)
    assert [choice.op for choice in prepare(model, strict=True).values()] == OPS
    assert all(a is b for a, b in zip(layers, model, strict=True))
    names, before = list(model.state_dict()), model(x)
    chosen = prepare(model, activations="int8", strict=True)
    assert [choice.op for choice in chosen.values()] == ["linear_dynamic_int8", *OPS[1:]]
    assert list(model.state_dict()) == names and "linear_dynamic_int8" in explain(model)
    fresh = each_kind(prepared=False)
    prepare(fresh, activations="int8")
    assert torch.equal(model(x), fresh(x)) and not torch.equal(model(x), before)
    prepare(model)
    assert torch.equal(model(x), before)


def test_hooks_of_a_stored_layer_are_kept_and_can_be_removed():
    model, seen = nn.Sequential(packed_layer()), []
    handles = [
        model[0].register_forward_hook(lambda *given: seen.append("after")),
        model[0].register_forward_pre_hook(lambda *given, **named: seen.append("before"), with_kwargs=True),
    ]
    prepare(model, strict=True)
    assert type(model[0]) is PreparedInteger
    model(some())
    assert seen == ["before", "after"]
    for handle in handles:
        handle.remove()
    model(some())
    assert len(seen) == 2


def test_a_layer_whose_forward_was_replaced_is_left_to_it():
    model = nn.Sequential(packed_layer(), nn.Linear(24, 8), packed_layer(columns=64))
    for layer in model[:2]:
        layer.forward = lambda x, layer=layer: 2 * type(layer).forward(layer, x)
    expected = model[:2](some())
    with pytest.warns(UserWarning, match="forward"):
        assert prepare(model)["0"].op is None
    assert type(model[0]) is PackedLinear and type(model[1]) is nn.Linear and type(model[2]) is PreparedInteger
    assert torch.equal(model[:2](some()), expected)
    with raises(KernelError, where="0", reason="fallback", kernel="reference") as failure:
        prepare(model, strict=True)
    assert any("forward" in skipped for skipped in failure.value.data["skipped"])


def test_a_dense_layer_with_a_backward_hook_is_left_alone():
    model = each_kind(prepared=False)
    model[3].register_full_backward_hook(lambda *given: None)
    prepare(model)
    assert type(model[3]) is nn.Linear
