"""The predicted work is the work that is done: floating-point operations are counted while a model runs."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from tiers import every_day
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from compressor.engine import stage_times
from compressor.engine.machine_rates import measure_rates, seconds
from compressor.engine.plan import make_plan
from compressor.engine.stage_times import check_time, predict_stages, stage_works
from compressor.errors import PreflightError
from compressor.evaluation import speed
from compressor.model.probe_model import use_eager_experts
from compressor.model.weights import Weight
from compressor.passes import BUILTIN
from compressor.passes.awq import AWQ
from compressor.passes.dsformer import DSFormer
from compressor.passes.gptq import GPTQ, solve
from compressor.protocol import DataSize, Work
from compressor.recipe.recipe import parse_recipe, read_recipe
from compressor.run import compress
from tests.support import tiny

SAMPLES, LENGTH = 8, 16
DATA = f"{{source: random, samples: {SAMPLES}, length: {LENGTH}}}"
SHAPE = {"vocab_size": 96, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
SHAPE |= {"intermediate_size": 64, "num_hidden_layers": 3}


def saved(model, path):
    model.save_pretrained(path)
    return model


MODELS = {
    "dense": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "experts": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SHAPE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    ),
}


ONES = Work(**dict.fromkeys(vars(Work()), 1.0))
# Recipes that have every built-in pass between them, and the family of models that they are planned for.
RECIPES = {
    "awq-gptq-w3": "llama",
    "bct-4-8": "llama",
    "dsformer-50": "llama",
    "gptq-llm-int8": "llama",
    "greedy-removal": "llama",
    "low-rank-50": "llama",
    "prefill-pruning": "llama",
    "rotate-gptq-w3": "llama",
    "rtn-w8": "llama",
    "slicegpt-25": "llama",
    "slicegpt-auto": "llama",
    "vtrans-30": "llama",
    "zero-tprune": "vit",
}
WIDTHS = {"hidden_size": 128, "intermediate_size": 256}


def plan_of(path, steps="[{pass: rtn, group_size: -1}]", metrics="[perplexity]"):
    text = f"version: 1\ndata: {DATA}\neval: {{data: {DATA}, metrics: {metrics}}}\nsteps: {steps}\n"
    return make_plan(parse_recipe(text.encode()), str(path))


@pytest.mark.parametrize("kind", MODELS)
def test_products_of_an_evaluation_are_those_that_both_models_do(kind, tmp_path):
    torch.manual_seed(0)
    model = saved(MODELS[kind](), tmp_path)
    use_eager_experts(model.config)  # one product for each expert, which the counter knows
    (evaluation,) = [work for work in stage_works(plan_of(tmp_path), measure=True) if work.name == "evaluate"]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(SAMPLES, LENGTH, dtype=torch.long))
    counted = counter.get_flop_counts()["Global"]
    matmuls = sum(flops for operation, flops in counted.items() if "mm" in str(operation))
    assert evaluation.whole.products == pytest.approx(2 * matmuls, rel=0.02)


def test_every_stage_and_every_part_has_work(tmp_path):
    saved(MODELS["dense"](), tmp_path)
    works = stage_works(plan_of(tmp_path), measure=False)
    assert [work.name for work in works] == ["sweep 0", "write", "verify"]
    assert [len(work.parts) for work in works] == [5, 1, 1]
    weights = 3 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64)
    assert works[0].known and works[0].whole.searched == weights


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """(recipe, blocks) -> its plan for a small model."""

    @cache
    def plan(recipe, blocks):
        folder = tmp_path_factory.mktemp(recipe)
        tiny.save(RECIPES[recipe], folder, num_hidden_layers=blocks, **WIDTHS)
        return make_plan(read_recipe(recipe, []), str(folder))

    return plan


def test_these_recipes_have_every_pass():
    assert {step.name for recipe in RECIPES for step in read_recipe(recipe, []).steps} == set(BUILTIN)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_pass_counts_its_work(planned, recipe):
    plan = planned(recipe, 5)
    assert not plan.problems
    works = stage_works(plan, measure=True)
    assert all(work.known for work in works)
    assert all(amount >= 0 for work in works for part in work.parts for amount in vars(part).values())
    assert works[0].whole != Work()


@pytest.mark.parametrize("recipe", ["awq-gptq-w3", "dsformer-50", "low-rank-50", "slicegpt-25", "vtrans-30"])
def test_twice_the_blocks_are_twice_the_work_on_them(planned, recipe):
    def in_blocks(blocks):
        *sweeps, _, _ = stage_works(planned(recipe, blocks), measure=False)
        return [sum(work.parts[1:-1], Work()) for work in sweeps]

    for once, twice in zip(in_blocks(5), in_blocks(10), strict=True):
        assert vars(twice) == pytest.approx(vars(once * 2))


@pytest.mark.parametrize("recipe", ["bct-4-8", "gptq-llm-int8", "low-rank-50", "slicegpt-auto", "vtrans-30"])
def test_more_samples_are_more_runs_of_the_blocks_and_no_more_bytes(planned, recipe):
    plan = planned(recipe, 5)
    data = plan.recipe.data.model_copy(update={"samples": 2 * plan.recipe.data.samples})
    more = replace(plan, recipe=replace(plan.recipe, data=data))
    few, many = (sum((work.whole for work in stage_works(one, measure=False)), Work()) for one in (plan, more))
    assert many.products > few.products
    assert many.stored == few.stored


def test_a_run_inside_a_pass_is_counted_for_each_trial():
    """AWQ that rounds itself runs the block on its search batches once for each alpha."""
    weights = (Weight("w", "w.weight", "w.weight", (64, 32), "mlp"),)
    data, run = DataSize(samples=8, tokens=800, batch=100), Work(products=1.0)
    once, twice = (AWQ(steps=steps).work(weights, data, run).products for steps in (10, 20))
    assert twice - once == 10 * 100


def test_the_runs_of_a_speed_measurement_are_those_that_it_makes(tmp_path, monkeypatch):
    """The prompt tokens, and the tokens that are generated one by one."""
    model = saved(MODELS["dense"](), tmp_path)
    read = []
    original = type(model).forward

    def forward(self, input_ids, **options):
        read.append(input_ids.shape[1])
        return original(self, input_ids=input_ids, **options)

    monkeypatch.setattr(type(model), "forward", forward)
    ids = torch.zeros(1, stage_times.PREFILL_TOKENS, dtype=torch.long)
    with speed._cache_if_any(model, {"input_ids": ids}):
        model(input_ids=ids)
        speed._median_seconds(lambda: model(input_ids=ids), speed.SPEED_RUNS)
    speed._decode_rate(model, ids)
    prompts = [length for length in read if length > 1]
    assert prompts == [stage_times.PREFILL_TOKENS] * (stage_times.ALL_PREFILL_RUNS + stage_times.ALL_DECODE_RUNS)
    assert len(read) - len(prompts) == stage_times.ALL_DECODE_RUNS * (stage_times.DECODE_TOKENS - 1)


def test_a_pass_that_does_not_count_its_work_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(stage_times, "LONG_SECONDS", 0.0)
    monkeypatch.setattr(stage_times, "measure_rates", lambda *_: ONES)
    monkeypatch.setattr(DSFormer, "work", lambda *_: None)
    saved(MODELS["dense"](), tmp_path)
    steps = "[{pass: rtn, group_size: -1, only: ['*q_proj']}, {pass: dsformer, except: ['*q_proj']}]"
    plan = plan_of(tmp_path, steps)
    stages = predict_stages(plan, False, torch.device("cpu"))
    assert [stage["known"] for stage in stages] == [True, False, True, True]


def test_a_short_run_is_not_predicted(tmp_path, monkeypatch):
    monkeypatch.setattr(stage_times, "measure_rates", None)  # not called
    saved(MODELS["dense"](), tmp_path)
    assert predict_stages(plan_of(tmp_path), True, torch.device("cpu")) is None


def test_seconds_add_up_over_kinds_of_work():
    work = Work(products=6.0, stored=10.0) + Work(products=2.0) * 2
    assert seconds(work, replace(ONES, products=2.0, stored=5.0)) == 7.0


@pytest.mark.slow
def test_every_kind_of_work_has_a_rate():
    rates = measure_rates(torch.bfloat16, torch.device("cpu"))
    assert all(rate > 0 for rate in vars(rates).values())


def test_a_run_of_more_than_a_day_needs_consent():
    stages = [{"name": "sweep 0", "parts": [80000.0, 8000.0], "known": True}]
    with pytest.raises(PreflightError) as caught:
        check_time(stages, long=False)
    assert caught.value.data == {"reason": "long", "seconds": 88000.0, "slowest": "sweep 0"}
    check_time(stages, long=True)
    check_time([{**stages[0], "parts": [80000.0]}], long=False)
    check_time(None, long=False)


KINDS = {torch.bfloat16: "products", torch.float32: "exact", torch.float64: "double"}


class Operations(TorchDispatchMode):
    """Counts the operations of matmuls, Cholesky factors and solves by the kind of work, and n^3 of spectra."""

    def __init__(self):
        super().__init__()
        self.counted = dict.fromkeys([*KINDS.values(), "spectra"], 0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [value for value in args if isinstance(value, torch.Tensor)]
        name = func._schema.name.split("::")[1].rstrip("_")
        if name in ("mm", "addmm", "bmm"):
            self.counted[KINDS[tensors[-1].dtype]] += 2 * tensors[-2].numel() * tensors[-1].shape[-1]
        elif name == "linalg_cholesky_ex":
            self.counted[KINDS[tensors[0].dtype]] += tensors[0].shape[-1] ** 3 / 3
        elif name == "cholesky_solve":
            self.counted[KINDS[tensors[0].dtype]] += 2 * tensors[0].numel() * tensors[1].shape[-1]
        elif name == "_linalg_eigh":
            self.counted["spectra"] += tensors[0].shape[-1] ** 3
        return func(*args, **(kwargs or {}))


class Swept(Exception):
    """Ends a run after its sweeps."""


STEPS = {
    "greedy_removal": "[{pass: greedy_removal, max_evaluations: 8}]",
    "slicegpt": "[{pass: fuse_norms}, {pass: slicegpt, orientation: per_site}]",
    "slicegpt-auto": "[{pass: fuse_norms}, {pass: slicegpt, orientation: auto, schedule: variance}]",
    "vtrans": "[{pass: vtrans, target: 0.3, samples: 4}]",
    "vtrans-trained": "[{pass: vtrans, target: 0.3, steps: 4, samples: 4}]",
    "vtrans-equal": "[{pass: vtrans, target: 0.3, start: equal, steps: 4, samples: 4}]",
}


@pytest.mark.parametrize("kind", every_day(STEPS, "slicegpt"))
def test_the_operations_of_a_pass_that_changes_the_model_are_those_that_it_counts(kind, tmp_path, monkeypatch):
    torch.manual_seed(0)
    widths = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4}
    tiny.save("llama", tmp_path / "model", dtype=torch.bfloat16, num_hidden_layers=3, **widths)
    text = f"version: 1\ndata: {{source: random, samples: 8, length: 64}}\nsteps: {STEPS[kind]}\n"
    operations, planned = Operations(), []
    monkeypatch.setattr("compressor.model.half_products._has_instruction", lambda _dtype: True)
    monkeypatch.setattr("compressor.run.predict_stages", lambda plan, *_: planned.extend(stage_works(plan, False)))

    def note(event):
        if event["event"] == "sweep" and event["sweep"] == 0:  # what the plan computed doesn't count
            operations.counted = dict.fromkeys(operations.counted, 0)
        if event["event"] == "stage" and event["name"] == "write":
            raise Swept

    with operations, pytest.raises(Swept):
        compress(parse_recipe(text.encode()), str(tmp_path / "model"), tmp_path / "out", measure=False, emit=note)
    sweeps = sum((work.whole for work in planned[:-2]), Work())
    for key in ("products", "double"):
        assert getattr(sweeps, key) == pytest.approx(operations.counted[key], rel=0.25), key
    # a spectrum also stands for a random orthogonal matrix, which takes as long as three of them
    assert operations.counted["spectra"] <= sweeps.spectra <= 4 * operations.counted["spectra"]


class Products(TorchDispatchMode):
    """Counts the operations of products that are added in place, which the counter of torch doesn't see."""

    operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.addmm_.default:
            _, left, right = args
            self.operations += 2 * left.numel() * right.shape[1]
        return func(*args, **(kwargs or {}))


def test_the_products_of_gptq_s_solve_are_those_that_it_counts():
    out, columns = 64, 1024
    weight = torch.randn(out, columns)
    settings = GPTQ()
    with Products() as counter:
        solve(weight, torch.eye(columns), torch.ones(columns), torch.arange(columns), settings, 128, torch.bfloat16)
    planned = settings.work((Weight("w", "w.weight", "w.weight", (out, columns), "mlp"),), DataSize(tokens=7), Work())
    # `solve` computes neither the errors, of all rows since they are fewer than SAMPLED_ROWS, nor the factor
    others = 3 * 2 * out * columns**2 + 2 / 3 * columns**3
    assert planned.exact - others == pytest.approx(counter.operations, rel=0.1)
    assert (planned.products, planned.searched) == (7 * columns**2, out * columns)
