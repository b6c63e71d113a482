"""Steps that change the model itself: norms folded, the residual stream rotated, or made narrower."""

from __future__ import annotations

import json

import pytest
import slicegpt_reference as reference
import tiny
import torch
import transformers as hf
import yaml
from raising import raises
from safetensors.torch import load_file
from tiers import every_day

import compressor
from compressor.analysis.residual_stream import residual_of
from compressor.data.samples import load_samples
from compressor.engine.plan import make_plan
from compressor.engine.plan_records import parameter_count
from compressor.errors import PreflightError, RecipeError
from compressor.methods.rotation.sliced_shapes import (
    global_parameters,
    kept_width,
    per_sublayer_parameters,
    stream_shape,
)
from compressor.model.block_runner import Pieces
from compressor.model.structure import find_blocks
from compressor.passes.rotate import Rotate
from compressor.passes.slicegpt import SliceGPT
from compressor.recipe.recipe import parse_recipe
from compressor.run import compress
from compressor.testing import check_pass, kill_at, weight_hashes

FUSED = {"pass": "fuse_norms"}
SLOWER = ("gpt2", "phi", "gpt_neox", "qwen3", "mixtral")
IDS = torch.arange(24).view(2, 12)


def recipe(*steps, **sections):
    tree = {
        "version": 1,
        "name": "reshape",
        "data": {"source": "random", "samples": 8, "length": 16},
        "steps": list(steps),
        "report": {"html": False},
        **sections,
    }
    return parse_recipe(yaml.safe_dump(tree).encode(), "reshape.yaml")


def logits(directory):
    with torch.no_grad():
        return hf.AutoModelForCausalLM.from_pretrained(directory).eval()(input_ids=IDS).logits


def ours(directory):
    with torch.no_grad():
        return compressor.load(directory, kernels="reference")(input_ids=IDS).logits


def relative(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


def problems(model, *steps):
    """(where, data) of each problem of the plan."""
    found = make_plan(recipe(*steps), str(model), prove=False).problems
    return [(problem.where, problem.data) for problem in found]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma", pytest.param("mixtral", marks=pytest.mark.slow)])
def test_norms_folded_and_the_stream_rotated_leave_the_logits_of_a_stock_model(family, tmp_path):
    model = tiny.save(family, tmp_path / "model")
    report = compress(recipe(FUSED, {"pass": "rotate"}), str(model), tmp_path / "out", measure=False)
    assert report["route"]["name"] == "dense" and report["verification"]["max_logit_difference"] == 0.0
    # each weight is rounded to float32 twice, 6e-8 of itself each time, and the model has some ten products in a row
    assert relative(logits(tmp_path / "out"), logits(model)) < 5e-6
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    gain = tensors["model.layers.1.input_layernorm.weight"]
    assert bool((gain == (0.0 if family == "gemma" else 1.0)).all())
    assert ("lm_head.weight" in tensors) and config.get("tie_word_embeddings") is False
    assert not tensors["model.embed_tokens.weight"].allclose(
        load_file(model / "model.safetensors")["model.embed_tokens.weight"]
    )


@pytest.mark.parametrize("family", ["llama", "qwen3", pytest.param("gemma", marks=pytest.mark.slow)])
def test_nothing_sliced_keeps_the_logits_also_where_eps_is_large(family, tmp_path):
    model = tiny.save(family, tmp_path / "model", rms_norm_eps=0.1)
    step = {"pass": "slicegpt", "sparsity": 0.0, "orientation": "global"}
    compress(recipe(FUSED, step), str(model), tmp_path / "out", measure=False)
    assert relative(logits(tmp_path / "out"), logits(model)) < 1e-4


def test_a_globally_sliced_model_is_a_stock_model_of_a_smaller_width(tmp_path):
    model = tiny.save("llama", tmp_path / "model")
    step = {"pass": "slicegpt", "sparsity": 0.25, "round_to": 4, "orientation": "global"}
    plan = make_plan(recipe(FUSED, step), str(model))
    report = compress(recipe(FUSED, step), str(model), tmp_path / "out", measure=False)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["hidden_size"], config["head_dim"], config["num_attention_heads"]) == (24, 8, 4)
    assert config["model_type"] == "llama" and config["rms_norm_eps"] == pytest.approx(1e-6 * 32 / 24)
    stock, info = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    count = sum(parameter.numel() for parameter in stock.parameters())
    (_, sliced) = plan.reshapes
    shapes = {name: tuple(p.shape) for name, p in sliced.before.model.named_parameters()}
    assert count == global_parameters(stream_shape(sliced.facts.residual, shapes), 24) == parameter_count(sliced.after)
    assert report["reshapes"][1]["parameters_after"] == count and report["reshapes"][1]["widths"] == [32, 24]
    assert report["sizes"]["predicted_bytes"] == report["sizes"]["after_bytes"]
    made = stock.generate(IDS[:1, :4], max_new_tokens=4, do_sample=False, attention_mask=torch.ones(1, 4, dtype=int))
    assert made[:, 4:].equal(stock(input_ids=made[:, :-1]).logits[:, 3:].argmax(-1))


