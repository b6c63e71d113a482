"""Measurements against slow obvious versions."""

from __future__ import annotations

import json
import math
import shutil
from contextlib import nullcontext

import junitparser
import pytest
import tiny
import torch
import transformers as hf
import yaml
from raising import raises
from safetensors.torch import save_file
from tiers import every_day

from compressor import run as running
from compressor.artifact.findings import Findings
from compressor.errors import KernelError, ModelError, PreflightError, RecipeError, UsageError
from compressor.evaluation import eval_command
from compressor.evaluation.compare import read_subject
from compressor.evaluation.eval_command import measure_model
from compressor.evaluation.metrics import QUALITY
from compressor.evaluation.quality import measure_quality
from compressor.evaluation.render import render_markdown, unmeasured_speed
from compressor.evaluation.report import validate_report
from compressor.evaluation.saturation import RangeCounts, saturation
from compressor.evaluation.speed import measure_speed
from compressor.model.mapped_tensors import MappedTensors
from compressor.model.model_files import demo_path
from compressor.recipe.gates import GATE_NAMES, check_gates, compares_models, read_gates, unknown_gate, unmeasured_gates
from compressor.recipe.recipe import parse_recipe
from compressor.run import compress


def ask(tmp_path, before, after, inputs, metrics, labels=None):
    save_file({f"{i:06d}": sample.contiguous() for i, sample in enumerate(inputs)}, tmp_path / "t.safetensors")
    if labels is not None:
        save_file({"labels": labels}, tmp_path / "l.safetensors")
    return {
        "before": str(before) if before else None,
        "after": str(after),
        "tokens": str(tmp_path / "t.safetensors"),
        "labels": str(tmp_path / "l.safetensors") if labels is not None else None,
        "metrics": metrics,
        "batch_size": 3,
        "seed": 0,
        "confidence": None,
        "most_tokens": None,
        "memory": None,
        "trust_remote_code": False,
    }


def quality(request):
    return measure_quality(request)["metrics"]


@pytest.fixture
def two(tmp_path):
    return tiny.save("llama", tmp_path / "a"), tiny.save("llama", tmp_path / "b", seed=1)


@pytest.fixture
def tokens():
    return list(torch.randint(0, 96, (5, 12), generator=torch.Generator().manual_seed(0)))


def test_perplexity_divergence_and_agreement_equal_a_loop_over_positions(two, tokens, tmp_path):
    found = quality(ask(tmp_path, *two, tokens, ["perplexity", "kl_divergence", "top1_agreement"]))
    models = [tiny.build("llama", seed=seed) for seed in (0, 1)]
    nll, kl, same, count = [0.0, 0.0], 0.0, 0, 0
    for sample in tokens:
        with torch.no_grad():
            logits = [model(input_ids=sample.unsqueeze(0)).logits[0].double() for model in models]
        for at in range(len(sample) - 1):
            p, q = (torch.softmax(side[at], -1) for side in logits)
            nll[0] -= math.log(p[sample[at + 1]])
            nll[1] -= math.log(q[sample[at + 1]])
            kl += float((p * (p / q).log()).sum())
            same += int(p.argmax() == q.argmax())
            count += 1
    assert found["perplexity"]["before"] == pytest.approx(math.exp(nll[0] / count), rel=1e-5)
    assert found["perplexity"]["after"] == pytest.approx(math.exp(nll[1] / count), rel=1e-5)
    assert found["kl_divergence"]["after"] == pytest.approx(kl / count, rel=1e-4)
    assert found["top1_agreement"]["after"] == pytest.approx(same / count)
    low, high = found["perplexity"]["interval"]
    assert low < found["perplexity"]["after"] < high


def test_a_model_agrees_with_itself(two, tokens, tmp_path):
    found = quality(ask(tmp_path, two[0], two[0], tokens, ["kl_divergence", "top1_agreement", "perplexity"]))
    assert found["kl_divergence"]["after"] == 0 and found["top1_agreement"]["after"] == 1
    assert found["perplexity"]["change_percent"] == 0


def test_what_a_model_does_not_have_is_null_with_a_reason(two, tokens, tmp_path):
    found = quality(ask(tmp_path, *two, tokens, ["accuracy"]))
    assert found["accuracy"]["after"] is None and "labels" in found["accuracy"]["reason"]


