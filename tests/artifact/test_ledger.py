"""The ledger accounts for every tensor of a source, says what the files show, and a run that loses one ends."""

from __future__ import annotations

import json
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import quantized
import tiny
import torch
import transformers as hf
import yaml
from family_models import FAMILIES, build, save
from many_models import tiny_model
from raising import raises
from safetensors.torch import load_file, save_file
from tiers import every_day

from compressor.artifact import writer
from compressor.artifact.inspection import inspect_path
from compressor.engine import plan as plan_module
from compressor.engine.plan import make_plan
from compressor.errors import ArtifactError, PreflightError
from compressor.evaluation.ledger_rows import rows_of_accounts, rows_of_kinds, tensor_count
from compressor.evaluation.render import render_html, render_markdown
from compressor.model.checkpoint import Checkpoint
from compressor.model.ledger import problems_of
from compressor.recipe.recipe import parse_recipe
from compressor.run import compress
from compressor.storage.file_names import MANIFEST
from compressor.storage.safetensors_file import TensorInfo

RTN = {"pass": "rtn", "bits": 4, "group_size": 32}
FUSE, AWQ = {"pass": "fuse_norms"}, {"pass": "awq", "bits": 4, "group_size": 32, "rounding": "later"}


def recipe(*steps, dtype="source"):
    data, model = {"source": "random", "samples": 4, "length": 16}, {"dtype": dtype}
    return parse_recipe(yaml.safe_dump({"version": 1, "data": data, "model": model, "steps": list(steps)}).encode())


def with_further(family, further, architecture=None, dtype=torch.bfloat16, **config):
    """Writes a tiny model that has these tensors, too. None removes one."""

    def write(directory):
        tiny.save(family, directory, dtype=dtype, **config)
        named = {} if architecture is None else {"architectures": [architecture]}
        quantized.edit(directory, lambda tensors: tensors.update(further), **named)

    return write


def deepseek(directory):
    save(FAMILIES["deepseek_v3"], build(FAMILIES["deepseek_v3"]), directory)
    layer = "model.layers.61."  # which the class knows by its number
    further = {f"{layer}eh_proj.weight": torch.randn(32, 64), f"{layer}shared_head.norm.weight": torch.ones(32)}
    quantized.edit(directory, lambda tensors: tensors.update(further), num_nextn_predict_layers=1)


def bert_with_pooler(directory):
    tiny_model(hf.BertForMaskedLM, torch.bfloat16).save_pretrained(directory)
    pooler = {"bert.pooler.dense.weight": torch.ones(32, 32), "bert.pooler.dense.bias": torch.ones(32)}
    quantized.edit(directory, lambda tensors: tensors.update(pooler))


def head_of_a_tie(directory):
    """The shared tensor lies under the name that the class doesn't prefer."""
    tiny.save("qwen3", directory, dtype=torch.bfloat16)
    quantized.edit(
        directory, lambda tensors: tensors.update({"lm_head.weight": tensors.pop("model.embed_tokens.weight")})
    )


def fused_experts(directory):
    tiny.save("granitemoe", directory, dtype=torch.bfloat16, hidden_size=64, intermediate_size=32)


def sharing_blocks(directory):
    """The blocks of Zamba 2 share an attention and an MLP."""
    save(FAMILIES["zamba2"], build(FAMILIES["zamba2"]), directory)


def sharded_twice(directory):
    """A tensor that lies in two shards: transformers reads the last one."""
    tiny.save("llama", directory, dtype=torch.bfloat16)
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    norm = {"model.norm.weight": torch.zeros(32, dtype=torch.bfloat16)}
    save_file(norm, directory / "model-00001-of-00002.safetensors", {"format": "pt"})
    save_file(tensors, directory / "model-00002-of-00002.safetensors", {"format": "pt"})
    names = dict.fromkeys(tensors, "model-00002-of-00002.safetensors")
    names["model.norm.weight"] = "model-00001-of-00002.safetensors"
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


