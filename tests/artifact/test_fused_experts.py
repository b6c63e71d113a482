"""Experts that a checkpoint stores in one tensor: each is quantized with its own inputs, under its own name."""

from __future__ import annotations

import json
import shutil

import fresh
import pytest
import tiny
import torch
import yaml
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from raising import raises
from safetensors.torch import load_file, save_file

import compressor
from compressor.engine.plan import make_plan
from compressor.errors import ArtifactError, PreflightError
from compressor.recipe.recipe import parse_recipe
from compressor.run import compress
from compressor.storage.file_names import MANIFEST

GPTQ = {"pass": "gptq", "bits": 4, "group_size": 32}
SIZES = {"hidden_size": 64, "intermediate_size": 32}
FUSED = {
    "granitemoe": ("custom", SIZES),
    "gpt_oss": ("custom", SIZES),
    "jetmoe": ("custom", {**SIZES, "kv_channels": 16}),
    "gemma4_moe": ("custom", {"hidden_size": 64}),
    "llama4": ("custom", SIZES),  # all of its experts are multiplied in one product
    "qwen3_vl_moe": ("custom", {"hidden_size": 32}),  # the checkpoint has the matrices transposed
    "qwen3_5_moe": ("compressed-tensors", {"hidden_size": 64}),
}


def recipe(*steps, **export):
    data = {"source": "random", "samples": 8, "length": 32}
    tree = {"version": 1, "data": data, "steps": list(steps), "export": export, "report": {"html": False}}
    return parse_recipe(yaml.safe_dump(tree).encode())


def save_fused(family, directory, **config):
    """The checkpoint of a tiny model, with experts as on the hub, which save_pretrained may write in another way."""
    tiny.save(family, directory, dtype=torch.bfloat16, **config)
    tensors = load_file(directory / "model.safetensors")
    if family == "qwen3_5_moe":  # it wrote each expert apart
        model = tiny.build(family, dtype=torch.bfloat16, **config)
        tensors = {name: value for name, value in tensors.items() if not is_experts(name)}
        tensors |= {name: value.detach() for name, value in model.named_parameters() if is_experts(name)}
    if family == "qwen3_vl_moe":  # it wrote the matrices as the parameter has them
        tensors = {name: value.mT.contiguous() if is_experts(name) else value for name, value in tensors.items()}
    assert any(tensor.dim() == 3 for tensor in tensors.values())
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def is_experts(name):
    return ".experts." in name


def unpacked(tensors, name):
    """The matrix of a stored expert, by the library that owns the format."""
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    own = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
    return BaseCompressor.get_value_from_registry("pack-quantized").decompress(own, scheme)["weight"]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    made = {}

    def get(family):
        if family not in made:
            scratch = tmp_path_factory.mktemp(family)
            model = save_fused(family, scratch / "m", **FUSED[family][1])
            made[family] = model, scratch / "out", compress(recipe(GPTQ), str(model), scratch / "out", measure=False)
        return made[family]

    return get


@pytest.mark.slow
@pytest.mark.parametrize("family", FUSED)
def test_each_expert_is_stored_and_loads_as_its_codes_say(family, built):
    model, out, report = built(family)
    assert report["route"]["name"] == FUSED[family][0]
    found = report["verification"]
    assert found["missing"] == found["unexpected"] == found["mismatched"] == found["problems"] == []
    assert found["max_logit_difference"] == 0.0
    weights = json.loads((out / MANIFEST).read_text())["weights"]
    experts = [entry for entry in weights.values() if entry["role"] == "experts"]
    source, tensors = load_file(model / "model.safetensors"), load_file(out / "model.safetensors")
    fused = {entry["tensor"] for entry in experts}
    assert fused == {name for name, value in source.items() if value.dim() == 3 and min(value.shape) > 1}
    assert not fused & tensors.keys()
    loaded = compressor.load(out, kernels="reference")
    for entry in experts:
        whole = loaded.get_parameter(entry["parameter"])[entry["expert"]]
        part = (whole.T if entry["transposed"] else whole)[slice(*entry["rows"])]
        assert torch.equal(part, unpacked(tensors, entry["name"])), entry["name"]
    stored = {f"{name}.{suffix}" for name in weights for suffix in ("weight", "bias")} | fused
    for name in source.keys() - stored:
        assert torch.equal(tensors[name], source[name]), name  # biases of experts, too


