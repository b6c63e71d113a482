"""The whole way, recipe to published artifact, as a user or a CI job walks it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import junitparser
import pytest
import tiny
import torch
import transformers as hf
import yaml
from fresh import COMMAND, PACKAGE, Going, command, stranger
from raising import raises

import compressor
from compressor.artifact import writer
from compressor.engine.plan import make_plan
from compressor.errors import (
    ArtifactError,
    GateError,
    Interrupted,
    PassError,
    PreflightError,
    RecipeError,
    ResumeError,
    ShapeError,
    UsageError,
)
from compressor.evaluation.report import validate_report
from compressor.kernels.cpu import library
from compressor.kernels.prepared.prepare import explain
from compressor.model.model_files import demo_path
from compressor.process.json_values import finite
from compressor.recipe.recipe import parse_recipe, read_recipe
from compressor.run import compress
from compressor.storage.files import file_sha256
from compressor.storage.safetensors_file import read_header
from compressor.testing import kill_at, weight_hashes

SMALL = {"source": "random", "samples": 8, "length": 16}
STEP = {"pass": "gptq", "bits": 4, "group_size": 32, "min_tokens_per_expert": 4}


def recipe(step=None, **sections):
    tree = {"version": 1, "name": "test", "data": SMALL, "steps": [{**STEP, **(step or {})}], **sections}
    tree.setdefault("report", {"html": False})
    return parse_recipe(yaml.safe_dump(tree).encode(), "test.yaml")


@pytest.fixture
def llama(tmp_path):
    return tiny.save("llama", tmp_path / "model", dtype=torch.bfloat16)


DENSE = ["qwen3", "opt", "phi3", "gemma3", "gpt_neox"]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mistral", "mixtral", "qwen3_moe", "bert", "bert_base", *DENSE])
def test_stock_transformers_loads_what_was_computed(family, tmp_path):
    model = tiny.save(family, tmp_path / "m", dtype=torch.bfloat16)
    report = compress(recipe(), str(model), tmp_path / "out", measure=False)
    assert report["route"]["name"] == "compressed-tensors"
    found = report["verification"]
    assert found["max_logit_difference"] == 0.0 and not found["problems"]
    assert found["missing"] == found["unexpected"] == found["mismatched"] == []


def test_a_gpt2_artifact_loads_where_this_package_is_not_installed(tmp_path):
    """Conv1D weights need the modeling file; it runs in an interpreter that can't import compressor."""
    model = tiny.save("gpt2", tmp_path / "m", dtype=torch.bfloat16)
    report = compress(recipe(), str(model), tmp_path / "out", measure=False)
    assert report["route"]["name"] == "custom" and "Conv1D" in report["route"]["reason"]
    code = f"""
import torch
from transformers import AutoModelForCausalLM
options = dict(trust_remote_code=True, output_loading_info=True)
model, info = AutoModelForCausalLM.from_pretrained({str(tmp_path / "out")!r}, **options)
assert not any(info[key] for key in ('missing_keys', 'unexpected_keys', 'mismatched_keys')), info
assert type(model.transformer.h[0].attn.c_attn).__name__ == 'PackedLinear'
out = model(input_ids=torch.arange(8).view(1, 8)).logits
again = model.generate(torch.arange(8).view(1, 8), max_new_tokens=4, do_sample=False, min_new_tokens=4)
torch.save((out, again), {str(tmp_path / "logits.pt")!r})
"""
    stranger(code)
    logits, made = torch.load(tmp_path / "logits.pt", weights_only=True)
    own = compressor.load(tmp_path / "out", kernels="reference")
    assert torch.equal(own(input_ids=torch.arange(8).view(1, 8)).logits, logits)
    assert made.shape == (1, 12)


@pytest.mark.slow
def test_two_widths_in_two_sweeps_load_stock(llama, tmp_path):
    steps = [
        {"pass": "rtn", "bits": 8, "group_size": 32, "only": ["down_proj"]},
        {**STEP, "bits": 3, "except": ["down_proj"]},
    ]
    tree = {"version": 1, "data": SMALL, "steps": steps, "report": {"html": False}}
    report = compress(parse_recipe(yaml.safe_dump(tree).encode()), str(llama), tmp_path / "out", measure=False)
    assert report["verification"]["max_logit_difference"] == 0.0
    bits = {w["name"].rpartition(".")[2]: w["spec"]["bits"] for w in report["weights"]}
    assert bits == {"q_proj": 3, "k_proj": 3, "v_proj": 3, "o_proj": 3, "gate_proj": 3, "up_proj": 3, "down_proj": 8}


