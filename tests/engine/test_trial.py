"""The export format is tried with the model's class before any work."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
import transformers as hf
import yaml
from raising import raises
from stored_as_planned import assert_plain_transformers_computes_what_the_codes_stand_for

from compressor.artifact.export_format import ExportFormat, next_export_format
from compressor.engine import plan as planning
from compressor.engine import trial
from compressor.engine.plan import make_plan
from compressor.errors import PreflightError
from compressor.model import remembered
from compressor.model.structure import read_structure
from compressor.recipe.recipe import parse_recipe

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
PATCHES = {**SIZES, "image_size": 32, "patch_size": 8}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# classes whose initialization reads `weight` of a Linear, which a packed module hasn't
INITIALIZED = {
    "modernbert": lambda: hf.ModernBertForSequenceClassification(
        hf.ModernBertConfig(vocab_size=96, **SIZES, max_position_embeddings=128, **IDS, cls_token_id=1, sep_token_id=2)
    ),
    "modernbert decoder": lambda: hf.ModernBertDecoderForCausalLM(
        hf.ModernBertDecoderConfig(vocab_size=96, **SIZES, max_position_embeddings=128, **IDS)
    ),
    "siglip vision": lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**PATCHES)),
    "ijepa": lambda: hf.IJepaModel(hf.IJepaConfig(**PATCHES)),
    "dinov3": lambda: hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**PATCHES)),
    "gpt_bigcode": lambda: hf.GPTBigCodeForCausalLM(
        hf.GPTBigCodeConfig(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=128, **IDS)
    ),
    "mamba": lambda: hf.MambaForCausalLM(
        hf.MambaConfig(vocab_size=96, hidden_size=64, num_hidden_layers=2, time_step_rank=32, **IDS)
    ),
}


def recipe(bits=8, group_size=-1, **export):
    steps = [{"pass": "rtn", "bits": bits, "group_size": group_size}]
    return parse_recipe(yaml.safe_dump({"version": 1, "steps": steps, "export": export}).encode())


@pytest.mark.parametrize("kind", INITIALIZED)
def test_a_class_that_initializes_packed_weights_gets_dense_ones_while_loading(kind, tmp_path):
    torch.manual_seed(0)
    INITIALIZED[kind]().to(torch.bfloat16).save_pretrained(tmp_path / "m")
    plan = make_plan(recipe(), str(tmp_path / "m"))
    assert not plan.problems and plan.export_format.name == "compressed-tensors" and plan.export_format.dequantize
    assert "since otherwise the loader stops (AttributeError" in plan.export_format.reason
    assert_plain_transformers_computes_what_the_codes_stand_for(plan, tmp_path / "out")


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "mixtral", "bert", "vit", "phi3", "gemma3"])
def test_a_class_without_such_rules_keeps_its_format(family, tmp_path):
    plan = make_plan(recipe(), str(tiny.save(family, tmp_path / "m", dtype=torch.bfloat16)))
    assert not plan.problems and not plan.export_format.dequantize
    assert plan.export_format.name == ("custom" if family == "gpt2" else "compressed-tensors")


@pytest.mark.parametrize("export_format", ["auto", "custom"])
def test_a_probe_model_needs_no_code_that_the_config_of_the_model_names(export_format, tmp_path):
    """Checkpoints of classes that transformers has by now (Phi-3, Qwen) still name the files they began with."""
    path = tiny.save("llama", tmp_path / "m", dtype=torch.bfloat16)
    values = json.loads((path / "config.json").read_text())
    values["auto_map"] = {"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X"}
    (path / "config.json").write_text(json.dumps(values))
    plan = make_plan(recipe(format=export_format), str(path))
    assert not plan.problems and not [found for found in plan.warnings if found.code == "format-untried"]


def test_two_schemes_take_the_modeling_file_since_the_loader_would_use_one_for_all(tmp_path):
    INITIALIZED["modernbert"]().to(torch.bfloat16).save_pretrained(tmp_path / "m")
    steps = [
        {"pass": "rtn", "bits": 8, "group_size": 32, "only": ["@attention"]},
        {"pass": "rtn", "bits": 4, "group_size": 32, "except": ["@attention"]},
    ]
    plan = make_plan(parse_recipe(yaml.safe_dump({"version": 1, "steps": steps}).encode()), str(tmp_path / "m"))
    assert not plan.problems and plan.export_format.name == "custom"
    assert "plain transformers can't load compressed-tensors into this class" in plan.export_format.reason


def test_what_no_loader_can_load_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "try_loaders", lambda *_: "the loader stops (KeyError: 'x')")
    (problem,) = make_plan(recipe(), str(tiny.save("llama", tmp_path / "m"))).problems
    told = {"reason": "loader-fails", "format": "custom", "cause": "the loader stops (KeyError: 'x')"}
    assert isinstance(problem, PreflightError) and (problem.where, problem.data) == ("export", told)
    with raises(PreflightError, where="export", reason="loader-fails", format="custom", cause="why"):
        next_export_format(ExportFormat("custom", ""), "why", [], "custom", False, tiny.build("llama"))


def test_a_format_that_was_not_tried_is_a_warning(tmp_path, monkeypatch):
    model = str(tiny.save("llama", tmp_path / "m"))
    monkeypatch.setattr(trial, "MOST_PARAMETERS", 10)
    (warning,) = [found for found in make_plan(recipe(), model).warnings if found.code == "format-untried"]
    assert warning.data["because"]["reason"] == "large" and warning.data["because"]["limit"] == 10
    monkeypatch.setattr(trial, "_narrowings", lambda *_: [lambda: 1 / 0])
    (warning,) = [found for found in make_plan(recipe(), model).warnings if found.code == "format-untried"]
    assert warning.data["because"] == {"reason": "not-made", "cause": "ZeroDivisionError: division by zero"}


@pytest.mark.parametrize(
    ("break_it", "told"),
    [
        (lambda model: model.lm_head.weight.data.mul_(2), "computes something else"),
        (lambda model: model.lm_head.weight.data.fill_(torch.nan), "computes something else"),
        (lambda model: setattr(model, "forward", lambda **_: 1 / 0), "can't run (ZeroDivisionError"),
    ],
)
def test_a_loader_whose_model_computes_something_else_is_found(break_it, told, tmp_path, monkeypatch):
    plan = make_plan(recipe(), str(tiny.save("llama", tmp_path / "m")), prove=False)
    load_stock = trial.load_stock

    def broken(*arguments):
        model, info = load_stock(*arguments)
        break_it(model)
        return model, info

    assert trial.try_loaders(plan.structure, list(plan.formats.values()), plan.export_format) is None
    monkeypatch.setattr(trial, "load_stock", broken)
    remembered.forget()
    assert told in trial.try_loaders(plan.structure, list(plan.formats.values()), plan.export_format)


def test_a_narrower_probe_that_cannot_run_is_not_tried(tmp_path):
    """Half of its experts are fewer than a token chooses."""
    sizes = {"hidden_size": 128, "moe_intermediate_size": 128, "num_experts": 8, "num_experts_per_tok": 6}
    model = tiny.save("qwen3_moe", tmp_path / "m", **sizes, num_attention_heads=4, head_dim=32)
    steps = [{"pass": "rtn", "bits": 8, "group_size": 32, "only": ["@attention"]}]
    plan = make_plan(parse_recipe(yaml.safe_dump({"version": 1, "steps": steps}).encode()), str(model))
    assert not plan.problems and not [found for found in plan.warnings if found.code == "format-untried"]


def test_the_probe_model_of_a_large_model_is_small(tmp_path):
    """At the widths of Llama 3 8B: what is saved and loaded has a few hundred thousand parameters."""
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 2, "vocab_size": 128256}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8}
    structure = read_structure(tiny.save("llama", tmp_path / "m"))
    config = hf.LlamaConfig(**sizes, **heads, bos_token_id=128000, eos_token_id=128001)
    with torch.device("meta"):
        structure.model = hf.LlamaForCausalLM(config)
    plan = make_plan(recipe(), str(tmp_path / "m"), prove=False)
    formats = [stored for stored in plan.formats.values()]
    for stored in formats:
        object.__setattr__(stored.weight, "shape", (4096, 14336) if "down" in stored.weight.name else (4096, 4096))
    change = next(trial._narrowings(config, structure, formats))
    narrow = change()
    assert (narrow.hidden_size, narrow.intermediate_size, narrow.head_dim, narrow.vocab_size) == (64, 224, 2, 512)
    assert sum(p.numel() for p in hf.LlamaForCausalLM(narrow).parameters()) < 500_000
