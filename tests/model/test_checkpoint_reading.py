"""A source is read as transformers' from_pretrained reads it: the same files, names, ties, dtypes and bits."""

from __future__ import annotations

import json
import shutil

import pytest
import tiny
import torch
import transformers as hf
from many_models import tiny_model
from raising import raises
from safetensors.torch import load_file, save_file
from same_model import differences, read_whole, stock
from tiers import every_day

from compressor.artifact import writer
from compressor.artifact.loader import load
from compressor.engine.block_io import PartSource, fill_part
from compressor.engine.plan import make_plan
from compressor.errors import Interrupted, ModelError, UsageError, values_of
from compressor.model.checkpoint import open_checkpoint
from compressor.model.structure import read_structure
from compressor.recipe.recipe import parse_recipe
from compressor.run import compress

RTN = "version: 1\nname: t\nsteps: [{pass: rtn, bits: 8, group_size: 32}]\n"
RTN_AND_HEAD = RTN.replace("group_size: 32", "group_size: 32, only: ['*', '@head']")

# Every kind of thing that loading does: plain, tied, renamed, joined and split tensors, buffers, float32 kept by name
# or made by the class, several towers.
QUICK = [
    "LlamaForCausalLM",
    "GPT2LMHeadModel",
    "BertForMaskedLM",
    "BertLMHeadModel",
    "RobertaForMaskedLM",
    "AlbertForMaskedLM",
    "DeepseekV3ForCausalLM",
    "Glm4MoeForCausalLM",
    "GptOssForCausalLM",
    "MixtralForCausalLM",
    "HunYuanMoEV1ForCausalLM",
    "BailingHybridForCausalLM",
    "ElectraForMaskedLM",
    "NomicBertForMaskedLM",
    "ModernBertForMaskedLM",
    "BloomForCausalLM",
    "EsmForMaskedLM",
    "MambaForCausalLM",
    "RwkvForCausalLM",
    "AfmoeForCausalLM",
    "AXK1ForCausalLM",
    "BartForCausalLM",
    "ViTForImageClassification",
    "Dinov2ForImageClassification",
    "XLMWithLMHeadModel",
    "GPTJForCausalLM",
    "XLMRobertaForSequenceClassification",
]


def edit_config(directory, **changes):
    path = directory / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def edit_tensors(directory, change):
    tensors = load_file(directory / "model.safetensors")
    save_file(change(tensors) or tensors, directory / "model.safetensors", metadata={"format": "pt"})


def check_family(name, tmp_path):
    tiny_model(getattr(hf, name), torch.bfloat16).save_pretrained(tmp_path)
    assert differences(stock(tmp_path), read_whole(tmp_path)) == []


@pytest.mark.parametrize("name", QUICK)
def test_a_model_is_read_as_stock_reads_it(name, tmp_path):
    check_family(name, tmp_path)


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_block_by_block_a_model_is_read_as_stock_reads_it(family, tmp_path):
    tiny.save(family, tmp_path, dtype=torch.bfloat16)
    structure = read_structure(tmp_path)
    for unit in range(structure.block_count + 2):
        fill_part(structure, unit, PartSource(structure), torch.device("cpu"))
    assert differences(stock(tmp_path), structure.model) == []


def test_what_is_compared_shows_every_difference(tmp_path):
    one, other = (tiny.build("qwen3") for _ in range(2))
    assert differences(one, other) == []
    with torch.no_grad():
        other.model.norm.weight[0] += 1e-6
    other.model.layers[0].mlp.up_proj.weight.data = other.model.layers[0].mlp.up_proj.weight.data.bfloat16()
    other.lm_head.weight = torch.nn.Parameter(other.lm_head.weight.detach().clone())
    del other.model.layers[1].self_attn.q_norm
    found = "; ".join(differences(one, other))
    assert "model.norm.weight has other values" in found
    assert "up_proj.weight is bfloat16 (64, 32), not float32 (64, 32)" in found
    assert "model.layers.1.self_attn.q_norm.weight is missing" in found
    assert "lm_head.weight and model.embed_tokens.weight share storage in one of the two only" in found


# which files


def two_sets(tmp_path):
    """A directory with a sharded checkpoint, and the single file of another model beside it."""
    tiny.save("llama", tmp_path / "m", seed=1, shard="20KB")
    tiny.save("llama", tmp_path / "n", seed=2)
    shutil.copy(tmp_path / "n" / "model.safetensors", tmp_path / "m")
    return tmp_path / "m"


