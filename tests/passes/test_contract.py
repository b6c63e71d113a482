"""Every pass keeps the contract, on a dense Llama and on a mixture of experts."""

from __future__ import annotations

import importlib
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

import counting_passes
import pytest
import tiny
import torch
import yaml
from counting_passes import DECISIONS, Chooses, ChoosesGates, Counting, Decides, Forgetful, LeavesOut
from installed import announce
from raising import raises

from compressor.engine.block_view import BlockView
from compressor.engine.line_facts import SET_BY_ENGINE
from compressor.engine.plan import make_plan
from compressor.errors import PassError
from compressor.evaluation.sections import WeightRow
from compressor.passes import awq, find_pass
from compressor.passes.bct import BCT
from compressor.passes.gptq import GPTQ
from compressor.passes.llm_int8 import LLMInt8
from compressor.passes.rtn import RTN
from compressor.process import child
from compressor.protocol import WeightPass
from compressor.protocol.views import Recorded
from compressor.recipe.recipe import parse_recipe
from compressor.run import compress
from compressor.testing import check_pass, recipe_for, sweep, weight_hashes

GPTQ_SETTINGS = {"bits": 4, "group_size": 32, "min_tokens_per_expert": 4}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("gptq", GPTQ(**GPTQ_SETTINGS)),
        pytest.param("rtn", RTN(bits=8, group_size=-1), marks=pytest.mark.slow),
        pytest.param("llm_int8", LLMInt8(), marks=pytest.mark.slow),
        pytest.param("bct", BCT(bits=4, activations="static", only=("*", "@embedding")), marks=pytest.mark.slow),
        pytest.param(
            "bct", BCT(activations="dynamic", only=("*", "@activation", "@norm", "@softmax")), marks=pytest.mark.slow
        ),
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


@pytest.mark.slow
def test_experts_are_stored_one_by_one_and_starved_ones_are_named(tmp_path):
    model = tiny.save("mixtral", tmp_path / "model", dtype=torch.bfloat16)
    settings = GPTQ(**{**GPTQ_SETTINGS, "min_tokens_per_expert": 64, "only": ("@experts",)})
    report = check_pass("gptq", settings, model, tmp_path, "@experts")
    assert {weight["role"] for weight in report["weights"]} == {"experts"}
    assert len(report["weights"]) == 2 * 4 * 3
    assert any(warning["code"] == "sparse-expert" for warning in report["warnings"])


@contextmanager
def announced(site, folder, points):
    """Passes of modules in a folder, found by entry points, and a server whose processes find them.

    points  name of a pass -> its module and class
    """
    with pytest.MonkeyPatch.context() as patch:
        announce(patch, site, {"compressor.passes": points}, folder)
        patch.setattr(child, "_server", None)
        with child.started_early():
            yield


@pytest.fixture(scope="module")
def counting(tmp_path_factory):
    """The passes of counting_passes.py."""
    names = ("Counting", "Forgetful", "LeavesOut", "Decides", "Chooses")
    points = {name.lower(): f"counting_passes:{name}" for name in names}
    with announced(tmp_path_factory.mktemp("site"), Path(counting_passes.__file__).parent, points):
        yield


def examples():
    """The Python code of docs/adding-a-pass.md."""
    page = Path(__file__).parents[2] / "docs" / "adding-a-pass.md"
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_the_pass_of_the_guide_keeps_the_contract(tmp_path):
    (tmp_path / "guide_pass.py").write_text(examples()[0])
    model = tiny.save("llama", tmp_path / "model", dtype=torch.bfloat16)
    with announced(tmp_path, tmp_path, {"my_method": "guide_pass:MyMethod"}):
        settings = importlib.import_module("guide_pass").MyMethod(clip=0.9)
        report = check_pass("my_method", settings, model, tmp_path, "*_proj")
    assert all(0.001 < row["output_error"] < 0.1 for row in report["weights"])
    assert report["verification"]["max_logit_difference"] == 0.0


def test_a_pass_of_ours_works_from_another_package(tmp_path):
    """awq under another name: no other file knows it, though it reads producers and changes tensors that stay dense."""
    shutil.copyfile(awq.__file__, tmp_path / "scaled_pass.py")
    model, hashes = tiny.save("llama", tmp_path / "model", dtype=torch.bfloat16), {}
    with announced(tmp_path, tmp_path, {"scaled": "scaled_pass:AWQ"}):
        for name in ("awq", "scaled"):
            steps = [
                {"pass": name, "bits": 3, "group_size": 32, "steps": 4, "rounding": "later"},
                {"pass": "gptq", "bits": 3, "group_size": 32},
            ]
            tree = {"version": 1, "data": {"source": "random", "samples": 4, "length": 16}, "steps": steps}
            compress(parse_recipe(yaml.safe_dump(tree).encode()), str(model), tmp_path / name, measure=False)
            hashes[name] = weight_hashes(tmp_path / name)
    assert hashes["scaled"] == hashes["awq"]


