"""Groups of columns in visiting order (the reference's desc_act): mathematics, stored index, export format."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import tiny
import torch
import yaml
from fresh import logits_without_this_package
from test_gptq import problem

import compressor
from compressor.artifact import verify
from compressor.artifact.findings import Findings
from compressor.engine.plan import make_plan
from compressor.errors import Interrupted, PreflightError
from compressor.methods.quantization.hessian import Gram, inverse_factor
from compressor.methods.quantization.uniform_grid import dequantize
from compressor.model.weights import Group, Weight
from compressor.passes.gptq import GPTQ, column_order, solve
from compressor.recipe.recipe import parse_recipe
from compressor.run import compress
from compressor.testing import weight_hashes

STEP = {"pass": "gptq", "bits": 4, "group_size": 32, "act_order": "group"}


class OneWeight:
    """The part of a view that solving one group needs."""

    dtype = torch.float32
    device = torch.device("cpu")

    def __init__(self, matrix):
        self._matrix, self.layers, self.records, self.warnings = matrix, [], [], []

    def matrix(self, weight):
        return self._matrix.clone()

    def put(self, weight, layer, **record):
        self.layers.append(layer)
        self.records.append(record)

    def warn(self, code, where, message, /, **data):
        self.warnings.append(code)


def solve_one(settings, matrix, gram):
    view = OneWeight(matrix)
    group = Group((Weight("w", "w.weight", "w.weight", tuple(matrix.shape), "mlp"),))
    settings._solve_group(view, group, gram)
    return view


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("refine_scales", [True, False])
def test_it_is_the_permuted_problem_solved_in_order_and_put_back(symmetric, refine_scales):
    weight, hessian = problem(3, rows=6, columns=96)
    weight, gram = weight.float(), Gram(hessian.float() * 128, 256)
    settings = GPTQ(**{k: v for k, v in STEP.items() if k != "pass"}, symmetric=symmetric, refine_scales=refine_scales)
    whole = gram.hessian()
    view = solve_one(settings, weight, gram)
    layer = view.layers[0]

    order = torch.argsort(whole.diagonal(), descending=True, stable=True)
    permuted = whole[order][:, order]
    plain = settings.model_copy(update={"act_order": "none"})
    upper = inverse_factor(permuted, 0.01, 1.0, "w").upper
    identity = torch.arange(96)
    solved = solve(weight[:, order], upper, permuted.diagonal(), identity, plain, 32, torch.float32)
    codes = torch.empty(6, 96)
    rebuilt = torch.empty(6, 96)
    for position, column in enumerate(order.tolist()):
        codes[:, column] = solved.codes.flatten(1)[:, position]
        rebuilt[:, column] = dequantize(solved.codes, solved.grid).flatten(1)[:, position]
        assert int(layer.weight_g_idx[column]) == position // 32
    assert torch.equal(layer.codes().float(), codes)
    if not refine_scales:
        assert torch.equal(layer.matrix(torch.float32), rebuilt)
    difference = weight - layer.matrix(torch.float32)
    error = float(((difference @ whole) * difference).sum() / ((weight @ whole) * weight).sum())
    assert view.records[0]["output_error"] == pytest.approx(error**0.5, rel=1e-3)
    assert view.records[0]["output_error"] < view.records[0]["output_error_rtn"]


def test_the_order_is_by_decreasing_energy_as_in_static():
    diagonal = torch.rand(64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(column_order(diagonal, "group", 32), column_order(diagonal, "static", 32))


def test_a_weight_that_falls_back_still_stores_the_index_the_plan_counted():
    weight, _ = problem(4)
    broken = Gram(torch.diag(torch.tensor([1.0] * 63 + [-1000.0])) * 128, 256)
    view = solve_one(GPTQ(group_size=32, act_order="group"), weight.float(), broken)
    assert view.warnings == ["not-positive-definite"] and view.records[0]["fallback"] == "rtn"
    assert view.layers[0].weight_g_idx.tolist() == [0] * 32 + [1] * 32


def test_whole_rows_need_no_index():
    settings = GPTQ(group_size=-1, act_order="group")
    assert settings.format_params(SimpleNamespace(in_features=64)) == {"bits": 4, "group_size": -1, "symmetric": True}


def recipe(export=None, **step):
    data = {"source": "random", "samples": 8, "length": 16}
    tree = {"version": 1, "data": data, "steps": [{**STEP, **step}], "report": {"html": False}, "export": export or {}}
    return parse_recipe(yaml.safe_dump(tree).encode())


@pytest.mark.slow
def test_an_interrupted_and_resumed_run_makes_an_artifact_that_loads_without_this_package(tmp_path, monkeypatch):
    model = tiny.save("llama", tmp_path / "m", dtype=torch.bfloat16)
    units = []

    def interrupt(event):
        units.extend([event] if event["event"] == "part" else [])
        if len(units) == 3:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        compress(recipe(), str(model), tmp_path / "out", measure=False, emit=interrupt)
    report = compress(recipe(), str(model), tmp_path / "out", measure=False, resume=True)
    assert report["run"]["resumed"]
    assert report["route"]["name"] == "custom" and "act_order: group" in report["route"]["reason"]
    predicted, actual = report["sizes"]["predicted_bytes"], report["sizes"]["after_bytes"]
    assert abs(predicted - actual) <= 0.02 * actual
    verified = Findings.from_json(report["verification"])
    with monkeypatch.context() as patch:  # the bytes are what is compared here; one verification is enough
        patch.setattr(verify, "verify_in_child", lambda *args, **options: verified)
        compress(recipe(), str(model), tmp_path / "whole", measure=False)
    assert weight_hashes(tmp_path / "out") == weight_hashes(tmp_path / "whole")
    own = compressor.load(tmp_path / "out", kernels="reference")
    down = own.model.layers[0].mlp.down_proj
    assert sorted(down.weight_g_idx.tolist()) == [0] * 32 + [1] * 32
    assert down.weight_g_idx.tolist() != [0] * 32 + [1] * 32
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["compressed_weights"]["model.layers.0.mlp.down_proj"]["spec"]["act_order_index"] is True
    expected = own(input_ids=torch.arange(8).view(1, 8)).logits
    assert torch.equal(logits_without_this_package(tmp_path / "out", tmp_path), expected)


@pytest.mark.parametrize(
    ("family", "step", "export", "where", "reason"),
    [
        ("llama", {}, {"stock_only": True}, "export", "no-stock-loader"),
        ("mixtral", {"only": ["@experts"]}, {}, "model.layers.0.block_sparse_moe.experts.0.w1", "no-custom-experts"),
    ],
)
def test_plan_refuses_what_cannot_hold_the_index_and_says_why(family, step, export, where, reason, tmp_path):
    model = tiny.save(family, tmp_path / "m", dtype=torch.bfloat16)
    plan = make_plan(recipe(export, **step), str(model), prove=False)
    (problem,) = plan.problems
    assert isinstance(problem, PreflightError) and (problem.where, problem.data["reason"]) == (where, reason)
    assert problem.data["weight"] == next(row.name for row in plan.rows)
    assert not make_plan(recipe(export, **step, act_order="static"), str(model), prove=False).problems