def test_accuracy_counts_right_answers(tmp_path):
    model = tiny.save("bert", tmp_path / "m")
    inputs = [torch.tensor([1, 5, 9]), torch.tensor([3, 4, 5, 6]), torch.tensor([7, 8, 9])]
    network = tiny.build("bert")
    with torch.no_grad():
        answers = [int(network(input_ids=sample.unsqueeze(0)).logits.argmax()) for sample in inputs]
    labels = torch.tensor([answers[0], 1 - answers[1], answers[2]])
    found = quality(ask(tmp_path, None, model, inputs, ["accuracy"], labels))
    assert found["accuracy"]["after"] == pytest.approx(2 / 3)


IN_PARTS = {
    "llama": ("llama", {"pass": "rtn", "group_size": 32}),
    "tied": ("qwen3", {"pass": "rtn", "group_size": 32}),
    "two kinds of blocks": ("gemma3", {"pass": "rtn", "group_size": 32}),
    "conv1d": ("gpt2", {"pass": "rtn", "group_size": 32}),
    "experts": ("mixtral", {"pass": "rtn", "group_size": 32}),
    "experts in one tensor": ("gpt_oss", {"pass": "rtn", "group_size": 32}),
    "untied head": ("qwen3", {"pass": "rtn", "group_size": 32, "only": ["*", "@head"]}),
    "classes": ("bert", {"pass": "bct", "activations": "dynamic", "only": ["*", "@norm", "@embedding"]}),
    "hidden states": ("bert_base", {"pass": "rtn", "bits": 8, "group_size": 32}),
    "layers of their own": ("llama", {"pass": "llm_int8"}),
    "token gates": ("vit", {"pass": "zero_tprune"}),
    "lazy blocks": ("llama", {"pass": "prefill_pruning", "keep": {0: 0.5}}),
}


@pytest.mark.parametrize("kind", every_day(IN_PARTS, *list(IN_PARTS)[::2]))
def test_quality_measured_in_parts_is_that_of_whole_models(kind, tmp_path, monkeypatch):
    family, step = IN_PARTS[kind]
    monkeypatch.setattr("compressor.evaluation.metrics.CHUNK_BYTES", 5 * 28 * 96)  # five positions at a time
    model, artifact = tiny.save(family, tmp_path / "m"), tmp_path / "out"
    data = {"source": "random", "samples": 4, "length": 16}
    tree = {"version": 1, "steps": [step], "data": data, "report": {"html": False}}
    monkeypatch.setattr(running, "_verify", lambda job: Findings())  # the artifact runs here
    compress(parse_recipe(yaml.safe_dump(tree).encode()), str(model), artifact, measure=False)
    drawn = torch.Generator().manual_seed(0)
    inputs = (
        list(torch.randn((5, 1, 16, 16), generator=drawn))
        if family == "vit"
        else [torch.randint(0, 96, (length,), generator=drawn) for length in (12, 12, 12, 9, 1)]
    )
    labels = torch.tensor([0, 1, 0, 1, 1]) if family in ("vit", "bert") else None
    request = ask(tmp_path, model, artifact, inputs, list(QUALITY), labels)
    mapped, empty = [], MappedTensors.empty
    monkeypatch.setattr(MappedTensors, "empty", lambda *a: mapped.append(a) or empty(*a))
    whole, parts = measure_quality(request), measure_quality({**request, "memory": 1})
    assert bool(mapped) == ("experts" in kind)
    assert (whole["measured"], parts["measured"]) == ("whole", "parts")
    assert any(row["after"] is not None for row in whole["metrics"].values())
    for name, row in whole["metrics"].items():
        for side in ("before", "after"):
            measured = parts["metrics"][name][side]
            near = 1e-3 if kind == "layers of their own" else 1e-6  # bitsandbytes rounds inputs to float16 first
            assert measured == (row[side] and pytest.approx(row[side], rel=near, abs=near)), name
    assert parts["saturation"]["layers"] == whole["saturation"]["layers"] or kind == "layers of their own"
    assert parts["patches"] == whole["patches"]


def test_a_model_that_can_not_run_in_parts_has_no_value_and_a_reason(tokens, tmp_path):
    """ALBERT runs its one layer several times."""
    sizes = {key: value for key, value in tiny.COMMON.items() if not key.endswith("_token_id")}
    hf.AlbertForMaskedLM(hf.AlbertConfig(**sizes, embedding_size=16)).save_pretrained(tmp_path / "m")
    found = measure_quality({**ask(tmp_path, None, tmp_path / "m", tokens, ["perplexity"]), "memory": 1})
    assert found["measured"] is None and found["metrics"]["perplexity"]["after"] is None
    assert "2 block calls were seen for 1 blocks" in found["metrics"]["perplexity"]["reason"]