@pytest.mark.slow
def test_a_tied_head_is_untied_only_when_it_is_named(tmp_path):
    model = tiny.save("qwen3", tmp_path / "m", dtype=torch.bfloat16)
    report = compress(recipe({"only": ["*", "@head"]}), str(model), tmp_path / "out", measure=False)
    assert any(warning["code"] == "untied-head" for warning in report["warnings"])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    own = compressor.load(tmp_path / "out", kernels="reference")
    assert type(own.lm_head).__name__ == "PackedLinear"
    compress(recipe(), str(model), tmp_path / "tied", measure=False)
    tied = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "tied")
    assert tied.lm_head.weight is tied.model.embed_tokens.weight


def test_side_files_are_carried_byte_for_byte(llama, tmp_path):
    (llama / "tokenizer.json").write_text('{"odd":  "spacing"}')
    (llama / "chat_template.jinja").write_text("{{ messages }}\n")
    (llama / "README.md").write_text("---\nlicense: mit\n---\n")
    compress(recipe(), str(llama), tmp_path / "out", measure=False)
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (llama / name).read_bytes()
    assert "license: mit" in (tmp_path / "out" / "README.md").read_text()
    rerun = parse_recipe((tmp_path / "out" / "recipe.yaml").read_bytes())
    assert rerun.resolved() == make_plan(recipe(), str(llama), prove=False).recipe.resolved()  # its lengths are chosen


def test_shards_split_and_load(llama, tmp_path):
    report = compress(recipe(export={"shard_bytes": "8KiB"}), str(llama), tmp_path / "out", measure=False)
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) > 2 and shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    assert report["verification"]["max_logit_difference"] == 0.0


@pytest.mark.slow
def test_a_kill_at_every_journal_step_resumes_to_the_same_bytes(llama, tmp_path):
    chosen = recipe()
    compress(chosen, str(llama), tmp_path / "whole", measure=False)
    expected = weight_hashes(tmp_path / "whole")
    killed = 0
    for step in range(2, 40, 3):
        output = tmp_path / f"out{step}"
        if not kill_at(step, chosen, llama, output):
            break
        killed += 1
        assert not output.exists()
        compress(chosen, str(llama), output, measure=False, resume=True)
        assert weight_hashes(output) == expected, step
    assert killed >= 4


def test_resume_refuses_another_recipe_and_names_the_difference(llama, tmp_path):
    assert kill_at(9, recipe(), llama, tmp_path / "out")
    with raises(UsageError, where=tmp_path / "out.work", reason="interrupted-run"):
        compress(recipe(), str(llama), tmp_path / "out", measure=False)
    with raises(ResumeError, where="out.work", reason="differs") as failure:
        compress(recipe({"bits": 3}), str(llama), tmp_path / "out", measure=False, resume=True)
    assert set(failure.value.data["was"]) == {"recipe"}
    shutil.copytree(llama, tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps({**config, "note": 1}))
    with raises(ResumeError, where="out.work", reason="differs") as failure:
        compress(recipe(), str(tmp_path / "other"), tmp_path / "out", measure=False, resume=True)
    assert set(failure.value.data["was"]) == {"model"}


@pytest.fixture
def reader(tmp_path):
    """A model that reads text, with the demo's tokenizer."""
    demo = demo_path()
    vocabulary = json.loads((demo / "config.json").read_text())["vocab_size"]
    model = tiny.save("llama", tmp_path / "reader", dtype=torch.bfloat16, vocab_size=vocabulary)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(demo / name, model / name)
    return model


def stopped(chosen, model, output):
    """A run that is asked to stop as it walks its first block; its work directory stays."""

    def ask(event):
        if event["event"] == "weight":
            os.kill(os.getpid(), signal.SIGTERM)

    with raises(Interrupted, where="run", resumable=True):
        compress(chosen, str(model), output, measure=False, emit=ask)


