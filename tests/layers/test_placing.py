"""A fresh model takes the shapes and layers that its config names, and nothing else."""

from __future__ import annotations

import pytest
import tiny
import torch
import transformers as hf
from accelerate import init_empty_weights
from raising import raises
from torch import nn

from compressor.errors import ModelError
from compressor.layers import find_layer
from compressor.layers.structural.placing import reshape
from compressor.layers.structural.removed import Removed
from compressor.layers.structural.resized import Resized
from compressor.layers.structural.rms_norm import RmsNorm
from compressor.layers.structural.rotated_block import RotatedBlock
from compressor.model.norms import Norm, apply_norm, describe_norm

FORMATS = {format_name: find_layer(format_name) for format_name in ("rms_norm", "rotated_block")}
SPEC = {
    "sites": [{"norm": [], "shortcut": True, "branches": []}, {"norm": [], "shortcut": True, "branches": []}],
    "returns": None,
}
NORM = {"form": "rms_norm", "spec": {"width": 32, "eps": 1e-5}, "shape": [24]}


def test_parameters_get_their_shapes_and_modules_say_so():
    model = tiny.build("llama", dtype=torch.bfloat16)
    shapes = {
        "model.embed_tokens.weight": [96, 24],
        "model.layers.1.self_attn.q_proj.weight": [32, 24],
        "model.layers.1.self_attn.q_proj.bias": [32],
        "lm_head.weight": [96, 24],
    }
    reshape(model, shapes, {}, FORMATS)
    assert all(list(model.get_parameter(name).shape) == shape for name, shape in shapes.items())
    assert {model.get_parameter(name).dtype for name in shapes} == {torch.bfloat16}
    table, linear = model.model.embed_tokens, model.model.layers[1].self_attn.q_proj
    assert (table.embedding_dim, linear.in_features, linear.out_features) == (24, 24, 32)
    assert linear(table(torch.tensor([[3]]))).shape == (1, 1, 32)
    assert model.model.layers[0].self_attn.q_proj.in_features == 32


def test_convolutions_and_their_transposed_cousins_say_their_sizes():
    vit, gpt2 = tiny.build("vit"), tiny.build("gpt2")
    name = "vit.embeddings.patch_embeddings.projection"
    reshape(vit, {f"{name}.weight": [24, 1, 4, 4], f"{name}.bias": [24]}, {}, FORMATS)
    projection = vit.get_submodule(name)
    assert projection.out_channels == 24 and projection(torch.ones(1, 1, 16, 16)).shape == (1, 24, 4, 4)
    reshape(
        gpt2, {"transformer.h.0.attn.c_proj.weight": [32, 24], "transformer.h.0.attn.c_proj.bias": [24]}, {}, FORMATS
    )
    conv = gpt2.transformer.h[0].attn.c_proj
    assert (conv.nx, conv.nf) == (32, 24) and conv(torch.ones(1, 3, 32)).shape == (1, 3, 24)


def test_a_router_computes_with_the_width_that_is_left():
    model = tiny.build("mixtral")
    reshape(model, {"model.layers.0.mlp.gate.weight": [4, 24]}, {}, FORMATS)
    assert model.model.layers[0].mlp.gate(torch.ones(5, 24))[0].shape == (5, 4)


def test_a_parameter_that_is_gone_is_none():
    model = tiny.build("opt")
    reshape(model, {"model.decoder.layers.0.fc1.bias": None}, {}, FORMATS)
    assert model.model.decoder.layers[0].fc1.bias is None
    assert "model.decoder.layers.0.fc1.bias" not in model.state_dict()


def test_nothing_is_allocated_on_the_meta_device():
    with init_empty_weights():
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**tiny.COMMON))
    block = {"form": "rotated_block", "spec": SPEC, "shape": [24, 24, 24]}
    reshape(model, {"lm_head.weight": [96, 24]}, {"model.norm": NORM, "model.layers.0": block}, FORMATS)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.model.layers[0].shortcut_0.shape == (24, 24)


