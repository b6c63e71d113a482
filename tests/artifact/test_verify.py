"""Verification against the source as stock transformers loads it: each planted fault is found, and nothing else."""

from __future__ import annotations

import json
import shutil
from collections import Counter

import pytest
import tiny
import torch
import transformers as hf
import yaml
from raising import raises
from safetensors.torch import load_file, save_file
from tiers import every_day

from compressor import run as running
from compressor.artifact import generation, streaming
from compressor.artifact import verify as verifying
from compressor.artifact.findings import Findings
from compressor.artifact.verify import verify
from compressor.errors import ArtifactError, ModelError, PassError
from compressor.layers import find_layer
from compressor.recipe.recipe import parse_recipe
from compressor.run import compress

RTN = {"pass": "rtn", "bits": 4, "group_size": 32}
NONE = {"max_logit_difference": 0.0, "tolerance": 1.0, "generated_tokens": 8, "problems": [], "not_compared": None}


@pytest.fixture
def built(monkeypatch):
    """Runs a recipe without the fresh process, which takes seconds; what it would check is checked in the test."""
    monkeypatch.setattr(running.verify, "verify_in_child", lambda *args, **options: Findings(**NONE))

    def build(model, output, *steps, **sections):
        tree = {"version": 1, "steps": list(steps), "report": {"html": False}, **sections}
        compress(parse_recipe(yaml.safe_dump(tree).encode()), str(model), output, measure=False)
        return output

    return build


def found(artifact, source, **options):
    return verify(artifact, None, sealed=False, deep=True, source=source, **options).to_json()


CASES = {
    "llama": ("llama", [RTN]),
    "a custom format": ("llama", [{**RTN, "only": ["*", "@head"]}]),
    "conv1d": ("gpt2", [RTN]),
    "tied": ("qwen3", [RTN]),
    "untied head": ("qwen3", [{**RTN, "only": ["*", "@head"]}]),
    "experts": ("mixtral", [RTN]),
    "dense experts": ("qwen3_moe", [{**RTN, "only": ["@attention"]}]),
    "experts in one tensor": ("gpt_oss", [RTN]),
    "dense experts in one tensor": ("gpt_oss", [{**RTN, "only": ["@attention"]}]),
    "biases": ("bert", [{**RTN, "bits": 8, "symmetric": False}]),
    "patches": ("vit", [{**RTN, "bits": 3}]),
    "tables and rounded inputs": ("bert", [{"pass": "bct", "activations": "dynamic", "only": ["*", "@norm"]}]),
}


@pytest.mark.parametrize("kind", every_day(CASES, "llama", "experts in one tensor", "tied"))
def test_a_sound_artifact_equals_its_source_in_memory_and_from_disk(kind, built, tmp_path):
    family, steps = CASES[kind]
    options = {"export": {"format": "custom"}} if kind == "a custom format" else {}
    model = tiny.save(family, tmp_path / "m", dtype=torch.bfloat16)
    artifact = built(model, tmp_path / "out", *steps, **options)
    near, far = found(artifact, model), found(artifact, model, source_limit=0)
    assert near["problems"] == [] and near["max_logit_difference"] == 0.0
    assert near["source"]["weights"] > 0 and near["source"]["tensors"] > 0 and near["source"]["output_distance"] > 0
    assert (near["source"].pop("loaded_to"), far["source"].pop("loaded_to")) == ("memory", "disk")
    assert near == far
    parts = found(artifact, model, memory=1)
    assert (near.pop("loaded"), parts.pop("loaded")) == ("whole", "parts")
    is_mapped = "experts" in kind  # one byte of memory is less than two blocks
    assert parts["source"].pop("loaded_to") == ("parts" if is_mapped else "disk")
    assert [note.startswith("the source was read by this package") for note in parts.pop("notes")] == [True] * is_mapped
    assert near.pop("notes") == []
    assert parts.pop("generated_tokens") == (None if near.pop("generated_tokens") is None else 2)
    assert parts == near


@pytest.mark.parametrize("kind", ["llama", "experts"])
def test_in_parts_a_block_is_read_once_for_each_comparison(kind, built, tmp_path, monkeypatch):
    """Not once for each weight or expert: a run by each loader, two tokens, the tensors, the source with the layers."""
    family, steps = CASES[kind]
    model = tiny.save(family, tmp_path / "m", dtype=torch.bfloat16)
    artifact = built(model, tmp_path / "out", *steps)
    read, fill = Counter(), streaming.ArtifactFiller.fill

    def counted(filler, unit, names):
        read[unit] += 1
        fill(filler, unit, names)

    monkeypatch.setattr(streaming.ArtifactFiller, "fill", counted)
    assert found(artifact, model, memory=1)["problems"] == []
    assert {unit: count for unit, count in read.items() if "layers." in unit} == {
        f"model.layers.{block}": 6 for block in range(2)
    }


