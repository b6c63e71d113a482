"""The pass: gates before and after quantization, a target met by a search, and what plan refuses."""

from __future__ import annotations

import json
from contextlib import ExitStack

import numpy
import pytest
import tiny
import torch
import yaml
from raising import raises
from transformers import AutoModelForImageClassification

import compressor
from compressor.artifact.manifest import read_manifest
from compressor.artifact.stock_loading import load_stock
from compressor.data.samples import load_samples
from compressor.engine.plan import make_plan
from compressor.errors import PassError, RecipeError
from compressor.evaluation.kept_patches import kept_patches
from compressor.evaluation.metrics import batch_sums
from compressor.evaluation.render import render_html
from compressor.layers.structural.token_gate import TokenGate
from compressor.model.facts import BlockTokens, TokenFacts
from compressor.model.structure import find_blocks, read_structure
from compressor.passes.zero_tprune import ZeroTPrune
from compressor.recipe.recipe import parse_recipe
from compressor.run import compress
from compressor.testing import check_pass

GATES = {"pass": "zero_tprune", "keep": {1: 0.7, 2: 0.5}, "min_tokens": 4}
TARGET = {"pass": "zero_tprune", "target_macs": 0.8, "min_tokens": 4}
INT8 = {"pass": "llm_int8"}


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """A tiny ViT of 4 blocks and images for it."""
    folder = tmp_path_factory.mktemp("zt")
    tiny.save("vit", folder / "model", num_hidden_layers=4)
    pixels = numpy.random.default_rng(0).integers(0, 255, (64, 16, 16), dtype=numpy.uint8)
    numpy.savez(folder / "x.npz", images=pixels, labels=numpy.arange(64) % 3)
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return tiny.save("bert", tmp_path_factory.mktemp("zt") / "model", num_hidden_layers=4)


def recipe(*steps, source="random", **more):
    data = {"source": str(source), "samples": 16, "length": 24}
    tree = {"version": 1, "name": "zt", "data": data, "steps": list(steps), "report": {"html": False}, **more}
    return parse_recipe(yaml.safe_dump(tree).encode(), "zt.yaml")


def problems(model, *steps):
    return [(p.where, p.data) for p in make_plan(recipe(*steps), str(model), prove=False).problems]


def kept_and_logits(model, batch):
    """Tokens after each block, and the answer."""
    found = []
    blocks = model.get_submodule(find_blocks(model))
    handles = [b.register_forward_hook(lambda _m, _a, out: found.append(out.shape[1])) for b in blocks]
    with torch.no_grad():
        logits = model(**batch).logits
    for handle in handles:
        handle.remove()
    return found, logits


@pytest.mark.slow
def test_gates_after_int8_meet_a_target_and_the_report_shows_them(vit, tmp_path):
    data = {"source": str(vit / "x.npz"), "samples": 8}
    steps = (INT8, TARGET)
    evaluation = {"data": data, "metrics": ["accuracy", "kl_divergence", "size", "speed"]}
    report = compress(
        recipe(*steps, source=vit / "x.npz", eval=evaluation), str(vit / "model"), tmp_path / "out", threads=1
    )
    assert report["verification"]["problems"] == [] and report["verification"]["max_logit_difference"] == 0.0
    gated = report["reshapes"][0]
    tokens = gated["tokens"]
    assert tokens["macs_after"] <= 0.8 * tokens["macs_before"] and len(report["weights"]) == 24
    assert gated["parameters_before"] == gated["parameters_after"]
    found = gated["decision"]["figures"]
    assert [f["macs"] for f in found] == sorted((f["macs"] for f in found), reverse=True)
    assert gated["decision"]["keep"].keys() == {"1", "2", "3"}
    ours = compressor.load(tmp_path / "out", kernels="reference")
    pixels = torch.stack(load_samples(recipe(TARGET, source=vit / "x.npz").data, vit, seed=0, vocabulary=None).inputs)
    assert [report["data"][key]["part"]["name"] for key in ("calibration", "eval")] == ["calibration", "evaluation"]
    assert kept_and_logits(ours, {"pixel_values": pixels})[0] == [row["left"] for row in tokens["blocks"]]
    assert report["run"]["speed"]["samples_per_second"]["before"] > 0
    picture = report["patches"]
    assert picture["gates"] == sum(row["keep"] < 1 for row in tokens["blocks"]) and len(picture["images"]) == 6
    for image in picture["images"]:
        passed = numpy.array(image["survived"])
        assert passed.shape == (4, 4) and int((passed == picture["gates"]).sum()) == tokens["blocks"][-1]["left"] - 1
    assert "Patches kept of sample images" in render_html(report)