def test_what_lies_in_blocks_that_a_probe_lacks_is_skipped_and_only_that():
    model = tiny.build("llama")
    block = {"form": "rotated_block", "spec": SPEC, "shape": [24, 24, 24]}
    reshape(model, {"model.layers.2.mlp.up_proj.weight": [64, 24]}, {"model.layers.7": block}, FORMATS)
    assert not any(isinstance(module, RotatedBlock) for module in model.modules())
    for shapes, modules in (
        ({"model.layers.2x.a": [1]}, {}),
        ({"model.embed.weight": [96, 24]}, {}),
        ({}, {"norm": NORM}),
    ):
        with raises(ModelError, where=next(iter({**shapes, **modules})), reason="no-module"):
            reshape(model, shapes, modules, FORMATS)


@pytest.mark.parametrize(
    ("shapes", "data"),
    [
        ({"lm_head.scale": [96]}, {"reason": "no-parameter", "module": "Linear"}),
        ({"lm_head.weight": [96]}, {"reason": "shape", "shape": [96], "old": [96, 32]}),
        ({"lm_head.bias": [0]}, {"reason": "shape", "shape": [0], "old": None}),
    ],
)
def test_a_shape_that_a_parameter_cannot_have_is_an_error(shapes, data):
    with raises(ModelError, where=next(iter(shapes)), **data):
        reshape(tiny.build("llama"), shapes, {}, FORMATS)


def test_an_unknown_form_is_an_error():
    with raises(ModelError, where="compressed_modules", format_name="table_norm"):
        reshape(tiny.build("llama"), {}, {"model.norm": {**NORM, "form": "table_norm"}}, FORMATS)


@pytest.mark.parametrize(("features", "width", "dtype"), [(24, 32, torch.float32), (32, 32, torch.bfloat16)])
def test_a_norm_divides_by_the_width_that_the_stream_had(features, width, dtype):
    layer = RmsNorm.empty((features,), {"width": width, "eps": 0.1}, dtype, False)
    x = torch.randn(3, features, generator=torch.Generator().manual_seed(0)).to(dtype)
    wanted = x.double() / (x.double().square().sum(-1, keepdim=True) / width + 0.1).sqrt()
    assert layer(x).dtype == dtype
    # one rounding to the dtype, and some in float32
    assert float((layer(x).double() - wanted).abs().max()) < 2 * torch.finfo(dtype).eps * float(wanted.abs().max())
    assert not layer.tensors() and layer.format_params() == {"width": width, "eps": 0.1}


@pytest.mark.parametrize("features", [32, 24])
def test_a_norm_without_parameters_is_described_with_its_divisor(features):
    found = describe_norm(RmsNorm(features, 32, 1e-3))
    divisor = None if features == 32 else 32
    assert found == Norm("rms", 0.0, 1e-3, features, has_weight=False, has_bias=False, divisor=divisor)
    x = torch.randn(2, features, generator=torch.Generator().manual_seed(0))
    assert apply_norm(x, None, None, found).allclose(RmsNorm(features, 32, 1e-3)(x), rtol=1e-6)


def test_a_module_that_states_a_wrong_divisor_is_no_norm():
    layer = RmsNorm(24, 32, 1e-3)
    layer.forward = nn.functional.relu
    assert describe_norm(layer) is None


def test_a_block_is_wrapped_once_and_with_widths_that_fit():
    def block():
        return tiny.build("llama").model.layers[0]

    with raises(ModelError, where="rotated_block", reason="widths", widths=2, sublayers=2):
        RotatedBlock.wrap(block(), (32, 32), SPEC)
    without = {**SPEC, "sites": [{**SPEC["sites"][0], "shortcut": False}]}
    with raises(ModelError, where="rotated_block", reason="no-shortcut", sublayer=0, before=32, after=24):
        RotatedBlock.wrap(block(), (32, 24), without)
    wrapped = block()
    RotatedBlock.wrap(wrapped, (32, 32, 24), SPEC)
    with raises(ModelError, where="LlamaDecoderLayer", reason="already-rotated"):
        RotatedBlock.wrap(wrapped, (32, 32, 32), SPEC)
    names = [name for name, _ in wrapped.named_parameters(recurse=False)]
    assert names == ["shortcut_0", "shortcut_1"] and "self_attn.q_proj.weight" in wrapped.state_dict()
    assert isinstance(wrapped, hf.models.llama.modeling_llama.LlamaDecoderLayer)


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.narrow = RmsNorm(4, 4, 0.0), nn.Linear(4, 2, bias=False)
        self.scale = Scale()

    def forward(self, x, factor=2.0, **kwargs):
        raise AssertionError("a wrapped block runs by its spec")


