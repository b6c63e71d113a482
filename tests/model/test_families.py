"""Families that are split or told apart in one way of their own are planned whole, or refused with what is true."""

from __future__ import annotations

import json
import re

import pytest
import tiny
import torch
import transformers as hf
import yaml
from family_models import FAMILIES, build, save
from many_models import tiny_config
from raising import raises
from tiers import every_day

from compressor.engine.calibration_batch import CalibrationBatch, equal_calls, finish_part, run_part
from compressor.engine.plan import make_plan
from compressor.engine.stage_times import stage_works
from compressor.errors import ModelError
from compressor.model.block_runner import Pieces
from compressor.model.probe_model import example_batch, make_probe_model
from compressor.model.structure import find_blocks, read_structure
from compressor.passes.gptq import GPTQ
from compressor.recipe.recipe import parse_recipe
from compressor.run import compress
from compressor.testing import recipe_for

ROUTERS = {
    "phimoe": "router",
    "gpt_oss": "router",
    "granitemoe": "router",
    "jamba": "router",
    "llama4": "router",
    "dbrx": "router.layer",
    "qwen3_next": "gate",
}
WHOLE = {"dbrx"}  # its experts are slices of one matrix
REFUSED = {"albert": {"calls": 4, "blocks": 1}}


def planned(directory, **step):
    tree = {"version": 1, "name": "t", "steps": [{"pass": "rtn", "bits": 8, "group_size": -1, **step}]}
    return make_plan(parse_recipe(yaml.safe_dump(tree).encode(), "t.yaml"), str(directory))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    made = {}

    def get(family, **config):
        key = family + json.dumps(config)
        if key not in made:
            made[key] = tiny.save(family, tmp_path_factory.mktemp(family) / "m", **config)
        return made[key]

    return get


@pytest.mark.parametrize("family", sorted(set(tiny.FURTHER) - set(REFUSED)))
def test_the_family_is_planned(family, saved):
    plan = planned(saved(family))
    assert not plan.problems, plan.problems[0]
    assert plan.formats
    assert all(stage.known for stage in stage_works(plan, measure=True))


@pytest.mark.parametrize("family", sorted(REFUSED))
def test_the_family_is_refused_by_plan_with_the_reason(family, saved):
    with raises(ModelError, **REFUSED[family]) as failure:
        planned(saved(family))
    assert failure.value.exit_code == 5


@pytest.mark.parametrize("family", sorted(ROUTERS))
def test_what_chooses_experts_is_a_router_and_stays_dense(family, saved):
    plan = planned(saved(family))
    routers = [w for _, w in plan.structure.weights() if w.role == "router"]
    assert routers and any(ROUTERS[family] in weight.parameter for weight in routers)
    assert not {weight.name for weight in routers} & set(plan.formats)
    experts = [weight for _, weight, _ in plan.structure.whole]
    assert bool(experts) == (family in WHOLE)
    if experts:
        assert "stays-dense" in [warning.code for warning in plan.warnings]
        assert {weight.role for weight in experts} == {"experts"}


def test_a_gate_projection_as_wide_as_a_convolution_is_no_router(saved):
    """Its linear attention has a convolution of 128 channels: as many as the MLP has units here, and no experts."""
    plan = planned(saved("qwen3_5", intermediate_size=128))
    roles = {w.name.rpartition(".")[2]: w.role for _, w in plan.structure.weights() if "gate_proj" in w.name}
    assert roles == {"gate_proj": "mlp"}
    assert any("gate_proj" in name for name in plan.formats)


@pytest.mark.parametrize(
    ("family", "only", "why"),
    [
        ("mixtral", "@router", {"reason": "does-more", "module": "MixtralTopKRouter"}),
        ("phimoe", "@router", {"reason": "does-more", "module": "PhimoeTopKRouter"}),
        ("dbrx", "@experts", {"reason": "several-matrices"}),
    ],
)
def test_a_named_weight_that_cannot_be_stored_is_a_problem_of_the_plan(family, only, why, saved):
    plan = planned(saved(family), only=["*", only])
    assert [p.exit_code for p in plan.problems] == [5]
    (problem,) = plan.problems
    assert (problem.data["reason"], problem.data["pass"], problem.data["because"]) == ("not-storable", "rtn", why)
    named = {w.name for _, w in plan.structure.weights() if f"@{w.role}" == only}
    assert problem.where in named | {weight.name for _, weight, _ in plan.structure.whole}


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("RwkvForCausalLM", "attention.output"),  # rescaled by the model, before any block runs
        ("HYV4ForCausalLM", "indexer.weights_proj"),  # asked for its dtype
    ],
)
def test_a_weight_that_other_code_reads_stays_dense(kind, name, tmp_path):
    cls = getattr(hf, kind)
    cls._from_config(tiny_config(cls)).save_pretrained(tmp_path / "m")
    plan = planned(tmp_path / "m")
    assert not plan.problems and plan.formats
    read = {weight.name for _, weight in plan.structure.weights() if plan.structure.is_read_elsewhere(weight)}
    assert read and not read & set(plan.formats)
    dense = {warning.where for warning in plan.warnings if warning.code == "stays-dense"}
    assert any(name in weight for weight in dense & read)