def test_the_picture_says_how_many_gates_each_patch_passed():
    model = tiny.build("vit")
    image = torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(2))
    assert kept_patches(model, [image]) is None
    place = (
        {"call": "layernorm_after", "nth": 0, "spread": False},
        {"call": "mlp", "nth": 0, "spread": False},
        {"call": "dropout", "nth": 1, "spread": True},
    )
    block = BlockTokens("attention", place, "attention_mask", 4096, 4096, 32, 4)
    facts = TokenFacts(17, 32, (1, 0), (4, 4), (block,) * 2, 0)
    TokenGate.prepare(model)
    settings = ZeroTPrune(keep={0: 0.6, 1: 0.5}, min_tokens=4)
    with ExitStack() as stack:
        for number, gate in settings.gates(facts, settings.keep).items():
            stack.enter_context(TokenGate.wrapped(model.vit.layers[number], gate))
        found = kept_patches(model, [image] * 8)
    assert found["gates"] == 2 and len(found["images"]) == 6
    passed = numpy.array(found["images"][0]["survived"])
    assert passed.shape == (4, 4) and [int((passed >= gates).sum()) for gates in (1, 2)] == [10, 5]
    assert numpy.array(found["images"][0]["pixels"]).max() == 255


@pytest.mark.slow
@pytest.mark.parametrize("family", ["vit", "bert"])
def test_gates_before_and_after_quantization_prune_the_same_tokens_of_the_same_weights(family, vit, bert, tmp_path):
    model, source = (vit / "model", vit / "x.npz") if family == "vit" else (bert, "random")
    batch = {"input_ids": torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(0))}
    if family == "vit":
        batch = {"pixel_values": torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))}
    rounded = {"pass": "rtn", "bits": 8, "group_size": -1}
    outputs = []
    for number, steps in enumerate([(GATES, rounded), (rounded, GATES), (GATES, INT8), (INT8, GATES)]):
        out = tmp_path / str(number)
        report = compress(recipe(*steps, source=source), str(model), out, measure=False)
        assert report["verification"]["problems"] == [] and report["verification"]["max_logit_difference"] == 0.0
        assert report["route"]["name"] == "custom"
        for loaded in (compressor.load(out, kernels="reference"), load_stock(out, read_manifest(out))[0]):
            outputs.append(kept_and_logits(loaded, batch))
    wanted = [17, 13, 7, 7] if family == "vit" else [24, 18, 10, 10]
    assert all(left == wanted for left, _ in outputs)
    for start in (0, 4):  # rounding to nearest reads no data, int8 without a report neither
        assert all(torch.equal(logits, outputs[start][1]) for _, logits in outputs[start : start + 4])


def test_a_search_stops_with_what_can_be_reached_or_the_plan_knows(vit, tmp_path, monkeypatch):
    asked = recipe({"pass": "zero_tprune", "target_macs": 0.3, "blocks": [3]}, source=vit / "x.npz")
    (problem,) = make_plan(asked, str(vit / "model")).problems
    assert problem.where == "zero_tprune.target_macs" and problem.data["least"] > problem.data["target"] == 0.3
    assert problem.data["blocks"] == [3]
    monkeypatch.setattr(ZeroTPrune, "_check_target", lambda *_: None)  # as where texts have no known length
    with raises(PassError, where="zero_tprune.target_macs", blocks=[3], target=0.3) as failure:
        compress(asked, str(vit / "model"), tmp_path / "out", measure=False)
    assert failure.value.data["least"] > 0.3


@pytest.mark.slow
def test_the_pass_keeps_the_contract(tmp_path):
    model = tiny.save("bert", tmp_path / "model", dtype=torch.bfloat16)
    report = check_pass("zero_tprune", ZeroTPrune(target_macs=0.9, blocks=(0, 1), min_tokens=4), model, tmp_path, "*")
    assert report["verification"]["max_logit_difference"] == 0.0
    assert report["sizes"]["before_bytes"] <= report["sizes"]["after_bytes"] * 1.01  # nothing is smaller


def test_the_modeling_file_loads_gates_without_this_package_and_weights_are_the_models(vit, tmp_path):
    report = compress(recipe(GATES), str(vit / "model"), tmp_path / "out", measure=False)
    assert report["reshapes"][0]["tokens"]["blocks"][3]["left"] == 7
    text = next((tmp_path / "out").glob("modeling_*.py")).read_text()
    assert "import compressor" not in text and "from compressor" not in text and "class TokenGate" in text
    stock = AutoModelForImageClassification.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    given = read_structure(vit / "model")
    dense = type(given.model).from_pretrained(vit / "model").eval()
    assert all(torch.equal(value, dense.state_dict()[name]) for name, value in stock.state_dict().items())
    batch = {"pixel_values": torch.randn(3, 1, 16, 16, generator=torch.Generator().manual_seed(0))}
    left, logits = kept_and_logits(stock, batch)
    ours, same = kept_and_logits(compressor.load(tmp_path / "out", kernels="reference"), batch)
    assert left == ours == [17, 13, 7, 7] and torch.equal(logits, same)
    assert not any(isinstance(module, TokenGate) for module in stock.modules())