@pytest.mark.slow
def test_the_modeling_file_needs_nothing_of_this_package(built, tmp_path):
    _, out, _ = built("gpt_oss")
    expected = compressor.load(out, kernels="reference")(input_ids=torch.arange(8).view(1, 8)).logits
    assert torch.equal(fresh.logits_without_this_package(out, tmp_path), expected)


@pytest.mark.slow
def test_experts_of_one_tensor_may_be_stored_by_two_steps(tmp_path):
    """Each step is a sweep of its own, so the second one reads a tensor of which half is stored."""
    model = save_fused("gpt_oss", tmp_path / "m", num_hidden_layers=1, **SIZES)
    steps = [{**GPTQ, "pass": "rtn", "only": [f"**.experts.{{{which}}}.*"]} for which in ("0,1", "2,3")]
    report = compress(recipe(*steps), str(model), tmp_path / "two", measure=False)
    assert report["verification"]["problems"] == []
    one = {**GPTQ, "pass": "rtn", "only": ["@experts"]}
    compress(recipe(one), str(model), tmp_path / "one", measure=False)
    two, one = (load_file(tmp_path / name / "model.safetensors") for name in ("two", "one"))
    assert two.keys() == one.keys() and all(torch.equal(two[name], one[name]) for name in two)


def test_experts_that_are_left_out_stay_in_one_tensor(tmp_path):
    model = save_fused("granitemoe", tmp_path / "m", num_hidden_layers=1, **SIZES)
    plan = make_plan(recipe({**GPTQ, "except": ["@experts"]}), str(model), prove=False)
    assert plan.export_format.name == "compressed-tensors" and not plan.problems
    assert not any(stored.weight.expert is not None for stored in plan.formats.values())


@pytest.mark.parametrize(
    ("only", "export", "data"),
    [
        (["**.experts.0.*"], {}, {"reason": "no-custom-experts", "because": {"reason": "no-joining-rule"}}),
        (["@experts"], {"stock_only": True}, {"reason": "no-stock-loader", "because": {"reason": "no-joining-rule"}}),
    ],
)
def test_what_no_export_format_holds_is_a_problem_of_the_plan(only, export, data, tmp_path):
    model = save_fused("granitemoe", tmp_path / "m", num_hidden_layers=1, **SIZES)
    (problem,) = make_plan(recipe({**GPTQ, "only": only}, **export), str(model), prove=False).problems
    with raises(PreflightError, **data):
        raise problem


def drop_an_expert(weights, name):
    del weights[name]


def move_an_expert(weights, name):
    weights[name]["expert"] = 1


def shift_its_rows(weights, name):
    weights[name]["rows"] = [1, 65]


def shorten_it(weights, name):
    weights[name]["rows"], weights[name]["shape"] = [0, 32], [32, 64]


@pytest.mark.slow
@pytest.mark.parametrize("damage", [drop_an_expert, move_an_expert, shift_its_rows, shorten_it])
def test_a_manifest_that_leaves_a_part_of_the_tensor_out_is_refused(damage, built, tmp_path):
    _, out, _ = built("gpt_oss")
    shutil.copytree(out, tmp_path / "a")
    manifest = json.loads((out / MANIFEST).read_text())
    damage(manifest["weights"], "model.layers.0.mlp.experts.0.gate_up_proj")
    (tmp_path / "a" / MANIFEST).write_text(json.dumps(manifest))
    with raises(ArtifactError, where="model.layers.0.mlp.experts.gate_up_proj"):
        compressor.load(tmp_path / "a", check_hashes=False)