@pytest.mark.slow
def test_resume_refuses_other_data_and_other_versions_and_names_them(reader, tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("def f(x):\n    return x + 1\n" * 40)
    chosen = recipe(data={"source": str(text), "samples": 4, "length": 32})
    stopped(chosen, reader, tmp_path / "out")
    told = text.read_text()
    text.write_text("import os\nprint(os.name)\n" * 60)
    with raises(ResumeError, where="out.work", reason="differs") as failure:
        compress(chosen, str(reader), tmp_path / "out", measure=False, resume=True)
    for values in (failure.value.data["was"], failure.value.data["is"]):
        assert set(values) == {"data"} and re.fullmatch("[0-9a-f]{64}", values["data"])
    text.write_text(told)
    journal = tmp_path / "out.work" / "run.json"
    facts = json.loads(journal.read_text())
    for package in ("transformers", "torch", "compress_model"):
        journal.write_text(json.dumps({**facts, package: "0.0.1"}))
        with raises(ResumeError, where="out.work", was={package: "0.0.1"}, **{"is": {package: facts[package]}}):
            compress(chosen, str(reader), tmp_path / "out", measure=False, resume=True)
    journal.write_text(json.dumps(facts))
    compress(chosen, str(reader), tmp_path / "out", measure=False, resume=True)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["run"]["resumed"] == [{"from_part": 2}]


@pytest.mark.slow
def test_the_stored_recipe_runs_again_to_the_same_bytes(reader, tmp_path, monkeypatch):
    """Its data files are named without their folders and pinned by hash; it runs where they lie."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "notes.txt").write_text("def f(x):\n    return x + 1\n" * 40)
    (data / "held.jsonl").write_text('{"text": "import os, sys, json and more words to read"}\n' * 8)
    chosen = recipe(
        data={"source": str(data / "notes.txt"), "samples": 4, "length": 32},
        eval={"metrics": ["perplexity"], "data": {"source": str(data / "held.jsonl"), "samples": 4, "length": 16}},
    )
    first = compress(chosen, str(reader), tmp_path / "first")
    text = (tmp_path / "first" / "recipe.yaml").read_text()
    stored = parse_recipe(text.encode())
    assert str(tmp_path) not in text
    assert (stored.data.source, stored.eval.data.source) == ("notes.txt", "held.jsonl")
    assert stored.data.sha256 == file_sha256(data / "notes.txt")
    assert stored.eval.data.sha256 == file_sha256(data / "held.jsonl")
    assert first["recipe"] == {"name": "test", "sha256": stored.sha256, "resolved": finite(stored.resolved())}
    monkeypatch.chdir(data)
    second = compress(read_recipe(tmp_path / "first" / "recipe.yaml"), str(reader), tmp_path / "second")
    assert weight_hashes(tmp_path / "second") == weight_hashes(tmp_path / "first")
    assert (tmp_path / "second" / "recipe.yaml").read_text() == text
    told = {"run", "environment"}
    assert {k: v for k, v in first.items() if k not in told} == {k: v for k, v in second.items() if k not in told}
    (data / "notes.txt").write_text("other words\n" * 100)
    with raises(RecipeError, where="notes.txt", reason="sha256", pinned=stored.data.sha256):
        compress(stored, str(reader), tmp_path / "third")


def test_an_artifact_that_does_not_verify_keeps_its_report_and_is_not_published(llama, tmp_path, monkeypatch):
    """One flipped bit in a scale, put there after the codes were computed and before the manifest is sealed."""
    write = writer.write_artifact

    def damage(directory, *rest):
        write(directory, *rest)
        info = read_header(directory / "model.safetensors")["model.layers.0.mlp.up_proj.weight_scale"]
        with (directory / "model.safetensors").open("r+b") as file:
            file.seek(info.offset + 1)
            byte = file.read(1)[0]
            file.seek(info.offset + 1)
            file.write(bytes([byte ^ 0x80]))

    monkeypatch.setattr("compressor.run.write_artifact", damage)
    chosen = recipe(eval={"metrics": ["perplexity"], "data": SMALL, "gates": {"perplexity": 1e9, "size_ratio": 0.9}})
    with raises(ArtifactError, where="out.work/artifact") as failure:
        compress(chosen, str(llama), tmp_path / "out")
    assert failure.value.exit_code == 4 and not (tmp_path / "out").exists()
    kept = tmp_path / "out.work" / "artifact"
    report = json.loads((kept / "report.json").read_text())
    validate_report(report)
    assert report["status"] == "verification_failed"
    assert report["verification"]["problems"] == failure.value.data["problems"]
    assert {values["reason"] for values in failure.value.data["because"]} == {"other-error", "outputs-differ"}
    assert report["verification"]["max_logit_difference"] > 0
    assert report["metrics"]["perplexity"]["after"] is None and report["run"]["speed"] == {}
    assert {gate["name"]: gate["passed"] for gate in report["gates"]} == {"perplexity": False, "size_ratio": True}
    assert all(problem in (kept / "report.md").read_text() for problem in failure.value.data["problems"])
    suite = next(iter(junitparser.JUnitXml.fromstring((kept / "junit.xml").read_bytes())))
    assert (suite.errors, suite.failures) == (1, 1)


@pytest.mark.parametrize("stage", ["write", "verify"])
def test_a_signal_in_a_later_stage_stops_at_once_and_keeps_the_work(stage, llama, tmp_path):
    def ask(event):
        if event.get("name") == stage:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        compress(recipe(), str(llama), tmp_path / "out", measure=False, emit=ask)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out.work"]


def mounted(folder, size):
    """Mount a small tmpfs there; skips the test where that isn't allowed."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip("mounting a tmpfs needs root")
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        pytest.skip(f"mounting a tmpfs isn't allowed here: {done.stderr.strip()}")


@pytest.mark.slow
def test_a_disk_that_fills_up_keeps_the_journal_and_resumes_to_the_same_bytes(llama, tmp_path):
    """A real file system, full first in the sweep, then as the artifact is written, then large enough."""
    chosen = recipe(limits={"disk": "1GiB"})  # or the plan would refuse, as it should
    compress(chosen, str(llama), tmp_path / "whole", measure=False)
    small, events = tmp_path / "small", []
    mounted(small, "28k")
    try:
        with raises(PassError, reason="disk-full") as failure:
            compress(chosen, str(llama), small / "out", measure=False)
        journal = small / "out.work" / "journal.jsonl"
        assert failure.value.exit_code == 7 and 0 < len(journal.read_text().splitlines()) < 4
        subprocess.run(["mount", "-o", "remount,size=84k", small], check=True)
        with raises(PassError, reason="disk-full"):
            compress(chosen, str(llama), small / "out", measure=False, resume=True, emit=events.append)
        assert {"event": "stage", "name": "write"} in events and len(journal.read_text().splitlines()) == 4
        subprocess.run(["mount", "-o", "remount,size=1m", small], check=True)
        compress(chosen, str(llama), small / "out", measure=False, resume=True)
        assert weight_hashes(small / "out") == weight_hashes(tmp_path / "whole")
        assert [path.name for path in small.iterdir()] == ["out"]
    finally:
        subprocess.run(["umount", "--lazy", small], check=True)  # tracebacks may still hold a mapped file


def test_an_output_that_exists_is_kept_without_fresh_and_only_ours_is_replaced(llama, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    for options, reason in (({}, "output-exists"), ({"fresh": True}, "no-artifact")):
        with raises(UsageError, where=tmp_path / "mine", reason=reason):
            compress(recipe(), str(llama), tmp_path / "mine", measure=False, **options)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"
    compress(recipe(), str(llama), tmp_path / "out", measure=False)
    first = weight_hashes(tmp_path / "out")
    compress(recipe(), str(llama), tmp_path / "out", measure=False, fresh=True)
    assert weight_hashes(tmp_path / "out") == first
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with raises(UsageError, where=tmp_path / "out", reason="foreign-files", names=["notes.txt"]):
        compress(recipe(), str(llama), tmp_path / "out", measure=False, fresh=True)


def test_resident_and_streamed_runs_write_the_same_bytes(llama, tmp_path):
    streamed, resident = recipe(), recipe(model={"placement": "resident"})
    compress(streamed, str(llama), tmp_path / "a", measure=False)
    compress(resident, str(llama), tmp_path / "b", measure=False)
    assert weight_hashes(tmp_path / "a") == weight_hashes(tmp_path / "b")


def test_a_failed_gate_keeps_the_result_aside_with_its_report(llama, tmp_path):
    gated = recipe(eval={"metrics": ["size"], "data": SMALL, "gates": {"size_ratio": 0.01}})
    with raises(GateError, where="out.rejected", gates=["size_ratio"]):
        compress(gated, str(llama), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    report = json.loads((tmp_path / "out.rejected" / "report.json").read_text())
    assert report["status"] == "gate_failed"
    assert "failure" in (tmp_path / "out.rejected" / "junit.xml").read_text()


@pytest.mark.parametrize(
    ("step", "sections", "error", "told"),
    [
        (
            {"group_size": 64},
            {},
            ShapeError,
            {"where": "model.layers.0.self_attn.q_proj", "group_size": 64, "in_features": 32, "usable": [32, -1]},
        ),
        ({"only": ["nope"]}, {}, RecipeError, {"where": "steps.0.only[0]", "reason": "matches-none"}),
        ({}, {"limits": {"memory": "1MiB"}}, PreflightError, {"where": "memory", "available": 1 << 20}),
        ({}, {"limits": {"disk": "1KiB"}}, PreflightError, {"where": "disk of {tmp_path}", "available": 1 << 10}),
        (
            {"act_order": "group"},
            {"export": {"stock_only": True}},
            PreflightError,
            {"where": "export", "reason": "no-stock-loader", "weights": 14},
        ),
        (
            {},
            {"data": {"source": "stdlib", "samples": 2, "length": 16}},
            RecipeError,
            {"where": "model", "reason": "no-tokenizer"},
        ),
        (
            {},
            {"data": {**SMALL, "length": 999}},
            PreflightError,
            {"where": "data.length", "length": 999, "limit": 128},
        ),
        ({}, {"data": {"source": "gone.txt"}}, RecipeError, {"where": "gone.txt", "reason": "no-such-file"}),
    ],
)
def test_what_cannot_work_is_refused_before_any_work(step, sections, error, told, llama, tmp_path):
    with raises(error, **{**told, "where": told["where"].format(tmp_path=tmp_path)}):
        compress(recipe(step, **sections), str(llama), tmp_path / "out", measure=False)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.work").exists()


def test_two_steps_that_store_one_weight_are_refused_by_name(llama, tmp_path):
    tree = {"version": 1, "data": SMALL, "steps": [STEP, {"pass": "rtn", "group_size": 32}]}
    name = "model.layers.0.self_attn.q_proj"
    with raises(PreflightError, where="steps.1", reason="stored-already", earlier="steps.0", weight=name):
        compress(parse_recipe(yaml.safe_dump(tree).encode()), str(llama), tmp_path / "out", measure=False)


def test_a_tampered_artifact_does_not_verify(llama, tmp_path):
    compress(recipe(), str(llama), tmp_path / "out", measure=False)
    weights = tmp_path / "out" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    with raises(ArtifactError, where="out", reason="not-as-written") as failure:
        compressor.load(tmp_path / "out")
    assert failure.value.data["because"] == [{"reason": "changed", "file": "model.safetensors"}]
    (tmp_path / "out" / "compress_manifest.json").unlink()
    with raises(ArtifactError, where=tmp_path / "out", reason="no-manifest"):
        compressor.load(tmp_path / "out")


def write_recipe(tmp_path, **sections):
    tree = {"version": 1, "data": SMALL, "steps": [STEP], "report": {"html": False}, **sections}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path / "r.yaml"


def test_exit_code_0_and_one_json_event_a_line(llama, tmp_path):
    done = command("run", write_recipe(tmp_path), "--model", llama, "--output", tmp_path / "out", "--no-eval", "--json")
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert events[-1]["event"] == "result" and events[-1]["status"] == "ok"
    assert {"sweep", "part", "weight", "stage"} <= {event["event"] for event in events}


def test_exit_code_2_for_usage_and_recipe(llama, tmp_path):
    assert command("run").returncode == 2
    assert command("run", "--no-such-flag").returncode == 2
    path = write_recipe(tmp_path, evil=1)
    done = command("run", path, "--model", llama, "--output", tmp_path / "out")
    assert done.returncode == 2 and "error[recipe]: r.yaml:" in done.stderr and "Traceback" not in done.stderr
    done = command("run", write_recipe(tmp_path), "--model", llama, "--output", "/proc/nope/out")
    assert done.returncode == 2 and "error[usage]" in done.stderr


def test_exit_code_3_for_a_failed_gate(llama, tmp_path):
    path = write_recipe(tmp_path, eval={"metrics": ["size"], "data": SMALL, "gates": {"size_ratio": 0.01}})
    done = command("run", path, "--model", llama, "--output", tmp_path / "out", "--quiet")
    assert done.returncode == 3 and "error[gate-failed]" in done.stderr and (tmp_path / "out.rejected").is_dir()


def test_exit_code_4_for_an_artifact_that_is_not_what_it_says(llama, tmp_path):
    compress(recipe(), str(llama), tmp_path / "out", measure=False)
    config = tmp_path / "out" / "config.json"
    config.write_text(config.read_text().replace('"silu"', '"gelu"'))
    done = command("verify", tmp_path / "out")
    assert done.returncode == 4 and "error[verification-failed]" in done.stderr and "config.json" in done.stderr


def test_exit_code_5_for_a_model_or_plan_that_cannot_work(llama, tmp_path):
    (llama / "model.safetensors").write_bytes(b"torn")
    done = command("plan", write_recipe(tmp_path), "--model", llama)
    assert done.returncode == 5 and "error[model]: model.safetensors" in done.stderr


def test_exit_code_6_for_a_missing_package(llama, tmp_path):
    path = write_recipe(tmp_path, data={**SMALL, "source": "dataset:some/name"})
    done = command("run", path, "--model", llama, "--output", tmp_path / "o", "--no-eval", without=("datasets",))
    assert done.returncode == 6, done.stderr
    assert "error[missing-dependency]" in done.stderr and "pip install datasets" in done.stderr


def test_exit_code_7_when_a_pass_fails_and_the_journal_is_kept(llama, tmp_path):
    path = write_recipe(tmp_path, data={**SMALL, "samples": 1, "length": 2})
    done = command("run", path, "--model", llama, "--output", tmp_path / "out", "--no-eval")
    assert done.returncode == 7, done.stderr
    assert "too few" in done.stderr and (tmp_path / "out.work" / "journal.jsonl").exists()


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_exit_code_130_when_interrupted_and_it_resumes(sign, llama, tmp_path):
    path = write_recipe(tmp_path, data={**SMALL, "samples": 600, "length": 64})
    child = Going(PACKAGE + COMMAND, "run", path, "--model", llama, "--output", tmp_path / "out", "--no-eval")
    journal = tmp_path / "out.work" / "journal.jsonl"
    deadline = time.monotonic() + 300  # planning takes minutes where others use the cores
    while not journal.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    child.send_signal(sign)
    _, errors = child.communicate(60)
    assert child.returncode == 130, errors
    assert not (tmp_path / "out").exists()
    done = command("run", path, "--model", llama, "--output", tmp_path / "out", "--no-eval", "--resume")
    assert done.returncode == 0, done.stderr


STORING = "[{pass: rtn, group_size: 128, scale_search: minmax}]"
REWRITING = "[{pass: fuse_norms}, {pass: slicegpt, sparsity: 0.25}]"


@pytest.mark.slow
def test_peak_memory_of_a_streamed_sweep_does_not_grow_with_depth(tmp_path):
    """A block has 13.6 MB of weights. If they stayed, the deep model's peak would be 1.2 times that of the other."""
    script = Path(__file__).parents[2] / "scripts" / "bench" / "measure_memory.py"
    command = [sys.executable, str(script), "--depths", "2", "10", "--scratch", str(tmp_path)]
    done = subprocess.run(
        [*command, "--steps", STORING, "--steps", REWRITING],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    peaks = json.loads(done.stdout)["peak_rss_bytes"]
    assert peaks.keys() == {STORING, REWRITING}
    for steps, at in peaks.items():
        assert at["10"] <= 1.1 * at["2"], (steps, peaks)


@pytest.mark.skipif(isinstance(library(), str), reason=f"{library()}")
def test_a_loaded_artifact_multiplies_by_kernels_and_generates(llama, tmp_path):
    compress(recipe(), str(llama), tmp_path / "out", measure=False)
    model = compressor.load(tmp_path / "out", kernels="strict")
    plain = compressor.load(tmp_path / "out", kernels="reference")
    assert type(model) is type(plain) and list(model.state_dict()) == list(plain.state_dict())
    ids = torch.arange(12).view(1, -1)
    with torch.no_grad():
        found, expected = model(ids).logits.float(), plain(ids).logits.float()
    assert (found - expected).norm() < 0.01 * expected.norm()  # bfloat16 rounds weights and sums: 2**-8 each
    made = model.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert made.shape == (1, 17)
    assert "linear_weight_only" in explain(model)
    with raises(UsageError, kernels="fastest"):
        compressor.load(tmp_path / "out", kernels="fastest")
