"""A planned run has the problems of the plan, the data and the request, in the order in which a run meets them."""

from __future__ import annotations

import pytest
import tiny
import torch

from compressor.engine import request
from compressor.recipe.recipe import parse_recipe

RECIPE = b"version: 1\nsteps: [{pass: rtn, bits: 4, group_size: 32}]\n"
REQUEST = {"resume": False, "fresh": False, "measure": True, "long": False, "trust_remote_code": False}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny.save("llama", tmp_path_factory.mktemp("request") / "model", dtype=torch.bfloat16))


def test_problems_of_all_sources_are_found_at_once_and_nothing_is_predicted(model, tmp_path):
    recipe = parse_recipe(RECIPE, overrides=["limits.memory=1", "eval.data.source=nowhere.txt"])
    planned = request.plan_run(recipe, model, tmp_path, device="mps", **REQUEST)
    assert [problem.where for problem in planned.plan.problems] == ["memory"]
    places = [problem.where for problem in planned.problems]
    assert places == ["memory", "nowhere.txt", "model", "--device mps"]  # the model has no tokenizer
    assert planned.stages is None and planned.to_json()["predicted_stages"] is None
    assert [row["where"] for row in planned.to_json()["problems"]] == places


def test_a_run_that_is_too_long_is_a_problem_and_its_times_are_there(model, monkeypatch):
    stages = [{"name": "sweep 0", "parts": [1e6], "known": True}]
    monkeypatch.setattr(request, "predict_stages", lambda *_: stages)
    recipe = parse_recipe(RECIPE, overrides=["eval.data.source=random", "eval.data.length=8", "eval.data.samples=1"])
    planned = request.plan_run(recipe, model, None, device="cpu", **REQUEST)
    assert [problem.where for problem in planned.problems] == ["time"] and planned.stages == stages
    assert not planned.plan.problems
    allowed = request.plan_run(recipe, model, None, device="cpu", **{**REQUEST, "long": True})
    assert not allowed.problems and allowed.stages == stages