def test_the_single_file_wins_over_an_index_and_the_plan_says_so(tmp_path):
    model = two_sets(tmp_path)
    assert differences(stock(model), read_whole(model)) == []
    warnings = make_plan(parse_recipe(RTN.encode()), str(model)).warnings
    (told,) = [warning.data for warning in warnings if warning.code == "second-weights"]
    assert told["read"] == "model.safetensors" and told["others"][0].startswith("model-00001-of-")


@pytest.mark.parametrize("other", ["consolidated.safetensors", "model.fp16.safetensors", "pytorch_model.bin"])
def test_weights_of_another_name_are_told_of_and_not_read(other, tmp_path):
    tiny.save("llama", tmp_path)
    (tmp_path / other).write_bytes(b"not even a weight file")
    (told,) = open_checkpoint(tmp_path).unread
    assert values_of(told) == {"read": "model.safetensors", "others": [other]}


@pytest.mark.parametrize("name", ["other.safetensors", "other.safetensors.index.json"])
def test_the_file_that_config_json_names_is_read(name, tmp_path):
    model = two_sets(tmp_path)
    old = "model.safetensors" if name == "other.safetensors" else "model.safetensors.index.json"
    (model / old).rename(model / name)
    edit_config(model, transformers_weights=name)
    assert differences(stock(model), read_whole(model)) == []


def test_an_artifact_does_not_name_the_file_that_its_source_was_read_from(tmp_path, in_process):
    model = tiny.save("llama", tmp_path / "m", dtype=torch.bfloat16)
    (model / "model.safetensors").rename(model / "foo.safetensors")
    edit_config(model, transformers_weights="foo.safetensors")
    recipe = parse_recipe(RTN.encode(), "t.yaml")
    assert not [found for found in make_plan(recipe, str(model)).warnings if found.code == "format-untried"]
    compress(recipe, str(model), tmp_path / "out", measure=False)
    assert "transformers_weights" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert stock(tmp_path / "out") is not None


@pytest.mark.parametrize(
    "name", ["../n/model.safetensors", "/etc/passwd", "weights.bin", 3, ["model.safetensors"], "a\0.safetensors"]
)
def test_a_name_of_weights_that_leads_elsewhere_is_refused(name, tmp_path):
    tiny.save("llama", tmp_path)
    edit_config(tmp_path, transformers_weights=name)
    if name == "a\0.safetensors":
        told = {"where": name, "reason": "unreadable"}
    else:
        told = {"where": "config.json", "reason": "transformers-weights", "value": repr(name)}
    with raises(ModelError, **told):
        open_checkpoint(tmp_path)


def test_the_index_is_used_as_stock_uses_it(tmp_path):
    """For its files alone: what it says of single tensors may be wrong, or missing, and there may be no metadata."""
    tiny.save("llama", tmp_path, shard="20KB")
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    names, files = list(index["weight_map"]), list(index["weight_map"].values())
    index["weight_map"] = dict(zip(names, files[1:] + files[:1]))
    del index["weight_map"][names[3]]
    path.write_text(json.dumps(index))
    assert differences(stock(tmp_path), read_whole(tmp_path)) == []
    del index["metadata"]
    path.write_text(json.dumps(index))
    assert len(open_checkpoint(tmp_path).tensors) == len(names)


def test_of_a_tensor_in_two_shards_the_last_one_counts(tmp_path):
    tiny.save("llama", tmp_path, shard="20KB")
    first, last = min(tmp_path.glob("*.safetensors")), max(tmp_path.glob("*.safetensors"))
    name = next(iter(load_file(first)))
    tensors = load_file(last)
    save_file({**tensors, name: load_file(first)[name] + 1}, last, metadata={"format": "pt"})
    assert differences(stock(tmp_path), read_whole(tmp_path)) == []
    (told,) = open_checkpoint(tmp_path).unread
    assert values_of(told) == {"tensors": 1, "first": name, "read": last.name}


def test_an_adapter_and_a_distributed_checkpoint_are_refused(tmp_path):
    tiny.save("llama", tmp_path)
    part = tmp_path / "shard-00001-model-00001-of-00002.safetensors"
    part.write_bytes(b"")
    with raises(ModelError, where=tmp_path.name, reason="distributed", file=part.name):
        open_checkpoint(tmp_path)
    part.unlink()
    (tmp_path / "adapter_config.json").write_text("{}")
    with raises(ModelError, where=f"{tmp_path.name}/adapter_config.json", reason="adapter"):
        open_checkpoint(tmp_path)