@pytest.mark.parametrize(
    ("kind", "step", "data"),
    [
        ("MambaForCausalLM", {"pass": "vtrans"}, {"reason": "no-head-count"}),
        (
            "XGLMForCausalLM",
            {"pass": "fuse_norms"},
            {"reason": "not-taken-apart", "pass": "fuse_norms", "error": "RuntimeError"},
        ),
        ("DebertaV2ForSequenceClassification", {"pass": "zero_tprune"}, {"reason": "causal"}),
        ("Qwen3NextForCausalLM", {"pass": "slicegpt", "sparsity": 0.25}, {"takes": [24, 24]}),
        ("MptForCausalLM", {"pass": "vtrans"}, {"reason": "not-prunable", "kind": "heads"}),
    ],
)
def test_what_a_pass_makes_of_a_class_that_it_cannot_change_is_a_problem_of_the_plan(kind, step, data, tmp_path):
    cls = getattr(hf, kind)
    cls._from_config(tiny_config(cls)).save_pretrained(tmp_path / "m")
    fused = [{"pass": "fuse_norms"}] if step["pass"] == "slicegpt" else []
    tree = {"version": 1, "data": {"source": "random"}, "steps": [*fused, step]}
    problems = make_plan(parse_recipe(yaml.safe_dump(tree).encode(), "t.yaml"), str(tmp_path / "m")).problems
    assert [problem.exit_code for problem in problems] == [5]
    with raises(ModelError, **data):
        raise problems[0]


def test_a_weight_that_its_own_module_reads_alone_is_not_among_them(saved):
    for family in ("llama", "mixtral", "bert", "gpt2"):
        structure = planned(saved(family)).structure
        assert not any(structure.is_read_elsewhere(weight) for _, weight in structure.weights())


def test_a_width_that_no_group_divides_stays_dense_unless_it_is_named(saved):
    narrow = saved("llama", intermediate_size=72)
    plan = planned(narrow, group_size=32)
    assert not plan.problems and [w.code for w in plan.warnings] == ["stays-dense"]
    assert not any("down_proj" in name for name in plan.formats)
    named = planned(narrow, group_size=32, only=["*", "down_proj"])
    found = named.problems[0]
    assert found.where.endswith("down_proj") and (found.data["group_size"], found.data["in_features"]) == (32, 72)


@pytest.mark.parametrize("family", ["llava", "gemma3", "gemma4_shared", "jamba", "falcon", "qwen3_next"])
def test_every_stage_sees_what_a_plain_hook_on_the_model_sees(family, saved):
    """Each block is replayed several times, as stages are; the inputs of its products stay those of one whole run."""
    model = tiny.build(family)
    probe = make_probe_model(type(model), model.config, torch.device("cpu"), torch.float32)
    batch = example_batch(probe, torch.device("cpu"))
    pieces = Pieces(probe, find_blocks(probe))
    seen = {}
    linears = {
        name: module
        for name, module in probe.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith(pieces.blocks_path + ".")
    }

    def noting(table):
        hooks = [
            module.register_forward_pre_hook(lambda _m, args, name=name: table.__setitem__(name, args[0].clone()))
            for name, module in linears.items()
        ]
        return lambda: [hook.remove() for hook in hooks]

    expected = {}
    done = noting(expected)
    with torch.no_grad():
        probe(**batch)
    done()
    hidden, calls = pieces.embeddings(batch)
    done = noting(seen)
    for index, call in enumerate(calls):
        for _ in range(3):
            following = pieces.block(index, hidden, call)
        hidden = following
    done()
    assert expected.keys() == seen.keys()
    for name, value in expected.items():
        assert torch.equal(seen[name], value), name


