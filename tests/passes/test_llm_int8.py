"""llm_int8 from recipe to artifact: what is chosen and stored, that bitsandbytes loads it, and planted outliers."""

from __future__ import annotations

import copy
import json

import bitsandbytes as bnb
import numpy
import pytest
import tiny
import torch
import torch.nn.functional as F
import transformers as hf
import yaml
from raising import raises
from safetensors.torch import load_file
from torch import nn

import compressor
from compressor.artifact import stock_formats as export
from compressor.artifact.artifact_config import artifact_config
from compressor.artifact.verify import verify, verify_in_child
from compressor.data.samples import load_samples
from compressor.engine.plan import make_plan
from compressor.errors import DependencyError, PassError, PreflightError, RecipeError
from compressor.evaluation.render import render_html, render_markdown
from compressor.evaluation.weight_rows import outlier_inputs
from compressor.kernels.ops.bitsandbytes_linear import bitsandbytes_forward
from compressor.layers.int8_split_linear import Int8SplitLinear
from compressor.layers.packed_linear import PackedLinear
from compressor.model.model_files import demo_path
from compressor.model.weights import Group, Weight
from compressor.passes.llm_int8 import LLMInt8, Outliers, choose_columns
from compressor.recipe.recipe import parse_recipe, read_recipe
from compressor.recipe.schema import DataSettings, EvalDataSettings
from compressor.run import compress

SMALL = {"source": "random", "samples": 8, "length": 16}


def recipe(*steps, **sections):
    steps = [{"pass": "llm_int8", **step} for step in steps or ({},)]
    tree = {"version": 1, "name": "test", "data": SMALL, "steps": steps, "report": {"html": False}, **sections}
    return parse_recipe(yaml.safe_dump(tree).encode(), "test.yaml")


def plan_of(family, tmp_path, *steps, **sections):
    model = tiny.save(family, tmp_path / "m", dtype=torch.bfloat16)
    return make_plan(recipe(*steps, **sections), str(model), prove=False)


def test_plan_says_where_calibration_decides_the_size(tmp_path):
    decided = [w.code for w in plan_of("llama", tmp_path, {"outliers": "calibrated"}).warnings]
    assert decided == ["sizes-undecided"]
    assert make_plan(recipe(), str(tmp_path / "m"), prove=False).warnings == ()


def group_of(inputs):
    return Group((Weight("fc", "fc.weight", "fc.weight", (4, inputs), "mlp"),))


def test_inf_means_what_zero_means_and_odd_settings_are_refused():
    assert LLMInt8(threshold=float("inf")).threshold == 0.0
    assert recipe({"threshold": float("inf")}).steps[0].settings == LLMInt8(threshold=0)
    for step, reason in [
        ({"threshold": -1}, "greater-than-equal"),
        ({"threshold": float("nan")}, "greater-than-equal"),
        ({"threshold": 0, "outliers": "calibrated"}, "nothing-calibrated"),
        ({"min_frequency": 0.5}, "needs-calibrated"),
        ({"max_outlier_columns": 4}, "needs-calibrated"),
    ]:
        with raises(RecipeError, reason=reason) as failure:
            recipe(step)
        key = ".threshold" if reason == "greater-than-equal" else ""
        assert failure.value.where.endswith(f" (steps.0{key})")


def test_data_is_read_only_where_something_is_counted():
    assert not recipe().reads_data
    assert recipe({"outliers": "calibrated"}).reads_data and recipe({"outlier_report": True}).reads_data


