"""What a search may choose is a model that stock classes can be made of, so that no search ends in a refusal."""

from __future__ import annotations

import pytest
import tiny
import transformers as hf
import yaml
from raising import raises

from compressor.analysis import model_facts
from compressor.engine import plan as planning
from compressor.engine.plan import make_plan
from compressor.errors import ModelError, PreflightError
from compressor.methods.pruning.removal_trials import Losses
from compressor.model.redefined_structure import check_redefinition
from compressor.passes.greedy_removal import Search
from compressor.recipe.recipe import parse_recipe

AWKWARD = {
    "llama, 6 heads of 8 in 96": ("llama", {"hidden_size": 96, "num_attention_heads": 6, "head_dim": 8}),
    "llama, 8 heads": ("llama", {"hidden_size": 64, "num_attention_heads": 8}),
    "llama, 4 groups of 8 heads": ("llama", {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4}),
    "qwen3, 3 groups of 6 heads": ("qwen3", {"num_attention_heads": 6, "num_key_value_heads": 3}),
    "gemma3": ("gemma3", {"layer_types": ["full_attention"]}),
    "opt": ("opt", {}),
    "gpt2": ("gpt2", {}),
    "vit": ("vit", {}),
}
NARROW = ("llama, 6 heads of 8 in 96", "qwen3, 3 groups of 6 heads")  # of which also the stream is pruned


def plan_of(directory, *steps):
    data = {"source": "random", "samples": 4, "length": 16}
    tree = {"version": 1, "data": data, "steps": list(steps)}
    return make_plan(parse_recipe(yaml.safe_dump(tree).encode(), "t.yaml"), str(directory), prove=False)


def saved(family, directory, **config):
    groups = {"num_key_value_heads": config["num_attention_heads"]} if "num_attention_heads" in config else {}
    depth = {"n_layer": 1} if family == "gpt2" else {"num_hidden_layers": 1}
    return tiny.save(family, directory / "m", **depth, **{**groups, **config})


@pytest.mark.parametrize(
    ("case", "sites"), [*((case, ["heads"]) for case in AWKWARD), *((case, ["heads", "hidden"]) for case in NARROW)]
)
def test_every_number_of_heads_that_vtrans_may_keep_makes_a_stock_model(case, sites, tmp_path):
    family, config = AWKWARD[case]
    step = {"pass": "vtrans", "target": 0.1, "sites": sites, "export": "stock", "align": 16}
    plan = plan_of(saved(family, tmp_path, **config), step)
    if plan.problems:  # before the search
        assert [problem.data["reason"] for problem in plan.problems] == ["no-stock-model"]
        return
    (reshape,) = plan.reshapes
    settings, facts = reshape.step.settings, reshape.facts
    prunable = settings._prunable(facts)
    size = settings._size(facts, prunable)
    heads = next(part.counts for part in size.parts if part.kind == "heads")
    widths = [None] if "hidden" not in sites else [size.width, size.narrowest]
    for count in heads:
        for width in widths:
            kept = {prunable.name: list(range(count)) for prunable in prunable if prunable.kind == "heads"}
            decision = {"sites": kept, "hidden": None if width is None else list(range(width)), "removed": []}
            redefinition = settings.redefine(facts, decision)  # raises what a stock class refuses
            assert "compressed_shapes" not in redefinition.config


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", {}),
        ("qwen3", {"layer_types": ["sliding_attention", *["full_attention"] * 2], "use_sliding_window": True}),
        ("qwen3_moe", {"mlp_only_layers": [1]}),
        ("gpt2", {}),
    ],
)
def test_greedy_removal_ends_with_a_stock_model_whatever_the_losses_are(family, config, tmp_path):
    depth = {"n_layer": 3} if family == "gpt2" else {"num_hidden_layers": 3}
    step = {"pass": "greedy_removal", "tiers": ["blocks"], "export": "stock"}
    plan = plan_of(tiny.save(family, tmp_path / "m", **depth, **config), step)
    if plan.problems:
        assert [problem.data["reason"] for problem in plan.problems] in (["no-stock-model"], ["not-prunable"])
        return
    (reshape,) = plan.reshapes
    settings, facts = reshape.step.settings, reshape.facts
    prunables = facts.prunable()
    search = Search(
        settings,
        Losses(0.0, 0.0),
        lambda _gone: Losses(0.0, 0.0),
        lambda _gone: False,
        prunables,
        fits=lambda removed: settings._why_not_stock(facts, prunables, removed) is None,
    )
    search.walk(settings._candidates("blocks", prunables))
    removed = [name for name, units in search.removed.items() if units]
    decision = {"sites": {s.name: [*range(s.units)] for s in prunables if s.name not in removed}, "removed": removed}
    redefinition = settings.redefine(facts, {**decision, "hidden": None})
    after = check_redefinition(reshape.before, redefinition, "greedy_removal")
    assert removed and 1 <= after.block_count < 3