class Scale(nn.Module):
    def forward(self, x, by, shift=0.0):
        return x * by + shift, None


def test_a_wrapped_block_runs_by_its_spec_and_so_does_a_module_in_a_shortcuts_place():
    steps = [
        {"call": "narrow", "args": [["input"]], "kwargs": {}, "rest": False, "take": None},
        {"call": "scale", "args": [["input"]], "kwargs": {"by": ["argument", "factor"]}, "rest": True, "take": 0},
    ]
    site = {"norm": ["norm"], "shortcut": True, "branches": [{"norm": "norm", "steps": steps}]}
    block = Toy()
    RotatedBlock.wrap(block, (4, 2), {"sites": [site], "returns": 3})
    shortcut = torch.arange(8.0).reshape(4, 2)
    block.shortcut_0.data.copy_(shortcut)
    x = torch.tensor([[1.0, 1.0, -1.0, -1.0]])  # of root mean square one
    with torch.no_grad():
        for given, (by, shift) in (((), (2.0, 0.0)), ((3.0,), (3.0, 1.0))):
            wanted = x @ shortcut + by * block.narrow(x) + shift
            found = block(x, *given, **({"shift": 1.0} if shift else {}))
            assert found[0].allclose(wanted) and found[1:] == (None, None)
        kept, block.shortcut_0 = block.shortcut_0, nn.Linear(4, 2, bias=False)
        block.shortcut_0.weight.data.copy_(shortcut.t())
        assert block(x, factor=3.0, shift=1.0)[0].allclose(wanted) and "shortcut_0.weight" in block.state_dict()
        block.shortcut_0 = kept
        assert "shortcut_0" in dict(block.named_parameters())


def test_what_is_left_of_a_sub_block_gives_its_bias_in_the_shape_that_was():
    model = tiny.build("llama", dtype=torch.bfloat16)
    format_params = {"returns": 2, "layer": 0, "has_bias": True, "of": "heads"}
    gone = {"form": "removed", "spec": format_params, "shape": [32]}
    reshape(model, {}, {"model.layers.0.self_attn": gone}, {"removed": Removed})
    layer = model.model.layers[0].self_attn
    assert [name for name, _ in layer.named_parameters()] == ["bias"] and layer.bias.dtype == torch.bfloat16
    layer.bias.data.fill_(0.5)
    cache = hf.DynamicCache()
    x = torch.randn(2, 5, 24, dtype=torch.bfloat16)
    output, weights = layer(hidden_states=x, cache=cache, attention_mask=None)
    assert weights is None and output.equal(torch.full((2, 5, 32), 0.5, dtype=torch.bfloat16))
    assert cache.get_seq_length() == 5 and layer.format_params() == format_params
    layer(x[:, :1], cache)
    assert cache.get_seq_length() == 6
    nothing = Removed.empty(
        (0,), {**format_params, "returns": None, "layer": None, "has_bias": False}, torch.float32, False
    )
    assert nothing(x).shape == (2, 5, 0) and not nothing.tensors()


def test_settings_of_a_module_are_changed_in_place_and_only_those_it_has():
    model = tiny.build("gpt2")
    attention = model.transformer.h[1].attn
    format_params = {"attributes": {"num_heads": 3, "split_size": 24}}
    reshape(
        model,
        {},
        {"transformer.h.1.attn": {"form": "resized", "spec": format_params, "shape": []}},
        {"resized": Resized},
    )
    assert model.transformer.h[1].attn is attention and (attention.num_heads, attention.split_size) == (3, 24)
    assert model.transformer.h[0].attn.num_heads == 4
    llama = tiny.build("llama")
    Resized.wrap(llama.model.norm, (), {"attributes": {}, "eps": 0.25})
    assert llama.model.norm.variance_epsilon == 0.25
    with raises(ModelError, where="resized", module="LlamaRMSNorm", name="heads"):
        Resized.wrap(llama.model.norm, (), {"attributes": {"heads": 3}})
