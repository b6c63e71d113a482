"""The whole way, recipe to published artifact, as a user or a CI job walks it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
import transformers as hf
import yaml

import compressor
from compressor.errors import ArtifactError, GateError, PreflightError, RecipeError, ResumeError, ShapeError, UsageError
from compressor.recipe import parse_recipe
from compressor.run import compress
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


def cli(*arguments, cwd=None, **options):
    command = [sys.executable, "-m", "compressor", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "NO_COLOR": "1", "COLUMNS": "200"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=cwd, check=False, **options)


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
    """Conv1D weights take the modelling file; it runs in an interpreter that can't import compressor."""
    model = tiny.save("gpt2", tmp_path / "m", dtype=torch.bfloat16)
    report = compress(recipe(), str(model), tmp_path / "out", measure=False)
    assert report["route"]["name"] == "custom" and "Conv1D" in report["route"]["reason"]
    code = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] == 'compressor': raise ImportError(name)
sys.meta_path.insert(0, Refuse())
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
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-1500:]
    logits, made = torch.load(tmp_path / "logits.pt", weights_only=True)
    own = compressor.load(tmp_path / "out")
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
    own = compressor.load(tmp_path / "out")
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
    assert rerun.resolved() == recipe().resolved()


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
        if kill_at(step, chosen, llama, output) == 0:
            break
        killed += 1
        assert not output.exists()
        compress(chosen, str(llama), output, measure=False, resume=True)
        assert weight_hashes(output) == expected, step
    assert killed >= 4


def test_resume_refuses_another_recipe_and_names_the_difference(llama, tmp_path):
    assert kill_at(9, recipe(), llama, tmp_path / "out") == -signal.SIGKILL
    with pytest.raises(UsageError, match="an interrupted run lies there"):
        compress(recipe(), str(llama), tmp_path / "out", measure=False)
    with pytest.raises(ResumeError, match="recipe: was"):
        compress(recipe({"bits": 3}), str(llama), tmp_path / "out", measure=False, resume=True)
    shutil.copytree(llama, tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps({**config, "note": 1}))
    with pytest.raises(ResumeError, match="model: was"):
        compress(recipe(), str(tmp_path / "other"), tmp_path / "out", measure=False, resume=True)


def test_an_output_that_exists_is_kept_without_fresh_and_only_ours_is_replaced(llama, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    for options in ({}, {"fresh": True}):
        with pytest.raises(UsageError):
            compress(recipe(), str(llama), tmp_path / "mine", measure=False, **options)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"
    compress(recipe(), str(llama), tmp_path / "out", measure=False)
    first = weight_hashes(tmp_path / "out")
    compress(recipe(), str(llama), tmp_path / "out", measure=False, fresh=True)
    assert weight_hashes(tmp_path / "out") == first
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"notes\.txt"):
        compress(recipe(), str(llama), tmp_path / "out", measure=False, fresh=True)


def test_resident_and_streamed_runs_write_the_same_bytes(llama, tmp_path):
    streamed, resident = recipe(), recipe(model={"placement": "resident"})
    compress(streamed, str(llama), tmp_path / "a", measure=False)
    compress(resident, str(llama), tmp_path / "b", measure=False)
    assert weight_hashes(tmp_path / "a") == weight_hashes(tmp_path / "b")


