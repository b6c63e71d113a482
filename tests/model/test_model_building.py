"""A wrong value in config.json is refused with code 5, key and value, before anything large is made."""

from __future__ import annotations

import json
import resource
import shutil

import pytest
import tiny
import torch
import transformers as hf

from compressor.engine.plan import make_plan
from compressor.errors import ModelError, PassError
from compressor.model.checkpoint import open_checkpoint
from compressor.model.model_building import check_buffers, empty_on_meta, guarded, parse_config
from compressor.model.structure import prove_by_replay, read_structure
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


# family, dotted key, value, what the message says
WRONG = [
    ("llama", "hidden_size", "256", r'hidden_size is "256"; int is needed'),
    ("llama", "rms_norm_eps", None, r"rms_norm_eps is null; float is needed"),
    ("llama", "rms_norm_eps", [1], r"rms_norm_eps is \[1\]"),
    ("llama", "use_cache", 3, r"use_cache is 3; bool is needed"),
    ("llama", "architectures", [3], r"architectures is \[3\]; a list of class names"),
    ("llama", "architectures", "LlamaForCausalLM", r"architectures is .* a list of class names"),
    ("llama", "architectures", {"a": 1}, r"architectures is .* a list of class names"),
    ("llama", "architectures", [], r"names no `architectures`"),
    ("llama", "architectures", ["utils"], r"utils is not a model class"),
    ("llama", "architectures", [""], r"no architecture ''"),
    ("llama", "model_type", 3, r"model_type is 3; the name of a model type"),
    ("llama", "model_type", "nothing", r"model_type is 'nothing', which this transformers doesn't know"),
    ("llama", "dtype", "float33", r'dtype is "float33"; one of float16, bfloat16'),
    ("llama", "dtype", "int8", r'dtype is "int8"; one of'),
    ("llama", "dtype", 5, r"dtype is 5; one of"),
    ("llama", "torch_dtype", [1], r"torch_dtype is \[1\]; one of"),
    ("llama", "quantization_config", "gptq", r'quantization_config is "gptq"; a map'),
    ("llama", "auto_map", [1], r"`auto_map` says 1"),
    ("llama", "hidden_act", "foo", r'hidden_act is "foo"; LlamaForCausalLM: it can\'t be built \(KeyError'),
    ("llama", "num_attention_heads", 0, r"num_attention_heads is 0; LlamaConfig: it can't be made"),
    ("llama", "num_attention_heads", -1, r"num_attention_heads is -1; Llama"),
    ("llama", "num_key_value_heads", 3, r"num_key_value_heads is 3|k_proj.weight: the checkpoint has shape"),
    ("llama", "rope_parameters.rope_type", "foo", r'rope_parameters\.rope_type is "foo";'),
    ("llama", "rope_parameters.rope_theta", [], r"rope_parameters\.rope_theta is \[\];"),
    ("llama", "rope_parameters.rope_theta", 0, r"rope_parameters\.rope_theta is 0; .*NaN or Inf"),
    ("llama", "num_hidden_layers", 0, r"num_hidden_layers is 0; at least 1"),
    ("llama", "num_hidden_layers", 3, r"no tensor for model\.layers\.2"),
    ("llama", "num_hidden_layers", 10**12, r"num_hidden_layers is 1000000000000; the checkpoint holds"),
    ("llama", "hidden_size", 10**12, r"hidden_size is 1000000000000; no model has more"),
    (
        "llama",
        "intermediate_size",
        10**8,
        r"the checkpoint has shape \(32, 64\), config.json asks for \(32, 100000000\)",
    ),
    ("llama", "num_key_value_heads", 10**6, r"config.json asks for \(8000000, 32\)"),
    ("llama", "id2label", -1, r"id2label is -1; LlamaConfig: it can't be made"),
    ("llama", "num_labels", 10**12, r"num_labels is 1000000000000; no model has more"),
    ("gpt2", "n_layer", 10**12, r"n_layer is 1000000000000; the checkpoint holds"),
    ("gpt2", "n_head", "4", r'n_head is "4"; int'),
    ("gpt2", "n_embd", -1, r"n_embd is -1;"),
    ("gpt2", "attn_pdrop", 1.5, r"attn_pdrop is 1\.5; GPT2LMHeadModel: it can't be built"),
    ("gemma3", "layer_types", [], r"layer_types is \[\]; Gemma3TextConfig: it can't be made"),
    ("gemma3", "layer_types", ["a", "b", "c"], r"layer_types is .*; Gemma3TextConfig: it can't be made"),
    ("gemma3", "rope_parameters.full_attention", True, r"rope_parameters.*; Gemma3TextConfig"),
    ("qwen3_moe", "num_experts_per_tok", 9, r"num_(local_)?experts(_per_tok)? is (4|9)"),
    ("vit", "patch_size", 0, r"patch_size is 0"),
    ("vit", "image_size", 10**12, r"image_size is 1000000000000; no model has more"),
    ("bert", "max_position_embeddings", 10**8, r"the checkpoint has shape \(128, 32\), config.json asks for"),
]