# kind -> (writer of the source, steps, pattern of names -> what becomes of them; the first pattern that fits counts)
KINDS = {
    "plain": (
        with_further("llama", {}),
        [RTN],
        {"*_proj.weight": "quantized: packed_linear 4 bits", "*": "copied: stays dense"},
    ),
    "multi-token prediction": (
        with_further(
            "qwen3_5", {"mtp.fc.weight": torch.randn(32, 64), "mtp.layers.0.mlp.up_proj.weight": torch.ones(4)}
        ),
        [RTN],
        {
            "mtp.*": "copied: the class leaves it out on purpose",
            "*mlp.*_proj.weight": "quantized: packed_linear 4 bits",
        },
    ),
    "a further layer": (
        deepseek,
        [{**RTN, "group_size": -1}],
        {
            "model.layers.61.*": "copied: the class leaves it out on purpose",
            "*up_proj.weight": "quantized: packed_linear 4 bits",
        },
    ),
    "tied embeddings": (
        with_further("qwen3", {}),
        [{**RTN, "only": ["*", "@head"]}],
        {"*_proj.weight": "quantized: packed_linear 4 bits", "*": "copied: stays dense"},
    ),
    "a tied copy": (
        with_further("qwen3", {"lm_head.weight": tiny.build("qwen3", dtype=torch.bfloat16).lm_head.weight.detach()}),
        [RTN],
        {
            "lm_head.weight": "left out: it equals the tensor that it is tied to",
            "model.embed_tokens.weight": "copied: stays dense",
        },
    ),
    "a shared tensor of the head": (
        head_of_a_tie,
        [RTN],
        {"lm_head.weight": "copied: stays dense", "*_proj.weight": "quantized: packed_linear 4 bits"},
    ),
    "fused experts": (
        fused_experts,
        [RTN],
        {"*input_linear.weight": "split: packed_linear 4 bits", "*output_linear.weight": "split: packed_linear 4 bits"},
    ),
    "a vision tower": (
        with_further("llava", {}),
        [RTN],
        {"*vision*": "copied: stays dense", "*language_model*_proj.weight": "quantized: packed_linear 4 bits"},
    ),
    "an unknown tower": (
        with_further("llama", {"vision_tower.patch.weight": torch.randn(3, 3).to(torch.float8_e4m3fn)}),
        [RTN],
        {"vision_tower.*": "copied: the class doesn't know it"},
    ),
    "a pooler": (
        bert_with_pooler,
        [RTN],
        {
            "*pooler*": "copied: the class doesn't know it",
            "bert.encoder*dense.weight": "quantized: packed_linear 4 bits",
        },
    ),
    "scales of a cache": (
        with_further("llama", {"model.layers.0.self_attn.k_scale": torch.tensor(2.5)}),
        [RTN],
        {"*k_scale": "copied: the class doesn't know it"},
    ),
    "computed buffers": (
        with_further("llama", {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}),
        [RTN],
        {"*inv_freq": "left out: the model computes it itself"},
    ),
    "fp8": (
        quantized.fp8_scales,
        [{**RTN, "except": ["@mlp"]}],
        {
            "*input_scale": "left out: only quantized activations need it",
            "*weight_scale": "merged: with fp8 codes",
            "*self_attn*_proj.weight": "quantized: packed_linear 4 bits, from fp8",
            "*_proj.weight": "converted: fp8 to bfloat16",
            "*": "copied: stays dense",
        },
    ),
    "mxfp4 experts": (
        quantized.mxfp4,
        [RTN],
        {"*_blocks": "split: packed_linear 4 bits, from mxfp4", "*_scales": "merged: with mxfp4 codes"},
    ),
    "gptq codes": (
        quantized.gptq,
        [RTN],
        {"*.qweight": "quantized: packed_linear 4 bits, from gptq", "*_proj.*": "merged: with gptq codes"},
    ),
    "llm_int8": (
        with_further("llama", {}),
        [{"pass": "llm_int8"}],
        {"*_proj.weight": "quantized: int8_split_linear", "*": "copied: stays dense"},
    ),
    "another dtype": (
        with_further("llama", {"mtp.fc.weight": torch.ones(4)}, dtype=torch.float32),
        [RTN],
        {
            "*_proj.weight": "quantized: packed_linear 4 bits",
            "mtp.*": "copied: *",
            "*": "converted: float32 to bfloat16",
        },
    ),
    "slicegpt": (
        with_further("llama", {}),
        [FUSE, {"pass": "slicegpt", "sparsity": 0.25}],
        {
            "*norm.weight": "left out: slicegpt removes what it fills, after fuse_norms",
            "lm_head.weight": "rewritten: by fuse_norms",
            "*o_proj.weight": "rewritten: by slicegpt",
            "*q_proj.weight": "rewritten: by fuse_norms and slicegpt",
        },
    ),
    "fuse_norms": (
        with_further("llama", {"mtp.fc.weight": torch.ones(4)}),
        [FUSE, RTN],
        {
            "mtp.*": "left out: the class doesn't know it, and fuse_norms changes the model",
            "*o_proj.weight": "quantized: packed_linear 4 bits",
            "*down_proj.weight": "quantized: packed_linear 4 bits",
            "*_proj.weight": "quantized: packed_linear 4 bits, after fuse_norms",
            "model.embed_tokens.weight": "copied: stays dense",
            "*": "rewritten: by fuse_norms",
        },
    ),
    "awq": (
        with_further("llama", {}),
        [{"sweep": [AWQ, RTN]}],
        {"*_proj.weight": "quantized: packed_linear 4 bits", "*layernorm.weight": "*", "*": "copied: stays dense"},
    ),
    "shared by blocks": (
        sharing_blocks,
        [RTN],
        {
            "*shared_transformer*_proj.weight": "copied: stays dense",
            "*mamba.in_proj.weight": "quantized: packed_linear 4 bits",
        },
    ),
    "two shards": (
        sharded_twice,
        [RTN],
        {
            "model-00001-of-*:model.norm.weight": "left out: the last shard that has a tensor of this name is read",
            "model.norm.weight": "copied: stays dense",
        },
    ),
    "tables": (
        with_further("llama", {}),
        [{"pass": "bct", "only": ["@mlp", "@norm"], "stock": False}],
        {
            "*norm.weight": "copied: in table_norm",
            "*mlp*.weight": "quantized: block_linear 8 bits",
            "*": "copied: stays dense",
        },
    ),
}


