"""A wrong value in config.json is refused with code 5, key and value, before anything large is made."""

from __future__ import annotations

import json
import resource
import shutil

import pytest
import tiny
import torch
import transformers as hf
from raising import raises

from compressor.engine.plan import make_plan
from compressor.errors import ModelError, PassError
from compressor.model.checkpoint import open_checkpoint
from compressor.model.model_building import check_buffers, empty_on_meta, guarded, parse_config
from compressor.model.replay_proof import prove_by_replay
from compressor.model.structure import read_structure
from compressor.recipe.recipe import parse_recipe

RTN = parse_recipe(b"version: 1\nname: t\nsteps: [{pass: rtn, bits: 8, group_size: -1}]\n")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {name: tiny.save(name, folder / name) for name in ("llama", "gpt2", "gemma3", "qwen3_moe", "vit", "bert")}


def changed(source, target, path, value):
    """The checkpoint with another value at a dotted path of config.json."""
    target.mkdir()
    shutil.copy(source / "model.safetensors", target)
    config = json.loads((source / "config.json").read_text())
    node = config
    *parents, last = path.split(".")
    for part in parents:
        node = node[part]
    node[last] = value
    (target / "config.json").write_text(json.dumps(config))
    return target


def wrong(key, needed=None, **data):
    """The values of a refusal that blames one key of config.json."""
    told = {} if needed is None else {"needed": needed}
    return {"where": "model/config.json", "reason": "wrong-value", "keys": [key], **told, **data}


MADE, BUILT = {"subject": "LlamaConfig"}, {"subject": "LlamaForCausalLM"}
GEMMA, GPT2 = {"subject": "Gemma3TextConfig"}, {"subject": "GPT2LMHeadModel"}
CLASSES = wrong("architectures", "a list of class names is needed")
LARGEST, MOST = "no model has more than 100,000,000", "no model has more than 1,000,000"


def shape(where, found, expected):
    return {"where": where, "reason": "shape", "shape": found, "expected": expected}


# family, dotted key, value, what is told
WRONG = [
    ("llama", "hidden_size", "256", wrong("hidden_size", "int is needed", value='"256"')),
    ("llama", "rms_norm_eps", None, wrong("rms_norm_eps", "float is needed", value="null")),
    ("llama", "rms_norm_eps", [1], wrong("rms_norm_eps", value="[1]")),
    ("llama", "use_cache", 3, wrong("use_cache", "bool is needed", value="3")),
    ("llama", "architectures", [3], CLASSES),
    ("llama", "architectures", "LlamaForCausalLM", CLASSES),
    ("llama", "architectures", {"a": 1}, CLASSES),
    ("llama", "architectures", [], {"where": "model", "reason": "no-architecture"}),
    ("llama", "architectures", ["utils"], {"where": "model", "reason": "no-model-class", "name": "utils"}),
    ("llama", "architectures", [""], {"where": "model", "reason": "unknown-architecture", "architecture": ""}),
    ("llama", "model_type", 3, wrong("model_type", value="3")),
    (
        "llama",
        "model_type",
        "nothing",
        {"where": "model/config.json", "reason": "unknown-model-type", "model_type": "nothing"},
    ),
    ("llama", "dtype", "float33", wrong("dtype", value='"float33"')),
    ("llama", "dtype", "int8", wrong("dtype", value='"int8"')),
    ("llama", "dtype", 5, wrong("dtype", value="5")),
    ("llama", "torch_dtype", [1], wrong("torch_dtype", value="[1]")),
    ("llama", "quantization_config", "gptq", wrong("quantization_config", "a map is needed", value='"gptq"')),
    ("llama", "auto_map", [1], {"where": "config.json", "reason": "auto-map-entry", "value": "1"}),
    ("llama", "hidden_act", "foo", wrong("hidden_act", **BUILT, cause="KeyError: 'foo'")),
    ("llama", "num_attention_heads", 0, wrong("num_attention_heads", **MADE)),
    ("llama", "num_attention_heads", -1, wrong("num_attention_heads", **BUILT)),
    ("llama", "num_key_value_heads", 3, shape("model.layers.0.self_attn.k_proj.weight", [16, 32], [24, 32])),
    ("llama", "rope_parameters.rope_type", "foo", wrong("rope_parameters.rope_type", **BUILT)),
    ("llama", "rope_parameters.rope_theta", [], wrong("rope_parameters.rope_theta", **BUILT)),
    ("llama", "rope_parameters.rope_theta", 0, wrong("rope_parameters.rope_theta", **BUILT)),
    ("llama", "num_hidden_layers", 0, wrong("num_hidden_layers", "at least 1 is needed", value="0")),
    ("llama", "num_hidden_layers", 3, {"where": "model", "reason": "missing-tensors", "is_output_head": False}),
    ("llama", "num_hidden_layers", 10**12, wrong("num_hidden_layers", value="1000000000000")),
    ("llama", "hidden_size", 10**12, wrong("hidden_size", LARGEST, value="1000000000000")),
    (
        "llama",
        "intermediate_size",
        10**8,
        shape("model.layers.0.mlp.down_proj.weight", [32, 64], [32, 100000000]),
    ),
    ("llama", "num_key_value_heads", 10**6, shape("model.layers.0.self_attn.k_proj.weight", [16, 32], [8000000, 32])),
    ("llama", "id2label", -1, wrong("id2label", **MADE)),
    ("llama", "num_labels", 10**12, wrong("num_labels", MOST, value="1000000000000")),
    ("gpt2", "n_layer", 10**12, wrong("n_layer", value="1000000000000")),
    ("gpt2", "n_head", "4", wrong("n_head", "int is needed", value='"4"')),
    ("gpt2", "n_embd", -1, wrong("n_embd", **GPT2)),
    ("gpt2", "attn_pdrop", 1.5, wrong("attn_pdrop", **GPT2)),
    ("gemma3", "layer_types", [], wrong("layer_types", **GEMMA)),
    ("gemma3", "layer_types", ["a", "b", "c"], wrong("layer_types", **GEMMA)),
    ("gemma3", "rope_parameters.full_attention", True, {"where": "model/config.json", **GEMMA}),
    ("qwen3_moe", "num_experts_per_tok", 9, {"where": "model/config.json", "subject": "Qwen3MoeForCausalLM"}),
    ("vit", "patch_size", 0, wrong("patch_size", subject="ViTForImageClassification")),
    ("vit", "image_size", 10**12, wrong("image_size", LARGEST, value="1000000000000")),
    (
        "bert",
        "max_position_embeddings",
        10**8,
        shape("bert.embeddings.position_embeddings.weight", [128, 32], [100000000, 32]),
    ),
]
# of several keys that could be to blame, one that has to be among them
AMONG = {"rope_parameters.full_attention": "rope_parameters", "num_experts_per_tok": "expert"}


