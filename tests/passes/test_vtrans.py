"""vtrans and greedy_removal as passes: what they promise, what they choose, and whole runs."""

from __future__ import annotations

import json
from math import prod

import model_in_memory
import pytest
import tiny
import torch
import yaml
from raising import raises
from safetensors.torch import load_file

from compressor.analysis.model_facts import facts_of
from compressor.analysis.pruning_proof import masked
from compressor.engine.plan import make_plan
from compressor.errors import ModelError, PassError, PreflightError, RecipeError
from compressor.methods.pruning.model_size import model_size
from compressor.methods.pruning.pruned_shapes import pruned_shapes
from compressor.model.structure import read_structure
from compressor.passes.greedy_removal import GreedyRemoval
from compressor.recipe.recipe import parse_recipe
from compressor.run import compress
from compressor.testing import check_pass, kill_at, weight_hashes

# few and long steps; tiny models have 64 MLP units
FAST = {"pass": "vtrans", "target": 0.3, "steps": 6, "mask_rate": 0.3, "samples": 4, "align": 4, "save_every": 2}
GREEDY = {"pass": "greedy_removal", "max_loss_increase": 0.01, "max_evaluations": 40}


def recipe(*steps, **sections):
    tree = {
        "version": 1,
        "name": "pruned",
        "data": {"source": "random", "samples": 8, "length": 16},
        "steps": list(steps),
        "report": {"html": False},
        **sections,
    }
    return parse_recipe(yaml.safe_dump(tree).encode(), "pruned.yaml")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny.save("llama", tmp_path_factory.mktemp("vtrans") / "model")


@pytest.fixture(scope="module")
def facts():
    found = {}

    def get(family, directory):
        if family not in found:
            found[family] = facts_of(read_structure(tiny.save(family, directory / family)), 0)
        return found[family]

    return get


