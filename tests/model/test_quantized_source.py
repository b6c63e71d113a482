"""A quantized checkpoint is read as the dense model that the owner of its format makes of it, bit for bit."""

from __future__ import annotations

import json
from contextlib import nullcontext
from functools import partial

import pytest
import quantized
import tiny
import torch
from raising import raises
from tiers import every_day

from compressor.artifact.against_source import load_source
from compressor.errors import ModelError
from compressor.evaluation import eval_command
from compressor.evaluation.eval_command import measure_model
from compressor.evaluation.model_loading import load_model, load_parts
from compressor.model.checkpoint import open_checkpoint
from compressor.model.fp8_source import dequantize_blocks
from compressor.model.ledger import problems_of
from compressor.model.ledger_accounts import make_ledger
from compressor.model.quantized_source import FORMATS, open_source
from compressor.model.structure import read_structure
from compressor.model.weight_names import read_parameter
from compressor.recipe.recipe import parse_recipe
from compressor.run import compress
from compressor.testing import weight_hashes

RECIPE = """
version: 1
name: quantized-source
data: {source: random, samples: 8, length: 16}
report: {html: false}
steps:
"""
GPTQ = RECIPE + "  - {pass: gptq, bits: 4, group_size: 32, min_tokens_per_expert: 4}\n"
BOTH = RECIPE + (
    '  - {pass: gptq, bits: 4, group_size: 32, only: ["@attention"]}\n'
    '  - {pass: rtn, bits: 4, group_size: 32, except: ["@attention"]}\n'
)
# name -> (writer of the checkpoint, the owner's dense model, family, what is said of it, recipe)
SOURCES = {
    "fp8-blocks": (
        quantized.fp8_blocks,
        quantized.owner_of_fp8_blocks,
        "llama",
        "8 bits (fp8, 16 x 8 blocks)",
        BOTH,
    ),
    "fp8-experts": (
        partial(quantized.fp8_blocks, family="mixtral", block=(16, 32)),
        quantized.owner_of_fp8_blocks,
        "mixtral",
        "8 bits (fp8, 16 x 32 blocks)",
        GPTQ,
    ),
    "fp8-tensors": (
        quantized.fp8_scales,
        quantized.owner_of_fp8_scales,
        "llama",
        "8 bits (fp8, one scale per tensor)",
        BOTH,
    ),
    "fp8-rows": (
        partial(quantized.fp8_scales, per_row=True),
        quantized.owner_of_fp8_scales,
        "llama",
        "8 bits (fp8, one scale per row)",
        BOTH,
    ),
    "integers-in-groups": (
        partial(quantized.compressed_tensors, kind="pack-quantized", num_bits=4, strategy="group", group_size=32),
        quantized.owner_of_compressed_tensors,
        "llama",
        "4 bits (compressed-tensors, groups of 32)",
        BOTH,
    ),
    "asymmetric-integers": (
        partial(
            quantized.compressed_tensors,
            kind="pack-quantized",
            num_bits=3,
            strategy="group",
            group_size=16,
            symmetric=False,
        ),
        quantized.owner_of_compressed_tensors,
        "llama",
        "3 bits (compressed-tensors, groups of 16)",
        BOTH,
    ),
    "experts-of-integers": (
        partial(
            quantized.compressed_tensors,
            kind="pack-quantized",
            family="mixtral",
            num_bits=4,
            strategy="group",
            group_size=32,
        ),
        quantized.owner_of_compressed_tensors,
        "mixtral",
        "4 bits (compressed-tensors, groups of 32)",
        GPTQ,
    ),
    "floats-in-rows": (
        partial(quantized.compressed_tensors, kind="float-quantized", type="float", num_bits=8, strategy="channel"),
        quantized.owner_of_compressed_tensors,
        "llama",
        "8 bits (compressed-tensors, one scale per row)",
        BOTH,
    ),
    "floats-of-a-tensor": (
        partial(quantized.compressed_tensors, kind="float-quantized", type="float", num_bits=8, strategy="tensor"),
        quantized.owner_of_compressed_tensors,
        "llama",
        "8 bits (compressed-tensors, one scale per tensor)",
        BOTH,
    ),
    "own-artifact": (
        quantized.own_artifact,
        quantized.owner_of_compressed_tensors,
        "llama",
        "8 bits (compressed-tensors, groups of 32)",
        BOTH,
    ),
    "mxfp4": (quantized.mxfp4, quantized.owner_of_mxfp4, "gpt_oss", "4 bits (mxfp4, groups of 32)", GPTQ),
    "gptq": (quantized.gptq, quantized.owner_of_packed, "llama", "4 bits (gptq, groups of 32)", BOTH),
    "gptq-3-bits-in-act-order": (
        partial(quantized.gptq, bits=3, variant="gptq_v2", shuffled=True),
        partial(quantized.owner_of_packed, bits=3, shuffled=True),
        "llama",
        "3 bits (gptq, groups of 32)",
        BOTH,
    ),
    "awq": (quantized.awq, quantized.owner_of_packed, "llama", "4 bits (awq, groups of 32)", BOTH),
    "int8-of-bitsandbytes": (
        partial(quantized.bitsandbytes, load_in_8bit=True),
        quantized.owner_of_bitsandbytes,
        "llama",
        "8 bits (bitsandbytes, one scale per row)",
        BOTH,
    ),
    "nf4-of-bitsandbytes": (
        partial(quantized.bitsandbytes, load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
        quantized.owner_of_bitsandbytes,
        "llama",
        "4 bits (bitsandbytes, nf4 in blocks of 64)",
        BOTH,
    ),
}


@pytest.fixture(params=SOURCES)
def source(request, tmp_path):
    """(checkpoint, the owner's dense model, family, what is said of it, recipe)"""
    write, owner, *rest = SOURCES[request.param]
    write(tmp_path / "source")
    return tmp_path / "source", owner(tmp_path / "source"), *rest


def test_dense_values_are_those_of_the_owner(source):
    directory, owner, _, said, _ = source
    structure = read_structure(directory)
    for name, meant in owner.named_parameters():
        found = read_parameter(name, structure.bindings, structure.read, structure.model)
        assert found.dtype == meant.dtype and torch.equal(found, meant), name
    assert structure.bindings.unused == ()
    assert problems_of(make_ledger(structure, structure, ()), structure.checkpoint) == []
    stored = open_checkpoint(directory)
    assert structure.checkpoint.content_sha256 == stored.content_sha256
    assert structure.checkpoint.weight_file_bytes == stored.weight_file_bytes
    assert str(structure.checkpoint.quantized) == said
    assert structure.overview().quantized == f"source has {said}; the baseline is the dequantized model"


@pytest.mark.parametrize("source", every_day(SOURCES, "fp8-blocks", "gptq", "mxfp4"), indirect=True)
def test_a_run_gives_the_artifact_of_the_dense_model(source, tmp_path):
    """The verification of the run has compared every tensor with the source, as stock transformers loads it."""
    directory, owner, family, _, recipe = source
    dense = quantized.dense_checkpoint(owner, family, tmp_path / "dense")
    report = compress(parse_recipe(recipe.encode()), str(directory), tmp_path / "out", measure=False)
    compress(parse_recipe(recipe.encode()), str(dense), tmp_path / "out-dense", measure=False)
    assert report["status"] == "ok" and report["verification"]["source"]["weights"] > 0
    assert weight_hashes(tmp_path / "out") == weight_hashes(tmp_path / "out-dense")
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("out", "out-dense")]
    assert configs[0] == configs[1]
    [warning] = [row for row in report["warnings"] if row["code"] == "quantized-source"]
    quantized_as = open_source(directory).quantized
    values = {"method": quantized_as.method, "bits": list(quantized_as.bits), "layouts": list(quantized_as.layouts)}
    assert warning["data"] == {**values, "unread": len(quantized_as.unread)}