# which dtype


@pytest.mark.parametrize("stated", ["bfloat16", "float16", "float32", None])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "DeepseekV3ForCausalLM", "GptOssForCausalLM"])
def test_the_model_takes_the_dtype_that_stock_gives_it(name, stored, stated, tmp_path):
    tiny_model(getattr(hf, name), stored).save_pretrained(tmp_path)
    edit_config(tmp_path, dtype=stated)
    assert differences(stock(tmp_path), read_whole(tmp_path)) == []


@pytest.mark.parametrize("stated", ["float8_e4m3fn", "int8"])
def test_a_dtype_that_no_model_can_have_is_refused(stated, tmp_path):
    tiny.save("llama", tmp_path)
    edit_config(tmp_path, dtype=stated)
    with pytest.raises(ModelError):
        read_structure(tmp_path)


def router_model(tmp_path):
    """DeepSeek-V3 whose correction bias has a large mean and small differences, which bfloat16 can't hold."""
    model = tiny_model(hf.DeepseekV3ForCausalLM, torch.bfloat16, num_key_value_heads=4)
    model.model.layers[1].mlp.gate.e_score_correction_bias.copy_(torch.randn(4) * 0.01 + 8)
    model.save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def run(model, out, text=RTN):
    return compress(parse_recipe(text.encode()), str(model), out, measure=False)


@pytest.mark.parametrize("export", ["auto", "custom"])
def test_what_no_step_touches_keeps_its_dtype_and_bits_in_the_artifact(export, tmp_path, in_process):
    model = router_model(tmp_path)
    only = ", only: ['@attention']" if export == "custom" else ""  # experts are no modules that a file could replace
    step = f"{{pass: rtn, bits: 8, group_size: -1{only}}}"
    text = f"version: 1\nname: t\nsteps: [{step}]\nexport: {{format: {export}}}\n"
    run(model, tmp_path / "out", text)
    before, after = load_file(model / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    kept = [name for name, value in before.items() if value.dtype == torch.float32]
    assert len(kept) == 2
    assert all(after[name].dtype == torch.float32 and torch.equal(after[name], before[name]) for name in kept)
    gate = load(tmp_path / "out").model.layers[1].mlp.gate
    assert torch.equal(gate.e_score_correction_bias, before["model.layers.1.mlp.gate.e_score_correction_bias"])
    assert gate.weight.dtype == torch.float32


# what is quantized already


def as_codes(tensors, dtype, leaf):
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        scale = tensors[name].abs().max() / 100
        tensors[name] = (tensors[name] / scale).to(dtype)
        tensors[name.removesuffix("weight") + leaf] = scale.reshape(1)
    return tensors


@pytest.mark.parametrize("dtype", ["int8", "uint8", "float8_e4m3fn", "float8_e5m2", "int32", "int64", "bool"])
def test_codes_where_weights_belong_are_refused_from_headers(dtype, tmp_path):
    tiny.save("llama", tmp_path, dtype=torch.bfloat16)
    edit_tensors(tmp_path, lambda tensors: as_codes(tensors, getattr(torch, dtype), "weight_scale"))
    with raises(ModelError, where=tmp_path.name, reason="codes", tensors=14) as refusal:
        make_plan(parse_recipe(RTN.encode()), str(tmp_path))
    assert refusal.value.exit_code == 5


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F6_E3M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "C64", "U16"])
def test_every_dtype_of_the_format_has_an_answer(dtype, tmp_path):
    tiny.save("llama", tmp_path, dtype=torch.bfloat16)
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    name = "model.norm.weight"  # 32 values, the last in the file for its size: give it another dtype and length
    bits = {"F4": 4, "C64": 64, "U16": 16}.get(dtype, 6 if dtype.startswith("F6") else 8)
    end = max(entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__")
    tensors = load_file(path)
    del tensors[name]
    save_file(tensors, path, metadata={"format": "pt"})
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    end = len(content) - 8 - length
    header[name] = {"dtype": dtype, "shape": [32], "data_offsets": [end, end + 4 * bits]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :] + bytes(4 * bits))
    with raises(ModelError, where=tmp_path.name, reason="codes", tensors=1, stored_as=dtype, tensor=name):
        read_structure(tmp_path)


