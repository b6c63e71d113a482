"""Fused forwards: which modules get one, that outputs stay, and when the forward of the class is used."""

from __future__ import annotations

import copy
import functools
import io

import pytest
import tiny
import torch
import torch.nn.functional as F
import transformers as hf
from kernel_decode import rounded
from raising import raises
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm

from compressor.errors import KernelError, ShapeError
from compressor.kernels.ops.block_functions import rms_norm, rotate_halves, silu_product
from compressor.kernels.prepared.dispatch import fast_library
from compressor.kernels.prepared.fused_forward import FusedAttention, FusedMLP, FusedNorm, fused_forward
from compressor.kernels.prepared.prepare import explain, prepare

pytestmark = pytest.mark.skipif(fast_library() is None, reason="no compiled library that is faster than torch")
ALL = {FusedNorm, FusedMLP, FusedAttention}
KINDS = {
    "llama": ALL,
    "mistral": ALL,
    "qwen3": ALL,  # heads of q and k have norms
    "gemma": {FusedNorm, FusedAttention},  # the gain is 1 + weight; gelu
    "phi3": {FusedNorm},  # q, k and v in one matrix, gate and up too
    "olmo2": {FusedNorm, FusedMLP},  # q and k have norms over all heads
    "phi": set(),
}


def prepared(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return prepared_model(tiny.build(family, dtype=dtype))


def prepared_model(model: PreTrainedModel) -> PreTrainedModel:
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, rounded(module, 8))
    prepare(model, strict=True)
    return model


def unfused(model: PreTrainedModel) -> PreTrainedModel:
    """A copy with the forwards of the classes."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if fused_forward(module) is not None:
            del module.forward
    return model


def outputs(model: PreTrainedModel) -> torch.Tensor:
    """The logits of two prompts, one of them padded, and of three steps with their cache."""
    tokens = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(3))
    mask, cache, found = torch.ones(2, 9, dtype=torch.long), DynamicCache(config=model.config), []
    mask[0, :4] = 0
    with torch.no_grad():
        for _ in range(4):
            found.append(model(input_ids=tokens, attention_mask=mask, past_key_values=cache).logits)
            tokens, mask = tokens[:, :1] + 1, F.pad(mask, (0, 1), value=1)
    return torch.cat(found, 1).float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", KINDS)
def test_modules_are_found_by_what_they_compute_and_outputs_stay(family, dtype):
    model = prepared(family, dtype)
    plain, found = unfused(model), [fused_forward(module) for module in model.modules()]
    assert {type(fused) for fused in found if fused is not None} == KINDS[family]
    assert all(fused is None or fused.module is module for fused, module in zip(found, model.modules()))
    expected = outputs(plain)
    bound = 1e-5 if dtype == torch.float32 else 0.01
    assert float((outputs(model) - expected).norm() / expected.norm()) < bound
    assert type(model) is type(plain) and list(model.state_dict()) == list(plain.state_dict())


def kinds_of_attention(made: type[PreTrainedModel], config: type[hf.PreTrainedConfig], **settings) -> list[type]:
    """Of the layers of a small model of another family, whose outputs have to stay."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    tokens = {"vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model = prepared_model(made(config(**sizes, **tokens, num_hidden_layers=2, **settings)).eval())
    assert torch.allclose(outputs(model), outputs(unfused(model)), atol=1e-5)
    return [type(fused_forward(layer.self_attn)) for layer in model.model.layers]


def test_layers_of_a_class_may_differ():
    """Every other layer of this family has no rotary embeddings."""
    kinds = kinds_of_attention(hf.SmolLM3ForCausalLM, hf.SmolLM3Config, no_rope_layers=[1, 0])
    assert kinds == [FusedAttention, type(None)]


@pytest.mark.parametrize("limit", [None, 8.0, 1000.0])
def test_limits_of_queries_keys_and_values_are_seen(limit):
    """Random weights never reach the limit."""
    expected = FusedAttention if limit is None else type(None)
    assert kinds_of_attention(hf.OlmoForCausalLM, hf.OlmoConfig, clip_qkv=limit) == [expected] * 2


def test_generate_gives_the_same_tokens():
    model = prepared("llama")
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "min_new_tokens": 12}
    tokens = torch.tensor([[5, 6, 7], [8, 9, 10]])
    assert torch.equal(model.generate(tokens, **settings), unfused(model).generate(tokens, **settings))


