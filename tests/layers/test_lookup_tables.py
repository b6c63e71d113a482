"""Lookup tables: bounds at a million points, the functions of a model, and whole runs."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
import transformers as hf
import yaml
from fresh import stranger
from transformers.activations import ACT2FN

import compressor
from compressor.engine.plan import make_plan
from compressor.errors import RecipeError
from compressor.kernels.ops.table_functions import activate, inverse_root, look_up, softmax
from compressor.layers import find_layer
from compressor.layers.block_attention import attend
from compressor.methods.quantization.lookup_tables import NARROWEST, activation_table, exp_table, root_table, tabulate
from compressor.model.activations import KNOWN, recognize
from compressor.model.functions import find_functions
from compressor.model.norms import describe_norm
from compressor.model.structure import read_structure
from compressor.model.weights import Weight
from compressor.passes.bct import BCT, EXP_LOW, Range
from compressor.recipe.recipe import parse_recipe
from compressor.run import compress

MILLION = 1_000_001
# float32 keeps a value to 2**-24 of itself; a few such roundings of numbers below 32 lie below this
ROUNDING = 2e-6


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_steepness_and_curvature_are_the_largest_of_a_million_slopes(name):
    x = torch.linspace(-24, 24, MILLION, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(KNOWN[name].formula(x).sum(), x, create_graph=True)
    (bend,) = torch.autograd.grad(slope.sum(), x)
    for found, stated in ((slope, KNOWN[name].steepness), (bend, KNOWN[name].curvature)):
        largest = float(found.detach().abs().max())
        assert largest <= stated * (1 + 1e-9) and largest > 0.999 * stated


@pytest.mark.parametrize("entries", [256, 1024])
@pytest.mark.parametrize("lookup", ["linear", "nearest"])
@pytest.mark.parametrize("name", sorted(KNOWN))
def test_an_activation_stays_within_its_bound_at_a_million_points_and_far_outside(name, lookup, entries):
    known, linear = KNOWN[name], lookup == "linear"
    table = activation_table(name, -100.0, 100.0, entries)
    x = torch.linspace(-24, 24, MILLION)
    found = activate(x, table.values, table.low, table.step, linear, known.slopes)
    error = float((found.double() - known.formula(x.double())).abs().max())
    bound = table.bound(known.steepness, known.curvature, linear)
    assert error <= bound + ROUNDING
    assert error > 0.9 * bound or entries == 1024  # the bound says something
    assert bound < {"linear": 1.1e-3, "nearest": 0.08}[lookup]


@pytest.mark.parametrize("entries", [256, 1024])
@pytest.mark.parametrize("span", [(-8.0, 8.0), (-0.17, 3.3), (-5.0, 0.0), (0.0, 1e-3), (-16.0, 16.0)])
def test_knots_are_exact(span, entries):
    table = activation_table("silu", *span, entries)
    knots = (table.low + table.step * torch.arange(entries, dtype=torch.float64)).float()
    exact = KNOWN["silu"].formula(knots.double()).float()
    for linear in (True, False):
        assert activate(knots, table.values, table.low, table.step, linear, (0.0, 1.0)).equal(exact)
    assert table.low <= max(span[0], -16.0) and table.high >= min(span[1], 16.0)


def test_a_table_covers_the_range_it_is_asked_for_with_a_step_hardly_wider_than_needed():
    for low, high in ((-1.0, 1.0), (-0.3, 7.9), (0.0, 1e-9), (-1e4, 3.0)):
        for entries in (256, 1024):
            table = tabulate(torch.sin, low, high, entries)
            assert table.low <= low and table.high >= high and len(table.values) == entries
            assert table.step <= (high - low) / (entries - 3) * (1 + 1 / 64)
    with pytest.raises(ValueError, match=r"1\.0 to 1\.0"):
        tabulate(torch.sin, 1.0, 1.0, 256)


def test_beyond_its_range_an_activation_goes_on_from_its_ends_without_a_jump():
    table = activation_table("gelu", -1.0, 2.0, 256)
    ends = torch.tensor([table.low, table.high])
    beyond = torch.tensor([math.nextafter(table.low, -9), math.nextafter(table.high, 9), -3.0, table.high + 1.0])
    found = activate(beyond, table.values, table.low, table.step, True, (0.0, 1.0))
    assert found[:2].allclose(KNOWN["gelu"].formula(ends.double()).float(), atol=1e-6)
    assert found[2] == table.values[0] and found[3] == table.values[-1] + 1.0


def test_values_count_as_outside_only_where_the_function_is_not_straight_yet():
    for span, expected in (((-1.0, 2.0), 2), ((-1.0, 20.0), 1), ((-20.0, 20.0), 0)):
        table = activation_table("gelu", *span, 256)
        format_params = {"function": "gelu", "entries": 256, "low": table.low, "step": table.step}
        layer = find_layer("table_activation").from_tensors(
            {**format_params, "lookup": "linear", "slopes": [0.0, 1.0]}, {"table": table.values}
        )
        assert int(layer.outside(torch.tensor([-30.0, 0.0, 0.5, 30.0]))) == expected


def test_what_is_not_a_number_stays_so_and_infinity_follows_the_asymptotes():
    table = activation_table("silu", -4.0, 4.0, 256)
    x = torch.tensor([float("nan"), float("inf"), float("-inf")])
    found = activate(x, table.values, table.low, table.step, True, (0.0, 1.0))
    assert found[0].isnan() and found[1] == float("inf") and found[2] == table.values[0]
    assert look_up(x[:1], table.values, table.low, table.step, False).isnan()


@pytest.mark.parametrize("lookup", ["linear", "nearest"])
def test_exp_and_softmax_stay_within_their_bounds_and_what_is_masked_gets_nothing(lookup):
    linear, table = lookup == "linear", exp_table(EXP_LOW, 256)
    x = torch.linspace(-16, 0, MILLION)
    found = look_up(x, table.values, table.low, table.step, linear)
    assert float((found.double() - x.double().exp()).abs().max()) <= table.bound(1, 1, linear) + ROUNDING
    assert bool((found.diff() >= 0).all()) and table.high == 0.0 and table.values[-1] == 1.0
    scores = torch.randn(64, 8, 40, generator=torch.Generator().manual_seed(0)) * 6
    scores[..., 30:35], scores[..., 35:] = torch.finfo(torch.float32).min, float("-inf")
    shares = softmax(scores, table.values, table.step, linear)
    assert bool((shares[..., 30:] == 0).all()) and float((shares.sum(-1) - 1).abs().max()) < 1e-6
    # each term is off by at most the bound and the largest is 1, so a sum of n terms is off by n bounds at most
    error = (shares.double() - scores.double().softmax(-1)).abs()
    assert float(error.max()) <= 30 * table.bound(1, 1, linear) + ROUNDING


@pytest.mark.parametrize("entries", [256, 1024])
@pytest.mark.parametrize("lookup", ["linear", "nearest"])
def test_the_inverse_root_keeps_its_relative_bound_over_sixty_decades(lookup, entries):
    linear, table = lookup == "linear", root_table(entries)
    x = torch.logspace(-30, 30, MILLION)
    found = inverse_root(x, table.values, table.step, linear).double()
    error = float((found * x.double().sqrt() - 1).abs().max())
    bound = table.bound(0.5, 0.75, linear)
    assert 0.9 * bound < error + ROUNDING <= bound + 2 * ROUNDING
    powers = 4.0 ** torch.arange(-20, 20)
    assert inverse_root(powers, table.values, table.step, linear).equal(powers.rsqrt())


def test_activations_are_recognized_by_what_they_compute():
    known = {
        name: recognize(ACT2FN[name]) for name in ("gelu", "gelu_new", "silu", "quick_gelu", "tanh", "relu", "mish")
    }
    assert known == {
        "gelu": "gelu",
        "gelu_new": "gelu_tanh",
        "silu": "silu",
        "quick_gelu": "quick_gelu",
        "tanh": "tanh",
        "relu": None,
        "mish": None,
    }


@pytest.mark.parametrize(
    "norm",
    [
        torch.nn.LayerNorm(24, eps=1e-3),
        torch.nn.LayerNorm(24, elementwise_affine=False),
        hf.models.llama.modeling_llama.LlamaRMSNorm(24),
        hf.models.gemma.modeling_gemma.GemmaRMSNorm(24),
    ],
    ids=lambda norm: type(norm).__name__,
)
def test_a_norm_from_a_table_is_the_norm_to_the_bound_of_its_root(norm):
    generator = torch.Generator().manual_seed(0)
    for parameter in norm.parameters():
        torch.nn.init.uniform_(parameter, -1, 1, generator=generator)
    found, table = describe_norm(norm), root_table(256)
    tensors = {"table": table.values, **({"weight": norm.weight.data} if found.has_weight else {})}
    format_params = {"kind": found.kind, "offset": found.offset, "eps": found.eps}
    format_params = {**format_params, "entries": 256, "step": table.step, "lookup": "linear"}
    layer = find_layer("table_norm").from_tensors(format_params, tensors, getattr(norm, "bias", None))
    x = torch.randn(5, 7, 24, generator=generator) * torch.logspace(-3, 3, 7)[:, None]
    # the root's error times the normalized input, which is below sqrt(24), times a gain below 2
    assert float((layer(x) - norm(x)).detach().abs().max()) <= table.bound(0.5, 0.75, True) * 24**0.5 * 2 + 1e-5


def test_ranges_ignore_what_is_not_finite_and_a_narrow_one_is_widened():
    seen = Range().add(torch.tensor([[0.5, float("inf")], [float("nan"), -0.25]]))
    assert (seen.smallest, seen.largest) == (-0.25, 0.5)
    assert not Range().add(torch.full((2, 2), float("nan"))).tokens
    assert activation_table("gelu", 0.0, 0.0, 256).high >= NARROWEST / 2


def functions_of(family, tmp_path, **config):
    return find_functions(read_structure(tiny.save(family, tmp_path / "model", **config)))


def test_functions_of_an_encoder_are_found_in_stem_blocks_and_head(tmp_path):
    found = functions_of("bert", tmp_path)
    block = "bert.encoder.layer.1."
    assert [weight.name for weight in found.by_part[0]] == ["bert.embeddings.LayerNorm"]
    assert {weight.name: weight.role for weight in found.by_part[2]} == {
        f"{block}attention.self.products": "softmax",
        f"{block}attention.output.LayerNorm": "norm",
        f"{block}intermediate.intermediate_act_fn": "activation",
        f"{block}output.LayerNorm": "norm",
    }
    assert [(weight.name, weight.facts) for weight in found.by_part[3]] == [
        ("bert.pooler.activation", {"function": "tanh"})
    ]


def test_attention_that_does_not_ask_for_an_implementation_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(hf.LlamaForCausalLM, "set_attn_implementation", lambda self, name: None)  # as older models do
    found = functions_of("llama", tmp_path)
    assert "AttentionInterface" in found.refused["softmax"]
    assert {weight.role for _, weight in found.all()} == {"norm", "activation"}


def test_attention_that_computes_something_else_is_refused_with_the_difference(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "compressor.model.plain_attention.attend", lambda *a, scaling=None, **k: attend(*a, scaling=2.0, **k)
    )
    model = tiny.save("llama", tmp_path / "model")
    problems = make_plan(recipe(only=["@softmax"]), str(model), prove=False).problems
    told = problems[0].data
    assert (told["role"], told["because"]["reason"]) == ("softmax", "not-plain") and told["because"]["difference"] > 0


def recipe(**step):
    tree = {
        "version": 1,
        "name": "tables",
        "data": {"source": "random", "samples": 8, "length": 16},
        "steps": [{"pass": "bct", "block_shape": [16, 16], **step}],
        "report": {"html": False},
    }
    return parse_recipe(yaml.safe_dump(tree).encode(), "tables.yaml")


EVERYTHING = ["*", "@activation!", "@norm", "@softmax"]
STRANGER = """
import torch, transformers
model, info = getattr(transformers, sys.argv[2]).from_pretrained(
    sys.argv[1], trust_remote_code=True, output_loading_info=True)