def test_speed_of_a_model_that_does_not_fit_is_reported_as_not_measured(two, monkeypatch):
    monkeypatch.setattr(eval_command, "started_early", nullcontext)  # no process is started
    found = measure_model(
        str(two[0]), baseline=str(two[1]), metrics="speed,memory,size", overrides=["limits.memory=1"], data="random"
    )
    row = found["run"]["speed"]["decode_tokens_per_second"]
    assert (row["before"], row["after"], set(row["unmeasured"])) == (None, None, {"before", "after"})
    assert [side for side, _ in unmeasured_speed(found)] == ["before", "after"]
    assert "The speed before was not measured: it needs 0." in render_markdown(found)


def test_speed_reports_rates_and_memory(two, tokens, tmp_path):
    request = {**ask(tmp_path, None, two[0], tokens, []), "model": str(two[0]), "is_baseline": False, "kernels": False}
    found = measure_speed(request)["values"]
    assert all(found[name] > 0 for name in found) and found["peak_rss_bytes"] > 1e8


ROW = {"perplexity": {"before": 10.0, "after": 10.4, "interval": [9.1, 11.7],
                      "intervals": {"value": [10.1, 10.7], "increase_percent": [3.5, 4.5]}},
       "accuracy": {"before": 0.9, "after": 0.88, "interval": [None, None]},
       "kl_divergence": {"before": None, "after": None, "interval": [None, None]}}  # fmt: skip
SPEED = {"decode_tokens_per_second": {"before": 100.0, "after": 150.0}}


@pytest.mark.parametrize(
    ("name", "bound", "value", "passed"),
    [
        ("perplexity_increase_percent", 5, 4.0, True),
        ("perplexity_increase_percent", 3, 4.0, False),
        ("perplexity", 10.5, 10.4, True),
        ("accuracy_min", 0.89, 0.88, False),
        ("accuracy_drop_points", 2.5, 2.0, True),
        ("size_ratio", 0.5, 0.4, True),
        ("decode_speed_ratio_min", 1.2, 1.5, True),
        ("kl_divergence", 9, None, False),
        ("top1_agreement_min", 0.1, None, False),
        ("peak_memory_ratio", 1, None, False),
    ],
)
def test_gates_bound_what_their_names_say_and_fail_on_the_unmeasured(name, bound, value, passed):
    row = check_gates({name: bound}, ROW, SPEED, {"ratio": 0.4})[0]
    assert row["value"] == (None if value is None else pytest.approx(value))
    assert row["passed"] is passed


def test_with_confidence_a_gate_fails_only_beyond_the_whole_interval():
    def passed(bound):
        return check_gates({"perplexity": bound}, ROW, {}, {"ratio": 1}, 0.95)[0]["passed"]

    assert passed(10.2) and not passed(10.0)


def test_a_gate_on_a_change_is_judged_by_the_paired_interval():
    def passed(bound, confidence):
        return check_gates({"perplexity_increase_percent": bound}, ROW, {}, {"ratio": 1}, confidence)[0]["passed"]

    assert passed(3.6, 0.95) and not passed(3.4, 0.95) and not passed(3.6, None)


def test_an_unknown_ratio_fails_its_gate():
    assert check_gates({"macs_ratio": 1}, {}, {}, {"ratio": 1})[0]["passed"] is False


def test_intervals_of_changes_are_paired_and_widen_with_confidence(two, tokens, tmp_path):
    request = ask(tmp_path, *two, tokens, ["perplexity"])
    wide, narrow = (quality({**request, "confidence": level})["perplexity"]["intervals"] for level in (0.99, 0.6))
    for key in ("value", "increase_percent", "drop_points"):
        assert wide[key][0] < narrow[key][0] < narrow[key][1] < wide[key][1]
    itself = quality({**ask(tmp_path, two[0], two[0], tokens, ["perplexity"]), "confidence": 0.95})
    assert itself["perplexity"]["intervals"]["increase_percent"] == [0, 0]  # unpaired it would be wide


def test_gates_that_could_never_hold_are_known_before_measuring():
    assert unknown_gate("perplexity_increase_percent") is None and unknown_gate("top1_agreement_min") is None
    assert "did you mean 'size_ratio'" in unknown_gate("size_ration")
    assert "nothing to bound" in unknown_gate("kl_divergence_increase_percent")
    assert unmeasured_gates(["perplexity", "size_ratio", "decode_speed_ratio_min"], ["size", "memory"]) == {
        "perplexity": "perplexity"
    }
    assert [name for name in GATE_NAMES if not compares_models(name)] == [
        "perplexity", "perplexity_min", "accuracy", "accuracy_min",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "data"),
    [
        ("size_ratio", {"reason": "no-bound", "gate": "size_ratio"}),
        ("size_ratio=", {"reason": "bad-bound", "gate": "size_ratio", "bound": ""}),
        ("size_ratio=x", {"reason": "bad-bound", "gate": "size_ratio", "bound": "x"}),
        ("size_ratio=nan", {"reason": "bad-bound", "gate": "size_ratio", "bound": "nan"}),
        ("size=1", {"reason": "unknown-gate", "gate": "size"}),
    ],
)
def test_a_gate_that_cannot_be_read_is_refused(text, data):
    with raises(UsageError, where="--gate", **data):
        read_gates([text], "--gate")


