"""What was found by running probe models is found once for a class and a config."""

from __future__ import annotations

import pytest
import tiny
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from compressor.engine.plan import make_plan
from compressor.model import remembered, structure
from compressor.recipe.recipe import parse_recipe

RECIPE = parse_recipe(yaml.safe_dump({"version": 1, "steps": [{"pass": "rtn", "bits": 8}]}).encode())


def test_a_second_plan_of_the_same_config_runs_no_probe_model(tmp_path, monkeypatch):
    runs = []
    trace = structure.trace
    monkeypatch.setattr(structure, "trace", lambda probes: runs.append(probes) or trace(probes))
    one = make_plan(RECIPE, str(tiny.save("llama", tmp_path / "one")))
    again = make_plan(RECIPE, str(tiny.save("llama", tmp_path / "again")))
    assert len(runs) == 1
    assert one.rows == again.rows and one.export_format == again.export_format
    make_plan(RECIPE, str(tiny.save("llama", tmp_path / "other", intermediate_size=160)))
    assert len(runs) == 2


def config(**values):
    return LlamaConfig(hidden_size=32, intermediate_size=64, num_attention_heads=4, **values)


def test_every_value_of_a_config_is_in_its_key():
    keys = {remembered.config_key(config(**values)) for values in ({}, {"rms_norm_eps": 1e-3}, {"added": [1, 2]})}
    eager = LlamaForCausalLM._from_config(config(num_hidden_layers=1), attn_implementation="eager").config
    sdpa = LlamaForCausalLM._from_config(config(num_hidden_layers=1), attn_implementation="sdpa").config
    assert len(keys) == 3 and remembered.config_key(eager) != remembered.config_key(sdpa)
    assert remembered.config_key(config()) in keys


def test_an_error_is_not_remembered(monkeypatch):
    answers = iter([1 / 3, 2 / 3])
    with pytest.raises(ZeroDivisionError):
        remembered.remembered("question", lambda: 1 / 0)
    assert remembered.remembered("question", lambda: next(answers)) == 1 / 3
    assert remembered.remembered("question", lambda: next(answers)) == 1 / 3


def test_the_oldest_answers_are_forgotten(monkeypatch):
    monkeypatch.setattr(remembered, "MOST", 2)
    for number in (1, 2, 1, 3):
        remembered.remembered(number, lambda number=number: number)
    assert list(remembered._known) == [1, 3]