@pytest.mark.parametrize(("family", "key", "value", "message"), WRONG, ids=[f"{f}-{k}-{v}" for f, k, v, _ in WRONG])
def test_a_wrong_value_is_refused_by_its_key(family, key, value, message, models, tmp_path):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ModelError, match=message) as failure:
        make_plan(RTN, str(changed(models[family], tmp_path / "model", key, value)))
    assert failure.value.exit_code == 5 and failure.value.where
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KiB
    assert grown < 200_000, "a refusal makes nothing large"


def test_a_config_that_names_no_type_says_so(models, tmp_path):
    path = changed(models["llama"], tmp_path / "model", "a", 1)
    config = json.loads((path / "config.json").read_text())
    del config["model_type"]
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="has no `model_type`"):
        read_structure(path)


@pytest.mark.parametrize(
    "content", [b"", b"\xef\xbb\xbf{}", b"\xff\xfe{}", b"[" * 100_000, b"[1]", b"nul", b"{'a': 1}"]
)
def test_a_config_that_is_no_json_object_is_refused(content, models, tmp_path):
    path = changed(models["llama"], tmp_path / "model", "a", 1)
    (path / "config.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"config\.json"):
        read_structure(path)


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"{", b"\xff\xfe", b'{"max_new_tokens": -1}'])
def test_settings_of_generation_that_cannot_be_read_are_refused(content, models, tmp_path):
    path = changed(models["llama"], tmp_path / "model", "a", 1)
    (path / "generation_config.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"generation_config\.json: can't be read"):
        read_structure(path)


def test_a_config_that_is_a_directory_is_refused(models, tmp_path):
    path = changed(models["llama"], tmp_path / "model", "a", 1)
    (path / "config.json").unlink()
    (path / "config.json").mkdir()
    with pytest.raises(ModelError, match=r"config\.json"):
        read_structure(path)


def test_buffers_larger_than_any_model_has_are_refused_with_the_key_that_makes_them(models):
    checkpoint = open_checkpoint(models["bert"])
    config = hf.BertConfig(**{**tiny.COMMON, "max_position_embeddings": 10**8})
    huge = empty_on_meta(hf.BertForSequenceClassification, config, 1000, torch.float32)
    checkpoint.config["max_position_embeddings"] = 10**8
    with pytest.raises(ModelError, match=r"bytes of buffers.*\(1, 100000000\), after max_position_embeddings"):
        check_buffers(huge, checkpoint)


def test_a_class_that_makes_ever_more_modules_is_ended():
    config = hf.LlamaConfig(**{**tiny.COMMON, "num_hidden_layers": 10**6})
    with pytest.raises(ValueError, match="more than 500 modules"):
        empty_on_meta(hf.LlamaForCausalLM, config, 500, torch.float32)


def test_no_key_is_blamed_where_the_model_runs_as_a_whole(models):
    """Then it is the way of running it that doesn't suit the model, and the config is right."""

    def in_pieces(config):
        if config.num_hidden_layers == 2:
            raise IndexError("tuple index out of range")

    checkpoint = open_checkpoint(models["llama"])
    config = hf.AutoConfig.from_pretrained(models["llama"])
    with pytest.raises(ModelError) as failure:
        guarded(in_pieces, checkpoint, config, "Llama", "it can't be run", retry=lambda config: None)
    assert str(failure.value).startswith("Llama: it can't be run (IndexError: tuple index out of range)")


def test_models_without_a_hidden_size_or_with_one_of_their_own_are_planned_or_refused(tmp_path):
    convnext = hf.ConvNextConfig(image_size=32, hidden_sizes=[16, 32], depths=[1, 1], num_stages=2)
    funnel = hf.FunnelConfig(vocab_size=96, d_model=32, d_inner=64, n_head=4, d_head=8, block_sizes=[1, 1])
    hf.ConvNextForImageClassification(convnext).save_pretrained(tmp_path / "convnext")
    hf.FunnelForSequenceClassification(funnel).save_pretrained(tmp_path / "funnel")
    assert make_plan(RTN, str(tmp_path / "convnext")).peak_memory_bytes > 0
    with pytest.raises(ModelError, match=r"FunnelForSequenceClassification: .*num_hidden_layers"):
        make_plan(RTN, str(tmp_path / "funnel"))


SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TOWERS = {
    "text_config": {**SIZES, "vocab_size": 96, "max_position_embeddings": 64, "projection_dim": 16},
    "vision_config": {**SIZES, "image_size": 16, "patch_size": 4},
}


@pytest.mark.parametrize("name", ["CLIP", "Siglip"])
def test_two_towers_are_refused_by_name(name, tmp_path):
    torch.manual_seed(0)
    getattr(hf, f"{name}Model")(getattr(hf, f"{name}Config")(**TOWERS)).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=rf"{name}Model: reads texts and images in two towers"):
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
    with pytest.raises(ModelError, match="doesn't say which size the images have"):
        read_structure(tmp_path)


def test_memory_that_runs_out_is_blamed_on_no_key(models):
    """As for fused experts of hundreds of gigabytes, whose config.json is right."""
    checkpoint = open_checkpoint(models["llama"])

    def build(_config):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 30064771072 bytes")

    with pytest.raises(PassError, match="memory ran out"):
        guarded(build, checkpoint, parse_config(checkpoint, False), "LlamaForCausalLM", "it can't be built")