@pytest.mark.parametrize(("family", "key", "value", "told"), WRONG, ids=[f"{f}-{k}-{v}" for f, k, v, _ in WRONG])
def test_a_wrong_value_is_refused_by_its_key(family, key, value, told, models, tmp_path):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with raises(ModelError, **told) as failure:
        make_plan(RTN, str(changed(models[family], tmp_path / "model", key, value)))
    assert failure.value.exit_code == 5
    if key in AMONG:
        assert any(AMONG[key] in name for name in failure.value.data["keys"])
    if told.get("reason") == "missing-tensors":
        assert all(name.startswith("model.layers.2.") for name in failure.value.data["names"])
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KiB
    assert grown < 200_000, "a refusal makes nothing large"


def test_a_config_that_names_no_type_says_so(models, tmp_path):
    path = changed(models["llama"], tmp_path / "model", "a", 1)
    config = json.loads((path / "config.json").read_text())
    del config["model_type"]
    (path / "config.json").write_text(json.dumps(config))
    with raises(ModelError, where="model/config.json", reason="no-model-type"):
        read_structure(path)


@pytest.mark.parametrize(
    "content", [b"", b"\xef\xbb\xbf{}", b"\xff\xfe{}", b"[" * 100_000, b"[1]", b"nul", b"{'a': 1}"]
)
def test_a_config_that_is_no_json_object_is_refused(content, models, tmp_path):
    path = changed(models["llama"], tmp_path / "model", "a", 1)
    (path / "config.json").write_bytes(content)
    with raises(ModelError, where="config.json", reason="no-json-object" if content == b"[1]" else "bad-json"):
        read_structure(path)


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"{", b"\xff\xfe", b'{"max_new_tokens": -1}'])
def test_settings_of_generation_that_cannot_be_read_are_refused(content, models, tmp_path):
    path = changed(models["llama"], tmp_path / "model", "a", 1)
    (path / "generation_config.json").write_bytes(content)
    with raises(ModelError, where="generation_config.json", reason="unreadable"):
        read_structure(path)


def test_a_config_that_is_a_directory_is_refused(models, tmp_path):
    path = changed(models["llama"], tmp_path / "model", "a", 1)
    (path / "config.json").unlink()
    (path / "config.json").mkdir()
    with raises(ModelError, where="config.json", reason="no-regular-file"):
        read_structure(path)


