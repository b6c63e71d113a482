"""A run never measures on what it calibrated on, and what a model can't take is known before the sweep."""

from __future__ import annotations

import json

import numpy
import pytest
import tiny
import tiny_tokenizer
import torch
import transformers as hf
import yaml
from raising import raises

from compressor.engine.plan import make_plan
from compressor.engine.run_samples import (
    check_labels,
    check_samples,
    data_problems,
    is_divided,
    read_data,
    read_evaluation_data,
)
from compressor.errors import PreflightError, RecipeError
from compressor.evaluation.report import data_facts
from compressor.model.model_files import demo_path
from compressor.model.structure import read_structure
from compressor.recipe.recipe import parse_recipe

GPTQ = {"pass": "gptq", "bits": 8, "group_size": 32}
ROWS = [f"a text with the number {number} and some words behind it" for number in range(200)]


def recipe(data, held_out, step=GPTQ):
    small = {"samples": 4, "length": 16}
    evaluation = {"metrics": ["perplexity"], "data": {**small, **held_out}}
    tree = {"version": 1, "name": "t", "data": {**small, **data}, "steps": [step], "eval": evaluation}
    return parse_recipe(yaml.safe_dump(tree).encode())


def write(path, texts):
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return {"source": str(path)}


def read(chosen, measure=True):
    return read_data(chosen, demo_path(), 2048, measure=measure)


def windows(samples):
    return {tuple(sample.tolist()) for sample in samples.inputs}


@pytest.mark.parametrize("pack", [True, False])
def test_one_file_for_both_is_divided_and_the_report_says_so(pack, tmp_path):
    data = {**write(tmp_path / "a.jsonl", ROWS), "pack": pack}
    chosen = recipe(data, data)
    calibration, held_out = read(chosen)
    assert windows(calibration).isdisjoint(windows(held_out)) and calibration.digest != held_out.digest
    assert calibration.sha256 == held_out.sha256
    parts = [data_facts(samples)["part"] for samples in (calibration, held_out)]
    assert [part["name"] for part in parts] == ["calibration", "evaluation"]
    assert sum(part["documents"] for part in parts) == 200 == parts[0]["of"]
    assert read(chosen, measure=False)[0].digest == calibration.digest  # the same weights with --no-eval
    assert read_evaluation_data(chosen, demo_path(), 2048).digest == held_out.digest


def test_a_source_is_whole_where_nothing_is_calibrated_on(tmp_path):
    data = write(tmp_path / "a.jsonl", ROWS)
    chosen = recipe(data, data, {"pass": "rtn", "bits": 8, "group_size": 32})
    assert not is_divided(chosen) and read(chosen)[0] is None and read(chosen)[1].part is None


