"""dsformer and low_rank from recipe to artifact: what is chosen, what stays dense, and what is refused."""

from __future__ import annotations

import pytest
import tiny
import torch
import yaml
from raising import raises
from safetensors.torch import load_file

import compressor
from compressor.engine.plan import make_plan
from compressor.errors import RecipeError
from compressor.methods.factorization.joint_training import StraightThrough, train
from compressor.methods.factorization.low_rank import dense_bytes
from compressor.passes.dsformer import DSFormer
from compressor.passes.low_rank import LowRank
from compressor.recipe.recipe import parse_recipe, recipe_folders
from compressor.run import compress
from compressor.testing import check_pass

SMALL = {"source": "random", "samples": 16, "length": 32}


def recipe(*steps, **sections):
    tree = {"version": 1, "name": "test", "data": SMALL, "steps": list(steps), "report": {"html": False}, **sections}
    return parse_recipe(yaml.safe_dump(tree).encode(), "test.yaml")


def plan_of(family, tmp_path, *steps, **config):
    model = tiny.save(family, tmp_path / family, dtype=torch.bfloat16, **config)
    return make_plan(recipe(*steps), str(model), prove=False)


@pytest.mark.parametrize(
    ("step", "data"),
    [
        ({"pass": "dsformer", "atoms": 8}, {"reason": "half-size"}),
        ({"pass": "dsformer", "atoms": 8, "k": 9}, {"reason": "too-few-atoms", "k": 9, "atoms": 8}),
        ({"pass": "dsformer", "atoms": 8, "k": 2, "ratio": 0.5}, {"reason": "ratio-and-atoms"}),
        ({"pass": "dsformer", "metric": "weight", "refine_steps": 5}, {"reason": "refining-without-data"}),
        ({"pass": "dsformer", "ratio": 1.0}, {"reason": "less-than", "lt": 1}),
        ({"pass": "low_rank", "ratio": 0.5, "energy": 0.9}, {"reason": "several-rules", "rules": ["ratio", "energy"]}),
        ({"pass": "low_rank", "rank": 4, "budget": 900}, {"reason": "several-rules", "rules": ["rank", "budget"]}),
    ],
)
def test_settings_that_contradict_each_other_are_refused(step, data):
    with raises(RecipeError, **data):
        recipe(step)


def test_data_is_read_only_for_the_metric_of_outputs():
    for name in ("dsformer", "low_rank"):
        assert recipe({"pass": name}).reads_data and not recipe({"pass": name, "metric": "weight"}).reads_data


@pytest.mark.parametrize("step", [{"pass": "dsformer", "ratio": 0.6}, {"pass": "low_rank", "rank": 4}])
@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "phi3", "gpt_neox", "bert", "vit"])
def test_families_are_planned_with_the_modeling_file(family, step, tmp_path):
    plan = plan_of(family, tmp_path, step)
    assert not plan.problems and plan.export_format.name == "custom"
    assert all(row.bytes_after < row.bytes_before for row in plan.rows if row.format_after != "dense")


def test_what_cannot_be_factorized_is_refused_by_name(tmp_path):
    (problem,) = plan_of("mixtral", tmp_path, {"pass": "dsformer"}).problems
    assert ".experts." in problem.where
    assert problem.data == {"reason": "expert-format", "format_name": "sparse_factor_linear"}
    (problem,) = plan_of("llama", tmp_path, {"pass": "dsformer", "only": ["q_proj", "@embedding"]}).problems
    assert (problem.data["reason"], problem.data["weight"]) == ("other-kind", "model.embed_tokens")
    problems = plan_of("llama", tmp_path, {"pass": "dsformer", "only": ["down_proj"], "block_size": 24}).problems
    assert len(problems) == 2 and problems[0].where == "model.layers.0.mlp.down_proj"
    assert problems[0].data == {"block_size": 24, "inputs": 64, "near": [8, 16, 32]}
    tied = {"pass": "low_rank", "energy": 0.9, "only": ["@head"]}
    (problem,) = plan_of("qwen3", tmp_path, tied).problems
    assert (problem.where, problem.data["reason"], problem.data["weight"]) == ("steps.0", "undecided-tie", "lm_head")
    (problem,) = plan_of("llama", tmp_path, {"pass": "low_rank", "budget": 100}).problems
    found = {"reason": "budget-too-small", "budget": 100, "matrices": 14, "rank": 1, "least": 2048}
    assert (problem.where, problem.data) == ("steps.0", found)
    (problem,) = plan_of("llama", tmp_path, {"pass": "low_rank"}, {"pass": "rtn", "bits": 8, "group_size": -1}).problems
    found = {
        "reason": "stored-already",
        "pass": "rtn",
        "earlier": "steps.0",
        "weights": 14,
        "weight": problem.data["weight"],
    }
    assert (problem.where, problem.data) == ("steps.1", found)