def test_a_failed_gate_keeps_the_result_aside_with_its_report(llama, tmp_path):
    gated = recipe(eval={"metrics": ["size"], "data": SMALL, "gates": {"size_ratio": 0.01}})
    with pytest.raises(GateError, match="size_ratio"):
        compress(gated, str(llama), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    report = json.loads((tmp_path / "out.rejected" / "report.json").read_text())
    assert report["status"] == "gate_failed"
    assert "failure" in (tmp_path / "out.rejected" / "junit.xml").read_text()


@pytest.mark.parametrize(
    ("step", "sections", "error", "message"),
    [
        (
            {"group_size": 64},
            {},
            ShapeError,
            r"group_size 64 does not divide in_features 32.*Set group_size to 32 or -1",
        ),
        ({"only": ["nope"]}, {}, RecipeError, "matches none"),
        ({}, {"limits": {"memory": "1MiB"}}, PreflightError, "bytes of memory are needed"),
        ({}, {"limits": {"disk": "1KiB"}}, PreflightError, "bytes of disk are needed"),
        ({"act_order": "group"}, {"export": {"stock_only": True}}, PreflightError, "stock transformers can't load"),
        ({}, {"data": {"source": "stdlib", "samples": 2}}, RecipeError, "no usable tokenizer"),
        ({}, {"data": {**SMALL, "length": 999}}, PreflightError, "the model takes 128"),
        ({}, {"data": {"source": "gone.txt"}}, RecipeError, "no such data file"),
    ],
)
def test_what_cannot_work_is_refused_before_any_work(step, sections, error, message, llama, tmp_path):
    with pytest.raises(error, match=message):
        compress(recipe(step, **sections), str(llama), tmp_path / "out", measure=False)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.work").exists()


def test_two_steps_that_store_one_weight_are_refused_by_name(llama, tmp_path):
    tree = {"version": 1, "data": SMALL, "steps": [STEP, {"pass": "rtn", "group_size": 32}]}
    with pytest.raises(PreflightError, match=r"rtn needs dense weights, but gptq \(steps.0\).*q_proj"):
        compress(parse_recipe(yaml.safe_dump(tree).encode()), str(llama), tmp_path / "out", measure=False)


def test_a_tampered_artifact_does_not_verify(llama, tmp_path):
    compress(recipe(), str(llama), tmp_path / "out", measure=False)
    weights = tmp_path / "out" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    with pytest.raises(ArtifactError, match="its hash differs"):
        compressor.load(tmp_path / "out")
    (tmp_path / "out" / "compress_manifest.json").unlink()
    with pytest.raises(ArtifactError, match="not a finished artifact"):
        compressor.load(tmp_path / "out")


def write_recipe(tmp_path, **sections):
    tree = {"version": 1, "data": SMALL, "steps": [STEP], "report": {"html": False}, **sections}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path / "r.yaml"


def test_exit_code_0_and_one_json_event_a_line(llama, tmp_path):
    done = cli("run", write_recipe(tmp_path), "--model", llama, "--output", tmp_path / "out", "--no-eval", "--json")
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert events[-1]["event"] == "result" and events[-1]["status"] == "ok"
    assert {"sweep", "unit", "weight", "stage"} <= {event["event"] for event in events}


def test_exit_code_2_for_usage_and_recipe(llama, tmp_path):
    assert cli("run").returncode == 2
    assert cli("run", "--no-such-flag").returncode == 2
    path = write_recipe(tmp_path, evil=1)
    done = cli("run", path, "--model", llama, "--output", tmp_path / "out")
    assert done.returncode == 2 and "error[recipe]: r.yaml:" in done.stderr and "Traceback" not in done.stderr
    done = cli("run", write_recipe(tmp_path), "--model", llama, "--output", "/proc/nope/out")
    assert done.returncode == 2 and "error[usage]" in done.stderr


def test_exit_code_3_for_a_failed_gate(llama, tmp_path):
    path = write_recipe(tmp_path, eval={"metrics": ["size"], "data": SMALL, "gates": {"size_ratio": 0.01}})
    done = cli("run", path, "--model", llama, "--output", tmp_path / "out", "--quiet")
    assert done.returncode == 3 and "error[gate-failed]" in done.stderr and (tmp_path / "out.rejected").is_dir()


def test_exit_code_4_for_an_artifact_that_is_not_what_it_says(llama, tmp_path):
    compress(recipe(), str(llama), tmp_path / "out", measure=False)
    config = tmp_path / "out" / "config.json"
    config.write_text(config.read_text().replace('"silu"', '"gelu"'))
    done = cli("verify", tmp_path / "out")
    assert done.returncode == 4 and "error[verification-failed]" in done.stderr and "config.json" in done.stderr


def test_exit_code_5_for_a_model_or_plan_that_cannot_work(llama, tmp_path):
    (llama / "model.safetensors").write_bytes(b"torn")
    done = cli("plan", write_recipe(tmp_path), "--model", llama)
    assert done.returncode == 5 and "error[model]: model.safetensors" in done.stderr


def test_exit_code_6_for_a_missing_package(llama, tmp_path):
    """`datasets` made unimportable, as on a machine without it."""
    path = write_recipe(tmp_path, data={"source": "dataset:some/name", "samples": 1})
    (tmp_path / "block").mkdir()
    (tmp_path / "block" / "datasets.py").write_text("raise ImportError('not installed')")
    command = [
        sys.executable,
        "-m",
        "compressor",
        "run",
        path,
        "--model",
        llama,
        "--output",
        tmp_path / "o",
        "--no-eval",
    ]
    roots = os.pathsep.join([str(tmp_path / "block"), str(Path(__file__).parent.parent)])
    done = subprocess.run(
        list(map(str, command)), env={**os.environ, "PYTHONPATH": roots}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 6, done.stderr
    assert "error[missing-dependency]" in done.stderr and "pip install datasets" in done.stderr


def test_exit_code_7_when_a_pass_fails_and_the_journal_is_kept(llama, tmp_path):
    path = write_recipe(tmp_path, data={**SMALL, "samples": 1, "length": 2})
    done = cli("run", path, "--model", llama, "--output", tmp_path / "out", "--no-eval")
    assert done.returncode == 7, done.stderr
    assert "too few" in done.stderr and (tmp_path / "out.work" / "journal.jsonl").exists()


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_exit_code_130_when_interrupted_and_it_resumes(sign, llama, tmp_path):
    path = write_recipe(tmp_path, data={**SMALL, "samples": 600, "length": 64})
    command = [
        sys.executable,
        "-m",
        "compressor",
        "run",
        path,
        "--model",
        llama,
        "--output",
        tmp_path / "out",
        "--no-eval",
    ]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    child = subprocess.Popen(list(map(str, command)), env=environment, stderr=subprocess.PIPE, text=True)
    journal = tmp_path / "out.work" / "journal.jsonl"
    deadline = time.monotonic() + 60
    while not journal.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    child.send_signal(sign)
    assert child.wait(60) == 130, child.stderr.read()
    assert not (tmp_path / "out").exists()
    done = cli("run", path, "--model", llama, "--output", tmp_path / "out", "--no-eval", "--resume")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_peak_memory_of_a_streamed_sweep_does_not_grow_with_depth(tmp_path):
    script = Path(__file__).parent.parent / "scripts" / "measure_memory.py"
    done = subprocess.run(
        [sys.executable, str(script), "--depths", "12", "48", "--scratch", str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    peaks = json.loads(done.stdout)["peak_rss_bytes"]
    assert peaks["48"] <= 1.1 * peaks["12"], peaks
