"""A pruned model computes what the whole one does with masks, in whatever form it is written."""

from __future__ import annotations

import json
from dataclasses import replace

import pruned as made
import pytest
import tiny
import torch
import transformers as hf
import yaml
from raising import raises
from safetensors.torch import load_file

import compressor
from compressor.analysis.model_facts import facts_of
from compressor.analysis.perturbation import InDouble
from compressor.artifact.export_format import choose_export_format
from compressor.errors import ModelError, PreflightError
from compressor.methods.pruning.pruned_shapes import check_decision, pruned_redefinition
from compressor.model.norms import Norm, apply_norm
from compressor.model.replay_proof import prove_by_replay
from compressor.model.structure import read_structure
from compressor.recipe.recipe import Step, parse_recipe
from compressor.run import compress

GONE = (2, 6, 7, 19)
HIDDEN = [index for index in range(32) if index not in GONE]
FAMILIES = ("llama", "opt", "gpt2", "bert", "vit")
# of the largest logit: some ten float64 products in a row of other lengths
TOLERANCE = 1e-10


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    found = {}

    def get(family, **config):
        key = (family, *sorted(config.items()))
        if key not in found:
            found[key] = made.opened(family, tmp_path_factory.mktemp(family) / "m", **config)
        return found[key]

    return get


@pytest.fixture
def pruned(opened, tmp_path):
    def get(family, decision, export="auto", *, config=None, **settings):
        structure, facts = opened(family, **(config or {}))
        return made.carry_out(
            tmp_path / f"work-{len(list(tmp_path.iterdir()))}", structure, facts, decision, export, **settings
        )

    return get


def even(prunables, less=4):
    return {"sites": {prunable.name: made.middle(prunable, less) for prunable in prunables}}


def uneven(prunables):
    return {"sites": {prunable.name: made.middle(prunable, number) for number, prunable in enumerate(prunables)}}


def apart(result, decision):
    with InDouble():
        return made.error(made.logits(result.model, made.batch_of(result.dense)), made.masked_logits(result, decision))


@pytest.mark.parametrize("family", FAMILIES)
def test_pruned_is_masked_with_other_sizes_in_each_block_and_a_sub_block_gone(family, opened, pruned):
    _, facts = opened(family)
    prunables = facts.prunable()
    decision = {**uneven(prunables), "removed": [prunables[-1].name]}
    if family != "bert":
        decision["hidden"] = HIDDEN
    result = pruned(family, decision)
    assert apart(result, decision) < TOLERANCE
    left = made.error(
        made.logits(result.model, made.batch_of(result.dense)), made.logits(result.dense, made.batch_of(result.dense))
    )
    assert left > 1e-2  # and the masks do something
    assert made.planned_parameters(result) == made.stored_numel(result.directory)
    assert result.redefinition.widths == (32, 32 if family == "bert" else 28)
    assert choose_export_format([], "auto", False, result.after.model).name == "custom"
    prove_by_replay(result.after)


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_pruned_leaves_every_bit(family, opened, pruned):
    structure, facts = opened(family)
    decision = {
        "sites": {prunable.name: list(range(prunable.units)) for prunable in facts.prunable()},
        "hidden": list(range(32)),
    }
    result = pruned(family, {**decision, "hidden": None} if family == "bert" else decision, "custom")
    assert not result.redefinition.shapes and not result.redefinition.config
    before = load_file(structure.checkpoint.directory / "model.safetensors")
    after = {k: v for f in result.directory.glob("*.safetensors") for k, v in load_file(f).items()}
    assert before.keys() == after.keys() and all(before[name].equal(after[name]) for name in before)


@pytest.mark.parametrize(
    ("family", "hidden", "said"),
    [
        ("llama", True, {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "intermediate_size": 59}),
        ("qwen3", False, {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "intermediate_size": 59}),
        ("vit", True, {"hidden_size": 28, "intermediate_size": 59}),
        ("phi3", False, {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 59}),
    ],
)
def test_sizes_alike_in_every_block_make_a_model_of_the_same_class(family, hidden, said, opened, pruned):
    structure, facts = opened(family)
    decision = {**even(facts.prunable()), "hidden": HIDDEN if hidden else None}
    result = pruned(family, decision, "stock")
    assert apart(result, decision) < TOLERANCE
    config = json.loads((result.directory / "config.json").read_text())
    assert config.items() >= said.items() and "compressed_shapes" not in config
    auto = hf.AutoModelForImageClassification if family == "vit" else hf.AutoModelForCausalLM
    stock = auto.from_pretrained(result.directory, dtype=torch.float64).eval()
    batch = made.batch_of(result.dense)
    assert made.logits(stock, batch).equal(made.logits(result.model, batch))
    assert made.planned_parameters(result) == made.stored_numel(result.directory)
    tied = config.get("tie_word_embeddings")
    assert bool(tied) == bool(structure.bindings.tied)
    if tied:
        assert stock.lm_head.weight is stock.model.embed_tokens.weight
    if family == "llama":  # as many query heads to a group as before
        assert config["num_attention_heads"] / config["num_key_value_heads"] == 4 / 2