def drop(prunables, seed=0):
    """A decision with other units in each prunable."""
    generator = torch.Generator().manual_seed(seed)
    kept = {
        s.name: sorted(torch.randperm(s.units, generator=generator)[: s.units - s.units // 3].tolist())
        for s in prunables
    }
    return {"sites": kept, "hidden": None, "removed": []}


def left(facts, prunables, decision):
    """Parameters of the pruned model by the shapes that are planned for it, tied ones once."""
    shapes = {**facts.shapes, **pruned_shapes(facts, prunables, decision)}
    return sum(prod(shape) for name, shape in shapes.items() if shape is not None and name not in facts.tied)


# sizes


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_the_size_is_that_of_the_tensors_that_are_left(family, facts, tmp_path):
    known = facts(family, tmp_path)
    prunables = known.prunable()
    size = model_size(known, prunables, measure="parameters", of="model", tokens=1)
    for seed in range(3):
        decision = drop(prunables, seed)
        if seed == 2:
            decision["sites"].pop(prunables[2].name)
            decision["removed"] = [prunables[2].name]
        counts = {prunable.name: len(decision["sites"].get(prunable.name, ())) for prunable in prunables}
        assert size.of(counts) == left(known, prunables, decision)
    blocks = model_size(known, prunables, measure="parameters", of="blocks", tokens=1)
    assert blocks.full == sum(prod(s) for name, s in known.shapes.items() if name.startswith(known.blocks))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_size_of_a_narrower_stream_is_that_of_the_tensors_that_are_left(family, facts, tmp_path):
    known = facts(family, tmp_path)
    prunables = known.prunable()
    size = model_size(known, prunables, measure="parameters", of="model", tokens=1, narrows=True)
    decision = {**drop(prunables), "hidden": list(range(3, 27))}
    counts = {name: len(units) for name, units in decision["sites"].items()}
    assert size.of(counts, 24) == left(known, prunables, decision)


def test_multiplications_are_those_of_matrices_and_attention(facts, tmp_path):
    known = facts("llama", tmp_path)
    prunables = known.prunable()
    size = model_size(known, prunables, measure="flops", of="model", tokens=100)
    # a block: queries and output 32 x 32, keys and values 16 x 32, an MLP of 3 x 64 x 32, 4 heads of 8 over 100 keys
    block = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32 + 2 * 100 * 4 * 8
    assert size.full == 2 * block + 96 * 32
    counts = {prunable.name: prunable.units for prunable in prunables}
    group = next(prunable.name for prunable in prunables if prunable.kind == "heads")
    assert size.full - size.of({**counts, group: 1}) == 2 * 16 * 32 + 2 * 8 * 32 + 2 * 100 * 2 * 8


# plan


def test_plan_shows_about_what_will_be_left_and_says_that_it_is_not_exact(llama):
    plan = make_plan(recipe(FAST), str(llama))
    assert not plan.problems
    before = plan.reshapes[0].to_json()
    blocks = sum(prod(info.shape) for name, info in plan.source.checkpoint.tensors.items() if ".layers." in name)
    assert 0.3 * blocks <= before["parameters_before"] - before["parameters_after"] < 0.34 * blocks
    assert [w.code for w in plan.warnings].count("sizes-undecided") == 1


@pytest.mark.parametrize(
    ("changes", "reachable"),
    [
        ({"target": 0.9, "min_ffn": 0.5}, 0.4),
        ({"sites": ["layers"], "protect_layers": [7]}, None),
        ({"sites": ["heads"], "target": 0.3}, 0.1),
    ],
)
def test_what_can_not_be_is_refused_with_what_can(changes, reachable, llama):
    plan = make_plan(recipe({**FAST, **changes}), str(llama), prove=False)
    (problem,) = plan.problems
    assert isinstance(problem, PreflightError)
    if reachable is None:
        assert (problem.where, problem.data) == ("vtrans.protect_layers", {"block": 7, "blocks": 2})
        return
    assert problem.where == "vtrans.target" and reachable <= problem.data["reachable"] < reachable + 0.1
    assert (problem.data["target"], problem.data["measure"]) == (changes["target"], "parameters")


def test_the_reachable_target_that_an_error_names_is_reached(llama):
    plan = make_plan(recipe({**FAST, "target": 0.9}), str(llama), prove=False)
    reachable = plan.problems[0].data["reachable"]
    assert not make_plan(recipe({**FAST, "target": reachable}), str(llama), prove=False).problems
    assert make_plan(recipe({**FAST, "target": reachable + 0.002}), str(llama), prove=False).problems


def test_families_without_the_structure_asked_for_are_refused(tmp_path):
    for family, changes, where in (("bert", {"sites": ["heads", "ffn", "hidden"]}, "bert"), ("mixtral", {}, "mlp")):
        plan = make_plan(recipe({**FAST, **changes}), str(tiny.save(family, tmp_path / family)), prove=False)
        assert len(plan.problems) == 1 and isinstance(plan.problems[0], ModelError), plan.problems
        assert where in plan.problems[0].where.lower()


@pytest.mark.parametrize(
    ("changes", "key", "reason"),
    [
        ({"target": 0.95}, ".target", "less-than-equal"),
        ({"sites": ["heads", "heads"]}, "", "site-twice"),
        ({"sites": ["layers"], "export": "stock"}, "", "layers-and-uniform"),
        ({"start": "equal", "steps": 0}, "", "start-and-steps"),
    ],
)
def test_settings_that_contradict_are_errors(changes, key, reason):
    with raises(RecipeError, reason=reason) as failure:
        recipe({**FAST, **changes})
    assert failure.value.where.endswith(f" (steps.0{key})")


# runs


def logits_of(directory, batch, dtype=torch.float32):
    import compressor

    with torch.no_grad():
        return compressor.load(directory, kernels="reference").to(dtype)(**batch).logits


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        pytest.param("llama", {}, marks=pytest.mark.slow),
        ("llama", {"sites": ["heads", "ffn", "layers"], "protect_layers": [], "target": 0.5}),
        pytest.param("llama", {"sites": ["hidden"], "measure": "bytes", "of": "model"}, marks=pytest.mark.slow),
        ("bert", {"reconstruct": False, "export": "auto"}),
    ],
)
def test_what_is_written_computes_what_the_masked_model_does(family, changes, tmp_path):
    model = tiny.save(family, tmp_path / "model")
    report = compress(recipe({**FAST, "reconstruct": False, **changes}), str(model), tmp_path / "out", measure=False)
    decision = report["reshapes"][0]["decision"]
    structure = read_structure(model)
    prunables = facts_of(structure, 0).prunable()
    dense = type(structure.model).from_pretrained(model, dtype=torch.float64).eval()
    batch = {"input_ids": torch.arange(3, 35).view(2, 16)}
    with torch.no_grad(), masked(dense, prunables, decision):
        for prunable in prunables:  # means are folded into the projections, which see what is kept of their input
            factors = dict(
                zip(decision["sites"].get(prunable.name, ()), decision["means"].get(prunable.name, ()), strict=True)
            )
            columns = torch.ones(sum(map(len, prunable.columns)), dtype=torch.float64)
            for unit, mean in factors.items():
                columns[list(prunable.columns[unit])] = mean
            dense.get_submodule(prunable.output_projection).register_forward_pre_hook(
                lambda _m, args, c=columns: (args[0] * c,)
            )
        if decision["hidden"] is not None:
            stream = torch.zeros(32, dtype=torch.float64)
            stream[decision["hidden"]] = 1
            for name, module in dense.named_modules():
                if name.endswith("norm"):  # over the old width, with zeros
                    module.register_forward_pre_hook(lambda _m, args: (args[0] * stream,))
        wanted = dense(**batch).logits
    found = logits_of(tmp_path / "out", batch)
    # float32 weights and products of a tiny model
    assert float((found - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())
    figures = decision["figures"]
    assert (decision["hidden"] is None) == ("hidden" not in changes.get("sites", []))
    assert figures["size"] <= (1 - {**FAST, **changes}["target"]) * figures["of"]
    assert ("coarse-units" in {w["code"] for w in report["warnings"]}) == (
        1 - {**FAST, **changes}["target"] - figures["size"] / figures["of"] > 0.01
    )
    named = [kept for kept in decision["sites"].values()]
    assert all(kept == sorted(kept) for kept in named) and decision == json.loads(json.dumps(decision, sort_keys=True))


def test_uniform_counts_make_a_model_of_its_own_class_that_plain_transformers_loads(llama, tmp_path):
    import transformers

    report = compress(recipe({**FAST, "export": "stock"}), str(llama), tmp_path / "out", measure=False)
    assert report["route"]["name"] == "stock" or "auto_map" not in json.loads(
        (tmp_path / "out/config.json").read_text()
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.arange(3, 35).view(2, 16)
    with torch.no_grad():
        assert model(input_ids=ids).logits.equal(logits_of(tmp_path / "out", {"input_ids": ids}))
    kept = report["reshapes"][0]["decision"]["sites"]
    for kind in ("self_attn", "mlp"):
        assert len({len(units) for name, units in kept.items() if kind in name}) == 1
    group = model.config.num_attention_heads // model.config.num_key_value_heads
    assert group == 2 and model.config.intermediate_size < 64


def test_nothing_asked_for_plans_nothing(facts, tmp_path):
    settings = recipe({**FAST, "target": 0}).steps[0].settings
    redefinition = settings.redefine(facts("llama", tmp_path), None)
    assert not redefinition.shapes and not redefinition.config and not settings.decides and not settings.unplanned


@pytest.mark.slow
def test_nothing_asked_for_changes_no_bit(llama, tmp_path):
    compress(recipe({**FAST, "target": 0}), str(llama), tmp_path / "out", measure=False)
    before, after = (load_file(next(d.glob("*.safetensors"))) for d in (llama, tmp_path / "out"))
    assert before.keys() == after.keys() and all(before[name].equal(after[name]) for name in before)


def chosen(settings, facts, seed=0, state=None):
    whole = model_in_memory.Whole(tiny.build("llama"), model_in_memory.token_batches(3, 4, 8), seed=seed, facts=facts)
    whole.state = state
    return settings.choose(whole), whole


def test_the_same_seed_decides_the_same_and_another_seed_otherwise(facts, tmp_path):
    settings, known = recipe(FAST).steps[0].settings, facts("llama", tmp_path)
    first, whole = chosen(settings, known, seed=4)
    assert first == chosen(settings, known, seed=4)[0] != chosen(settings, known, seed=5)[0]
    for state in whole.states:  # and so does a training that resumes from there
        assert chosen(settings, known, 4, state)[0] == first
    assert [step for step, _ in whole.states] == [2, 2, 4]  # of three groups for the start, then of six steps


def test_without_training_the_noise_alone_decides(facts, tmp_path):
    settings, known = recipe({**FAST, "steps": 0}).steps[0].settings, facts("llama", tmp_path)
    first, whole = chosen(settings, known, seed=4)
    assert first == chosen(settings, known, seed=4)[0] != chosen(settings, known, seed=5)[0]
    assert "last_loss" not in first["figures"] and {m for part in first["means"].values() for m in part} == {1.0}
    assert [step for step, _ in whole.states] == [2]
    assert chosen(settings, known, 4, whole.states[0])[0] == first


def test_a_search_that_goes_on_finds_the_same(facts, tmp_path):
    settings, known = recipe({**GREEDY, "save_every": 3}).steps[0].settings, facts("llama", tmp_path)
    first, whole = chosen(settings, known)
    assert any(row["removed"] for row in first["log"]) and not all(row["removed"] for row in first["log"])
    assert len(whole.states) >= 3
    for state in whole.states:
        assert chosen(settings, known, 0, state)[0] == first
    bounds = zip(first["figures"]["after"], first["figures"]["dense"], strict=True)
    assert all(after <= dense + settings.max_loss_increase for after, dense in bounds)


def test_greedy_removal_ends_at_its_target_and_keeps_what_is_protected(facts, tmp_path):
    known = facts("llama", tmp_path)
    step = {**GREEDY, "max_loss_increase": 9, "target": 0.2, "protect_layers": [0]}
    decision = chosen(recipe(step).steps[0].settings, known)[0]
    assert decision["removed"] and all(".1." in name for name in decision["removed"])
    prunables = known.prunable()
    blocks = model_size(known, prunables, measure="parameters", of="blocks", tokens=1)
    left = {prunable.name: len(decision["sites"].get(prunable.name, ())) for prunable in prunables}
    assert blocks.of(left) <= 0.8 * blocks.full
    with raises(PreflightError, where="greedy_removal.protect_layers", block=5, blocks=2):
        GreedyRemoval(protect_layers=(5,)).redefine(known, None)


@pytest.mark.slow
@pytest.mark.parametrize("step", [8, 14, 20])
def test_training_that_was_killed_resumes_to_the_same_bytes(step, llama, tmp_path):
    compress(recipe(FAST), str(llama), tmp_path / "first", measure=False)
    assert kill_at(step, recipe(FAST), llama, tmp_path / "killed")
    compress(recipe(FAST), str(llama), tmp_path / "killed", measure=False, resume=True)
    assert weight_hashes(tmp_path / "killed") == weight_hashes(tmp_path / "first")


@pytest.mark.slow
@pytest.mark.parametrize("step", [FAST, GREEDY], ids=["vtrans", "greedy_removal"])
def test_pass_keeps_the_contract(step, llama, tmp_path):
    settings = recipe(step).steps[0].settings
    report = check_pass(step["pass"], settings, llama, tmp_path, "*")
    assert report["verification"]["max_logit_difference"] == 0.0


@pytest.mark.slow
def test_what_is_left_is_quantized_like_any_model(llama, tmp_path):
    steps = ({**FAST, "steps": 2}, {"pass": "gptq", "bits": 4, "group_size": -1})
    report = compress(recipe(*steps), str(llama), tmp_path / "out", measure=False)
    assert report["reshapes"][0]["parameters_after"] < report["reshapes"][0]["parameters_before"]
    assert {row["form"] for row in report["weights"]} == {"packed_linear"}
    plan = make_plan(recipe(*reversed(steps)), str(llama), prove=False)
    assert plan.problems[0].data == {"reason": "needs-dense", "pass": "vtrans", "before": "gptq"}


def test_labels_that_are_missing_end_the_run(llama, tmp_path):
    with raises(PassError, where="loss: task", reason="no-labels"):
        compress(recipe({**FAST, "loss": "task"}), str(llama), tmp_path / "out", measure=False)


# greedy removal


def test_a_sub_block_that_does_nothing_is_all_that_goes(tmp_path):
    model = tiny.build("llama", num_hidden_layers=3)
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()
        model.model.layers[2].mlp.down_proj.weight.zero_()
    model.save_pretrained(tmp_path / "model")
    step = {**GREEDY, "max_loss_increase": 0, "tiers": ["sub_blocks", "heads"]}
    report = compress(recipe(step), str(tmp_path / "model"), tmp_path / "out", measure=False)
    decision = report["reshapes"][0]["decision"]
    assert sorted(decision["removed"]) == ["model.layers.1.self_attn", "model.layers.2.mlp"]
    assert all(len(units) in (2, 64) for units in decision["sites"].values())
    assert decision["figures"]["after"] == decision["figures"]["dense"]
    batch = {"input_ids": torch.arange(3, 35).view(2, 16)}
    with torch.no_grad():
        assert torch.allclose(logits_of(tmp_path / "out", batch), model(**batch).logits, atol=1e-5)
    replayed = {name for row in decision["log"] if row["removed"] for name in row["what"].split(" + ")}
    assert replayed == set(decision["removed"])
