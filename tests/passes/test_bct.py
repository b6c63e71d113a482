"""BCT: block quantization, its formats, the choice of bits under a budget, and whole runs."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from fresh import stranger
from raising import raises
from safetensors.torch import load_file, save_file

import compressor
from compressor.engine.estimates import planned_tensors
from compressor.engine.plan import make_plan
from compressor.errors import PreflightError, RecipeError, ShapeError
from compressor.evaluation.quality import measure_quality
from compressor.kernels.ops.blocks import pack_rows, power_of_two, round_to_shift, shift_exponent, unpack_rows
from compressor.layers.block_activation_linear import BlockActivationLinear
from compressor.layers.block_embedding import BlockEmbedding
from compressor.layers.block_linear import BlockLinear
from compressor.methods.quantization.block_grid import quantize_blocks
from compressor.passes.bct import BCT, Seen, choose_bits, output_errors, some_blocks, stored_bytes
from compressor.recipe.recipe import parse_recipe
from compressor.run import compress
from compressor.testing import kill_at, weight_hashes


def seeded(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def slow_exponent(largest, limit):
    """The least e with limit * 2**e >= largest, by exact fractions."""
    exponent = -126
    while limit * Fraction(2) ** exponent < Fraction(largest) and exponent < 127:
        exponent += 1
    return exponent


def test_the_worked_example_comes_out_to_the_digit():
    block = torch.tensor([[0.30, -1.20, 0.05, 0.74]])
    codes, exponent, rounded = quantize_blocks(block, 8, (1, 4), search=False)
    assert codes.tolist() == [[19, -77, 3, 47]] and exponent.tolist() == [[-6]]
    assert rounded.tolist() == [[0.296875, -1.203125, 0.046875, 0.734375]]
    codes, exponent, rounded = quantize_blocks(block, 4, (1, 4), search=False)
    assert codes.tolist() == [[1, -5, 0, 3]] and exponent.tolist() == [[-2]]
    assert rounded.tolist() == [[0.25, -1.25, 0.0, 0.75]]


@pytest.mark.parametrize("limit", [7, 127])
def test_the_exponent_is_the_least_that_holds_the_block(limit):
    values = [limit * 2.0**t for t in (-100, -7, 0, 3)]
    values += [math.nextafter(v, 0) for v in values] + [1e-30, 0.3, 1.2, 88.0]
    largest = torch.tensor(values, dtype=torch.float32)
    found = shift_exponent(largest, limit)
    assert found.tolist() == [slow_exponent(float(v), limit) for v in largest]
    assert shift_exponent(torch.zeros(1), limit).tolist() == [0]


def test_a_largest_value_that_is_a_whole_code_has_no_error():
    for power in (-9, 0, 5):
        block = torch.tensor([[127 * 2.0**power, 0.3 * 2.0**power]])
        assert quantize_blocks(block, 8, (1, 2), search=False)[2][0, 0] == block[0, 0]


@pytest.mark.parametrize("bits", [4, 8])
def test_without_search_no_error_is_above_half_a_step(bits):
    matrix = seeded(70, 45)
    codes, exponent, rounded = quantize_blocks(matrix, bits, (16, 8), search=False)
    wide = exponent.repeat_interleave(16, 0)[:70].repeat_interleave(8, 1)[:, :45].to(torch.float64)
    assert bool(((matrix.double() - rounded.double()).abs() <= 2.0 ** (wide - 1)).all())
    assert int(codes.abs().max()) <= 2 ** (bits - 1) - 1


def test_blocks_within_a_block_never_need_a_larger_exponent():
    matrix = seeded(64, 64, seed=3)
    large = quantize_blocks(matrix, 8, (32, 32), search=False)[1]
    small = quantize_blocks(matrix, 8, (1, 16), search=False)[1]
    assert bool((small <= large.repeat_interleave(32, 0).repeat_interleave(2, 1)).all())


@pytest.mark.parametrize("scale", ["shift", "float16"])
@pytest.mark.parametrize("bits", [4, 8])
def test_searched_scales_have_the_least_error_of_all_that_are_tried(bits, scale):
    matrix, importance = seeded(9, 21), seeded(21, seed=1).square()
    rounded = quantize_blocks(matrix, bits, (4, 8), scale, True, importance)[2]
    plain = quantize_blocks(matrix, bits, (4, 8), scale, False)[2]
    limit = 2 ** (bits - 1) - 1
    for top in range(0, 9, 4):
        for left in range(0, 21, 8):
            part, weight = matrix[top : top + 4, left : left + 8], importance[left : left + 8]
            largest = float(part.abs().max())
            if scale == "shift":
                tried = [2.0 ** (slow_exponent(largest, limit) - n) for n in range(4)]
            else:
                tried = [float(torch.tensor(largest / limit * (1 - 0.02 * n)).half()) for n in range(33)]
            errors = [
                float((((part / s).round().clamp(-limit, limit) * s - part).square() * weight).sum()) for s in tried
            ]
            found = float(((rounded - matrix)[top : top + 4, left : left + 8].square() * weight).sum())
            assert found == pytest.approx(min(errors), rel=1e-5)  # float32 sums in another order
            before = float(((plain - matrix)[top : top + 4, left : left + 8].square() * weight).sum())
            assert found <= before * (1 + 1e-6)


@pytest.mark.parametrize("columns", [1, 2, 7, 16])
def test_packed_codes_come_back_at_every_length(columns):
    every = torch.arange(-7, 8, dtype=torch.int8).repeat(columns).view(15, columns)
    assert unpack_rows(pack_rows(every, 4), 4, columns).equal(every)
    every = torch.arange(-127, 128, dtype=torch.int8).repeat(columns).view(255, columns)
    assert unpack_rows(pack_rows(every, 8), 8, columns).equal(every)
    assert pack_rows(torch.tensor([[1, -2, 3]], dtype=torch.int8), 4).tolist() == [[0xE1, 0x03]]


@pytest.mark.parametrize("scale", ["shift", "float16"])
@pytest.mark.parametrize(("shape", "bits"), [((70, 45), 4), ((64, 64), 8), ((3, 200), 4)])
def test_stored_bytes_are_those_of_the_formula_and_the_weight_comes_back(shape, bits, scale):
    matrix = seeded(*shape)
    codes, stored, rounded = quantize_blocks(matrix, bits, (16, 32), scale)
    layer = BlockLinear.pack(codes, stored, bits=bits, block=(16, 32))
    tensors = layer.tensors()
    assert sum(t.nbytes for t in tensors.values()) == stored_bytes(shape, layer.format_params())
    again = BlockLinear.from_tensors(layer.format_params(), tensors)
    assert again.matrix(torch.float32).equal(rounded) and again.format_params() == layer.format_params()
    planned = BlockLinear.planned(shape, layer.format_params(), torch.float32)
    assert planned == {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    x = seeded(2, shape[1], seed=5)
    assert again(x).equal(torch.nn.functional.linear(x, rounded))


def test_biases_in_blocks_are_within_half_a_step_and_add_what_the_layer_adds():
    matrix, bias = seeded(130, 32), seeded(130, seed=1) * 3
    codes, exponent, _ = quantize_blocks(matrix, 8, (1, 32))
    of_bias = quantize_blocks(bias[None], 8, (1, 64), search=False)
    layer = BlockLinear.pack(
        codes, exponent, bits=8, block=(1, 32), biased=True, bias_packed=of_bias[0][0], bias_exponent=of_bias[1][0]
    )
    found, step = layer.vector(torch.float32), power_of_two(of_bias[1][0], torch.float32).repeat_interleave(64)[:130]
    assert bool(((found - bias).abs() <= step / 2).all()) and layer.bias is None
    assert layer(torch.zeros(2, 32)).equal(found.expand(2, 130))
    again = BlockLinear.from_tensors(layer.format_params(), layer.tensors())
    assert again(seeded(3, 32, seed=2)).equal(layer(seeded(3, 32, seed=2)))
    assert sum(t.nbytes for t in layer.tensors().values()) == stored_bytes((130, 32), layer.format_params()) + 130 + 3


def test_a_tensor_of_another_shape_is_refused_by_name():
    layer = BlockLinear.pack(*quantize_blocks(seeded(8, 8), 8, (8, 8))[:2], bits=8, block=(8, 8))
    tensors = {**layer.tensors(), "weight_exponent": torch.zeros(2, 1, dtype=torch.int8)}
    with raises(ShapeError, tensor="weight_exponent", shape=[2, 1], expected=[1, 1]):
        BlockLinear.from_tensors(layer.format_params(), tensors)


def test_integer_products_with_shifts_are_what_the_layer_computes():
    matrix, x = seeded(12, 40), seeded(5, 40, seed=2) * 3
    codes, exponent, _ = quantize_blocks(matrix, 8, (1, 16))
    layer = BlockActivationLinear.pack(codes, exponent, bits=8, block=(1, 16), activations="dynamic")
    expected = torch.zeros(5, 12, dtype=torch.float64)
    for token in range(5):
        for number, left in enumerate(range(0, 40, 16)):
            part = x[token, left : left + 16]
            e = slow_exponent(float(part.abs().max()), 127)
            c = [round(Fraction(float(v)) / Fraction(2) ** e) for v in part]
            for row in range(12):
                products = sum(a * int(b) for a, b in zip(c, codes[row, left : left + 16], strict=True))
                assert abs(products) < 2**31
                expected[token, row] += products * 2.0 ** (e + int(exponent[row, number]))
    # sums of 40 float32 products
    assert float((layer(x).double() - expected).abs().max()) <= 40 * 2**-24 * float(expected.abs().max())


def test_static_exponents_saturate_and_leave_small_values_alone():
    exponent = torch.tensor([-6, -3], dtype=torch.int8)
    x = torch.tensor([[5.0, 0.5, -5.0, 0.5]])
    assert round_to_shift(x, 2, exponent).tolist() == [[127 / 64, 0.5, -5.0, 0.5]]


def test_values_beyond_a_static_exponent_are_counted():
    format_params = {"bits": 8, "block": [1, 2], "scale": "shift", "activations": "static"}
    layer = BlockActivationLinear.empty((1, 3), format_params, torch.float32, False)
    layer.input_exponent = torch.tensor([-6, -3], dtype=torch.int8)
    x = torch.tensor([[[127 / 64, -2.0, 5.0], [3.0, float("inf"), -16.0]]])
    assert int(layer.outside(x)) == int(layer.outside(x.bfloat16())) == 4
    dynamic = BlockActivationLinear.empty((1, 3), {**format_params, "activations": "dynamic"}, torch.float32, False)
    assert dynamic.outside(x) is None and BlockLinear.outside(dynamic, x) is None


def test_the_evaluation_counts_what_saturates_weight_by_weight(tmp_path):
    model = tiny.save("llama", tmp_path / "model", dtype=torch.float32)
    settings = recipe(only=["*", "@embedding"], activations="static")
    few = replace(settings, data=settings.data.model_copy(update={"samples": 1, "length": 2}))
    compress(few, str(model), tmp_path / "out", measure=False)
    ids = torch.arange(48).view(3, 16)
    save_file({f"{number}": row for number, row in enumerate(ids)}, tmp_path / "tokens.safetensors")
    asked = {"before": None, "after": str(tmp_path / "out"), "tokens": str(tmp_path / "tokens.safetensors")}
    asked |= {"labels": None, "metrics": ["perplexity"], "batch_size": 3, "seed": 0}
    asked |= {"confidence": None, "trust_remote_code": False, "memory": None}
    found = measure_quality(asked)["saturation"]
    ours, read = compressor.load(tmp_path / "out", kernels="reference"), {}
    for name, module in ours.named_modules():
        if isinstance(module, BlockActivationLinear):
            module.register_forward_pre_hook(lambda module, args, name=name: read.update({name: (module, args[0])}))
    with torch.no_grad():
        ours(input_ids=ids)
    expected = []
    for name, (layer, x) in sorted(read.items()):
        limits = [127 * 2.0 ** int(layer.input_exponent[column // 16]) for column in range(layer.in_features)]
        outside = sum(abs(v) > limit for row in x.flatten(0, 1).tolist() for v, limit in zip(row, limits, strict=True))
        expected.append({"name": name, "values": x.numel(), "outside": outside})
    assert found == {"reason": None, "layers": expected}
    assert sum(row["outside"] for row in found["layers"]) > 0


def test_a_block_with_inf_passes_through_as_it_is():
    x = torch.tensor([[float("inf"), 0.3, 0.3, 0.7]])
    found = round_to_shift(x, 2)
    assert found[0, :2].equal(x[0, :2]) and found[0, 2:].equal(round_to_shift(x[:, 2:], 2)[0])


@pytest.mark.parametrize("scale", ["shift", "float16"])
def test_a_table_in_blocks_looks_up_the_rows_of_its_matrix(scale):
    codes, stored, rounded = quantize_blocks(seeded(11, 9), 4, (2, 4), scale)
    layer = BlockEmbedding.pack(codes, stored, bits=4, block=(2, 4))
    ids = torch.tensor([[3, 10, 0], [3, 3, 7]])
    assert layer(ids).equal(torch.nn.functional.embedding(ids, rounded))


def test_bits_go_where_the_error_falls_most_per_byte_within_the_budget():
    errors = {"a": [1.0, 0.1], "b": [0.5, 0.1], "c": [2.0, 0.1], "d": [0.1, 0.2]}
    costs = {"a": [10, 20], "b": [1, 2], "c": [100, 200], "d": [1, 2]}
    assert choose_bits(errors, costs, 112) == {"a": 4, "b": 4, "c": 4, "d": 4}
    assert choose_bits(errors, costs, 123) == {"a": 8, "b": 8, "c": 4, "d": 4}
    assert choose_bits(errors, costs, 10_000) == {"a": 8, "b": 8, "c": 8, "d": 4}


def test_output_error_is_that_of_the_products_seen():
    matrix, x = seeded(6, 8), seeded(50, 8, seed=1)
    rounded = quantize_blocks(matrix, 4, (2, 8))[2]
    seen = Seen.of_inputs(8, 8, True, torch.device("cpu")).add(x[:20]).add(x[20:])
    slow = ((rounded - matrix) @ x.t()).square().sum() / (matrix @ x.t()).square().sum()
    assert output_errors(matrix, [rounded], seen, seen.gram.hessian())[0] == pytest.approx(float(slow), rel=1e-4)
    assert seen.largest.tolist() == [float(x.abs().max())]
    table = Seen.of_rows(6, torch.device("cpu")).add(torch.tensor([1, 1, 4]))
    slow = (rounded - matrix)[[1, 1, 4]].square().sum() / matrix[[1, 1, 4]].square().sum()
    assert output_errors(matrix, [rounded], table, None)[0] == pytest.approx(float(slow), rel=1e-5)


def test_sampled_blocks_of_rows_are_rounded_as_in_the_whole_matrix():
    matrix = seeded(1300, 10)
    sample = some_blocks(matrix, 64)
    assert len(sample) < len(matrix) and some_blocks(matrix[:512], 64).equal(matrix[:512])
    assert some_blocks(matrix, 1).equal(matrix[torch.linspace(0, 1299, 512).long()])
    rows = [int((matrix == row).all(1).nonzero()) for row in sample]
    assert rows[0] == 0 and rows[-1] == 1299
    whole, part = (quantize_blocks(m, 4, (64, 4))[2] for m in (matrix, sample))
    assert part.equal(whole[rows])


def test_bits_and_a_budget_exclude_each_other():
    text = b"version: 1\nname: x\nsteps:\n  - {pass: bct, bits: 4, budget: 1000}\n"
    with raises(RecipeError, reason="bits-and-budget"):
        parse_recipe(text, "x.yaml")


def test_powers_of_two_are_exact_over_the_whole_range():
    exponents = torch.arange(-126, 128, dtype=torch.int8)
    assert power_of_two(exponents, torch.float32).tolist() == [2.0**e for e in range(-126, 128)]


def test_settings_name_the_form_that_is_stored():
    assert BCT(activations="static").traits.stores == "block_activation_linear"
    assert BCT().traits.stores == "block_linear"


STRANGER = """
import torch
from transformers import AutoModelForSequenceClassification as Auto
model, info = Auto.from_pretrained(sys.argv[1], trust_remote_code=True, output_loading_info=True)
assert not any(info[key] for key in ('missing_keys', 'unexpected_keys', 'mismatched_keys')), info
torch.save(model.eval()(input_ids=torch.arange(8).view(1, 8)).logits, sys.argv[2])
"""


def recipe(**step):
    tree = {
        "version": 1,
        "name": "blocks",
        "data": {"source": "random", "samples": 8, "length": 16},
        "steps": [{"pass": "bct", "block_shape": [16, 16], **step}],
        "report": {"html": False},
    }
    return parse_recipe(yaml.safe_dump(tree).encode(), "blocks.yaml")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_everything_of_an_encoder_in_blocks_loads_where_this_package_is_not(dtype, tmp_path):
    model = tiny.save("bert", tmp_path / "model", dtype=dtype)
    settings = {"only": ["*", "@embedding", "@head!"], "activations": "static", "embedding_bits": 4, "biases": True}
    plan = make_plan(recipe(**settings), str(model))
    planned = planned_tensors(plan.structure, plan.functions, plan.formats, plan.untied)
    report = compress(recipe(**settings), str(model), tmp_path / "out", measure=False)
    assert sum(report["sizes"]["by_class"].values()) == sum(tensor.nbytes for tensor in planned)
    stored = {name for file in (tmp_path / "out").glob("*.safetensors") for name in load_file(file)}
    assert [name for name in stored if name.endswith(".bias")] and not any(
        name.removesuffix("_packed") in stored for name in stored if name.endswith(".bias_packed")
    )
    assert report["verification"]["max_logit_difference"] == 0.0
    formats = {weight["form"] for weight in report["weights"]}
    assert formats == {"block_activation_linear", "block_embedding"}
    stranger(STRANGER, tmp_path / "out", tmp_path / "logits.pt")
    ours = compressor.load(tmp_path / "out", kernels="reference")
    assert torch.load(tmp_path / "logits.pt").equal(ours(input_ids=torch.arange(8).view(1, 8)).logits)


def test_a_budget_is_kept_journaled_and_spent_where_it_helps(tmp_path):
    model = tiny.save("bert", tmp_path / "model", dtype=torch.float32)
    report = compress(recipe(only=["*", "@embedding"], budget_bits=5.5), str(model), tmp_path / "out", measure=False)
    rows = report["weights"]
    bits = {row["name"]: row["spec"]["bits"] for row in rows}
    assert set(bits.values()) == {4, 8}
    stored = load_file(tmp_path / "out" / "model.safetensors")
    parts = ("weight_packed", "weight_exponent")
    used = sum(t.nbytes for name, t in stored.items() if name.rpartition(".")[2] in parts)
    weights = sum(row["shape"][0] * row["shape"][1] for row in rows)
    assert used <= 5.5 * weights / 8
    assert used == sum(row["bytes_after"] for row in rows)
    assert used == sum(stored_bytes(tuple(row["shape"]), row["spec"]) for row in rows)


@pytest.mark.slow
def test_a_run_killed_after_its_decision_resumes_with_it(tmp_path):
    model = tiny.save("bert", tmp_path / "model", dtype=torch.float32)
    settings = recipe(only=["*", "@embedding"], budget_bits=5.5)
    compress(settings, str(model), tmp_path / "whole", measure=False)
    output = tmp_path / "killed"
    assert kill_at(9, settings, model, output)
    lines = (tmp_path / "killed.work" / "journal.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    assert first["key"] == "0/decision/0" and set(first["decision"]["bits"].values()) == {4, 8}
    compress(settings, str(model), output, measure=False, resume=True)
    assert weight_hashes(output) == weight_hashes(tmp_path / "whole")


def test_a_budget_below_four_bits_is_refused_with_the_bytes_it_takes(tmp_path):
    model = tiny.save("llama", tmp_path / "model")
    plan = make_plan(recipe(budget=1000), str(model))
    problem = plan.problems[0]
    assert isinstance(problem, PreflightError) and problem.where == "steps.0"
    assert problem.data["reason"] == "budget-too-small" and problem.data["budget"] == 1000 < problem.data["least"]


def test_a_table_that_the_head_shares_is_refused_by_name(tmp_path):
    model = tiny.save("qwen3", tmp_path / "model")
    with raises(PreflightError, where="model.embed_tokens", reason="shared-embedding", other="lm_head.weight"):
        compress(recipe(only=["@embedding"]), str(model), tmp_path / "out", measure=False)


def test_a_table_that_the_head_shares_stays_dense_where_only_an_optional_pattern_names_it(tmp_path):
    model = tiny.save("qwen3", tmp_path / "model")
    plan = make_plan(recipe(only=["*", "@embedding!"]), str(model), prove=False)
    assert not plan.problems and len(plan.rows) == 14
    assert [(w.code, w.where) for w in plan.warnings] == [("shared-embedding", "model.embed_tokens")]
    assert {"name": "model.embed_tokens", "reason": "shares its weight with lm_head.weight"} in plan.skipped
    named = make_plan(recipe(only=["embed_tokens", "@embedding!"]), str(model), prove=False)
    shared = {"reason": "shared-embedding", "other": "lm_head.weight"}
    assert (named.problems[0].where, named.problems[0].data) == ("model.embed_tokens", shared)
    assert make_plan(recipe(only=["@embedding!"]), str(model), prove=False).rows == ()


def test_a_form_that_multiplies_is_refused_for_a_table(tmp_path):
    model = tiny.save("llama", tmp_path / "model")
    text = b"version: 1\nname: x\nsteps:\n  - {pass: rtn, group_size: -1, only: ['@embedding']}\n"
    problems = make_plan(parse_recipe(text, "x.yaml"), str(model)).problems
    found = {"reason": "other-kind", "weight": "model.embed_tokens", "pass": "rtn", "form": "packed_linear"}
    assert problems[0].where == "steps.0" and problems[0].data == {**found, "kind": "embedding", "stands_for": "linear"}


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_every_family_is_planned_or_a_weight_is_named(family, tmp_path):
    model = tiny.save(family, tmp_path / "model")
    plan = make_plan(recipe(only=["*", "@embedding!"], activations="dynamic"), str(model))
    names = [row.name for row in plan.rows]
    if family in ("mixtral", "qwen3_moe"):
        assert any("expert" in str(problem.where) for problem in plan.problems)
    else:
        shared = any(warning.code == "shared-embedding" for warning in plan.warnings)
        assert shared == (family in ("qwen3", "opt", "gpt2"))
        assert not plan.problems and plan.export_format is not None and plan.export_format.name == "custom" and names


@pytest.mark.parametrize("name", ["bct-4-8", "bct-full"])
def test_the_shipped_recipes_mix_bits_on_a_tiny_model(name, tmp_path):
    model = tiny.save("llama", tmp_path / "model", dtype=torch.float32)
    shipped = yaml.safe_load((Path(__file__).parents[2] / "recipes" / f"{name}.yaml").read_text())
    small = {"data": {"source": "random", "samples": 8, "length": 16}, "eval": {}, "report": {"html": False}}
    text = yaml.safe_dump({**shipped, **small}).encode()
    report = compress(parse_recipe(text, "small.yaml"), str(model), tmp_path / "out", measure=False)
    assert {row["spec"]["bits"] for row in report["weights"] if "bits" in row["spec"] and row["shape"]} == {4, 8}
    assert any(row["form"] == "block_embedding" for row in report["weights"])
    assert any(row["form"] == "block_attention" for row in report["weights"]) == (name == "bct-full")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "compressed_llama"
