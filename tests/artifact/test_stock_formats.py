"""What plain transformers loads, tried: every scheme that the router calls stock, and the ones it must not."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
import yaml
from raising import raises
from safetensors.torch import load_file
from stored_as_planned import assert_plain_transformers_computes_what_the_codes_stand_for, store_as_planned

import compressor
from compressor.artifact.artifact_config import artifact_config
from compressor.engine.plan import make_plan
from compressor.errors import PreflightError, RecipeError, ShapeError
from compressor.layers.block_linear import BlockLinear
from compressor.layers.byte_linear import ByteLinear
from compressor.methods.quantization.block_grid import quantize_blocks
from compressor.passes.bct import stock_layer
from compressor.recipe.recipe import parse_recipe
from compressor.run import compress


def recipe(*steps, **export):
    tree = {"version": 1, "steps": [{"pass": "rtn", "group_size": 32, **step} for step in steps], "export": export}
    return parse_recipe(yaml.safe_dump({**tree, "report": {"html": False}}).encode())


def plan_of(tmp_path, family, *steps, **export):
    model = tiny.save(family, tmp_path / "m", dtype=torch.bfloat16)
    return make_plan(recipe(*steps, **export), str(model), prove=False)


@pytest.mark.slow
@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_width_group_and_symmetry_loads_stock(bits, symmetric, group_size, tmp_path):
    plan = plan_of(tmp_path, "llama", {"bits": bits, "group_size": group_size, "symmetric": symmetric})
    assert plan.export_format.name == "compressed-tensors"
    assert_plain_transformers_computes_what_the_codes_stand_for(plan, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "opt", "phi3", "gpt_neox", "gemma3", "bert", "bert_base", "vit"])
def test_packed_zero_points_load_stock_in_every_family_without_experts(family, tmp_path):
    only = ["*", "@head"] if family == "llama" else ["*"]
    plan = plan_of(tmp_path, family, {"bits": 3, "symmetric": False, "only": only})
    assert plan.export_format.name == "compressed-tensors"
    assert_plain_transformers_computes_what_the_codes_stand_for(plan, tmp_path / "out")


def test_unpacked_zero_points_load_stock_beside_other_schemes(tmp_path):
    """Asymmetric 8 bits, symmetric 4 and 3 bits in one model: two formats, three groups."""
    steps = [
        {"bits": 8, "symmetric": False, "only": ["down_proj"]},
        {"bits": 3, "only": ["o_proj"]},
        {"bits": 4, "only": ["*"], "except": ["down_proj", "o_proj"]},
    ]
    plan = plan_of(tmp_path, "llama", *steps)
    assert plan.export_format.name == "compressed-tensors"
    assert_plain_transformers_computes_what_the_codes_stand_for(plan, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision" and "dequantize" not in config
    assert {group["format"] for group in config["config_groups"].values()} == {"naive-quantized", "pack-quantized"}


@pytest.mark.parametrize(("bits", "width"), [(8, 16), (4, 32), (8, 64)])
def test_blocks_of_one_row_with_shifts_load_stock_as_groups(bits, width, tmp_path):
    def blocks(stored, matrix):
        codes, exponent, rounded = quantize_blocks(matrix, bits, (1, width))
        layer = stock_layer(codes, exponent, stored.format_params, torch.bfloat16)
        ours = BlockLinear.pack(codes, exponent, bits=bits, block=(1, width))
        assert layer.matrix(torch.bfloat16).equal(ours.matrix(torch.bfloat16))
        assert layer.matrix(torch.float32).equal(rounded)  # shifts are exact in bfloat16
        return layer

    step = {"pass": "bct", "bits": bits, "block_shape": [1, width], "stock": True}
    model = tiny.save("llama", tmp_path / "m", dtype=torch.bfloat16)
    plan = make_plan(parse_recipe(yaml.safe_dump({"version": 1, "steps": [step]}).encode()), str(model), prove=False)
    assert plan.export_format.name == "compressed-tensors" and not plan.problems
    assert_plain_transformers_computes_what_the_codes_stand_for(plan, tmp_path / "out", blocks)


def test_a_float16_model_gets_its_least_shift_and_the_same_values():
    tiny_values = torch.randint(-40, 41, (4, 32), generator=torch.Generator().manual_seed(0)) * 2.0**-24
    matrix = torch.cat((tiny_values, torch.ones(4, 32)), 1)
    codes, exponent, rounded = quantize_blocks(matrix, 8, (1, 32))
    assert int(exponent.min()) < -24
    layer = stock_layer(codes, exponent, {"bits": 8, "group_size": 32, "symmetric": True}, torch.float16)
    assert layer.weight_scale.dtype == torch.float16 and bool((layer.weight_scale > 0).all())
    assert layer.matrix(torch.float16).float().equal(rounded) and rounded.equal(matrix)


@pytest.mark.slow
def test_stock_blocks_go_the_whole_way(tmp_path):
    model = tiny.save("bert", tmp_path / "m", dtype=torch.float16)
    tree = {"version": 1, "steps": [{"pass": "bct", "block_shape": [1, 32], "stock": True}], "report": {"html": False}}
    report = compress(parse_recipe(yaml.safe_dump(tree).encode()), str(model), tmp_path / "out", measure=False)
    assert report["route"]["name"] == "compressed-tensors" and not report["verification"]["problems"]
    assert report["verification"]["max_logit_difference"] == 0.0


@pytest.mark.parametrize(
    ("settings", "lacking"),
    [
        ({}, ["block_shape"]),
        ({"block_shape": [1, 16], "scale": "float16"}, ["scale"]),
        ({"block_shape": [1, 16], "activations": "dynamic"}, ["activations"]),
        ({"budget": 9}, ["block_shape", "budget"]),
    ],
)
def test_blocks_without_a_stock_form_are_refused_in_the_recipe(settings, lacking):
    tree = {"version": 1, "steps": [{"pass": "bct", "stock": True, **settings}]}
    with raises(RecipeError, reason="no-stock-format", lacking=lacking):
        parse_recipe(yaml.safe_dump(tree).encode())


def test_weights_without_a_stock_form_are_refused_by_name(tmp_path):
    step = {"pass": "bct", "stock": True, "block_shape": [1, 24], "only": ["down_proj", "@embedding", "@norm"]}
    model = tiny.save("llama", tmp_path / "m", num_hidden_layers=1)
    problems = make_plan(parse_recipe(yaml.safe_dump({"version": 1, "steps": [step]}).encode()), str(model)).problems
    assert [problem.where for problem in problems[:2]] == ["model.embed_tokens", "model.layers.0.mlp.down_proj"]
    assert problems[0].data == {"reason": "no-stock-table", "role": "embedding"}
    assert problems[1].data == {"reason": "blocks-do-not-divide", "width": 24, "in_features": 64}
    assert [problem.data for problem in problems[2:]] == [{"reason": "no-stock-table", "role": "norm"}] * 3


@pytest.mark.slow
def test_packed_zero_points_go_the_whole_way(tmp_path):
    model = tiny.save("llama", tmp_path / "m", dtype=torch.bfloat16)
    report = compress(recipe({"symmetric": False}), str(model), tmp_path / "out", measure=False)
    assert report["route"]["name"] == "compressed-tensors"
    assert report["verification"]["max_logit_difference"] == 0.0 and not report["verification"]["problems"]


@pytest.mark.slow
def test_a_conv1d_in_bytes_takes_the_modeling_file(tmp_path):
    model = tiny.save("gpt2", tmp_path / "m", dtype=torch.bfloat16)
    step = {"bits": 8, "symmetric": False}
    report = compress(recipe(step), str(model), tmp_path / "out", measure=False)
    assert report["route"]["name"] == "custom" and "Conv1D" in report["route"]["reason"]
    assert report["verification"]["max_logit_difference"] == 0.0
    assert type(compressor.load(tmp_path / "out", kernels="reference").transformer.h[0].attn.c_attn) is ByteLinear


def test_packed_zero_points_beside_another_scheme_take_the_modeling_file(tmp_path):
    steps = [{"symmetric": False, "only": ["down_proj"]}, {"bits": 3, "except": ["down_proj"]}]
    plan = plan_of(tmp_path, "llama", *steps)
    assert plan.export_format.name == "custom"
    assert (
        "down_proj has packed zero points, which stock loaders read only if all weights share one"
        in plan.export_format.reason
    )
    (problem,) = plan_of(tmp_path, "llama", *steps, stock_only=True).problems
    because = {"reason": "packed-zeros", "schemes": 2}
    with raises(PreflightError, where="export", reason="no-stock-loader", because=because):
        raise problem


@pytest.mark.slow
def test_attention_beside_dense_experts_takes_the_modeling_file_which_joins_them(tmp_path):
    """Seen with transformers 5.24: the stock loader of a quantized model leaves dense experts uninitialized."""
    model = tiny.save("mixtral", tmp_path / "m", dtype=torch.bfloat16)
    report = compress(recipe({"only": ["@attention"]}), str(model), tmp_path / "out", measure=False)
    assert report["route"]["name"] == "custom" and "some experts stay dense" in report["route"]["reason"]
    found = report["verification"]
    assert found["max_logit_difference"] == 0.0
    assert found["missing"] == found["unexpected"] == found["mismatched"] == found["problems"] == []


def test_some_experts_quantized_beside_dense_ones_are_refused(tmp_path):
    (problem,) = plan_of(tmp_path, "qwen3_moe", {"only": ["**.experts.0.*"]}).problems
    with raises(PreflightError, reason="no-custom-experts", because={"reason": "dense-experts"}):
        raise problem


@pytest.mark.parametrize("bits", [4, 8])
def test_asymmetric_experts_are_refused(bits, tmp_path):
    (problem,) = plan_of(tmp_path, "mixtral", {"bits": bits, "symmetric": False, "only": ["@experts"]}).problems
    with raises(PreflightError, reason="no-custom-experts", because={"reason": "expert-codes"}):
        raise problem


def test_packed_zero_points_ask_for_the_loader_that_rebuilds_weights_and_symmetric_codes_do_not(tmp_path):
    for symmetric, expected in ((True, None), (False, True)):
        plan = plan_of(tmp_path, "llama", {"symmetric": symmetric})
        structure = plan.structure
        formats = list(plan.formats.values())
        config = artifact_config(
            structure.checkpoint.config, plan.export_format, formats, structure.model, "bfloat16", False
        )
        assert config["quantization_config"].get("dequantize") is expected


def test_bytes_are_laid_out_as_naive_quantized_has_them(tmp_path):
    plan = plan_of(tmp_path, "llama", {"bits": 8, "symmetric": False})
    store_as_planned(plan, tmp_path / "out")
    name = "model.layers.0.mlp.down_proj"
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    stored = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if name in key}
    assert {key: (value.dtype, tuple(value.shape)) for key, value in stored.items()} == {
        "weight": (torch.int8, (32, 64)),
        "weight_scale": (torch.bfloat16, (32, 2)),
        "weight_zero_point": (torch.int8, (32, 2)),
    }
    dense = load_file(tmp_path / "m" / "model.safetensors")[f"{name}.weight"].float()
    scale = stored["weight_scale"].float().repeat_interleave(32, 1)
    zero = stored["weight_zero_point"].float().repeat_interleave(32, 1)
    # half a step of rounding, and as much again where the rounded zero point shifts a range past its end
    assert (((stored["weight"].float() - zero) * scale - dense).abs() <= 1.01 * scale).all()


def test_bytes_that_do_not_fit_each_other_are_refused():
    tensors = {
        "weight": torch.zeros(4, 64, dtype=torch.int8),
        "weight_scale": torch.ones(4, 2),
        "weight_zero_point": torch.zeros(4, 2, dtype=torch.int8),
    }
    format_params = {"bits": 8, "group_size": 32, "symmetric": False}
    assert ByteLinear.from_tensors(format_params, tensors).format_params() == format_params
    for name, wrong in (("weight_scale", torch.ones(4, 3)), ("weight_zero_point", torch.zeros(4, 2))):
        with raises(ShapeError, tensor=name, shape=list(wrong.shape), dtype=str(wrong.dtype)):
            ByteLinear.from_tensors(format_params, {**tensors, name: wrong})