assert not any(info[key] for key in ('missing_keys', 'unexpected_keys', 'mismatched_keys')), info
with torch.no_grad():
    torch.save(model.eval()(input_ids=torch.arange(8).view(1, 8)).logits, sys.argv[3])
"""


@pytest.mark.parametrize(
    ("family", "dtype", "auto"),
    [
        ("bert", torch.float32, "AutoModelForSequenceClassification"),
        ("llama", torch.bfloat16, "AutoModelForCausalLM"),
    ],
)
def test_a_model_of_tables_loads_where_this_package_is_not(family, dtype, auto, tmp_path):
    model = tiny.save(family, tmp_path / "model", dtype=dtype)
    report = compress(
        recipe(only=[*EVERYTHING, "@head!"], activations="dynamic"), str(model), tmp_path / "out", measure=False
    )
    assert report["verification"]["max_logit_difference"] == 0.0
    formats = {row["form"] for row in report["weights"]}
    assert formats == {"block_activation_linear", "table_activation", "table_norm", "block_attention"}
    tables = [row for row in report["weights"] if "table_bound" in row]
    assert all(0 < row["table_bound"] < 1.1e-3 for row in tables)
    assert all(row["bytes_after"] == 4 * 256 for row in tables if row["role"] != "norm")
    predicted, actual = report["sizes"]["predicted_bytes"], report["sizes"]["after_bytes"]
    assert abs(predicted - actual) <= 0.02 * actual
    stranger(STRANGER, tmp_path / "out", auto, tmp_path / "logits.pt")
    ours = compressor.load(tmp_path / "out", kernels="reference")
    with torch.no_grad():
        assert torch.load(tmp_path / "logits.pt").equal(ours(input_ids=torch.arange(8).view(1, 8)).logits)


def test_tables_alone_hardly_change_what_a_model_says(tmp_path):
    model = tiny.save("llama", tmp_path / "model")
    compress(recipe(only=["@activation", "@norm", "@softmax"]), str(model), tmp_path / "out", measure=False)
    ids = torch.arange(32).view(2, 16)
    dense = hf.AutoModelForCausalLM.from_pretrained(model)
    ours = compressor.load(tmp_path / "out", kernels="reference")
    with torch.no_grad():
        before, after = dense(input_ids=ids).logits, ours(input_ids=ids).logits
    change = float((before - after).abs().max() / before.abs().max())
    # roots are off by 1.3e-5 and softmax terms and SiLU by at most 1e-3; this model shows a thousandth of its logits
    assert 0 < change < 2e-3
    made = ours.generate(ids[:1, :4], max_new_tokens=4, do_sample=False, attention_mask=torch.ones(1, 4, dtype=int))
    again = ours(input_ids=made[:, :-1]).logits[:, 3:].argmax(-1)
    assert made[:, 4:].equal(again)  # with the cache as without it


def test_ranges_are_those_of_the_calibration_data_and_bounds_follow(tmp_path):
    model = tiny.save("llama", tmp_path / "model")
    report = compress(recipe(only=["@activation"]), str(model), tmp_path / "out", measure=False)
    for row in report["weights"]:
        low, high = row["table_range"]
        assert -16 < low < 0 < high < 16 and row["table_bound"] == row["spec"]["step"] ** 2 / 8 * 0.5


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_every_family_has_functions_that_can_be_planned(family, tmp_path):
    model = tiny.save(family, tmp_path / "model")
    plan = make_plan(recipe(only=EVERYTHING[1:]), str(model), prove=False)
    assert not plan.problems
    found = {row.role for row in plan.rows}
    assert found >= {"norm", "softmax"} and ("activation" in found) == (family != "opt")  # ReLU needs no table


def test_a_pass_for_matrices_refuses_a_function_by_name(tmp_path):
    model = tiny.save("llama", tmp_path / "model")
    text = b"version: 1\nname: x\nsteps:\n  - {pass: rtn, group_size: -1, only: ['@norm']}\n"
    problems = make_plan(parse_recipe(text, "x.yaml"), str(model)).problems
    told = problems[0].data
    assert (told["reason"], told["kind"], told["pass"], told["form"]) == ("other-kind", "norm", "rtn", "packed_linear")
    assert problems[0].where == "steps.0" and told["weight"].endswith("layernorm")


def test_a_model_without_such_a_function_says_so(tmp_path):
    model = tiny.save("opt", tmp_path / "model")
    problems = make_plan(recipe(only=["@activation"]), str(model)).problems
    assert isinstance(problems[0], RecipeError) and problems[0].where == "steps.0.only[0]"
    assert (problems[0].data["reason"], problems[0].data["pattern"]) == ("matches-none", "@activation")


def test_settings_say_whether_ranges_have_to_be_calibrated():
    assert BCT(only=("*", "@activation!")).traits.reads == "inputs"
    assert BCT(only=("*", "@norm", "@softmax")).traits.reads == "weights"
    softmax_of = Weight("a.products", "", "a.products", (), "softmax")
    assert (
        BCT().format_params(softmax_of)["bits"] is None
        and BCT(activations="dynamic").format_params(softmax_of)["bits"] == 8
    )