def data_bytes(directory):
    """Bytes of the tensors in the weight files, from their sizes alone."""
    return sum(
        file.stat().st_size - 8 - int.from_bytes(file.open("rb").read(8), "little")
        for file in Path(directory).glob("*.safetensors")
    )


def told(ledger):
    """Tensor -> what becomes of it, as a sentence."""
    return {
        name: f"{account['becomes']}: {account['how']}" for account in ledger["accounts"] for name in account["tensors"]
    }


@pytest.mark.parametrize("kind", every_day(KINDS, "plain", "multi-token prediction", "fp8", "fuse_norms"))
def test_every_tensor_is_accounted_for(kind, tmp_path, in_process):
    write, steps, expected = KINDS[kind]
    write(tmp_path / "m")
    asked = recipe(*steps, dtype="bfloat16" if kind == "another dtype" else "source")
    plan = make_plan(asked, str(tmp_path / "m"))
    assert problems_of(plan.ledger, plan.source.checkpoint) == []
    report = compress(asked, str(tmp_path / "m"), tmp_path / "out", measure=False)
    assert report["status"] == "ok"
    ledger = report["ledger"]
    names = told(ledger)
    assert ledger["source_bytes"] == data_bytes(tmp_path / "m") == sum(a["bytes"] for a in ledger["accounts"])
    for pattern in expected:
        assert any(fnmatchcase(name, pattern) for name in names), pattern
    for name, found in names.items():
        meant = next((what for pattern, what in expected.items() if fnmatchcase(name, pattern)), found)
        assert found == meant or fnmatchcase(found, meant), name
    before = {n: t for file in (tmp_path / "m").glob("*.safetensors") for n, t in load_file(file).items()}
    after = {n: t for file in (tmp_path / "out").glob("*.safetensors") for n, t in load_file(file).items()}
    assert before.keys() == {name for name in names if ":" not in name}
    for account in ledger["accounts"]:
        for name in account["tensors"] if account["becomes"] == "copied" else ():
            (held,) = account.get("into", {}).get(name, [name])
            assert torch.equal(before[name].view(-1).view(torch.uint8), after[held].view(-1).view(torch.uint8)), name
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert told(manifest["ledger"]) == names and told(inspect_path(str(tmp_path / "out")).ledger) == names
    assert told(plan.ledger).keys() == names.keys()
    page, text = render_html(report), render_markdown(report)
    for row in rows_of_accounts(ledger):
        assert f"{row.becomes}: {row.how}" in text and row.what.split(" and ")[0] in page


def losing(structure):
    """The structure as a reader would give it that drops what fills nothing."""
    return replace(structure, bindings=replace(structure.bindings, unused=()))