def test_outliers_are_counted_and_the_largest_are_kept():
    count = Outliers.none(6.0, torch.device("cpu"), group_of(5))
    x = torch.tensor([[0.0, 6, 1, -9, 0], [0, 0, 5.9, -8, 0], [7, 0, 0, 0, 0], [0, 0, 0, 0, 0]])
    for part in (x[:2], x[2:], x[:0]):
        count = count.add(part)
    record = count.record(group_of(5))
    assert record["outlier_features"] == 3 and record["outlier_token_share"] == 0.75
    assert record["largest_features"] == [3, 0, 1] and record["largest_magnitudes"] == [9, 7, 6]
    assert (record["outlier_magnitude"], record["calibration_tokens"]) == (9, 4)
    for frequency, most, expected, dropped in [(0, 9, [0, 1, 3], []), (0.3, 9, [3], []), (0, 2, [0, 3], [1])]:
        columns, left = choose_columns(count, frequency, most)
        assert columns.tolist() == expected and left == dropped


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "opt", "gpt2", "phi3", "gemma3", "gpt_neox", "bert"])
def test_dynamic_outliers_take_bitsandbytes_and_calibrated_ones_the_modeling_file(family, tmp_path):
    plan = plan_of(family, tmp_path)
    assert plan.export_format.name == "bitsandbytes" and not plan.problems
    formats = list(plan.formats.values())
    config = artifact_config(
        plan.structure.checkpoint.config, plan.export_format, formats, plan.structure.model, "", False
    )
    settings = config["quantization_config"]
    assert settings["llm_int8_threshold"] == 6.0 and isinstance(settings["llm_int8_threshold"], float)
    stored = {export.module_of(stored_weight) for stored_weight in formats}
    linears = {name for name, module in plan.structure.model.named_modules() if isinstance(module, nn.Linear)}
    assert linears - stored <= set(settings["llm_int8_skip_modules"])
    kept = make_plan(recipe({"outliers": "calibrated"}), str(tmp_path / "m"), prove=False)
    assert kept.export_format.name == "custom" and "calibrated outlier columns" in kept.export_format.reason


def test_what_one_checkpoint_of_bitsandbytes_cannot_hold_takes_the_modeling_file(tmp_path):
    mixed = [{"only": ["*_proj"], "except": ["o_proj"]}, {"only": ["o_proj"], "threshold": 0}]
    plan = plan_of("llama", tmp_path, *mixed)
    assert plan.export_format.name == "custom" and "thresholds [0.0, 6.0]" in plan.export_format.reason
    refused = make_plan(recipe(*mixed, export={"format": "bitsandbytes"}), str(tmp_path / "m"), prove=False)
    because = {"reason": "thresholds", "thresholds": [0.0, 6.0]}
    with raises(PreflightError, where="export", reason="no-stock-loader", because=because):
        raise refused.problems[0]


def test_experts_are_refused_by_name_and_attention_beside_them_is_for_bitsandbytes(tmp_path):
    (problem,) = plan_of("mixtral", tmp_path).problems
    assert "block_sparse_moe.experts" in problem.where and problem.data["reason"] == "expert-format"
    plan = make_plan(recipe({"only": ["@attention"]}), str(tmp_path / "m"), prove=False)
    assert plan.export_format.name == "bitsandbytes" and not plan.problems


@pytest.mark.slow
def test_bitsandbytes_loads_attention_beside_dense_experts(tmp_path):
    """Nothing is missing, and `verify` compares every dense parameter, experts among them, bit for bit."""
    model = tiny.save("mixtral", tmp_path / "m", dtype=torch.bfloat16)
    report = compress(recipe({"only": ["@attention"]}), str(model), tmp_path / "out", measure=False)
    found = report["verification"]
    assert report["route"]["name"] == "bitsandbytes" and found["stock_layers"]["compared"] == 8
    assert found["missing"] == found["unexpected"] == found["mismatched"] == found["problems"] == []
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    dense = hf.AutoModelForCausalLM.from_pretrained(model)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    assert loaded.get_parameter(name).equal(dense.get_parameter(name))


@pytest.mark.slow
def test_a_calibrated_vision_transformer_goes_the_whole_way(tmp_path):
    model = tiny.save("vit", tmp_path / "m", dtype=torch.bfloat16)
    draw = numpy.random.default_rng(0)
    images = draw.integers(0, 256, (64, 16, 16), dtype=numpy.uint8)
    numpy.savez(tmp_path / "images.npz", images=images, labels=draw.integers(0, 3, 64))
    data = {"source": str(tmp_path / "images.npz"), "samples": 16}
    step = {"outliers": "calibrated", "threshold": 3.0}
    report = compress(
        recipe(step, data=data, eval={"metrics": ["accuracy", "kl_divergence"], "data": {**data, "samples": 8}}),
        str(model),
        tmp_path / "out",
    )
    assert report["route"]["name"] == "custom" and report["verification"]["max_logit_difference"] == 0.0
    rows = report["weights"]
    assert len(rows) == 12 and all(row["calibration_tokens"] == 16 * 17 for row in rows)  # 16 patches and the class
    assert any(row["kept_columns"] for row in rows)
    assert report["metrics"]["accuracy"]["after"] is not None
    assert 0 <= report["metrics"]["kl_divergence"]["after"] < 0.01
    assert report["data"]["calibration"]["samples"] == 16