@pytest.mark.parametrize("leaf", ["qweight", "weight_packed", "SCB", "weight_scale_inv", "absmax"])
def test_tensors_of_quantized_weights_beside_modules_are_refused(leaf, tmp_path):
    tiny.save("llama", tmp_path)
    name = f"model.layers.0.mlp.up_proj.{leaf}"
    edit_tensors(tmp_path, lambda t: t | {name: torch.ones(3)})
    with raises(ModelError, where=tmp_path.name, reason="tensors-beside", tensors=1, tensor=name):
        read_structure(tmp_path)


@pytest.mark.parametrize(
    ("config", "data"),
    [
        (
            {"compression_config": {"quant_method": "compressed-tensors"}},
            {"reason": "config-key", "key": "compression_config", "quantized": "compressed-tensors"},
        ),
        (
            {"quantization_config": {"quant_method": "fp8"}},
            {"reason": "config-key", "key": "quantization_config", "quantized": "fp8"},
        ),
        ({"quantization_config": "fp8"}, {"reason": "wrong-value", "keys": ["quantization_config"]}),
        ({"quantization_config": {}}, {"reason": "config-key", "key": "quantization_config"}),
        (
            {"text_config": {"quantization_config": {"quant_method": "fp8"}}},
            {"reason": "config-key", "key": "text_config.quantization_config", "quantized": "fp8"},
        ),
    ],
)
def test_what_config_json_says_of_quantization_is_believed(config, data, tmp_path):
    tiny.save("llama", tmp_path)
    edit_config(tmp_path, **config)
    with raises(ModelError, **data):
        read_structure(tmp_path)


@pytest.mark.parametrize("name", ["hf_quant_config.json", "quantize_config.json", "quant_config.json"])
def test_a_file_that_quantizers_write_is_believed(name, tmp_path):
    tiny.save("llama", tmp_path)
    (tmp_path / name).write_text("{}")
    with raises(ModelError, where=tmp_path.name, reason="config-file", file=name):
        read_structure(tmp_path)


# what fills nothing


def with_further_tokens(tmp_path):
    model = tiny_model(hf.Glm4MoeForCausalLM, torch.bfloat16, num_nextn_predict_layers=1)
    model.save_pretrained(tmp_path / "m")
    extra = {
        "model.layers.92.eh_proj.weight": torch.randn(32, 64),  # which the class ignores
        "vision.tower.weight": torch.randn(3, 3).to(torch.float8_e4m3fn),  # which it doesn't know
        "model.layers.0.self_attn.k_scale": torch.tensor(2.5),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),  # which it computes
    }
    edit_tensors(tmp_path / "m", lambda tensors: tensors | extra)
    return tmp_path / "m", extra


def test_tensors_that_fill_nothing_are_carried_bit_for_bit(tmp_path, in_process):
    model, extra = with_further_tokens(tmp_path)
    report = run(model, tmp_path / "out")
    assert report["verification"]["problems"] == []
    after = load_file(tmp_path / "out" / "model.safetensors")
    computed = "model.layers.0.self_attn.rotary_emb.inv_freq"
    for name in extra.keys() - {computed}:
        assert after[name].dtype == extra[name].dtype
        assert torch.equal(after[name].reshape(-1).view(torch.uint8), extra[name].reshape(-1).view(torch.uint8))
    assert computed not in after
    became = {name: row["becomes"] for row in report["ledger"]["accounts"] for name in row["tensors"]}
    assert {name: became[name] for name in extra} == {
        name: "left out" if name == computed else "copied" for name in extra
    }
    assert [w["code"] for w in report["warnings"]] == ["unused-tensors"]
    weights = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert report["sizes"]["predicted_bytes"] == report["sizes"]["after_bytes"] == weights
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_nextn_predict_layers"] == 1
    _, info = hf.Glm4MoeForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert set(info["unexpected_keys"]) <= set(extra)