SMALL = {"source": "random", "samples": 8, "length": 16}
QUICK = ["eval.data.samples=4", "eval.data.length=16"]


def test_an_evaluation_against_a_baseline_is_written_for_a_job_to_keep(two, tmp_path, monkeypatch):
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    options = {"data": "random", "metrics": "perplexity", "overrides": QUICK, "baseline": str(two[0])}
    gates = ["size_ratio=1", "perplexity_increase_percent=-99"]
    report = measure_model(str(two[1]), gates=gates, output=tmp_path / "eval", **options)
    assert json.loads((tmp_path / "eval" / "report.json").read_text()) == report
    validate_report(report)
    assert report["sizes"]["ratio"] == 1 and (report["model"]["source"], report["baseline"]["source"]) == ("b", "a")
    assert {row["name"]: row["passed"] for row in report["gates"]} == {
        "size_ratio": True, "perplexity_increase_percent": False,
    }  # fmt: skip
    assert report["status"] == "gate_failed"
    page = (tmp_path / "eval" / "report.md").read_text()
    assert "| perplexity_increase_percent | -99 |" in page and page in (tmp_path / "summary.md").read_text()
    suite = next(iter(junitparser.JUnitXml.fromstring((tmp_path / "eval" / "junit.xml").read_bytes())))
    assert [case.name for case in suite] == ["perplexity_increase_percent", "size_ratio"] and suite.failures == 1
    assert read_subject(tmp_path / "eval")["metrics"] == report["metrics"]
    again = measure_model(str(two[1]), output=tmp_path / "eval", **options)  # its own directory is written again
    assert again["metrics"] == report["metrics"] and again["status"] == "ok"


def test_labels_that_are_no_class_of_the_model_are_refused(tmp_path):
    model = tiny.save("vit", tmp_path / "m")
    images = [torch.zeros(1, 16, 16) for _ in range(4)]
    asked = ask(tmp_path, None, model, images, ["accuracy"], labels=torch.tensor([0, 1, 2, 3]))
    with raises(ModelError, where="m", label=3, classes=3):
        measure_quality(asked)


SHORT = {
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=2048, n_embd=32, n_layer=2, n_head=2, n_positions=48)),
    "gpt2 shorter than a measurement": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=2048, n_embd=32, n_layer=2, n_head=2, n_positions=20)
    ),
    "roberta": lambda: hf.RobertaForMaskedLM(
        hf.RobertaConfig(**{**tiny.COMMON, "vocab_size": 2048, "max_position_embeddings": 50, "pad_token_id": 1})
    ),
}


@pytest.mark.parametrize("kind", SHORT)
def test_a_model_of_few_positions_is_measured_on_as_many(kind, tmp_path):
    SHORT[kind]().save_pretrained(tmp_path / "m")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_path() / name, tmp_path / "m")
    path, few = str(tmp_path / "m"), ["eval.data.samples=4"]
    report = measure_model(path, metrics="perplexity,speed", overrides=few)
    length = 20 if "shorter" in kind else 48
    assert report["settings"]["data"]["length"] == length and report["run"]["speed"]["prefill_tokens_per_second"]
    assert (report["run"]["speed"]["decode_tokens_per_second"]["after"] is not None) is (kind == "gpt2")
    with raises(PreflightError, where="eval.data.length", length=length + 1, limit=length):
        measure_model(path, metrics="speed", overrides=[*few, f"eval.data.length={length + 1}"])


def built(folder, step):
    """A tiny model compressed by one step."""
    tree = {"version": 1, "data": SMALL, "steps": [step], "eval": {"metrics": ["size"], "data": SMALL}}
    model = tiny.save("llama", folder / "model")
    compress(parse_recipe(yaml.safe_dump(tree).encode(), "one.yaml"), str(model), folder / "out")
    return folder / "out"