def test_without_bitsandbytes_plan_says_what_to_install_and_custom_goes_without(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    plan = plan_of("llama", tmp_path)
    (problem,) = plan.problems
    assert isinstance(problem, DependencyError) and problem.exit_code == 6
    assert problem.data["package"] == "bitsandbytes" and plan.artifact_bytes > 0
    with pytest.raises(DependencyError):
        compress(recipe(), str(tmp_path / "m"), tmp_path / "out", measure=False)
    assert not (tmp_path / "out.work").exists()
    custom = make_plan(recipe(export={"format": "custom"}), str(tmp_path / "m"), prove=False)
    assert custom.export_format.name == "custom" and not custom.problems


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """A tiny Llama whose activations have outliers, in bitsandbytes' layout, and its report."""
    place = tmp_path_factory.mktemp("stock")
    save_planted(place / "m")
    report = compress(recipe({"outlier_report": True}), str(place / "m"), place / "out", measure=False)
    return place / "out", report


def plant(model, factor=60.0):
    """Scale one normed feature and, by the inverse, the weights that read it: outliers, and the same logits."""
    with torch.no_grad():
        for layer in model.model.layers:
            for norm, readers in (
                (layer.input_layernorm, (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)),
                (layer.post_attention_layernorm, (layer.mlp.gate_proj, layer.mlp.up_proj)),
            ):
                norm.weight[5] *= factor
                for reader in readers:
                    reader.weight[:, 5] /= factor
    return model


def save_planted(directory):
    plant(tiny.build("llama")).to(torch.bfloat16).save_pretrained(directory)


def test_bitsandbytes_itself_loads_the_artifact_and_its_layers_do_what_they_should(stock):
    directory, report = stock
    assert report["route"]["name"] == "bitsandbytes"
    found = report["verification"]
    assert found["max_logit_difference"] == 0.0 and not found["problems"]
    assert found["missing"] == found["unexpected"] == found["mismatched"] == []
    layers = found["stock_layers"]
    assert layers["compared"] == 14 and 0 < layers["largest_share_of_allowed"] < 1
    model = hf.AutoModelForCausalLM.from_pretrained(directory)
    own = compressor.load(directory, kernels="reference")
    theirs, ours = (m.model.layers[0].mlp.gate_proj for m in (model, own))
    assert type(theirs) is bnb.nn.Linear8bitLt and type(ours) is Int8SplitLinear
    assert type(model.lm_head) is nn.Linear
    assert torch.equal(theirs.weight, ours.weight)
    x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    x[0, 3, 7], x[1, 1, 9] = 30, -6
    with torch.no_grad():
        expected, allowed = bitsandbytes_forward(ours, x)
        assert ((theirs(x).float() - expected).abs() <= allowed).all()
        # one token: its largest magnitude is the same in both, so what differs is their order of roundings
        one = x[:1, 3:4]
        expected, allowed = bitsandbytes_forward(ours, one)
        assert ((ours(one).float() - expected).abs() <= allowed).all()


def test_a_wrong_scale_or_code_fails_the_comparison_with_bitsandbytes(stock, tmp_path, monkeypatch):
    """Our loader is given other tensors than theirs reads, which only the comparison can see."""
    directory, _ = stock
    for name, change in (
        ("SCB", lambda layer: layer.SCB.mul_(1.05)),
        ("weight", lambda layer: layer.weight[0, :1].add_(1)),
    ):
        load = compressor.artifact.loader.load

        def spoiled(*args, change=change, load=load, **kwargs):
            model = load(*args, **kwargs)
            change(model.model.layers[1].mlp.down_proj)
            return model

        with monkeypatch.context() as patched:
            patched.setattr(compressor.artifact.verify, "load", spoiled)
            problems = verify(directory, None, sealed=True, deep=True).problems
        assert any("layers.1.mlp.down_proj" in problem for problem in problems), (name, problems)


def test_the_layout_is_bitsandbytes_own(stock):
    directory, report = stock
    tensors = load_file(directory / "model.safetensors")
    name = "model.layers.0.mlp.down_proj"
    found = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(name)}
    assert {key: (value.dtype, tuple(value.shape)) for key, value in found.items()} == {
        "weight": (torch.int8, (32, 64)),
        "SCB": (torch.float32, (32,)),
        "weight_format": (torch.uint8, ()),
    }
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "bitsandbytes" and config["llm_int8_skip_modules"] == ["lm_head"]
    dense = load_file(directory.parent / "m" / "model.safetensors")[f"{name}.weight"]
    codes, scale, _ = bnb.functional.int8_vectorwise_quant(dense.to(torch.float16))
    assert torch.equal(codes, found["weight"]) and torch.equal(scale, found["SCB"])
    rows = {row["name"]: row for row in report["weights"]}
    attention, down = rows["model.layers.0.self_attn.k_proj"], rows[name]
    assert attention["input"] == "model.layers.0.self_attn.q_proj" and 5 in attention["largest_features"]
    assert attention["outlier_features"] >= 1 and attention["outlier_magnitude"] > 20
    assert 0 < attention["outlier_token_share"] <= 1 and down["calibration_tokens"] == 8 * 16