def test_a_tensor_that_nothing_takes_is_a_problem_of_the_plan(tmp_path, monkeypatch):
    with_further("llama", {"mtp.a": torch.ones(4), "mtp.b": torch.ones(8)})(tmp_path / "m")
    read = plan_module.read_structure
    monkeypatch.setattr(plan_module, "read_structure", lambda *names, **more: losing(read(*names, **more)))
    plan = make_plan(recipe(RTN), str(tmp_path / "m"))
    (problem,) = plan.problems
    assert isinstance(problem, PreflightError) and problem.data["reason"] == "unbalanced-ledger"
    assert problem.data["because"][0] == {"reason": "not-accounted-for", "tensors": ["mtp.a", "mtp.b"]}
    with raises(PreflightError, reason="unbalanced-ledger"):
        compress(recipe(RTN), str(tmp_path / "m"), tmp_path / "out", measure=False)
    assert not (tmp_path / "out").exists()


SPOILED = {
    "lost": (lambda infos: {}, {"reason": "absent-tensors", "tensors": ["mtp.a (copied)", "mtp.b (copied)"]}),
    "exchanged": (
        lambda infos: {"mtp.a": infos["mtp.b"], "mtp.b": infos["mtp.a"]},
        {"reason": "changed-tensors", "tensors": ["mtp.a", "mtp.b"]},
    ),
}


@pytest.mark.parametrize("kind", SPOILED)
def test_an_artifact_that_does_not_have_what_the_ledger_says_is_not_published(kind, tmp_path, monkeypatch, in_process):
    spoil, values = SPOILED[kind]
    with_further("llama", {"mtp.a": torch.ones(4), "mtp.b": torch.zeros(4)})(tmp_path / "m")
    found = writer.carried_tensors
    monkeypatch.setattr(writer, "carried_tensors", lambda structure: spoil(found(structure)))
    with pytest.raises(ArtifactError) as failure:
        compress(recipe(RTN), str(tmp_path / "m"), tmp_path / "out", measure=False)
    assert values in failure.value.data["because"]
    assert not (tmp_path / "out").exists()


def ledger_of(*accounts):
    size = sum(sum(tensors.values()) for _, _, tensors in accounts)
    rows = [
        {"becomes": becomes, "how": how, "bytes": sum(tensors.values()), "tensors": tensors}
        for becomes, how, tensors in accounts
    ]
    return {"source_bytes": size, "accounts": rows}


def checkpoint_of(**sizes):
    infos = {name: TensorInfo(Path(), torch.uint8, (size,), 0, size) for name, size in sizes.items()}
    return Checkpoint(Path(), {}, infos, stored=infos)


UNBALANCED = {
    "lost": (ledger_of(("copied", "", {"a": 4})), "not-accounted-for", ["b"]),
    "twice": (
        ledger_of(("copied", "", {"a": 4, "b": 8}), ("left out", "", {"b": 8})),
        "accounted-for-twice",
        ["b"],
    ),
    "another size": (
        ledger_of(("copied", "", {"a": 4, "b": 9})),
        "not-in-source",
        ["b"],
    ),
    "unknown": (
        ledger_of(("copied", "", {"a": 4, "b": 8, "c": 1})),
        "not-in-source",
        ["c"],
    ),
}


@pytest.mark.parametrize("kind", UNBALANCED)
def test_a_ledger_that_does_not_sum_to_its_source_is_told(kind):
    ledger, reason, tensors = UNBALANCED[kind]
    first, second = problems_of(ledger, checkpoint_of(a=4, b=8))
    assert first.data == {"reason": reason, "tensors": tensors}
    assert (second.data["reason"], second.data["source"]) == ("other-sum", 12)


def test_a_ledger_of_many_blocks_has_few_rows():
    tensors = {f"model.layers.{i}.mlp.{leaf}.weight": 10 for i in range(32) for leaf in ("up", "down")}
    ledger = ledger_of(("quantized", "int4", tensors), ("copied", "stays dense", {"lm_head.weight": 5}))
    assert list(rows_of_accounts(ledger)) == [
        ("model.layers.*.mlp.up.weight and 1 other kinds", "quantized", "int4", 64, 640),
        ("lm_head.weight", "copied", "stays dense", 1, 5),
    ]
    assert [(row.what, row.tensors) for row in rows_of_kinds(ledger)] == [
        ("model.layers.*.mlp.up.weight", 32),
        ("model.layers.*.mlp.down.weight", 32),
        ("lm_head.weight", 1),
    ]
    assert tensor_count(ledger) == 65