@pytest.mark.parametrize("family", ["opt", "gpt2", "bert"])
def test_a_class_whose_heads_are_tied_to_its_width_loses_mlp_units_alone_as_stock(family, opened, pruned):
    _, facts = opened(family)
    decision = even([prunable for prunable in facts.prunable() if prunable.kind == "ffn"])
    result = pruned(family, decision, "stock")
    assert apart(result, decision) < TOLERANCE and "compressed_shapes" not in result.redefinition.config
    because = {"reason": "count-not-in-config", "kind": "heads"}
    with raises(PreflightError, where="export", reason="no-stock-model", because=because):
        pruned_redefinition(facts, facts.prunable(), even(facts.prunable()), "stock")


def test_blocks_that_differ_or_a_sub_block_gone_are_no_stock_model(opened):
    _, facts = opened("llama")
    prunables = facts.prunable()
    stock = {"where": "export", "reason": "no-stock-model"}
    with raises(PreflightError, **stock, because={"reason": "uneven", "kind": "ffn"}):
        pruned_redefinition(facts, prunables, {"sites": {prunables[1].name: list(range(60))}}, "stock")
    with raises(PreflightError, **stock, because={"reason": "removed", "prunable": "model.layers.1.mlp"}):
        pruned_redefinition(facts, prunables, {"sites": {}, "removed": [prunables[3].name]}, "stock")
    with raises(PreflightError, **stock, because={"reason": "eps-of-other-norms", "key": "rms_norm_eps"}):
        other = opened("qwen3")[1]
        pruned_redefinition(other, other.prunable(), {"sites": {}, "hidden": HIDDEN}, "stock")
    assert "compressed_shapes" in pruned_redefinition(facts, prunables, even(prunables), "custom").config


def test_a_class_that_splits_by_its_config_needs_as_many_heads_in_every_block(opened, pruned):
    _, facts = opened("phi3")
    prunables = facts.prunable()
    with raises(PreflightError, where="model.layers.0.self_attn", reason="blocks-differ", kind="heads"):
        pruned_redefinition(facts, prunables, {"sites": {prunables[0].name: [1]}})
    decision = {
        "sites": {
            prunable.name: [1] if prunable.kind == "heads" else made.middle(prunable, n)
            for n, prunable in enumerate(prunables)
        }
    }
    result = pruned("phi3", decision)
    assert apart(result, decision) < TOLERANCE
    assert result.redefinition.config["num_key_value_heads"] == 1 and result.redefinition.config["compressed_shapes"]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_another_head_gone_is_another_model(family, opened, pruned):
    """An index that is off by a head would pass every test of sizes."""
    _, facts = opened(family)
    name, units = facts.prunable()[0].name, facts.prunable()[0].units
    kept = [[unit for unit in range(units) if unit != removed] for removed in (0, 1)]
    models = [pruned(family, {"sites": {name: units}}) for units in kept]
    batch = made.batch_of(models[0].dense)
    outputs = [made.logits(result.model, batch) for result in models]
    assert made.error(*outputs) > 1e-2
    assert all(apart(result, {"sites": {name: units}}) < TOLERANCE for result, units in zip(models, kept))


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_a_block_of_which_nothing_is_left_is_dropped_where_the_class_can_be_shorter(family, opened, pruned):
    """Other families keep what their biases add."""
    _, facts = opened(family)
    prunables = facts.prunable()
    decision = {"sites": {}, "removed": [prunable.name for prunable in prunables if prunable.block == 0]}
    result = pruned(family, decision)
    assert apart(result, decision) < TOLERANCE
    blocks = result.redefinition.blocks
    if family == "gpt2":
        assert blocks is None and "removed" in {
            m["form"] for m in result.redefinition.config["compressed_modules"].values()
        }
        return
    assert blocks == tuple(range(1, len(result.before.pieces))) and not result.after.model.config.to_dict().get(
        "compressed_shapes"
    )
    assert result.after.model.config.num_hidden_layers == len(blocks) == len(result.after.pieces)
    assert made.planned_parameters(result) == made.stored_numel(result.directory)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_a_model_without_its_first_attention_generates_with_a_cache_as_without(family, opened, pruned):
    """The cache is asked for its length at the first block."""
    _, facts = opened(family)
    prunables = facts.prunable()
    result = pruned(family, {**uneven(prunables), "removed": [prunables[0].name]})
    ids = made.batch_of(result.model)["input_ids"][:2, :7]
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    without = result.model.generate(ids, **settings, use_cache=False)
    assert result.model.generate(ids, **settings).equal(without)
    assert result.model.generate(ids, **settings, cache_implementation="static").equal(without)


