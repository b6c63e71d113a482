"""Runs without the fork server: the processes that verify, evaluate and are killed are new interpreters."""

from __future__ import annotations

import json

import pytest
import tiny
import torch

from compressor.process import child
from compressor.process.fork_server import Forked
from compressor.recipe.recipe import parse_recipe
from compressor.run import compress
from compressor.testing import kill_at

pytestmark = pytest.mark.slow
RECIPE = b"""version: 1
steps: [{pass: rtn, bits: 4, group_size: 32}]
eval: {data: {source: random, samples: 2, length: 16}, metrics: [perplexity]}
report: {html: false}
"""


@pytest.fixture
def begun(monkeypatch):
    """The module of each process that is started, which is never forked: the server has other variables."""
    monkeypatch.setenv("UNKNOWN_TO_THE_SERVER", "1")
    modules, start = [], child.start

    def noted(program, arguments, request_end):
        process, *pipes = start(program, arguments, request_end)
        assert not isinstance(process, Forked)
        modules.append(arguments[1])
        return process, *pipes

    monkeypatch.setattr(child, "start", noted)
    return modules


def test_a_run_verifies_and_evaluates_in_new_interpreters(begun, tmp_path):
    model = tiny.save("llama", tmp_path / "model", dtype=torch.bfloat16)
    report = compress(parse_recipe(RECIPE), str(model), tmp_path / "out")
    assert report["verification"]["problems"] == [] and report["verification"]["max_logit_difference"] == 0.0
    assert report["metrics"]["perplexity"]["after"] > 1
    assert begun == ["compressor.artifact.verify", "compressor.evaluation.evaluate"]
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report


def test_a_run_in_a_new_interpreter_is_killed_and_resumed(begun, tmp_path):
    recipe, model = parse_recipe(RECIPE), tiny.save("llama", tmp_path / "model", dtype=torch.bfloat16)
    assert kill_at(2, recipe, model, tmp_path / "out", of="commits")
    assert begun == ["compressor.contract"]
    report = compress(recipe, str(model), tmp_path / "out", measure=False, resume=True)
    assert report["status"] == "ok" and report["run"]["resumed"] == [{"from_part": 2}]
