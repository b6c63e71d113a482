"""The sweep: what batches may keep while they wait in a block is a matter of speed and memory alone."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
import tiny
import torch
from raising import raises
from safetensors.torch import load_file, save_file

from compressor.data.samples import load_samples
from compressor.engine import block_view, calibration_batch, estimates, sweep
from compressor.engine import plan as planning
from compressor.engine.plan import make_plan
from compressor.engine.plan_records import DecidedPlan, Plan
from compressor.errors import PassError
from compressor.layers.packed_linear import PackedLinear
from compressor.model.mapped_tensors import MappedTensors
from compressor.recipe.recipe import parse_recipe
from compressor.run import compress
from compressor.storage.journal import Journal

RECIPE = b"""version: 1
data: {source: random, samples: 12, length: 16}
steps: [{pass: gptq, bits: 4, group_size: 32, min_tokens_per_expert: 4, true_sequential: %s}]
"""


def swept(model, work, monkeypatch, share, sequential=b"true", **sizes):
    """sha256 of all unit files of a sweep over six batches."""
    monkeypatch.setattr(calibration_batch, "RECORDED_SHARE", share)
    monkeypatch.setattr(calibration_batch, "BATCH_TOKENS", 32)
    plan = make_plan(parse_recipe(RECIPE % sequential), str(model), prove=False)
    plan = replace(plan, sizes=replace(plan.sizes, **sizes))
    samples = load_samples(plan.recipe.data, model, seed=0, vocabulary=96)
    sweeper = sweep.Sweeper(
        plan, Journal.create(work, {}), samples, torch.device("cpu"), 0, lambda event: None, lambda: False
    )
    outcome = sweep.run_sweeps(sweeper)
    return hashlib.sha256(b"".join(file.read_bytes() for file in outcome.files)).hexdigest()


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "mixtral", "bert"])
def test_what_batches_may_keep_changes_no_byte(family, tmp_path, monkeypatch):
    model = tiny.save(family, tmp_path / "m", dtype=torch.bfloat16)
    found = {swept(model, tmp_path / f"w{share}", monkeypatch, share) for share in (0, 1.5, 100)}
    assert found == {swept(model, tmp_path / "spilled", monkeypatch, 100, spills=True)}
    assert list((tmp_path / "spilled" / "parts" / "hidden").iterdir()) == []


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "qwen3_vl_moe"])
def test_experts_in_a_mapped_file_change_no_byte(family, tmp_path, monkeypatch):
    model, filled = tiny.save(family, tmp_path / "m", dtype=torch.bfloat16), []
    empty = MappedTensors.empty
    monkeypatch.setattr(MappedTensors, "empty", lambda *a: filled.append(empty(*a)) or filled[-1])
    in_memory = swept(model, tmp_path / "memory", monkeypatch, 100)
    assert not filled
    assert swept(model, tmp_path / "mapped", monkeypatch, 100, maps_experts=True) == in_memory
    assert len(filled) == 2 * 2 * 2  # two parameters of two blocks, before and after they are stored
    left = {path.suffix for path in (tmp_path / "mapped" / "parts").iterdir()}
    assert left == {".safetensors"}


def test_paused_batches_keep_what_the_small_verification_batch_reads(tmp_path, monkeypatch):
    """At its down projection a block reads its residual stream, and the product that the projection multiplies."""
    kept = []
    keep_only = block_view.RecordedForward.keep_only

    def noted(recorded, leaves):
        keep_only(recorded, leaves)
        kept.append(sum(tensor.numel() for tensor in recorded.kept()))

    monkeypatch.setattr(block_view.RecordedForward, "keep_only", noted)
    swept(tiny.save("llama", tmp_path / "m", dtype=torch.bfloat16), tmp_path / "w", monkeypatch, 100)
    blocks, batches, stages, tokens = 2, 6, 4, 32
    assert len(kept) == blocks * batches * stages
    widths = [elements // tokens for elements in kept[3 * batches : 4 * batches]]
    assert set(widths) == {32 + 64}


def test_all_groups_in_one_stage_see_the_same_with_and_without_tapes(tmp_path, monkeypatch):
    model = tiny.save("llama", tmp_path / "m", dtype=torch.bfloat16)
    found = {swept(model, tmp_path / f"w{share}", monkeypatch, share, b"false") for share in (0, 100)}
    assert len(found) == 1


def test_a_forward_that_can_not_be_taped_is_run_from_its_start(tmp_path, monkeypatch):
    """Every replay is made to diverge; the bytes are those of an undisturbed sweep."""
    model = tiny.save("llama", tmp_path / "m", dtype=torch.bfloat16)
    expected = swept(model, tmp_path / "w1", monkeypatch, 100)
    advance, run_on, diverged = block_view.advance, block_view.run_on, []

    def refuse(function, tape, *arguments):
        if tape.answers:
            diverged.append(function)
            raise block_view.Diverged
        return function(tape, *arguments)

    monkeypatch.setattr(block_view, "advance", lambda *a: refuse(advance, *a))
    for module in (block_view, calibration_batch):
        monkeypatch.setattr(module, "run_on", lambda *a: refuse(run_on, *a))
    assert swept(model, tmp_path / "w2", monkeypatch, 100) == expected
    assert set(diverged) == {advance, run_on}


@pytest.mark.parametrize("whose", ["the model's", "the step's"])
def test_a_block_that_overflows_ends_the_run_and_says_whose_fault_it_is(whose, tmp_path, monkeypatch):
    model = tiny.save("llama", tmp_path / "m", dtype=torch.float16)
    if whose == "the model's":
        tensors = load_file(model / "model.safetensors")
        for name in ("up", "gate"):
            tensors[f"model.layers.0.mlp.{name}_proj.weight"] *= 60_000
        save_file(tensors, model / "model.safetensors", {"format": "pt"})
    else:
        monkeypatch.setattr(planning, "try_loaders", lambda *_: None)  # which would have found it
        restored = PackedLinear.matrix
        monkeypatch.setattr(PackedLinear, "matrix", lambda *a, **k: restored(*a, **k) * float("inf"))
    recipe = parse_recipe(b"version: 1\nsteps: [{pass: rtn, bits: 8, group_size: -1}]\n")
    reason = "overflow-of-model" if whose == "the model's" else "overflow-as-stored"
    with raises(PassError, where="block 0", reason=reason, dtype="float16") as failure:
        compress(recipe, str(model), tmp_path / "out", measure=False)
    assert failure.value.exit_code == 7 and not (tmp_path / "out").exists()


def test_a_plan_spills_hidden_states_only_if_they_do_not_fit(tmp_path):
    """Of 12.8 million tokens, 4 copies of 32 values in 16 bits take 3.3 GB."""
    model = tiny.save("llama", tmp_path / "m", dtype=torch.bfloat16)

    def sizes(memory):
        recipe = RECIPE.replace(b"samples: 12, length: 16", b"samples: 100000, length: 128") % b"true"
        plan = make_plan(parse_recipe(recipe + b"limits: {memory: %s}\n" % memory), str(model), prove=False)
        return plan.sizes, [problem.where for problem in plan.problems]

    (small, refused), (large, _) = sizes(b"2GiB"), sizes(b"64GiB")
    assert small.spills and not large.spills and refused == []
    kept = 12_800_000 * 32 * 2
    assert small.peak_memory_bytes <= 2 << 30 < 4 * kept < large.peak_memory_bytes
    assert small.disk_bytes - large.disk_bytes == pytest.approx(2 * kept, rel=1e-3)  # before and after a block
    assert sizes(b"100MiB")[1] == ["memory"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "maps"),
    [
        ("rtn, group_size: 32", True),
        ("low_rank, only: ['@attention']", True),
        ("awq, group_size: 32", False),
        ("dsformer, only: ['@attention']", False),
    ],
)
def test_a_plan_maps_experts_only_if_they_do_not_fit(step, maps, tmp_path, monkeypatch):
    """Not for a pass that holds more than one expert at a time."""
    monkeypatch.setattr(estimates, "INTERPRETER_BYTES", 0)
    monkeypatch.setattr(estimates, "CHUNK_BYTES", 0)
    model = tiny.save("qwen3_moe", tmp_path / "m", dtype=torch.bfloat16, num_experts=64, moe_intermediate_size=128)
    experts = 64 * 3 * 32 * 128 * 2

    def planned(memory):
        recipe = b"version: 1\ndata: {source: random, samples: 2, length: 8}\nsteps: [{pass: %s}]\n" % step.encode()
        overrides = [f"limits.memory={memory}", "eval.data.length=8", "eval.batch_size=1"]
        plan = make_plan(parse_recipe(recipe, overrides=overrides), str(model), prove=False)
        told = [warning.data for warning in plan.warnings if warning.code == "experts-mapped"]
        return plan.sizes, [problem.where for problem in plan.problems], told

    large, refused, told = planned(1 << 34)
    assert not large.maps_experts and not refused and not told and large.peak_memory_bytes > 2 * experts
    small, refused, told = planned(2 * experts)
    assert small.maps_experts == maps and refused == ([] if maps else ["memory"])
    if maps:
        assert small.peak_memory_bytes <= 2 * experts < small.disk_bytes - large.disk_bytes
        assert told == [{"bytes": experts}]
    assert planned(1000)[1] == ["memory"]


def test_a_choice_in_the_run_makes_a_second_plan(tmp_path):
    """The plan before the run stays as it was made."""
    model = tiny.save("llama", tmp_path / "m")
    step = b"{pass: slicegpt, orientation: auto, sparsity: 0.25, round_to: 4}"
    recipe = parse_recipe(
        b"version: 1\ndata: {source: random, samples: 4, length: 16}\nsteps: [{pass: fuse_norms}, %s]\n" % step
    )
    plan = make_plan(recipe, str(model), prove=False)
    samples = load_samples(plan.recipe.data, model, seed=0, vocabulary=96)
    device, journal = torch.device("cpu"), Journal.create(tmp_path / "w", {})
    outcome = sweep.run_sweeps(sweep.Sweeper(plan, journal, samples, device, 0, lambda event: None, lambda: False))
    chosen = plan.recipe.steps[1]
    assert type(plan) is Plan and plan.reshape_of(chosen).redefinition.decision is None
    assert type(outcome.plan) is DecidedPlan and list(outcome.plan.decisions) == [chosen.path]
    assert outcome.plan.reshape_of(chosen).redefinition.decision == outcome.plan.decisions[chosen.path]
    assert outcome.stored == {} and len(outcome.files) == 4