def test_float16_keeps_the_forwards_of_the_classes():
    assert not any(fused_forward(module) for module in prepared("llama", torch.float16).modules())


def test_hooks_do_not_see_the_samples():
    model, seen = tiny.build("llama"), []
    for module in model.modules():
        if module is not model:
            module.register_forward_hook(lambda module, *given: seen.append(module))
    prepared_model(model)
    assert seen == [] and fused_forward(model.model.norm) is not None
    model(torch.tensor([[5, 6]]))
    assert model.model.norm in seen and model.model.layers[0].mlp.act_fn in seen


def test_explain_names_what_is_fused():
    lines = explain(prepared("llama")).splitlines()
    assert "model.layers.0.mlp   LlamaMLP   fused forward   silu_product" in lines
    assert sum("fused forward" in line for line in lines) == 9


def test_a_model_without_quantized_layers_is_left_alone():
    model = tiny.build("llama")
    prepare(model)
    assert not any("forward" in vars(module) for module in model.modules())


def test_copies_and_pickles_are_fused_and_have_their_own_weights():
    model, expected = prepared("llama"), outputs(prepared("llama"))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(outputs(other), expected)
        fused = [module for module in other.modules() if fused_forward(module)]
        assert len(fused) == 9 and all(fused_forward(module).module is module for module in fused)
        other.model.norm.weight.data.zero_()
        assert not outputs(other).any() and torch.equal(outputs(model), expected)


def test_a_second_preparation_keeps_them():
    model = prepared("qwen3")
    before = {name: type(fused_forward(module)) for name, module in model.named_modules()}
    prepare(model, activations="int8", strict=True)
    assert {name: type(fused_forward(module)) for name, module in model.named_modules()} == before


def test_another_dtype_is_proven_by_another_preparation(calls):
    model, tokens = prepared("llama").bfloat16(), torch.tensor([[5, 6, 7]])
    calls.clear()
    with torch.no_grad():
        model(tokens)
        assert set(calls) == {LlamaMLP, LlamaAttention}
        prepare(model, strict=True)
        calls.clear()
        model(tokens)
    assert calls == []


@pytest.mark.parametrize("how", ["another module", "another forward"])
def test_an_activation_that_was_replaced_is_used(how):
    model = prepared("llama")
    for layer in model.model.layers:
        if how == "another module":
            layer.mlp.act_fn = nn.Tanh()
        else:
            layer.mlp.act_fn.forward = torch.tanh
    assert torch.allclose(outputs(model), outputs(unfused(model)), atol=1e-5)
    prepare(model, strict=True)
    assert not any(fused_forward(layer.mlp) for layer in model.model.layers)


@pytest.fixture
def calls(monkeypatch):
    """The classes whose own forward runs."""
    found = []
    for cls in (LlamaRMSNorm, LlamaMLP, LlamaAttention):
        own = cls.forward

        @functools.wraps(own)
        def forward(self, *arguments, own=own, **named):
            found.append(type(self))
            return own(self, *arguments, **named)

        monkeypatch.setattr(cls, "forward", forward)
    return found


@pytest.mark.parametrize("how", ["gradients", "autocast", "float64", "attention weights", "training", "hook", "other"])
def test_the_forward_of_the_class_is_used_for_what_a_fused_one_does_not_take(how, calls):
    model, tokens = prepared("llama"), torch.tensor([[5, 6, 7]])
    calls.clear()
    with torch.no_grad():
        model(tokens)
        assert calls == []
        if how == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                model(tokens)
        elif how == "float64":
            model.model.norm(torch.ones(1, 32, dtype=torch.float64))
        elif how == "attention weights":
            model.set_attn_implementation("eager")
            assert model(tokens, output_attentions=True).attentions[0].shape == (1, 4, 3, 3)
        elif how == "training":
            model.train()(tokens)
        elif how == "hook":
            model.model.layers[0].mlp.act_fn.register_forward_hook(lambda *given: calls.append("act_fn"))
            model(tokens)
        elif how == "other":
            with pytest.raises(RuntimeError):
                model.model.norm(torch.ones(1, 5))
    if how == "gradients":
        x = torch.ones(1, 32, requires_grad=True)
        model.model.norm(x).sum().backward()
        assert x.grad is not None and model.model.norm.weight.grad is not None
    expected = {
        "gradients": {LlamaRMSNorm}, "autocast": {LlamaRMSNorm, LlamaMLP, LlamaAttention}, "float64": {LlamaRMSNorm},
        "attention weights": {LlamaAttention}, "training": {LlamaAttention, LlamaMLP}, "hook": {LlamaMLP, "act_fn"},
        "other": {LlamaRMSNorm},
    }  # fmt: skip
    assert set(calls) == expected[how]