def test_the_report_shows_outliers_of_each_input_once(stock):
    report = json.loads((stock[0] / "report.json").read_text())
    assert [row["name"].rpartition(".")[2] for row in outlier_inputs(report)] == [
        "q_proj",
        "o_proj",
        "gate_proj",
        "down_proj",
    ] * 2
    markdown, html = render_markdown(report), render_html(report)
    row = next(row for row in report["weights"] if row["name"] == "model.layers.0.self_attn.q_proj")
    share = round(100 * row["outlier_token_share"], 2)
    assert f"| {row['name']} | {row['outlier_features']} | 32 | {share} % |" in markdown
    assert "k_proj" not in markdown[markdown.index("outlier features of the input") :]
    for text in ("Outlier features of each input, on calibration data", "tokens with one, %", "input of gate_proj"):
        assert text in html
    plain = {**report, "weights": [{k: v for k, v in row.items() if k != "input"} for row in report["weights"]]}
    assert "outlier features" not in render_markdown(plain) and "Outlier features" not in render_html(plain)


@pytest.mark.slow
def test_calibrated_columns_are_stored_as_they_were_and_load_without_this_package(tmp_path):
    from fresh import logits_without_this_package

    save_planted(tmp_path / "m")
    step = {"outliers": "calibrated", "threshold": 2.0, "max_outlier_columns": 2}
    report = compress(recipe(step), str(tmp_path / "m"), tmp_path / "out", measure=False)
    assert report["route"]["name"] == "custom" and not report["verification"]["problems"]
    assert report["verification"]["max_logit_difference"] == 0.0
    name = "model.layers.1.mlp.up_proj"
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    columns = tensors[f"{name}.outlier_columns"].long()
    assert 5 in columns
    dense = load_file(tmp_path / "m" / "model.safetensors")[f"{name}.weight"]
    assert torch.equal(tensors[f"{name}.outlier_weight"], dense[:, columns])
    row = next(row for row in report["weights"] if row["name"] == name)
    assert row["kept_columns"] == len(columns) == row["spec"]["outlier_columns"] == 2
    assert any(warning["code"] == "outliers-dropped" for warning in report["warnings"])
    assert row["bytes_after"] == sum(value.nbytes for key, value in tensors.items() if key.startswith(name))
    own = compressor.load(tmp_path / "out", kernels="reference")
    expected = own(input_ids=torch.arange(8).view(1, 8)).logits
    assert torch.equal(logits_without_this_package(tmp_path / "out", tmp_path), expected)


def test_broken_inputs_stop_the_run():
    count = Outliers.none(6.0, torch.device("cpu"), group_of(3)).add(torch.tensor([[1.0, torch.nan, 2]]))
    with raises(PassError, where=group_of(3).name, reason="not-finite"):
        LLMInt8(outlier_report=True)._store(None, group_of(3), count)