@pytest.mark.slow
def test_a_model_whose_stream_needs_fewer_directions_loses_nothing_with_the_rest_cut(tmp_path):
    """Everything that writes to the stream lies in 24 of 32 directions."""
    dense = tiny.build("llama", seed=1)
    basis = torch.linalg.qr(torch.randn(32, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    project = (basis @ basis.t()).float()
    with torch.no_grad():
        dense.model.embed_tokens.weight.copy_(dense.model.embed_tokens.weight @ project)
        for block in dense.model.layers:
            for writer in (block.self_attn.o_proj, block.mlp.down_proj):
                writer.weight.copy_(project @ writer.weight)
    model = tmp_path / "model"
    dense.save_pretrained(model)
    for kept, lossless in ((24, True), (20, False)):
        step = {"pass": "slicegpt", "sparsity": 1 - kept / 32, "round_to": 4, "orientation": "global"}
        compress(recipe(FUSED, step), str(model), tmp_path / f"out-{kept}", measure=False)
        assert (relative(logits(tmp_path / f"out-{kept}"), logits(model)) < 1e-4) == lossless


def test_a_sliced_model_is_quantized_in_the_same_recipe_and_loads_by_plain_transformers(tmp_path):
    model = tiny.save("llama", tmp_path / "model", dtype=torch.bfloat16)
    steps = (
        FUSED,
        {"pass": "slicegpt", "sparsity": 0.25, "orientation": "global"},
        {"pass": "gptq", "bits": 4, "group_size": -1},
    )
    report = compress(recipe(*steps), str(model), tmp_path / "out", measure=False)
    assert report["route"]["name"] == "compressed-tensors" and report["verification"]["max_logit_difference"] == 0.0
    shapes = {row["name"]: row["shape"] for row in report["weights"]}
    assert shapes["model.layers.0.self_attn.q_proj"] == [32, 24] and shapes["model.layers.1.mlp.down_proj"] == [24, 64]
    assert [step["pass"] for step in report["reshapes"]] == ["fuse_norms", "slicegpt"]


@pytest.mark.parametrize(
    ("name", "settings", "before"),
    [
        pytest.param("rotate", Rotate(rotation="pca"), [FUSED], marks=pytest.mark.slow),
        ("slicegpt", SliceGPT(sparsity=0.25, orientation="global"), [FUSED]),
    ],
)
def test_reshaping_passes_keep_the_contract(name, settings, before, tmp_path):
    model = tiny.save("llama", tmp_path / "model", dtype=torch.bfloat16)
    check_pass(name, settings, model, tmp_path, "*", before=before)


def test_a_reshaping_step_out_of_place_is_refused_with_the_reason(tmp_path):
    model = tiny.save("llama", tmp_path / "model")
    rtn, rotate = {"pass": "rtn", "group_size": -1}, {"pass": "rotate"}
    dense = {"reason": "needs-dense", "pass": "rotate", "before": "rtn"}
    folded = {"reason": "needs-fact", "pass": "rotate", "fact": "norms_folded"}
    assert problems(model, rtn, rotate)[0] == ("steps.1", dense)
    alone = {"reason": "shares-sweep", "pass": "fuse_norms"}
    assert problems(model, {"sweep": [FUSED, rtn]})[0] == ("steps.0.sweep.0", alone)
    confined = {"reason": "changes-all", "pass": "fuse_norms"}
    assert problems(model, {**FUSED, "only": ["q_proj"]})[0] == ("steps.0", confined)
    assert problems(model, rotate) == [("steps.0", folded)]


@pytest.mark.parametrize(
    ("family", "where", "reason"),
    [
        ("gemma3", "model.layers.0.post_attention_layernorm", "norm-on-branch"),
        ("bert", "bert.encoder.layer.0.output.LayerNorm", "post-norm"),
        ("olmo2", "model.layers.0.post_attention_layernorm", "norm-on-branch"),
    ],
)
def test_a_family_that_cannot_be_sliced_is_refused_with_the_reason(family, where, reason, tmp_path):
    model = tiny.save(family, tmp_path / "model")
    found = problems(model, FUSED, {"pass": "slicegpt", "orientation": "global"})
    assert found[0] == (where, {"reason": reason})


@pytest.mark.parametrize("orientation", ["global", "auto"])
def test_a_family_that_ties_width_to_heads_is_sliced_per_site_and_says_so(orientation, tmp_path):
    model = tiny.save("opt", tmp_path / "model")
    step = {"pass": "slicegpt", "orientation": orientation}
    plan = make_plan(recipe(FUSED, step), str(model), prove=False)
    assert not plan.problems and plan.export_format.name == "custom"
    redefinition = plan.reshapes[1].redefinition
    assert redefinition.widths == (32, *[24] * 4, 32)
    assert "OPTForCausalLM can't be narrower by its config alone" in redefinition.notes[-1]
    assert redefinition.notes[-1].endswith("so orientation is per_site")


def test_settings_of_no_sense_are_refused(tmp_path):
    with raises(RecipeError, reason="one-width"):
        recipe({"pass": "slicegpt", "schedule": "variance", "orientation": "global"})
    with raises(RecipeError, reason="less-than-equal", found="0.7") as failure:
        recipe({"pass": "slicegpt", "sparsity": 0.7})
    assert failure.value.where.endswith(" (steps.0.sparsity)")
    model = tiny.save("llama", tmp_path / "model")
    step = {"pass": "slicegpt", "round_to": 64, "orientation": "global"}
    (problem,) = make_plan(recipe(FUSED, step), str(model), prove=False).problems
    assert problem.where == "slicegpt.round_to" and problem.data["width"] == 32


@pytest.mark.slow
def test_a_sparsity_that_makes_a_model_larger_is_refused_with_the_least_that_helps(tmp_path):
    """Untying the head costs more than a tenth of the width saves."""
    model = tiny.save("qwen3", tmp_path / "model", vocab_size=512)
    step = {"pass": "slicegpt", "sparsity": 0.1, "round_to": 1, "orientation": "global"}
    with raises(PreflightError, where="slicegpt.sparsity") as failure:
        compress(recipe(FUSED, step), str(model), tmp_path / "out", measure=False)
    plan = make_plan(recipe(FUSED, step), str(model), prove=False)
    assert plan.problems[0].data == failure.value.data
    assert failure.value.data["after"] > failure.value.data["before"]
    least = failure.value.data["least"]
    for sparsity, grows in ((least + 1e-3, False), (least - 0.035, True)):
        found = make_plan(recipe(FUSED, {**step, "sparsity": round(sparsity, 4)}), str(model), prove=False)
        assert bool(found.problems) == grows


@pytest.mark.slow
@pytest.mark.parametrize("orientation", ["global", "per_site"])
def test_too_few_calibration_tokens_are_said_in_the_report(orientation, tmp_path):
    model = tiny.save("llama", tmp_path / "model")
    step = {"pass": "slicegpt", "sparsity": 0.5, "orientation": orientation}
    few = {"source": "random", "samples": 2, "length": 16}
    report = compress(recipe(FUSED, step, data=few), str(model), tmp_path / "out", measure=False)
    (warning,) = [w for w in report["warnings"] if w["code"] == "few-tokens"]
    found = dict(warning["data"])
    assert 16 < found.pop("rank") <= 32 and found == {"tokens": 32, "width": 32, "wanted": 128}


def test_widths_are_rounded_down_to_what_is_asked():
    assert [kept_width(4096, s, 8) for s in (0.1, 0.2, 0.25, 0.3)] == [3680, 3272, 3072, 2864]


@pytest.mark.parametrize("family", ["opt", "gpt2", pytest.param("phi", marks=pytest.mark.slow)])
def test_norms_of_a_layernorm_model_are_folded_and_its_logits_stay(family, tmp_path):
    model = tiny.save(family, tmp_path / "model")
    report = compress(recipe(FUSED, {"pass": "rotate"}), str(model), tmp_path / "out", measure=False)
    assert report["route"]["name"] == "custom" and report["verification"]["max_logit_difference"] == 0.0
    assert relative(ours(tmp_path / "out"), logits(model)) < 5e-6
    held = {name for file in (tmp_path / "out").glob("*.safetensors") for name in load_file(file)}
    assert not any("norm" in name or ".ln_" in name for name in held) and "lm_head.bias" in held


@pytest.mark.parametrize("family", every_day(["llama", "opt", *SLOWER], "llama", "opt"))
def test_nothing_sliced_at_any_site_keeps_the_logits(family, tmp_path):
    model = tiny.save(family, tmp_path / "model")
    compress(recipe(FUSED, {"pass": "slicegpt", "sparsity": 0.0}), str(model), tmp_path / "out", measure=False)
    assert relative(ours(tmp_path / "out"), logits(model)) < 5e-6


@pytest.mark.parametrize("family", ["llama", pytest.param("opt", marks=pytest.mark.slow)])
def test_slicing_at_each_site_is_what_the_plain_algorithm_gives(family, tmp_path):
    """The sweep projects a dense block's norms; the reference runs the sliced model itself, sublayer after sublayer."""
    model = tiny.save(family, tmp_path / "model")
    step = {"pass": "slicegpt", "sparsity": 0.25, "round_to": 4, "final_orientation": "pca"}
    report = compress(recipe(FUSED, step), str(model), tmp_path / "out", measure=False)
    dense = hf.AutoModelForCausalLM.from_pretrained(model).double().eval().requires_grad_(False)
    head = dense.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.clone(), requires_grad=False)
    pieces = Pieces(dense, find_blocks(dense))
    residual = residual_of(dense, pieces)
    samples = load_samples(recipe(step).data, model, seed=0, vocabulary=96)
    reference.fold(dense, residual)
    widths = [24] * sum(map(len, residual.blocks)) + [32]
    cut = reference.slice_model(pieces, residual, {"input_ids": torch.stack(samples.inputs)}, widths)
    expected = reference.run(cut, {"input_ids": IDS})[1].float()
    # float32 signals turn the axes a little, most where two eigenvalues lie close; dropped parts differ by as much
    assert relative(ours(tmp_path / "out"), expected) < 2e-3
    assert relative(ours(tmp_path / "out"), logits(model)) > 2e-2  # and it is another model than the dense one
    (_, sliced) = make_plan(recipe(FUSED, step), str(model), prove=False).reshapes
    shapes = {name: tuple(p.shape) for name, p in sliced.before.model.named_parameters()}
    count = per_sublayer_parameters(stream_shape(sliced.facts.residual, shapes), widths)
    assert report["reshapes"][1]["parameters_after"] == count == parameter_count(sliced.after)


@pytest.mark.slow
def test_a_model_sliced_at_each_site_is_quantized_and_generates(tmp_path):
    model = tiny.save("llama", tmp_path / "model", dtype=torch.bfloat16)
    steps = (FUSED, {"pass": "slicegpt", "sparsity": 0.25}, {"pass": "llm_int8", "only": ["*", "@shortcut!"]})
    report = compress(recipe(*steps), str(model), tmp_path / "out", measure=False)
    assert report["route"]["name"] == "custom" and report["verification"]["max_logit_difference"] == 0.0
    assert report["verification"]["generated_tokens"] == 8


@pytest.mark.slow
@pytest.mark.parametrize(
    ("orientation", "step"), [("global", 2), ("global", 14), ("per_site", 9), ("per_site", 14), ("per_site", 20)]
)
def test_a_run_killed_while_it_folds_surveys_or_slices_resumes_to_the_same_bytes(orientation, step, tmp_path):
    model = tiny.save("llama", tmp_path / "model")
    whole = recipe(FUSED, {"pass": "slicegpt", "sparsity": 0.25, "orientation": orientation})
    compress(whole, str(model), tmp_path / "first", measure=False)
    assert kill_at(step, whole, model, tmp_path / "killed")
    compress(whole, str(model), tmp_path / "killed", measure=False, resume=True)
    assert weight_hashes(tmp_path / "killed") == weight_hashes(tmp_path / "first")