def test_tensors_that_no_longer_fit_are_left_out_and_no_longer_announced(tmp_path, in_process):
    tiny.save("llama", tmp_path / "m")
    edit_tensors(tmp_path / "m", lambda tensors: tensors | {"mtp.fc.weight": torch.ones(32, 64)})
    edit_config(tmp_path / "m", num_nextn_predict_layers=1)
    text = "version: 1\nname: t\nsteps: [{pass: fuse_norms}]\n"
    report = run(tmp_path / "m", tmp_path / "out", text)
    assert "mtp.fc.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    (told,) = [w for w in report["warnings"] if w["code"] == "left-out-tensors"]
    assert told["where"] == "mtp.fc.weight"
    assert told["data"] == {"pass": "fuse_norms", "tensors": 1, "bytes": 32 * 64 * 4}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_nextn_predict_layers"] == 0


# ties


def tie_variants():
    """name -> (tied in config.json, what is done to the tensors of a tied Llama)"""
    embed, head = "model.embed_tokens.weight", "lm_head.weight"
    return {
        "plain": (True, lambda t: t),
        "equal copy": (True, lambda t: t | {head: t[embed].clone()}),
        "equal copy in another dtype": (True, lambda t: t | {head: t[embed].bfloat16()}),
        "different copy": (True, lambda t: t | {head: t[embed] + 1}),
        "head alone": (True, lambda t: {k: v for k, v in t.items() if k != embed} | {head: t[embed].clone()}),
        "untied": (False, lambda t: t | {head: t[embed] + 1}),
    }


@pytest.mark.parametrize("variant", every_day(tie_variants(), "equal copy", "untied"))
def test_ties_are_those_of_stock_also_when_the_head_is_quantized(variant, tmp_path, in_process):
    is_tied, change = tie_variants()[variant]
    tiny.save("llama", tmp_path / "m", tie_word_embeddings=True)
    edit_tensors(tmp_path / "m", change)
    edit_config(tmp_path / "m", tie_word_embeddings=is_tied)
    assert differences(stock(tmp_path / "m"), read_whole(tmp_path / "m")) == []
    report = run(tmp_path / "m", tmp_path / "dense")
    assert report["verification"]["problems"] == []
    report = run(tmp_path / "m", tmp_path / "out", RTN_AND_HEAD)
    assert report["verification"]["problems"] == []
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert "lm_head.weight_packed" in after and "model.embed_tokens.weight" in after


def test_an_encoder_whose_head_gets_its_own_weights_keeps_its_tied_bias(tmp_path, in_process):
    tiny_model(hf.BertForMaskedLM, torch.float32).save_pretrained(tmp_path / "m")
    report = run(tmp_path / "m", tmp_path / "out", RTN_AND_HEAD)
    assert report["verification"]["problems"] == []
    assert "cls.predictions.decoder.bias" in load_file(tmp_path / "out" / "model.safetensors")


def test_a_head_without_tensor_or_tie_is_refused_with_the_way_out(tmp_path):
    tiny.save("llama", tmp_path, tie_word_embeddings=True)
    edit_config(tmp_path, tie_word_embeddings=False)
    with raises(ModelError, reason="missing-tensors", names=["lm_head.weight"], is_output_head=True):
        read_structure(tmp_path)


# what a refusal leaves


def spoil(directory):
    def change(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")

    edit_tensors(directory, change)


def test_a_refusal_in_the_middle_of_a_run_leaves_nothing(tmp_path):
    tiny.save("llama", tmp_path / "m")
    spoil(tmp_path / "m")
    for _ in range(2):
        name = "model.layers.1.mlp.up_proj.weight"
        with raises(ModelError, where=name, reason="not-finite", bad=1, first=[3, 4]):
            run(tmp_path / "m", tmp_path / "out")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["m"]


def test_a_refusal_of_a_resumed_run_keeps_what_was_done(tmp_path, monkeypatch):
    tiny.save("llama", tmp_path / "m")
    real = writer.write_artifact

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("compressor.run.write_artifact", stop)
    with raises(Interrupted, where="run"):
        run(tmp_path / "m", tmp_path / "out")
    done = sorted(path.name for path in (tmp_path / "out.work" / "parts").iterdir())

    def refuse(*_, **__):
        raise UsageError("no", where="here")

    monkeypatch.setattr("compressor.run.write_artifact", refuse)
    with raises(UsageError, where="here"):
        compress(parse_recipe(RTN.encode()), str(tmp_path / "m"), tmp_path / "out", measure=False, resume=True)
    assert done == sorted(path.name for path in (tmp_path / "out.work" / "parts").iterdir())
    monkeypatch.setattr("compressor.run.write_artifact", real)