def test_plan_refuses_what_no_gate_can_do(vit, bert, tmp_path):
    image, text = vit / "model", bert
    few = {"reason": "too-few", "block": 2, "left": 2, "tokens": 17, "least": 4}
    keep = {"pass": "zero_tprune", "keep": {1: 0.4, 2: 0.1}}
    assert ("zero_tprune.keep", few) in problems(image, keep)
    absent = {"reason": "no-block", "block": 9, "blocks": 4}
    keep = {"pass": "zero_tprune", "keep": {1: 0.9, 9: 0.8}}
    assert ("zero_tprune.keep", absent) in problems(image, keep)
    blocks = {"pass": "zero_tprune", "blocks": [-1, 2]}
    assert ("zero_tprune.blocks", {**absent, "block": -1}) in problems(text, blocks)
    only = {**GATES, "only": ["*query"]}
    assert ("steps.0", {"reason": "changes-no-weights", "pass": "zero_tprune"}) in problems(text, only)
    twice = {"reason": "needs-own-blocks", "pass": "zero_tprune", "before": "zero_tprune"}
    assert ("steps.1", twice) in problems(text, GATES, GATES)
    late = {"reason": "needs-dense", "pass": "fuse_norms", "before": INT8["pass"]}
    assert ("steps.1", late) in problems(image, INT8, {"pass": "fuse_norms"})
    llama = tiny.save("llama", tmp_path / "llama")
    assert ("model.layers.0", {"reason": "causal"}) in problems(llama, GATES)
    attentions = tiny.save("bert", tmp_path / "bert", output_attentions=True, attn_implementation="eager")
    asked = {"reason": "asks-for-output", "key": "output_attentions"}
    assert ("BertForSequenceClassification", asked) in problems(attentions, GATES)


@pytest.mark.parametrize(
    ("settings", "key", "reason"),
    [
        ({"keep": 0.0}, ".keep", "greater-than"),
        ({"keep": {1: 1.2}}, ".keep", "float-type"),
        ({"keep": {}}, "", "keep-without-blocks"),
        ({"keep": {1: 0.5}, "blocks": [1]}, "", "keep-and-blocks"),
        ({"keep": 0.5, "target_macs": 0.5}, "", "keep-and-target"),
        ({"target_macs": 1.0}, ".target_macs", "less-than"),
        ({"blocks": [1, 1]}, "", "blocks-each-once"),
        ({"head_filter": [1.0, 0.5]}, "", "head-filter-order"),
        ({"min_tokens": 3}, ".min_tokens", "greater-than-equal"),
    ],
)
def test_settings_that_make_no_sense_are_refused_where_they_stand(settings, key, reason):
    with raises(RecipeError, reason=reason) as failure:
        recipe({"pass": "zero_tprune", **settings})
    assert failure.value.where.endswith(f" (steps.0{key})")


def test_a_plan_counts_the_work_of_the_worked_example():
    facts = _deit_small()
    found = ZeroTPrune(keep=0.8, min_tokens=4).account(facts, ZeroTPrune()._rates(12), 197)
    assert found["macs_before"] == 4598882304
    assert found["macs_after"] - found["macs_of_gates"] == 3444215040
    assert [row["left"] for row in found["blocks"]] == [197] * 3 + [158] * 3 + [127] * 3 + [102] * 3
    assert [row["similar"] for row in found["blocks"] if row["keep"] < 1] == [12, 9, 8]
    assert found["macs_of_gates"] < 0.01 * found["macs_before"]


def test_rates_that_min_tokens_held_say_what_it_made_of_them():
    settings, facts = ZeroTPrune(min_tokens=8), _deit_small()
    for rates in ({3: 0.1, 6: 0.2, 9: 0.9}, {1: 0.12, 2: 0.3}, {0: 0.5}):
        said = settings._without_clamps(facts, rates)
        left = [row["left"] for row in settings.account(facts, rates, 197)["blocks"]]
        assert [row["left"] for row in settings.account(facts, said, 197)["blocks"]] == left
        assert settings._too_few(facts, said) is None


def _deit_small():
    block = BlockTokens("attention", (), None, 4 * 384**2, 8 * 384**2, 384, 6)
    return TokenFacts(197, 384, (1, 0), (14, 14), (block,) * 12, 196 * 768 * 384 + 1000 * 384)


def test_embeddings_of_fewer_tokens_are_compared_by_their_means():
    before, after = torch.ones(2, 6, 4), torch.ones(2, 3, 4)
    found = batch_sums(before, after, torch.zeros(2, 6), None, causal=False)
    assert found.keys() == {"cosine"} and found["cosine"].tolist() == pytest.approx([1, 1])


def test_settings_survive_yaml():
    settings = {"pass": "zero_tprune", "keep": {3: 0.9, 6: 0.8}, "head_filter": [0.1, 5.0], "iterations": [30, 5, 1]}
    made = recipe(settings)
    again = parse_recipe(made.to_yaml().encode(), "again")
    assert again.steps[0].settings == made.steps[0].settings and made.steps[0].settings.keep == {3: 0.9, 6: 0.8}
    assert json.dumps(made.resolved()) == json.dumps(again.resolved())