def edit_tensors(directory, change):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({name: value.contiguous() for name, value in tensors.items()}, path, {"format": "pt"})


def edit_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


DOWN, NORM = "model.layers.0.mlp.down_proj", "model.layers.1.input_layernorm.weight"


def rounded(tensors):
    tensors[NORM] = tensors[NORM].bfloat16()


def perturbed(tensors):
    tensors[NORM] = tensors[NORM].bfloat16().to(tensors[NORM].dtype)


def swapped(tensors):
    tensors[f"{DOWN}.weight"] = tensors[f"{DOWN}.weight"].flip(0)


def scaled(tensors):
    tensors[f"{DOWN}.weight"][:4] *= 0.5


def swapped_dense(tensors):
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].roll(1, 0)


# how the source was misread, as a checkpoint that reads so -> what of the artifact made of that is told
MISREAD = {
    "another file": (lambda t: t.update({k: v + 0.01 * torch.randn_like(v) for k, v in t.items()}), DOWN),
    "rows swapped": (swapped, DOWN),
    "scales of another size": (scaled, DOWN),
    "integer codes taken for weights": (
        lambda t: t.update({f"{DOWN}.weight": (t[f"{DOWN}.weight"] * 300).round()}),
        DOWN,
    ),
    "a parameter rounded": (perturbed, NORM),
    "rows of what stays dense swapped": (swapped_dense, "model.embed_tokens.weight"),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", MISREAD)
def test_an_artifact_of_a_misread_source_is_found(fault, built, tmp_path):
    change, name = MISREAD[fault]
    source = tiny.save("llama", tmp_path / "m")
    shutil.copytree(source, tmp_path / "misread")
    torch.manual_seed(1)
    edit_tensors(tmp_path / "misread", change)
    artifact = built(tmp_path / "misread", tmp_path / "out", {**RTN, "bits": 8})
    assert found(artifact, tmp_path / "misread")["problems"] == []
    problems = found(artifact, source)["problems"]
    assert any(name in problem.split() for problem in problems), problems


def router_packed(artifact):
    """A dense router of which the artifact holds what 4 bits make of it."""
    name = "model.layers.0.mlp.gate.weight"
    edit_tensors(artifact, lambda t: t.update({name: (t[name] * 8).round() / 8}))


def tied_head(artifact):
    edit_tensors(artifact, lambda t: t.pop("lm_head.weight"))
    edit_config(artifact, tie_word_embeddings=True)


# what is done to a sound artifact -> which module, parameter or buffer verification tells
DAMAGED = {
    "rounded in another dtype": (lambda a: edit_tensors(a, rounded), NORM),
    "a step's scales raised": (
        lambda a: edit_tensors(a, lambda t: t.update({f"{DOWN}.weight_scale": t[f"{DOWN}.weight_scale"] * 1.25})),
        DOWN,
    ),
    "tied": (tied_head, "lm_head.weight"),
    "another rope": (
        lambda a: edit_config(a, rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
        "model.rotary_emb.inv_freq",
    ),
}


@pytest.mark.parametrize("fault", DAMAGED)
def test_a_damaged_artifact_is_found(fault, built, tmp_path):
    change, name = DAMAGED[fault]
    source = tiny.save("llama", tmp_path / "m")
    artifact = built(source, tmp_path / "out", {**RTN, "bits": 8})
    change(artifact)
    problems = found(artifact, source)["problems"]
    assert any(name in problem.split() for problem in problems), problems


def test_a_dropped_tensor_is_found(built, tmp_path):
    source = tiny.save("llama", tmp_path / "m")
    artifact = built(source, tmp_path / "out", RTN)
    edit_tensors(artifact, lambda t: t.pop(NORM))
    with raises(ModelError, where="out", reason="missing-tensors", names=[NORM]):
        found(artifact, source)


def test_a_router_that_was_packed_is_found(built, tmp_path):
    source = tiny.save("qwen3_moe", tmp_path / "m")
    artifact = built(source, tmp_path / "out", {**RTN, "bits": 8})
    router_packed(artifact)
    gate = {"reason": "changed", "tensor": "model.layers.0.mlp.gate.weight"}
    assert gate in found(artifact, source)["because"]


def test_a_rotation_keeps_the_outputs_and_a_wrong_one_is_found(built, tmp_path):
    source = tiny.save("llama", tmp_path / "m")
    artifact = built(source, tmp_path / "out", {"pass": "fuse_norms"}, {"pass": "rotate"})
    sound = found(artifact, source)
    assert sound["problems"] == [] and sound["source"]["output_distance"] < 1e-4
    edit_tensors(artifact, lambda t: t.update({f"{DOWN}.weight": t[f"{DOWN}.weight"].flip(0)}))
    assert "outputs-not-kept" in [values["reason"] for values in found(artifact, source)["because"]]


def test_a_rewritten_artifact_whose_source_was_misread_is_found(built, tmp_path, monkeypatch):
    from compressor.artifact import against_source

    source = tiny.save("llama", tmp_path / "m")
    artifact = built(source, tmp_path / "out", {"pass": "fuse_norms"})
    read = against_source.read_parameter

    def misread(name, *rest):
        value = read(name, *rest)
        return value.bfloat16() if name == NORM else value

    monkeypatch.setattr(against_source, "read_parameter", misread)
    assert found(artifact, source)["because"] == [{"reason": "read-otherwise", "tensor": NORM}]


def test_without_its_source_verification_says_what_was_not_compared(built, tmp_path):
    artifact = built(tiny.save("llama", tmp_path / "m"), tmp_path / "out", RTN)
    sound = found(artifact, None)
    assert sound["problems"] == [] and sound["source"] is None and "not available" in sound["not_compared"]


def test_a_model_that_cannot_generate_by_itself_is_no_fault_of_its_artifact(built, tmp_path, monkeypatch):
    """As transformers 5.24 has no cache for a Jamba without attention; and one that alone can't is a fault."""
    source = tiny.save("llama", tmp_path / "m")
    artifact = built(source, tmp_path / "out", RTN)

    def refuse(self, *_, **__):
        raise ValueError("no cache")

    with monkeypatch.context() as patched:
        patched.setattr(hf.LlamaForCausalLM, "generate", refuse)
        sound = found(artifact, source)
        assert sound["problems"] == [] and sound["generated_tokens"] is None
        (note,) = sound["notes"]
        assert note.data == {"reason": "source-cannot-generate", "cause": "ValueError: no cache"}
        cause = {"reason": "cannot-generate", "cause": "ValueError: no cache"}
        assert found(artifact, None)["because"] == [cause]
    answers = iter([(7, "it makes 7"), (8, None)])  # of the artifact, of its source
    monkeypatch.setattr(generation, "generate_tokens", lambda *_: next(answers))
    assert found(artifact, source)["because"] == [{"reason": "cannot-generate", "cause": "it makes 7"}]


def moved(weights, name):
    weights[name]["parameter"] = "model.embed_tokens.weight"


def swapped_places(weights, name):
    other = name.replace("k_proj", "q_proj")
    for key in ("tensor", "parameter"):
        weights[name][key], weights[other][key] = weights[other][key], weights[name][key]


def called_a_norm(weights, name):
    weights[name] |= {"role": "norm", "parameter": "model.norm", "tensor": ""}


@pytest.mark.parametrize("change", [moved, swapped_places, called_a_norm])
def test_a_manifest_whose_layers_cannot_run_is_an_error_of_the_artifact(change, built, tmp_path):
    """No rule of the manifest alone can say that, since the model runs where a layer stands."""
    artifact = built(tiny.save("llama", tmp_path / "m", dtype=torch.bfloat16), tmp_path / "out", RTN)
    manifest = json.loads((artifact / "compress_manifest.json").read_text())
    change(manifest["weights"], "model.layers.0.self_attn.k_proj")
    (artifact / "compress_manifest.json").write_text(json.dumps(manifest))
    with pytest.raises((ArtifactError, ModelError)):
        found(artifact, None)


@pytest.mark.parametrize(("fault", "error"), [(ValueError("x"), ArtifactError), (MemoryError(), PassError)])
def test_what_fails_in_our_own_loader_is_told_apart_from_too_little_memory(fault, error, built, tmp_path, monkeypatch):
    artifact = built(tiny.save("llama", tmp_path / "m", dtype=torch.bfloat16), tmp_path / "out", RTN)

    def fail(*_):
        raise fault

    monkeypatch.setattr(find_layer("packed_linear"), "forward", fail)
    with pytest.raises(error):
        found(artifact, None)


def test_outputs_of_another_shape_are_found(built, tmp_path, monkeypatch):
    artifact = built(tiny.save("llama", tmp_path / "m", dtype=torch.bfloat16), tmp_path / "out", RTN)
    shapes = iter((slice(None), slice(None), slice(1, None)))
    plain = verifying.output_of
    monkeypatch.setattr(verifying, "output_of", lambda output: plain(output)[next(shapes)])
    (values,) = found(artifact, None)["because"]
    assert values["reason"] == "other-shape" and values["model"] == "own loader"
    assert (values["shape"], values["expected"]) == ([1, 32, 96], [2, 32, 96])
