"""AWQ: its formulas against slow ones, its fold in an artifact, and the contract with both roundings."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import compressor
from compressor.artifact.verify import verify
from compressor.engine.plan import make_plan
from compressor.methods.quantization.hessian import inverse_factor
from compressor.model.weights import Producer, ScaledParameter
from compressor.passes.awq import AWQ, factors_of, feedback_shares, fold
from compressor.recipe.recipe import parse_recipe
from compressor.run import compress
from compressor.testing import check_pass

SCALED = {"pass": "awq", "bits": 3, "group_size": 32, "steps": 5}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A Llama in float32 with large input features, so that scaling pays."""
    path = tmp_path_factory.mktemp("awq") / "model"
    dense = tiny.build("llama")
    with torch.no_grad():
        for layer in dense.model.layers:
            layer.input_layernorm.weight[::7] *= 20
            layer.post_attention_layernorm.weight[3::5] *= 20
    dense.save_pretrained(path)
    return path


def run(model, output, *steps, **sections):
    tree = {
        "version": 1,
        "name": "awq",
        "data": {"source": "random", "samples": 8, "length": 16},
        "steps": list(steps),
        "report": {"html": False},
        **sections,
    }
    return compress(parse_recipe(yaml.safe_dump(tree).encode(), "awq.yaml"), str(model), output, measure=False)


class View:
    """The part of a view that folding needs."""

    def __init__(self, **parameters):
        self.parameters = parameters

    def read(self, name):
        return self.parameters[name].clone()

    def write(self, name, value):
        self.parameters[name] = value


def test_factors_are_powers_of_the_magnitudes_around_one():
    magnitude = torch.tensor([4.0, 1.0, 0.25], dtype=torch.float64)
    assert torch.equal(factors_of(magnitude, 0.0), torch.ones(3))
    torch.testing.assert_close(factors_of(magnitude, 0.5), torch.tensor([2.0, 1.0, 0.5]))
    assert torch.isfinite(factors_of(torch.zeros(3, dtype=torch.float64), 0.9)).all()


@pytest.mark.parametrize("dead", [[], [2, 5]])
def test_shares_that_feedback_leaves_are_those_of_the_whole_factor(dead):
    x = torch.randn(64, 12, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 3, 12)
    x[:, dead] = 0
    hessian = x.t() @ x
    live = hessian.clone()
    live.diagonal()[dead] = hessian.diagonal()[hessian.diagonal() > 0].mean()
    order = torch.argsort(live.diagonal(), descending=True, stable=True)
    factor = inverse_factor(live[order][:, order], 0.01, 1.0, "w")
    expected = torch.empty(12)
    expected[order] = 1 / factor.upper.diagonal()
    torch.testing.assert_close(feedback_shares(hessian), expected)


def test_a_gain_that_is_stored_less_one_is_divided_as_a_whole():
    """Slice 1 makes two features; slice 2 makes none and stays."""
    view = View(norm=torch.tensor([1.0, 3.0, 5.0]), reader=torch.ones(1, 3))
    producer = Producer(
        "norm", "norm", (ScaledParameter("norm", 0, 1.0),), (ScaledParameter("reader", 1),), slices=(0, 1, 1)
    )
    fold(view, producer, torch.tensor([2.0, 4.0, 7.0]))
    assert view.parameters["norm"].tolist() == [0.0, 0.0, 5.0]
    assert view.parameters["reader"].tolist() == [[2.0, 4.0, 4.0]]