def test_every_loader_of_the_source_gives_the_dequantized_model(tmp_path):
    """For a verification in memory and from disk, and for an evaluation. Its tied head has no tensor."""
    quantized.fp8_blocks(tmp_path / "source", family="qwen3")
    owner, tokens = quantized.owner_of_fp8_blocks(tmp_path / "source"), torch.arange(1, 9).unsqueeze(0)
    checkpoint, scratch = open_source(tmp_path / "source"), tmp_path / "scratch"
    scratch.mkdir()
    load = partial(load_source, tmp_path / "source", checkpoint, torch.bfloat16, trust_remote_code=False)
    models = {
        "memory": load(offload=None),
        "disk": load(offload=scratch),
        "baseline": load_model(tmp_path / "source", False, is_baseline=True),
        "parts": load_parts(tmp_path / "source", False, is_baseline=True).model,
    }
    with torch.no_grad():
        meant = owner(tokens).logits
        assert [name for name, model in models.items() if not torch.equal(model(tokens).logits, meant)] == []


def test_an_evaluation_says_that_its_baseline_is_dequantized(tmp_path, monkeypatch):
    monkeypatch.setattr(eval_command, "started_early", nullcontext)  # no process is started
    quantized.fp8_blocks(tmp_path / "source")
    report = measure_model(
        str(tmp_path / "source"),
        baseline=str(tmp_path / "source"),
        metrics="size",
        data="random",
        overrides=["eval.data.samples=2", "eval.data.length=16"],
    )
    [warning] = report["warnings"]
    assert warning["code"] == "quantized-source"
    assert (warning["data"]["method"], warning["data"]["bits"]) == ("fp8", [8])