def test_buffers_larger_than_any_model_has_are_refused_with_the_key_that_makes_them(models):
    checkpoint = open_checkpoint(models["bert"])
    config = hf.BertConfig(**{**tiny.COMMON, "max_position_embeddings": 10**8})
    huge = empty_on_meta(hf.BertForSequenceClassification, config, 1000, torch.float32)
    checkpoint.config["max_position_embeddings"] = 10**8
    key = "max_position_embeddings"
    with raises(ModelError, where="bert/config.json", reason="large-buffers", shape=[1, 10**8], keys=[key]):
        check_buffers(huge, checkpoint)


def test_a_class_that_makes_ever_more_modules_is_ended():
    config = hf.LlamaConfig(**{**tiny.COMMON, "num_hidden_layers": 10**6})
    with pytest.raises(ValueError, match="500"):
        empty_on_meta(hf.LlamaForCausalLM, config, 500, torch.float32)


def test_no_key_is_blamed_where_the_model_runs_as_a_whole(models):
    """Then it is the way of running it that doesn't suit the model, and the config is right."""

    def in_pieces(config):
        if config.num_hidden_layers == 2:
            raise IndexError("tuple index out of range")

    checkpoint = open_checkpoint(models["llama"])
    config = hf.AutoConfig.from_pretrained(models["llama"])
    said = "IndexError: tuple index out of range"
    with raises(ModelError, where="Llama", reason="not-in-blocks", cause=said):
        guarded(in_pieces, checkpoint, config, "Llama", "it can't be run", retry=lambda config: None)


def test_models_without_a_hidden_size_or_with_one_of_their_own_are_planned_or_refused(tmp_path):
    convnext = hf.ConvNextConfig(image_size=32, hidden_sizes=[16, 32], depths=[1, 1], num_stages=2)
    funnel = hf.FunnelConfig(vocab_size=96, d_model=32, d_inner=64, n_head=4, d_head=8, block_sizes=[1, 1])
    hf.ConvNextForImageClassification(convnext).save_pretrained(tmp_path / "convnext")
    hf.FunnelForSequenceClassification(funnel).save_pretrained(tmp_path / "funnel")
    assert make_plan(RTN, str(tmp_path / "convnext")).peak_memory_bytes > 0
    with raises(ModelError, where="FunnelForSequenceClassification", reason="not-in-blocks") as failure:
        make_plan(RTN, str(tmp_path / "funnel"))
    assert "num_hidden_layers" in failure.value.data["cause"]


SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TOWERS = {
    "text_config": {**SIZES, "vocab_size": 96, "max_position_embeddings": 64, "projection_dim": 16},
    "vision_config": {**SIZES, "image_size": 16, "patch_size": 4},
}


@pytest.mark.parametrize("name", ["CLIP", "Siglip"])
def test_two_towers_are_refused_by_name(name, tmp_path):
    torch.manual_seed(0)
    getattr(hf, f"{name}Model")(getattr(hf, f"{name}Config")(**TOWERS)).save_pretrained(tmp_path)
    with raises(ModelError, where=f"{name}Model", reason="two-towers"):
        read_structure(tmp_path)


@pytest.mark.parametrize("name", ["CLIP", "Siglip"])
def test_the_size_of_images_is_read_from_the_vision_config(name, tmp_path):
    torch.manual_seed(0)
    getattr(hf, f"{name}ForImageClassification")(getattr(hf, f"{name}Config")(**TOWERS)).save_pretrained(tmp_path)
    structure = read_structure(tmp_path)
    prove_by_replay(structure)
    assert structure.block_count == 2


def test_images_of_a_size_that_is_not_told_are_refused(tmp_path):
    hf.ResNetForImageClassification(
        hf.ResNetConfig(hidden_sizes=[16, 32], depths=[1, 1], embedding_size=8)
    ).save_pretrained(tmp_path)
    with raises(ModelError, where="ResNetForImageClassification", reason="no-image-size"):
        read_structure(tmp_path)


def test_memory_that_runs_out_is_blamed_on_no_key(models):
    """As for fused experts of hundreds of gigabytes, whose config.json is right."""
    checkpoint = open_checkpoint(models["llama"])

    def build(_config):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 30064771072 bytes")

    with raises(PassError, where=None, reason="out-of-memory"):
        guarded(build, checkpoint, parse_config(checkpoint, False), "LlamaForCausalLM", "it can't be built")