def test_the_guide_overrides_what_a_pass_has():
    for code in examples():
        found = {}
        exec(compile(code, "adding-a-pass.md", "exec"), found)
        (of_guide,) = [value for name, value in found.items() if name.startswith("My")]
        methods = {name for name, value in vars(of_guide).items() if callable(value) and not name.startswith("_")}
        assert methods and methods <= set(dir(of_guide.__mro__[1])), methods


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("output_eror", "near-name"),
        ("weight_errors", "near-name"),
        ("bytes_after", "taken-name"),
        ("spec", "taken-name"),
    ],
)
def test_a_misspelt_name_of_a_record_ends_the_sweep_at_the_first_weight(name, reason, tmp_path, monkeypatch):
    model = tiny.save("llama", tmp_path / "model", dtype=torch.bfloat16)
    put = BlockView.put
    monkeypatch.setattr(BlockView, "put", lambda self, *given, **record: put(self, *given, **record, **{name: 1}))
    with raises(PassError, where="model.layers.0.self_attn.q_proj", reason=reason, name=name):
        sweep(recipe_for("rtn", RTN(group_size=32)), model, tmp_path / "work")


def test_a_pass_may_take_no_column_of_a_row_for_a_value_of_its_own():
    """`seconds` is in the journal's row alone."""
    assert WeightRow.__annotations__.keys() - Recorded.__annotations__.keys() | {"seconds"} == SET_BY_ENGINE


def test_a_pass_that_says_nothing_of_its_format_is_refused(tmp_path, monkeypatch):
    model = tiny.save("llama", tmp_path / "model", dtype=torch.bfloat16)
    monkeypatch.setattr(RTN, "format_params", WeightPass.format_params)
    plan = make_plan(recipe_for("rtn", RTN(only=("q_proj",))), str(model))
    assert [(type(problem), problem.data["reason"]) for problem in plan.problems] == [
        (PassError, "no-format-params")
    ] * 2


@pytest.mark.slow
@pytest.mark.parametrize("in_place", [False, True])
def test_the_state_of_a_rewrite_is_there_after_a_kill(in_place, counting, tmp_path):
    """Its redefinition does not follow, so parts that are done are not even loaded again."""
    model = tiny.save("llama", tmp_path / "model", num_hidden_layers=4)
    check_pass("counting", Counting(in_place=in_place), model, tmp_path, "*")


def test_a_state_that_is_kept_elsewhere_is_found_out(counting, tmp_path):
    model = tiny.save("llama", tmp_path / "model", num_hidden_layers=4)
    with pytest.raises(AssertionError, match="a killed and resumed run writes another"):
        check_pass("forgetful", Forgetful(), model, tmp_path, "*")


def test_a_selected_weight_that_a_pass_says_nothing_of_ends_the_run(counting, tmp_path):
    model = tiny.save("llama", tmp_path / "model")
    with raises(PassError, where="model.layers.0.self_attn.q_proj", reason="left-out", weights=7):
        sweep(recipe_for("leavesout", LeavesOut()), model, tmp_path / "work")


@pytest.mark.parametrize(
    ("name", "settings", "decision"), [("decides", Decides(), {"parts": 4}), ("chooses", Chooses(), {"chosen": True})]
)
def test_a_pass_that_only_writes_its_choice_gets_its_decision(name, settings, decision, counting, llama, tmp_path):
    """Nothing has to be set besides: `decides` follows from the method."""
    DECISIONS.clear()
    swept = sweep(recipe_for(name, settings), llama, tmp_path / "work")
    assert DECISIONS[-1] == decision
    assert [warning.where for warning in swept.plan.warnings if warning.code == "sizes-undecided"] == ["steps.0"]


def test_a_pass_decides_exactly_if_it_has_a_choice():
    assert Decides().decides and Chooses().decides and ChoosesGates().decides
    assert not (LeavesOut().decides or Counting().decides)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny.save("llama", tmp_path_factory.mktemp("contract") / "model")


@pytest.mark.parametrize("role", ["@activation", "@norm", "@softmax"])
@pytest.mark.parametrize("name", ["awq", "dsformer", "gptq", "llm_int8", "low_rank", "rtn"])
def test_a_function_is_refused_by_passes_that_store_matrices(name, role, llama):
    recipe = recipe_for(name, find_pass(name)(only=(role,)))
    problems = make_plan(recipe, str(llama), prove=False).problems
    assert problems and {problem.data["reason"] for problem in problems} <= {"other-kind", "no-producer"}