def test_a_sub_block_of_which_nothing_is_left_still_adds_its_bias(opened, pruned):
    for family, number in (("opt", 0), ("opt", 1), ("gpt2", 1), ("bert", 0)):
        _, facts = opened(family)
        prunable = facts.prunable()[number]
        result = pruned(family, {"sites": {prunable.name: []}})
        path = next(entry.path for entry in prunable.layout.removal if entry.adds)
        assert result.model.get_parameter(f"{path}.bias").equal(result.dense.get_parameter(prunable.bias))
        assert not [
            name for name, _ in result.model.named_parameters() if name.startswith(f"{path}.") and "bias" not in name
        ]


def test_a_pruned_model_is_pruned_again(opened, pruned, tmp_path):
    for family in ("llama", "gpt2"):
        _, facts = opened(family)
        prunables = facts.prunable()
        once = pruned(family, {**uneven(prunables), "removed": [prunables[0].name]})
        structure = read_structure(once.directory)
        again = structure, facts_of(structure, 0)
        left = again[1].prunable()
        assert [prunable.name for prunable in left] == [prunable.name for prunable in prunables[1:]]
        decision = {**uneven(left), "removed": [left[-1].name]}
        assert apart(made.carry_out(tmp_path / f"again-{family}", *again, decision), decision) < TOLERANCE


def test_the_residual_stream_of_a_post_norm_model_is_not_made_narrower(opened):
    _, facts = opened("bert")
    with raises(ModelError, where="bert.encoder.layer.0.output.LayerNorm", reason="post-norm"):
        pruned_redefinition(facts, facts.prunable(), {"sites": {}, "hidden": HIDDEN})


def test_a_narrower_rms_norm_takes_the_factor_of_the_worked_example(opened, pruned):
    result = pruned("llama", {"sites": {}, "hidden": HIDDEN}, config={"rms_norm_eps": 0.1})
    before, after = result.dense.model.norm, result.model.model.norm
    assert after.weight.allclose(before.weight[HIDDEN] * (32 / 28) ** 0.5, rtol=1e-15)
    assert after.variance_epsilon == pytest.approx(0.1 * 32 / 28, rel=1e-15)
    x = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    kept, gain = [0, 1, 3, 4, 5, 7], torch.rand(8, dtype=torch.float64)
    wide = x.index_fill(1, torch.tensor([2, 6]), 0.0)
    masked = apply_norm(wide, gain, None, Norm("rms", 0.0, 1e-6, 8, True, False))[:, kept]
    naive = apply_norm(x[:, kept], gain[kept], None, Norm("rms", 0.0, 1e-6 * 8 / 6, 6, True, False))
    assert (naive / masked).allclose(torch.tensor(0.866025, dtype=torch.float64), atol=1e-6)
    scaled = apply_norm(x[:, kept], gain[kept] * (8 / 6) ** 0.5, None, Norm("rms", 0.0, 1e-6 * 8 / 6, 6, True, False))
    assert float((scaled - masked).abs().max()) < 1e-15