def test_a_compiler_is_given_the_forward_of_the_class():
    model = prepared("llama")
    norm, mlp, x = model.model.norm, model.model.layers[0].mlp, torch.randn(2, 32)
    for module in (norm, mlp):
        compiled = torch.compile(lambda x, module=module: module(x), backend="aot_eager", fullgraph=True)
        with torch.no_grad():
            assert torch.allclose(compiled(x), module(x), atol=1e-5)


def interleaved(q, k, cos, sin, unsqueeze_dim=1):
    def turned(x):
        return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)

    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + turned(q) * sin, k * cos + turned(k) * sin


def another_mlp(self, x):
    return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))


def larger_far_away(self, hidden_states, position_embeddings=None, attention_mask=None, cache=None, **kwargs):
    """The queries of Ministral 3 grow with their places."""
    cos, sin = position_embeddings
    if (places := kwargs.get("position_ids")) is not None:
        cos, sin = cos * (1 + (places // 8192).log1p()).unsqueeze(-1), sin
    return LLAMA_ATTENTION(self, hidden_states, (cos, sin), attention_mask, cache, **kwargs)


LLAMA_ATTENTION = LlamaAttention.forward


def without_root(self, x):
    return self.weight * x / (x.square().mean(-1, keepdim=True) + self.variance_epsilon)


def another_eps(self, x):
    return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 2 * self.variance_epsilon)


OTHERS = {
    "rotation of neighbours": (modeling_llama, "apply_rotary_pos_emb", interleaved, FusedAttention),
    "attention that knows places": (LlamaAttention, "forward", larger_far_away, FusedAttention),
    "gate and up swapped": (LlamaMLP, "forward", another_mlp, FusedMLP),
    "norm without root": (LlamaRMSNorm, "forward", without_root, FusedNorm),
    "norm with another eps": (LlamaRMSNorm, "forward", another_eps, FusedNorm),
}


@pytest.mark.parametrize("case", OTHERS)
def test_a_module_that_computes_something_else_is_left_alone(case, monkeypatch):
    owner, name, other, kind = OTHERS[case]
    monkeypatch.setattr(owner, name, other)
    model = prepared("llama")
    assert {type(fused) for m in model.modules() if (fused := fused_forward(m))} == ALL - {kind}
    assert torch.allclose(outputs(model), outputs(unfused(model)), rtol=1e-4, atol=1e-5)


WRONG = {
    "rms_norm": lambda x: rms_norm(x, x[0, :3], 1e-6, 0.0, False),
    "silu_product": lambda x: silu_product(x, x[:1]),
    "rotate_halves": lambda x: rotate_halves(x, x, x),
    "types": lambda x: silu_product(x.half(), x.half()),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_operands_are_told(case):
    with raises(ShapeError, reason="operands"):
        WRONG[case](torch.ones(2, 4))


def test_operands_elsewhere_or_with_gradients_are_refused():
    x = torch.ones(2, 4)
    with raises(KernelError, op="silu_product"):
        silu_product(x, x.to("meta"))
    with pytest.raises(RuntimeError, match="no gradient"):
        silu_product(x, x.requires_grad_())


@pytest.mark.parametrize("shape", [(1, 7), (3, 5, 33), (0, 8), (40, 2048)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operations_agree_with_those_of_torch(shape, dtype):
    made = torch.Generator().manual_seed(1)
    x, y = (torch.randn(shape, generator=made).to(dtype) for _ in range(2))
    norm = LlamaRMSNorm(shape[-1], 1e-6).to(dtype)
    norm.weight.data = torch.randn(shape[-1], generator=made).to(dtype)
    unit = torch.finfo(dtype).eps * (4 if dtype == torch.float32 else 1)
    with torch.no_grad():
        pairs = [
            (rms_norm(x, norm.weight, 1e-6, 0.0, True), norm(x)),
            (silu_product(x * 8, y), F.silu(x * 8) * y),
        ]
    for found, expected in pairs:
        assert found.dtype == dtype and found.shape == expected.shape
        assert bool(((found - expected).double().abs() <= 2 * unit * expected.double().abs() + 1e-30).all())