@pytest.mark.parametrize(
    ("calibration", "evaluation", "data"),
    [
        (ROWS[:150], ROWS[140:], {"shared": 10, "first": 1}),
        (ROWS, [*reversed(ROWS)], {"shared": 200}),
        (ROWS[:100], ROWS[100:], None),
    ],
)
def test_documents_of_two_files_that_are_the_same_are_refused(calibration, evaluation, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.jsonl", calibration)
    write(tmp_path / "b.jsonl", evaluation)
    chosen = recipe({"source": "a.jsonl"}, {"source": "b.jsonl"})
    if data is None:
        assert all(samples.part is None for samples in read(chosen))
        return
    told = {"where": "eval.data (b.jsonl)", "reason": "overlap", "kind": "documents", "source": "a.jsonl"}
    with raises(RecipeError, **told, **data):
        read(chosen)


def test_an_excerpt_of_a_text_file_is_refused(tmp_path):
    for name, texts in (("a.txt", ROWS), ("b.txt", ROWS[50:120])):
        (tmp_path / name).write_text("\r\n".join(texts))
    with raises(RecipeError, where=f"eval.data ({tmp_path / 'b.txt'})", reason="overlap", shared=70, kind="lines"):
        read(recipe({"source": str(tmp_path / "a.txt")}, {"source": str(tmp_path / "b.txt")}))


def test_the_built_in_text_and_random_tokens_are_disjoint_for_one_seed():
    calibration, held_out = read(recipe({"source": "random"}, {"source": "random"}))
    assert windows(calibration).isdisjoint(windows(held_out))
    calibration, held_out = read(recipe({"source": "stdlib"}, {"source": "stdlib", "split": "train"}))
    assert windows(calibration).isdisjoint(windows(held_out)) and held_out.part["of"] == calibration.part["of"]


def test_plan_warns_of_a_divided_source_and_names_what_is_wrong_with_the_data(tmp_path):
    data = write(tmp_path / "a.jsonl", ROWS)
    codes = [warning.code for warning in make_plan(recipe(data, data), "demo", prove=False).warnings]
    assert "data-divided" in codes
    plan = make_plan(recipe({"source": "gone.txt"}, {"source": "random", "length": 99999}), "demo", prove=False)
    assert "data-divided" not in [warning.code for warning in plan.warnings]
    problems = data_problems(plan.recipe, plan.source, measure=True)
    assert [type(problem) for problem in problems] == [RecipeError, PreflightError]
    assert len(data_problems(plan.recipe, plan.source, measure=False)) == 1


def test_a_tokenizer_that_cannot_be_used_is_known_in_plan_where_text_is_read(tmp_path):
    structure = read_structure(tiny.save("llama", tmp_path / "m"))
    (tmp_path / "m" / "tokenizer.json").write_text("[]")
    drawn, text = {"source": "random"}, {"source": "stdlib", "split": "heldout"}
    assert data_problems(recipe(drawn, drawn), structure, measure=True) == []
    assert data_problems(recipe(drawn, text), structure, measure=False) == []
    (problem,) = data_problems(recipe(drawn, text), structure, measure=True)
    assert isinstance(problem, RecipeError) and problem.data["reason"] == "no-tokenizer"


CHATS = [{"messages": [{"role": "user", "content": f"{number} is the question"}]} for number in range(200)]
REFUSING = "{% for m in messages %}{{ m.content }}{{ raise_exception('never') }}{% endfor %}"


@pytest.mark.parametrize(
    ("family", "template", "rows", "reason"),
    [
        ("gpt", None, CHATS, "no-chat-template"),
        ("llama", REFUSING, CHATS, "chat-refused"),
        ("llama", None, [{"messages": "text"}], "no-chat"),
        ("llama", None, [{"text": "text"}], "no-chat"),
        ("llama", None, [{"turns": []}], "no-field"),
        ("llama", None, CHATS, None),
    ],
)
def test_chats_that_cannot_be_used_are_known_in_plan(family, template, rows, reason, tmp_path):
    structure = read_structure(tiny.save("llama", tmp_path / "m"))
    tiny_tokenizer.save(family, tmp_path / "m", template)
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {"source": str(tmp_path / "c.jsonl"), "format": "chat"}
    chosen = recipe(data, data)
    problems = data_problems(chosen, structure, measure=False)
    assert [(problem.exit_code, problem.data["reason"]) for problem in problems] == ([(2, reason)] if reason else [])
    if reason is None:
        calibration, held_out = read_data(chosen, structure.checkpoint.directory, 200, measure=True)
        assert windows(calibration).isdisjoint(windows(held_out))
        assert all(sample[0] == 1 and (sample[1:] != 1).all() for sample in calibration.inputs)  # one BOS


@pytest.mark.parametrize(
    ("shape", "read"),
    [
        ((24, 24), [1, 24, 24]),
        ((16, 8), [1, 16, 8]),
        ((16, 16, 4), [4, 16, 16]),
        ((16, 16), None),
    ],
)
def test_images_that_the_model_does_not_read_are_refused_before_the_sweep(shape, read, tmp_path):
    structure = read_structure(tiny.save("vit", tmp_path / "m"))
    pixels = numpy.random.default_rng(0).integers(0, 255, (40, *shape), dtype=numpy.uint8)
    numpy.savez(tmp_path / "x.npz", images=pixels, labels=numpy.arange(40) % 3 + 1)
    chosen = recipe({"source": str(tmp_path / "x.npz")}, {"source": str(tmp_path / "x.npz")})
    _, held_out = read_data(chosen, structure.checkpoint.directory, None, measure=True)
    if read is not None:
        with raises(PreflightError, where="eval.data", reason="shape", shape=read):
            check_samples(held_out, structure, "eval.data")
        return
    check_samples(held_out, structure, "eval.data")
    held_out.labels[:] = 2
    check_labels(held_out, structure, "eval.data")
    held_out.labels[-1] = 3
    with raises(PreflightError, where="eval.data", reason="unknown-label", label=3, classes=3):
        check_labels(held_out, structure, "eval.data")


@pytest.fixture(scope="module")
def roberta(tmp_path_factory):
    torch.manual_seed(0)
    config = hf.RobertaConfig(**{**tiny.COMMON, "max_position_embeddings": 66, "pad_token_id": 1})
    hf.RobertaForSequenceClassification(config).save_pretrained(folder := tmp_path_factory.mktemp("r"))
    return read_structure(folder)


@pytest.mark.parametrize(("length", "fits"), [(64, True), (65, False), (66, False), (67, False)])
def test_samples_longer_than_the_positions_that_a_model_has_are_refused_with_the_length_to_set(length, fits, roberta):
    chosen = recipe({"source": "random", "length": length}, {"source": "random"})
    problems = data_problems(chosen, roberta, measure=True)
    assert (problems == []) is fits
    samples = read_data(chosen, demo_path(), 96, measure=False)[0]
    if fits:
        check_samples(samples, roberta, "data")
        return
    for problem in (lambda: check_samples(samples, roberta, "data"), lambda: _raise(problems[0])):
        with raises(PreflightError, where="data.length", length=length, limit=64):
            problem()


def test_a_length_that_nobody_set_is_what_the_model_takes(roberta, tmp_path):
    step = {"pass": "gptq", "bits": 8, "group_size": 32}
    tree = {"version": 1, "steps": [step], "data": {"source": "random"}, "eval": {"data": {"length": 65}}}
    plan = make_plan(parse_recipe(yaml.safe_dump(tree).encode()), str(roberta.checkpoint.directory), prove=False)
    assert (plan.recipe.data.length, plan.recipe.eval.data.length) == (
        64,
        65,
    )  # one that was set is refused, not changed
    assert [problem.where for problem in data_problems(plan.recipe, roberta, measure=True)] == ["eval.data.length"]
    fitting = make_plan(parse_recipe(yaml.safe_dump({"version": 1, "steps": [step]}).encode()), "demo", prove=False)
    assert (fitting.recipe.data.length, fitting.recipe.eval.data.length) == (512, 512)


def _raise(error):
    raise error


def test_tokens_that_the_model_does_not_know_are_refused(roberta):
    samples = read_data(recipe({"source": "stdlib"}, {"source": "random"}), demo_path(), 2048, measure=False)[0]
    with raises(PreflightError, where="data", reason="unknown-token", vocabulary=96):
        check_samples(samples, roberta, "data")