def test_factors_of_kept_units_go_into_the_reader(opened, pruned):
    for family in ("llama", "gpt2"):
        _, facts = opened(family)
        prunables = facts.prunable()
        decision = even(prunables)
        factors = {name: [1 + 0.1 * n for n in range(len(units))] for name, units in decision["sites"].items()}
        factors[prunables[1].name] = [0.5] * 64  # nothing of it goes
        decision["sites"][prunables[1].name] = list(range(64))
        result = pruned(family, decision, factors=factors)
        with torch.no_grad():
            for prunable in result.prunables:
                weight = result.dense.get_parameter(prunable.slices[0].parameter)
                for unit, factor in zip(decision["sites"][prunable.name], factors[prunable.name]):
                    weight.index_copy_(
                        prunable.slices[0].axis,
                        torch.tensor(prunable.columns[unit]),
                        weight.index_select(prunable.slices[0].axis, torch.tensor(prunable.columns[unit])) * factor,
                    )
        assert apart(result, decision) < TOLERANCE


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_readers_that_are_solved_again_bring_the_model_nearer_to_the_whole_one(family, opened, pruned):
    _, facts = opened(family)
    prunables = facts.prunable()
    decision = {**even(prunables, 30), "removed": [prunables[2].name] if prunables[2].bias else []}
    generator = torch.Generator().manual_seed(1)
    batches = [{"input_ids": torch.randint(0, 96, (16, 12), generator=generator)} for _ in range(5)]
    plain = pruned(family, decision)
    solved = pruned(family, decision, batches=batches, ridge=1e-2)
    assert {w["code"] for w in solved.warnings} == {"repaired"}
    assert len(solved.warnings) == 4  # where nothing is left the bias takes the mean
    wanted = made.logits(plain.dense, batches[0])
    errors = [made.error(made.logits(result.model, batches[0]), wanted) for result in (plain, solved)]
    assert errors[1] < errors[0]
    name = prunables[1].slices[0].parameter  # of the first block, whose inputs are those of the dense model
    assert not solved.model.get_parameter(name).allclose(plain.model.get_parameter(name))
    assert solved.model.get_parameter(prunables[1].slices[1].parameter).equal(
        plain.model.get_parameter(prunables[1].slices[1].parameter)
    )


@pytest.mark.parametrize(
    ("decision", "data"),
    [
        ({"sites": {"model.layers.9.mlp": [1]}}, {"reason": "no-prunable", "prunable": "model.layers.9.mlp"}),
        ({"sites": {"model.layers.0.mlp": [1, 64]}}, {"reason": "units", "kept": [1, 64], "units": 64}),
        ({"sites": {"model.layers.0.mlp": [3, 1]}}, {"reason": "units", "kept": [3, 1], "units": 64}),
        ({"sites": {}, "removed": ["model.layers.0"]}, {"reason": "no-prunable", "prunable": "model.layers.0"}),
    ],
)
def test_a_decision_that_does_not_fit_the_model_is_refused(decision, data, opened):
    with raises(PreflightError, where="decision", **data):
        check_decision(opened("llama")[1].prunable(), decision)


class Told(made.Fixed):
    export: str = "auto"

    def redefine(self, model, decision):
        return pruned_redefinition(model, model.prunable(), self.decision, self.export)


@pytest.mark.slow
def test_a_pruned_model_is_quantized_written_and_loaded_by_its_modeling_file(opened, pruned, tmp_path):
    """GPT-2: an embedding shared with the output head, transposed matrices, biases, and no first attention."""
    model = tiny.save("gpt2", tmp_path / "model")
    structure, facts = opened("gpt2")
    prunables = facts.prunable()
    decision = {**uneven(prunables), "removed": [prunables[0].name], "hidden": HIDDEN}
    tree = {
        "version": 1,
        "name": "pruned",
        "data": {"source": "random", "samples": 8, "length": 16},
        "steps": [{"pass": "rtn", "bits": 8, "group_size": -1}],
        "report": {"html": False},
    }
    recipe = parse_recipe(yaml.safe_dump(tree).encode(), "pruned.yaml")
    told = Step(("steps", 0), "told", Told(decision=decision))
    recipe = replace(recipe, sweeps=((told,), *recipe.sweeps))
    report = compress(recipe, str(model), tmp_path / "out", measure=False)
    assert report["route"]["name"] == "custom" and report["verification"]["problems"] == []
    assert report["verification"]["max_logit_difference"] == 0.0 and report["verification"]["generated_tokens"] == 8
    assert report["reshapes"][0]["parameters_after"] == made.stored_numel(pruned("gpt2", decision).directory)
    ours = compressor.load(tmp_path / "out", kernels="reference")
    dense = hf.AutoModelForCausalLM.from_pretrained(model).eval()
    assert ours.lm_head.weight is ours.transformer.wte.weight
    result = made.Pruned(dense, ours, structure, structure, prunables, facts, None, tmp_path, [])
    assert made.error(made.logits(ours, made.batch_of(dense)), made.masked_logits(result, decision)) < 0.02  # 8 bits
