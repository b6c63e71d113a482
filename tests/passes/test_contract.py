"""Every pass keeps the contract, on a dense Llama and on a mixture of experts."""

from __future__ import annotations

import pytest
import tiny
import torch
from counting_passes import SEEN, Counting, Forgetful, LeavesOut
from raising import raises

from compressor import passes, testing
from compressor.engine.sweeper import Sweeper
from compressor.errors import PassError
from compressor.passes.bct import BCT
from compressor.passes.gptq import GPTQ
from compressor.passes.llm_int8 import LLMInt8
from compressor.passes.rtn import RTN
from compressor.storage.files import file_sha256
from compressor.testing import check_pass, recipe_for, sweep

GPTQ_SETTINGS = {"bits": 4, "group_size": 32, "min_tokens_per_expert": 4}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("gptq", GPTQ(**GPTQ_SETTINGS)),
        pytest.param("rtn", RTN(bits=8, group_size=-1), marks=pytest.mark.slow),
        ("llm_int8", LLMInt8()),
        pytest.param("bct", BCT(bits=4, activations="static", only=("*", "@embedding")), marks=pytest.mark.slow),
        ("bct", BCT(activations="dynamic", only=("*", "@activation", "@norm", "@softmax"))),
        pytest.param("bct", BCT(budget_bits=5.5, only=("*", "@embedding")), marks=pytest.mark.slow),
    ],
)
def test_pass_keeps_the_contract(name, settings, tmp_path):
    model = tiny.save("llama", tmp_path / "model", dtype=torch.bfloat16)
    report = check_pass(name, settings, model, tmp_path, "*_proj")
    assert report["verification"]["max_logit_difference"] == 0.0


@pytest.mark.slow
def test_a_pass_whose_sizes_calibration_decides_keeps_the_contract(tmp_path):
    """plan can't know how many columns are kept; the one or two found here stay within its margin."""
    model = tiny.save("llama", tmp_path / "model", dtype=torch.bfloat16)
    settings = LLMInt8(outliers="calibrated", threshold=3.6, only=("q_proj", "down_proj"))
    report = check_pass("llm_int8", settings, model, tmp_path, "q_proj")
    assert report["route"]["name"] == "custom" and report["verification"]["max_logit_difference"] == 0.0
    assert any(row["kept_columns"] for row in report["weights"])


def test_experts_are_stored_one_by_one_and_starved_ones_are_named(tmp_path):
    model = tiny.save("mixtral", tmp_path / "model", dtype=torch.bfloat16)
    settings = GPTQ(**{**GPTQ_SETTINGS, "min_tokens_per_expert": 64, "only": ("@experts",)})
    report = check_pass("gptq", settings, model, tmp_path, "@experts")
    assert {weight["role"] for weight in report["weights"]} == {"experts"}
    assert len(report["weights"]) == 2 * 4 * 3
    assert any(warning["code"] == "sparse-expert" for warning in report["warnings"])


@pytest.fixture
def counting(monkeypatch):
    """Names of passes of another module, as if they were built in."""
    for name in ("Counting", "Forgetful", "LeavesOut"):
        monkeypatch.setitem(passes.BUILTIN, name.lower(), f"counting_passes:{name}")


def interrupted_as_often_as_possible(name, settings, tmp_path):
    """Whether a run that is stopped after each part and resumed writes what one run writes."""
    model = tiny.save("llama", tmp_path / "model", num_hidden_layers=4)
    recipe = recipe_for(name, settings)
    hashes = [
        [file_sha256(file) for file in sweep(recipe, model, tmp_path / str(stops), stops=stops).files]
        for stops in (False, True)
    ]
    return hashes[0] == hashes[1]


@pytest.mark.parametrize("in_place", [False, True])
def test_the_state_of_a_rewrite_is_there_after_an_interruption(in_place, counting, tmp_path):
    """Its redefinition does not follow, so parts that are done are not even loaded again."""
    assert interrupted_as_often_as_possible("counting", Counting(in_place=in_place), tmp_path)


def test_a_state_that_is_kept_elsewhere_is_found_out(counting, monkeypatch, tmp_path):
    """A new process begins with an empty list, as here each resumed sweep does."""
    monkeypatch.setattr(testing, "Sweeper", lambda *args: SEEN.clear() or Sweeper(*args))
    assert not interrupted_as_often_as_possible("forgetful", Forgetful(), tmp_path)


def test_a_selected_weight_that_a_pass_says_nothing_of_ends_the_run(counting, tmp_path):
    model = tiny.save("llama", tmp_path / "model")
    with raises(PassError, where="model.layers.0.self_attn.q_proj", reason="left-out", weights=7):
        sweep(recipe_for("leavesout", LeavesOut()), model, tmp_path / "work")