@pytest.mark.parametrize("tiers", [["sub_blocks"], ["blocks", "heads"]])
def test_parts_without_which_no_stock_model_exists_are_refused_by_plan(tiers, tmp_path):
    step = {"pass": "greedy_removal", "tiers": tiers, "export": "stock"}
    (problem,) = plan_of(tiny.save("llama", tmp_path / "m"), step).problems
    assert (problem.where, problem.data) == (
        "greedy_removal.tiers",
        {"reason": "tier-not-stock", "tier": tiers[-1]},
    )


def test_a_number_that_only_the_model_class_refuses_is_not_kept(tmp_path, monkeypatch):
    """As of a class whose config class has no rules: here Llama's attention refuses two heads."""
    made = hf.models.llama.modeling_llama.LlamaAttention.__init__

    def refusing(self, config, layer_idx):
        if config.num_attention_heads == 2:
            raise ValueError("two heads")
        made(self, config, layer_idx)

    monkeypatch.setattr(hf.models.llama.modeling_llama.LlamaAttention, "__init__", refusing)
    step = {"pass": "vtrans", "target": 0.1, "sites": ["heads"], "export": "stock"}
    model = tiny.save("llama", tmp_path / "m", num_attention_heads=4, num_key_value_heads=4)
    (reshape,) = plan_of(model, step).reshapes
    settings, facts = reshape.step.settings, reshape.facts
    assert [part.counts for part in settings._size(facts, settings._prunable(facts)).parts if part.kind == "heads"] == [
        [4, 1],
        [4, 1],
    ]


def test_a_config_that_transformers_refuses_is_a_problem_of_the_plan(tmp_path, monkeypatch):
    def wrong(source, *_):
        return {**source, "num_attention_heads": 5}

    monkeypatch.setattr(planning, "artifact_config", wrong)
    plan = plan_of(tiny.save("llama", tmp_path / "m"), {"pass": "rtn", "bits": 8, "group_size": -1})
    with raises(PreflightError, where="LlamaForCausalLM", reason="config-refused", format="compressed-tensors"):
        raise plan.problems[0]


@pytest.mark.parametrize(("schedule", "problems"), [("uniform", 0), ("variance", 1)])
def test_blocks_that_cannot_have_several_widths_are_refused_before_widths_are_chosen(
    schedule, problems, tmp_path, monkeypatch
):
    def one_width_inside(_structure, _residual, _all_params, widths):
        if any(first != second for first, second, _ in widths):
            raise ModelError("its branches write as many values as they read")

    monkeypatch.setattr(model_facts, "check_widths", one_width_inside)
    step = {"pass": "slicegpt", "sparsity": 0.25, "round_to": 1, "orientation": "per_site", "schedule": schedule}
    plan = plan_of(tiny.save("llama", tmp_path / "m"), {"pass": "fuse_norms"}, step)
    assert len(plan.problems) == problems