@pytest.mark.slow
def test_an_artifact_is_timed_as_compressor_load_gives_it_too(tmp_path):
    artifact = built(tmp_path, {"pass": "rtn", "group_size": 32})
    report = measure_model(
        str(artifact),
        data="random",
        metrics="speed",
        overrides=QUICK,
        strict_kernels=True,
        baseline=str(tmp_path / "model"),
    )
    validate_report(report)
    speed, (row, head) = report["run"]["speed"], report["kernels"]
    for name in ("prefill_tokens_per_second", "decode_tokens_per_second"):
        assert speed[f"kernels_{name}"]["before"] == speed[name]["before"] and speed[f"kernels_{name}"]["after"] > 0
    assert row["op"] == "packed_linear" and row["chosen"].endswith("linear_weight_only")
    assert row["why"].startswith("14 layers in 8 calls; not used: ")  # q, k, v in one, gate and up in one
    assert head["op"] == "dense" and head["chosen"].endswith("linear_dense")


@pytest.mark.slow
def test_strict_kernels_name_what_falls_back_to_the_reference(tmp_path):
    artifact = built(tmp_path, {"pass": "low_rank", "rank": 4})
    options = {"data": "random", "metrics": "speed", "overrides": QUICK}
    (row,) = measure_model(str(artifact), **options)["kernels"]
    assert (row["op"], row["chosen"]) == ("low_rank_linear", "reference")
    with raises(KernelError, where="eval", fallbacks=[row]):
        measure_model(str(artifact), strict_kernels=True, **options)
    with raises(UsageError, where="eval", reason="no-kernels"):
        measure_model(str(artifact), strict_kernels=True, **{**options, "metrics": "perplexity"})


@pytest.mark.parametrize("gate", ["size_ratio=1", "perplexity_increase_percent=1", "kl_divergence=1"])
def test_a_gate_that_compares_needs_a_baseline(gate, two):
    with raises(UsageError, where="eval", reason="no-baseline", gates=[gate.partition("=")[0]]):
        measure_model(str(two[0]), gates=[gate])


def test_an_evaluation_keeps_out_of_directories_that_are_not_its_own(two, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("precious")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "report.json").write_text('{"report_version": 1}')
    (tmp_path / "file").write_text("precious")
    for name, data in (
        ("mine", {"reason": "foreign-files", "names": ["notes.txt"]}),
        ("other", {"reason": "other-report"}),
        ("file", {"reason": "no-directory"}),
    ):
        with raises(UsageError, where=tmp_path / name, **data):
            measure_model(str(two[0]), data="random", output=tmp_path / name)
    with raises(RecipeError, where="gone.txt", reason="no-such-file"):
        measure_model(str(two[0]), data="gone.txt", output=tmp_path / "new")
    assert not (tmp_path / "new").exists()


class Squashed(torch.nn.Module):
    """Stands for a layer of any package that holds a range, or (None) could and doesn't."""

    def __init__(self, largest):
        super().__init__()
        self.largest = largest

    def forward(self, x):
        return x

    def outside(self, x):
        return None if self.largest is None else (x.abs() > self.largest).sum()


def watched(model):
    counts = RangeCounts()
    counts.watch(model)
    return counts


def test_any_module_that_holds_a_range_is_asked_what_lies_outside(tmp_path):
    model = torch.nn.Sequential(Squashed(2), torch.nn.Identity(), Squashed(None), Squashed(9))
    counts = watched(model)
    model(torch.tensor([[1.0, -3.0, 2.0]]))
    model(torch.tensor([[8.0, -9.5]]))
    assert saturation(tmp_path, counts) == {
        "reason": None,
        "layers": [{"name": "0", "values": 5, "outside": 3}, {"name": "3", "values": 5, "outside": 1}],
    }
    plain = torch.nn.Sequential(torch.nn.Identity())
    assert saturation(tmp_path, watched(plain)) == {
        "reason": "no layer has a range for its input",
        "layers": [],
    }


def test_a_quantized_checkpoint_of_another_tool_is_measured(two, tokens, tmp_path):
    """Stock transformers loads it; that it can't be compressed again doesn't matter here."""
    tree = {"version": 1, "steps": [{"pass": "rtn", "bits": 8, "group_size": -1}], "report": {"html": False}}
    compress(parse_recipe(yaml.safe_dump(tree).encode()), str(two[0]), tmp_path / "out", measure=False)
    (tmp_path / "out" / "compress_manifest.json").unlink()
    row = quality(ask(tmp_path, two[0], tmp_path / "out", tokens, ["perplexity"]))["perplexity"]
    assert row["after"] != row["before"] and row["after"] == pytest.approx(row["before"], rel=0.05)  # 8 bits