def test_blocks_that_put_tensors_into_what_they_share_are_run_anew_and_never_share_it_between_batches(saved):
    from functools import partial

    from compressor.engine.block_view import watched_parameters
    from compressor.engine.resumable_forward import Forgotten, RecordedForward, advance, needs

    structure = read_structure(saved("gemma4_shared"))
    probe = tiny.build("gemma4_shared")
    for part in (probe.config, probe.config.get_text_config()):
        part.use_cache = False  # as the skeleton of a structure has it
    pieces = Pieces(probe, structure.pieces.blocks_path)
    structure.model, structure.pieces = probe, pieces
    streams = []
    for seed in (0, 1):
        ids = torch.randint(0, 96, (1, 12), generator=torch.Generator().manual_seed(seed))
        hidden, calls = pieces.embeddings({"input_ids": ids})
        streams.append(CalibrationBatch({"input_ids": ids}, hidden, calls))
    assert not equal_calls(streams[0].calls, streams[1].calls)
    stream, watched = streams[0], watched_parameters(structure, 1)
    stream.recorded = RecordedForward()
    work = partial(run_part, structure, 1, stream)
    advance(stream.recorded, watched, work, lambda call: call.parameter.endswith("o_proj.weight"))
    stream.recorded.keep_only(needs(stream.recorded, work))
    stream.hidden = finish_part(structure, 1, stream)
    shared = next(value for value in stream.calls[0].kwargs.values() if hasattr(value, "keys"))
    assert not any(isinstance(part, Forgotten) for pair in shared.values() for part in pair)


def reshaped(directory, *steps):
    data = {"source": "random", "samples": 4, "length": 16}
    tree = {"version": 1, "name": "t", "data": data, "steps": list(steps)}
    plan = make_plan(parse_recipe(yaml.safe_dump(tree).encode(), "t.yaml"), str(directory))
    assert not plan.problems, plan.problems[0]
    return plan.reshapes[-1]


def test_a_stock_model_keeps_a_number_of_heads_that_its_config_takes(saved):
    """Of 8 heads of 4 values 5 to 7 are no divisor of the width, which Llama's config refuses."""
    step = {"pass": "vtrans", "target": 0.1, "sites": ["heads"], "export": "stock"}
    config = reshaped(saved("llama", num_attention_heads=8, num_key_value_heads=8), step).after.model.config
    assert config.num_attention_heads in (1, 2, 4)


@pytest.mark.parametrize("sites", [["heads", "ffn"], ["heads", "hidden"]])
@pytest.mark.parametrize(
    ("family", "config"), [("llama", {"num_key_value_heads": 4}), ("mistral", {"num_key_value_heads": 4})]
)
def test_a_stock_model_has_numbers_that_its_config_class_accepts_together(family, config, sites, saved):
    """Whatever the run chooses: 8 heads of a width of 64 in four groups, with fewer heads and a narrower stream."""
    sizes = {"hidden_size": 64, "num_attention_heads": 8, "num_hidden_layers": 1, **config}
    step = {"pass": "vtrans", "target": 0.2, "sites": sites, "export": "stock", "min_hidden": 0.25}
    planned_step = reshaped(saved(family, **sizes), step)
    settings, facts = planned_step.step.settings, planned_step.facts
    size = settings._size(facts, settings._prunable(facts))
    counts = next(part.counts for part in size.parts if part.kind == "heads")
    widths = range(size.width, size.least_width - 1, -size.align_width) if "hidden" in sites else [64]
    assert len(counts) > 2 and ("hidden" not in sites or len(widths) > 2)
    for count in counts:
        for width in widths:
            values = {"num_attention_heads": 2 * count, "num_key_value_heads": count, "hidden_size": width}
            type(planned_step.after.model.config)(**{**facts.config, **values})  # raises what the class refuses


@pytest.mark.parametrize(
    ("family", "config", "sparsity", "why"),
    [
        ("phi", {}, 0.25, r"has no weight that could correct for the width"),
        ("llama", {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 6}, 0.3, r"not a multiple"),
    ],
)
def test_what_cannot_be_narrower_everywhere_is_sliced_per_sublayer(family, config, sparsity, why, saved):
    step = {"pass": "slicegpt", "sparsity": sparsity, "orientation": "global", "round_to": 1}
    found = reshaped(saved(family, **config), {"pass": "fuse_norms"}, step)
    assert "compressed_modules" in found.redefinition.config
    assert any(re.search(why, note) for note in found.redefinition.notes), found.redefinition.notes


@pytest.mark.parametrize("family", every_day(["zamba", "zamba2"], "zamba"))
def test_matrices_that_blocks_share_stay_dense_and_the_others_are_compressed(family, tmp_path):
    """The blocks of Zamba share an attention and an MLP, and each of Zamba 2 uses its own adapter of them.

    transformers makes no Zamba in which nothing is shared.
    """
    model = tmp_path / "model"
    save(FAMILIES[family], build(FAMILIES[family]), model)
    chosen = recipe_for("gptq", GPTQ(group_size=32), samples=16, length=32)
    plan = make_plan(chosen, str(model))
    reasons = {row["name"]: row["reason"] for row in plan.skipped}
    shared = {name for name in reasons if ".shared_transf" in name}
    assert shared and all("shares its tensor with" in reasons[name] for name in shared)
    assert not any(".shared_transf" in name for name in plan.formats) and plan.formats
    report = compress(chosen, str(model), tmp_path / "out", measure=False)
    assert report["status"] == "ok" and not report["verification"]["problems"]