def test_what_would_grow_is_planned_dense_and_free_for_another_step(tmp_path):
    rank = {"pass": "low_rank", "rank": 12, "only": ["*_proj"]}  # k and v, 16 x 32, break even below 11
    plan = plan_of("llama", tmp_path, rank, {"pass": "rtn", "bits": 8, "group_size": -1, "only": ["{k,v}_proj"]})
    assert not plan.problems
    formats = {(row.name.rpartition(".")[2], row.pass_name): row.format_after for row in plan.rows}
    assert formats["q_proj", "low_rank"] == "low_rank_linear" and formats["k_proj", "low_rank"] == "dense"
    assert formats["k_proj", "rtn"] == "packed_linear"
    grown = plan_of("llama", tmp_path, {"pass": "dsformer", "atoms": 32, "k": 32})
    assert {row.format_after for row in grown.rows} == {"dense"} and grown.export_format.name == "dense"


def test_plan_counts_a_weight_that_may_stay_dense_as_dense(tmp_path):
    certain = plan_of("llama", tmp_path, {"pass": "dsformer", "ratio": 0.5})
    unsure = plan_of("llama", tmp_path, {"pass": "dsformer", "ratio": 0.5, "max_rel_error": 0.1})
    for few, many in zip(certain.rows, unsure.rows, strict=True):
        assert few.bytes_after <= 0.5 * dense_bytes(few.shape) < many.bytes_after == many.bytes_before
    assert certain.weight_bytes < unsure.weight_bytes
    assert [warning.code for warning in unsure.warnings] == ["sizes-undecided"]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Attention by dsformer, refined, where the error allows it; the MLP by low rank of what energy needs."""
    place = tmp_path_factory.mktemp("mixed")
    model = tiny.save("gpt2", place / "m", dtype=torch.bfloat16)
    attention = {"pass": "dsformer", "only": ["@attention"], "max_rel_error": 0.25, "ratio": 0.5, "refine_steps": 20}
    mlp = {"pass": "low_rank", "only": ["@mlp"], "energy": 0.9, "values": "int8"}
    report = compress(recipe({"sweep": [attention, mlp]}), str(model), place / "out", measure=False)
    return model, place / "out", report


def test_the_better_form_is_stored_and_the_rest_stays_as_it_was(mixed):
    model, out, report = mixed
    assert report["verification"]["max_logit_difference"] == 0.0 and report["route"]["name"] == "custom"
    rows = {row["name"]: row for row in report["weights"]}
    before, after = load_file(model / "model.safetensors"), load_file(out / "model.safetensors")
    assert {row["form"] for row in rows.values()} >= {"sparse_factor_linear", "low_rank_linear"}
    for name, row in rows.items():
        if row["form"] == "dense":
            assert row["fallback"] == "dense" and row["relative_error"] > 0.25
            assert before[f"{name}.weight"].equal(after[f"{name}.weight"])
            assert row["bytes_after"] == dense_bytes(row["shape"])
            assert any(w["code"] == "stays-dense" and w["where"] == name for w in report["warnings"])
            continue
        assert f"{name}.weight" not in after and after[f"{name}.bias"].equal(before[f"{name}.bias"])
        assert row["bytes_after"] == sum(t.nbytes for key, t in after.items() if key.startswith(f"{name}.weight_"))
        assert row["output_error"] == pytest.approx(row["relative_error"] ** 0.5)
        if row["role"] == "mlp":
            assert row["relative_error"] <= 0.1 + 0.01  # 0.9 of the energy, and int8
        elif row["chosen"] == "low_rank":
            assert row["fallback"] == "svd"


def test_refining_lowers_the_loss_of_the_block_or_leaves_it(mixed):
    refined = [row for row in mixed[2]["weights"] if "refine_loss" in row]
    assert refined and all(row["refine_loss"] <= row["refine_loss_before"] for row in refined)


def test_layers_of_the_artifact_are_what_was_stored(mixed):
    _, out, report = mixed
    loaded = compressor.load(out, kernels="reference")
    for row in report["weights"]:
        if row["form"] != "dense":
            layer = loaded.get_submodule(row["name"])
            assert layer.format_name == row["form"] and layer.format_params() == row["spec"]
            assert [layer.out_features, layer.in_features] == row["shape"] and layer.bias is not None


@torch.enable_grad()
def test_gradients_pass_straight_through_to_entries_that_are_not_kept():
    draw = torch.Generator().manual_seed(0)
    atoms, target = torch.randn(2, 5, 4, generator=draw), torch.randn(6, 8, generator=draw)
    products = torch.stack([target[:, 4 * b : 4 * b + 4] @ atoms[b].t() for b in range(2)], 1)
    index = (products / atoms.norm(dim=2)).abs().topk(2).indices.sort().values
    values = (products / atoms.square().sum(2)).gather(2, index)
    module = StraightThrough(atoms, values, index, torch.eye(4).expand(2, 4, 4), torch.zeros(6))
    assert module.support().equal(index)
    x = torch.randn(30, 8, generator=draw)
    (module(x) - x @ target.t()).square().mean().backward()
    dropped = torch.ones_like(module.latent).scatter_(2, index, 0).bool()
    assert bool((module.latent.grad[dropped] != 0).all()) and bool(module.atoms.grad.any())
    losses = []
    for _ in range(2):  # the same seed, the same result
        again = StraightThrough(atoms, values, index, torch.eye(4).expand(2, 4, 4), None)
        batches = [x, x + 1]
        wanted = [batch @ target.t() for batch in batches]
        train([again], lambda b, m=again, xs=batches: m(xs[b]), wanted, 60, 1e-2, torch.Generator().manual_seed(1))
        losses.append(float((again(x) - wanted[0]).square().mean().detach()))
        found = again.factors()
        assert found[1].shape == values.shape and found[2].shape == index.shape
    assert losses[0] == losses[1] < 0.9 * float((module(x) - x @ target.t()).square().mean().detach())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("dsformer", DSFormer(ratio=0.5, values="int8", refine_steps=5)),
        ("low_rank", LowRank(budget=20_000)),
        ("low_rank", LowRank(ratio=0.4, metric="weight")),
    ],
)
@pytest.mark.parametrize(("family", "only"), [("llama", "*_proj"), ("gpt2", "c_*")])
def test_factorizing_passes_keep_the_contract(family, only, name, settings, tmp_path):
    model = tiny.save(family, tmp_path / "model", dtype=torch.bfloat16)
    report = check_pass(name, settings, model, tmp_path, only)
    assert report["verification"]["max_logit_difference"] == 0.0
    if settings == LowRank(budget=20_000):
        assert sum(row["bytes_after"] for row in report["weights"]) <= 20_000


@pytest.mark.slow
def test_a_run_that_leaves_everything_dense_gives_a_model_that_loads(tmp_path):
    model = tiny.save("bert", tmp_path / "m", dtype=torch.float32)
    report = compress(recipe({"pass": "low_rank", "energy": 0.99999}), str(model), tmp_path / "out", measure=False)
    assert {row["form"] for row in report["weights"]} == {"dense"}
    assert report["verification"]["max_logit_difference"] == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dsformer-50", "low-rank-50"])
def test_the_shipped_recipes_run_on_a_tiny_model(name, tmp_path):
    model = tiny.save("llama", tmp_path / "model", dtype=torch.float32)
    text = (recipe_folders()[0] / f"{name}.yaml").read_text()
    small = {"data": SMALL, "eval": {}, "report": {"html": False}}
    shipped = parse_recipe(yaml.safe_dump({**yaml.safe_load(text), **small}).encode(), "small.yaml")
    report = compress(shipped, str(model), tmp_path / "out", measure=False)
    assert {row["form"] for row in report["weights"]} <= {"sparse_factor_linear", "low_rank_linear"}