def test_verification_elsewhere_names_the_missing_package(stock, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    with raises(DependencyError, where="export", package="bitsandbytes"):
        verify_in_child(stock[0], None, sealed=True)


def test_a_tied_head_is_left_alone_unless_named(tmp_path):
    plan = plan_of("qwen3", tmp_path)
    assert not plan.untied and all(stored.weight.role != "head" for stored in plan.formats.values())
    named = make_plan(recipe({"only": ["*", "@head"]}), str(tmp_path / "m"), prove=False)
    assert named.untied and named.export_format.name == "bitsandbytes"
    config = export.bitsandbytes_config(export.described_by(list(named.formats.values())), named.structure.model)
    assert config["llm_int8_skip_modules"] == []


def perplexity(model, samples):
    inputs = torch.stack(list(samples.inputs))
    with torch.no_grad():
        logits = model(input_ids=inputs).logits.float()
    return float(F.cross_entropy(logits[:, :-1].flatten(0, 1), inputs[:, 1:].flatten()).exp())


def converted(model, threshold, counts=None):
    """The model with every Linear of its blocks in int8, with outliers calibrated on `counts` or dynamic."""
    model = copy.deepcopy(model)
    for name, module in list(model.model.named_modules()):
        if isinstance(module, nn.Linear):
            columns = None if counts is None else choose_columns(counts[name], 0.0, 128)[0]
            layer = Int8SplitLinear.pack(module.weight.data, threshold, torch.float32, columns)
            model.model.set_submodule(name, layer.eval())
    return model


@pytest.mark.slow
def test_perplexity_with_the_split_is_the_dense_models_and_without_it_is_not(capsys):
    """The demo model with one feature of 60 planted before attention and MLP of each block."""
    dense = hf.AutoModelForCausalLM.from_pretrained(demo_path(), dtype=torch.float32).eval()
    train, held_out = (
        load_samples(settings(samples=8, length=256), demo_path(), seed=0, vocabulary=dense.config.vocab_size)
        for settings in (DataSettings, EvalDataSettings)
    )
    before, planted = perplexity(dense, held_out), plant(dense)
    expected = perplexity(planted, held_out)
    assert expected == pytest.approx(before, rel=1e-5)
    counts = {}

    def count(name, module):
        counts[name] = Outliers.none(6.0, torch.device("cpu"), group_of(module.in_features))

        def hook(module, args):
            counts[name].add(args[0].flatten(0, 1))

        return module.register_forward_pre_hook(hook)

    linears = [(name, module) for name, module in planted.model.named_modules() if isinstance(module, nn.Linear)]
    hooks = [count(name, module) for name, module in linears]
    perplexity(planted, train)
    for hook in hooks:
        hook.remove()
    found = {
        "calibrated": perplexity(converted(planted, 6.0, counts), held_out),
        "dynamic": perplexity(converted(planted, 6.0), held_out),
        "no split": perplexity(converted(planted, 0.0), held_out),
    }
    rise = {name: 100 * (value / expected - 1) for name, value in found.items()}
    with capsys.disabled():
        shown = ", ".join(f"{name} {value:.4f} ({rise[name]:+.3f} %)" for name, value in found.items())
        print(f"\nperplexity with planted outliers: dense {expected:.4f}, {shown}")
    assert abs(rise["calibrated"]) < 0.1
    # dynamic keeps the outliers, but rounds the weights that read them, which were scaled by 1/60 beside others
    assert abs(rise["calibrated"]) < rise["dynamic"] < 2
    assert rise["no split"] > 5


@pytest.mark.slow
def test_the_recipe_runs_and_reports_outliers(tmp_path):
    few = [
        "data.samples=2",
        "data.length=128",
        "eval.data.samples=4",
        "eval.data.length=128",
        "eval.metrics=[perplexity]",
    ]
    report = compress(read_recipe("llm-int8", few), str(demo_path()), tmp_path / "out")
    assert report["status"] == "ok" and report["route"]["name"] == "bitsandbytes"
    assert len(outlier_inputs(report)) == 24


@pytest.mark.slow
def test_gptq_on_the_mlp_and_int8_attention_share_a_sweep(tmp_path):
    """The MLP's hessians are those of the block with attention in int8: the layer stands in the running model."""
    few = [
        "data.samples=8",
        "data.length=128",
        "eval.data.samples=4",
        "eval.data.length=128",
        "eval.metrics=[perplexity]",
    ]
    report = compress(read_recipe("gptq-llm-int8", few), str(demo_path()), tmp_path / "out")
    assert report["status"] == "ok" and report["route"]["name"] == "custom"
    assert report["verification"]["max_logit_difference"] == 0.0
    formats = {(row["role"], row["pass"], row["form"]) for row in report["weights"]}
    assert formats == {("attention", "llm_int8", "int8_split_linear"), ("mlp", "gptq", "packed_linear")}
    block = compressor.load(tmp_path / "out", kernels="reference").model.layers[0]
    assert type(block.self_attn.q_proj) is Int8SplitLinear and type(block.mlp.up_proj) is PackedLinear


def test_the_card_says_what_to_install(stock):
    card = (stock[0] / "README.md").read_text()
    assert "Needs `pip install bitsandbytes`" in card and "- bitsandbytes\n" in card
    assert "activations are rounded to int8 too" in card and "rebuilt" not in card