def test_the_exponent_is_the_one_with_the_least_error_of_the_block(model, tmp_path):
    """Against a slow search: whole models rounded by hand, one exponent after the other, for the first norm alone."""
    report = run(
        model,
        tmp_path / "out",
        {**SCALED, "only": [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"], "rounding": "later"},
    )
    rows = [row for row in report["weights"] if row["name"].startswith("model.layers.0.self_attn.")]
    assert {row["scaled_in"] for row in rows} == {"model.layers.0.input_layernorm"}
    assert rows[0]["error_ratio"] < 0.99
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    scaled = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    gain = [m.model.layers[0].input_layernorm.weight.detach() for m in (dense, scaled)]
    factors = gain[0] / gain[1]
    assert float(factors.max() * factors.min()) == pytest.approx(1, rel=1e-4)
    for name in ("q_proj", "k_proj", "v_proj"):
        first, second = (getattr(m.model.layers[0].self_attn, name).weight.detach() for m in (dense, scaled))
        torch.testing.assert_close(second, first * factors, rtol=1e-5, atol=1e-7)


def test_scaling_without_rounding_keeps_what_the_model_computes(model, tmp_path):
    run(model, tmp_path / "out", {**SCALED, "rounding": "later"})
    ids = torch.randint(3, 96, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        dense, scaled = (AutoModelForCausalLM.from_pretrained(path)(ids).logits for path in (model, tmp_path / "out"))
    torch.testing.assert_close(scaled, dense, rtol=1e-4, atol=1e-4 * float(dense.abs().max()))


def test_scaled_weights_lose_less_than_plain_ones(model, tmp_path):
    ids = torch.randint(3, 96, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        dense = AutoModelForCausalLM.from_pretrained(model)(ids).logits
        errors = []
        for name, step in (("awq", SCALED), ("rtn", {"pass": "rtn", "bits": 3, "group_size": 32})):
            run(model, tmp_path / name, step)
            errors.append(float((compressor.load(tmp_path / name, kernels="reference")(ids).logits - dense).norm()))
    assert errors[0] < 0.95 * errors[1]


@pytest.mark.slow
def test_gptq_can_round_what_awq_has_scaled_in_one_sweep_or_two(model, tmp_path):
    steps = [{**SCALED, "rounding": "later"}, {"pass": "gptq", "bits": 3, "group_size": 32}]
    together = run(model, tmp_path / "one", {"sweep": steps})
    apart = run(model, tmp_path / "two", *steps)
    for report, name in ((together, "one"), (apart, "two")):
        assert report["status"] == "ok" and not report["verification"]["problems"]
        manifest = json.loads((tmp_path / name / "compress_manifest.json").read_text())
        rewritten = manifest["source"]["rewritten"]
        norms = {f"model.layers.{n}.{norm}_layernorm.weight" for n in (0, 1) for norm in ("input", "post_attention")}
        assert set(rewritten) == norms and all(error > 0 for error in rewritten.values())
        assert all(error is not None for error in manifest["source"]["relative_errors"].values())


def test_verification_finds_a_gain_that_was_changed_after_the_run(model, tmp_path):
    run(model, tmp_path / "out", SCALED)
    file = tmp_path / "out" / "model.safetensors"
    with safe_open(file, "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        metadata = opened.metadata()
    tensors["model.layers.1.input_layernorm.weight"] *= 1.5
    save_file(tensors, file, metadata)
    problems = verify(tmp_path / "out", None, sealed=False, deep=True, source=model).problems
    assert any("model.layers.1.input_layernorm.weight" in problem for problem in problems)


@pytest.mark.parametrize("rounding", ["nearest", pytest.param("later", marks=pytest.mark.slow)])
def test_pass_keeps_the_contract(rounding, tmp_path):
    model = tiny.save("llama", tmp_path / "model", dtype=torch.bfloat16)
    settings = AWQ(group_size=32, rounding=rounding, steps=3)
    report = check_pass("awq", settings, model, tmp_path, "*q_proj")
    assert report["verification"]["max_logit_difference"] == 0.0


@pytest.mark.slow
def test_experts_and_their_router_are_scaled_together(tmp_path):
    model = tiny.save("mixtral", tmp_path / "model", dtype=torch.bfloat16)
    report = check_pass("awq", AWQ(group_size=32, steps=3), model, tmp_path, "@experts")
    scaled = {row["scaled_in"] for row in report["weights"] if row["role"] == "experts"}
    assert "model.layers.0.post_attention_layernorm" in scaled and "model.layers.0.mlp.experts.gate_up_proj" in scaled


def test_a_model_without_such_producers_is_refused_by_plan(tmp_path):
    model = tiny.save("bert", tmp_path / "model")
    step = {**SCALED, "only": ["@mlp"]}
    tree = {"version": 1, "data": {"source": "random", "samples": 2, "length": 8}, "steps": [step]}
    plan = make_plan(parse_recipe(yaml.safe_dump(tree).encode()), str(model))
    assert [problem.data["reason"] for problem in plan.problems] == ["no-producer"]


def test_scaling_for_a_step_that_does_not_come_is_a_warning(model):
    def codes(*steps):
        tree = {"version": 1, "data": {"source": "random", "samples": 2, "length": 8}, "steps": list(steps)}
        plan = make_plan(parse_recipe(yaml.safe_dump(tree).encode()), str(model), prove=False)
        assert not plan.problems
        return {warning.code for warning in plan.warnings}

    later, gptq = {**SCALED, "rounding": "later"}, {"pass": "gptq", "bits": 3, "group_size": 32}
    apart = ({**later, "only": ["@mlp"]}, {**gptq, "only": ["@attention"]})
    assert "nothing-stored" in codes(later) & codes(*apart)
    assert "nothing-stored" not in codes({"sweep": [later, gptq]})