def test_blocks_may_be_cut_off_at_the_edges():
    """576 rows, as in DeepSeek's kv_a_proj_with_mqa, have four and a half blocks of 128."""
    torch.manual_seed(0)
    codes, scale = torch.randn(5, 7).to(torch.float8_e4m3fn), torch.rand(3, 4) + 0.5
    found = dequantize_blocks(codes, scale, (2, 2), torch.bfloat16)
    meant = [[codes[i, j].float() * scale[i // 2, j // 2] for j in range(7)] for i in range(5)]
    assert torch.equal(found, torch.tensor(meant).bfloat16())


def lose_a_scale(tensors):
    del tensors["model.layers.0.mlp.up_proj.weight_scale_inv"]


def misshape_a_scale(tensors):
    tensors["model.layers.0.mlp.up_proj.weight_scale_inv"] = torch.ones(5, 4)


@pytest.mark.parametrize(
    ("damage", "data"),
    [
        (lose_a_scale, {"reason": "codes", "tensors": 1, "tensor": "model.layers.0.mlp.up_proj.weight"}),
        (misshape_a_scale, {"reason": "quantized-tensors"}),
    ],
)
def test_scales_that_are_missing_or_do_not_fit_are_refused(damage, data, tmp_path):
    quantized.fp8_blocks(tmp_path)
    quantized.edit(tmp_path, damage)
    with raises(ModelError, **data):
        read_structure(tmp_path)


def test_values_that_can_not_be_dequantized_name_the_weight(tmp_path):
    name = "model.layers.0.mlp.up_proj"
    quantized.gptq(tmp_path)
    quantized.edit(tmp_path, lambda tensors: tensors[f"{name}.g_idx"].add_(100))  # there are fewer groups
    with raises(ModelError, where=f"{name}.weight", reason="quantized-tensors"):
        open_source(tmp_path).read(f"{name}.weight")


def test_a_format_that_is_not_read_is_refused_with_those_that_are(tmp_path):
    tiny.save("llama", tmp_path)
    quantized.edit(tmp_path, lambda tensors: None, quantization_config={"quant_method": "hqq"})
    with raises(ModelError, reason="config-key", quantized="hqq") as refusal:
        read_structure(tmp_path)
    assert all(entry.name in refusal.value.hint for entry in FORMATS.values())
