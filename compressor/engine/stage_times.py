"""Predicts how long each stage of a run takes, from counts of its work and the measured rates of this machine.

The counts are those of the algorithms: passes count their own work (`work`), and here are the runs of the blocks, the
reading and writing of parts, and what `write`, `verify` and `evaluate` do. What the machine does in a second is
measured (`machine_rates`). A stage with a pass that doesn't count its work has no prediction.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from compressor.artifact.generation import FEWEST_TOKENS, GENERATED_TOKENS, PROMPT_TOKENS
from compressor.artifact.memory_needs import limit_bytes, speed_bytes, whole_verification_bytes
from compressor.artifact.speed_runs import (
    ALL_BATCH_RUNS,
    ALL_DECODE_RUNS,
    ALL_PREFILL_RUNS,
    DECODE_TOKENS,
    PREFILL_TOKENS,
    SPEED_BATCH,
)
from compressor.engine.events import PredictedStage
from compressor.engine.machine_rates import measure_rates, seconds
from compressor.engine.part_work import chosen_groups, data_size, part_works, run_of, sample_tokens, tokens_of
from compressor.engine.plan_records import Plan
from compressor.errors import PreflightError
from compressor.layers import DENSE, find_layer
from compressor.methods.divergence import divergence_work
from compressor.model.structure import Structure
from compressor.protocol import PartWork, RewritePass, TokenPass, WeightPass, Work
from compressor.recipe.recipe import Step

VERIFICATION_TOKENS = 64
LONG_SECONDS = 20.0
LONGEST_SECONDS = 24 * 3600.0
# of a laptop, to know whether measuring this machine is worth two seconds
ORDINARY = Work(
    products=2e11,
    exact=1e11,
    double=5e10,
    factors=2e4,
    spectra=2e9,
    searched=2e7,
    values=1e9,
    stored=5e8,
    hashed=1e9,
    seconds=1.0,
)

# Of a weight that is put in its format and read back: it is dequantized twice, and compared with its value.
PASSES_OF_STORING = 65
# Of a weight that the reference layers dequantize, each time that it is used: codes are unpacked, converted and scaled.
PASSES_OF_DEQUANTIZING = 18
PASSES_OF_CHECKING = 6  # of a tensor: whether it is finite, and its distance from the source's
# The runs of `verify`: the stock loader twice, our own loader, the source as it is and with the artifact's layers.
DENSE_RUNS, REFERENCE_RUNS = 3, 2
SERVER_SECONDS = 3.0  # of the process that starts others: it imports torch and transformers beside the first sweep
PROCESS_SECONDS = 0.5  # that a forked process needs before it loads a model; our measurement


@dataclass(frozen=True)
class StageWork:
    """The work of a stage, part by part; one part for a stage that isn't a sweep.

    name   as the events of the run name it: "sweep 0", "write", "verify", "evaluate"
    known  false if a pass of this sweep doesn't count its work, which then isn't in `parts`
    """

    name: str
    parts: tuple[Work, ...]
    known: bool = True

    @property
    def whole(self) -> Work:
        return sum(self.parts, Work())


def stage_works(plan: Plan, measure: bool) -> list[StageWork]:
    """The work of each stage in order. measure: the run evaluates the model before and after"""
    before, after = part_works(plan.source), part_works(plan.structure)
    works = [_sweep_work(plan, number, steps, after) for number, steps in enumerate(plan.recipe.sweeps)]
    size = float(plan.weight_bytes)
    works.append(StageWork("write", (Work(stored=2 * size, hashed=size),)))
    works.append(StageWork("verify", (_verify_work(plan, before, after),)))
    if measure:
        works.append(StageWork("evaluate", (_evaluate_work(plan, before, after),)))
    return works


def _sweep_work(plan: Plan, number: int, steps: Sequence[Step], after: Sequence[PartWork]) -> StageWork:
    """Of a sweep: its steps on each part, and the run of the calibration tokens through the part as it is stored."""
    match steps[0].settings:
        case RewritePass() | TokenPass():
            parts = _redefining_work(plan, steps[0])
        case _:
            parts = _storing_work(plan, steps, after)
    if number == 0 and parts[0] is not None:
        parts[0] += Work(seconds=SERVER_SECONDS)
    return StageWork(f"sweep {number}", tuple(work or Work() for work in parts), None not in parts)


def _redefining_work(plan: Plan, step: Step) -> list[Work | None]:
    """Of a step that changes the model itself. None for parts whose work isn't known."""
    reshape, settings = plan.reshape_of(step), step.settings
    parts = part_works(reshape.before)
    data = data_size(plan.recipe, [step], reshape.before)
    if isinstance(settings, TokenPass):
        chosen = settings.work(reshape.facts, data, parts)
        batch = [part.load + part.run * VERIFICATION_TOKENS for part in parts]
        return [None if chosen is None else chosen + batch[0], *batch[1:]]
    assert isinstance(settings, RewritePass)
    found = settings.work(reshape.facts, data, parts)
    if found is None:
        return [None] * len(parts)
    return [own + part.load * 2 for own, part in zip(found, parts, strict=True)]


def _storing_work(plan: Plan, steps: Sequence[Step], after: Sequence[PartWork]) -> list[Work | None]:
    """Of steps that store weights. None for parts whose work isn't known."""
    structure = plan.structure
    sizes = [data_size(plan.recipe, [step], structure) for step in steps]
    tokens = max((size.tokens for size in sizes), default=0)
    # A batch that a pass has read is paused in the block and goes on from there, unless a layer replaces a module.
    replacing = {
        name for name, stored_weight in plan.formats.items() if not find_layer(stored_weight.format_name).weight_only
    }
    deciding = sum(2 * size.tokens for step, size in zip(steps, sizes, strict=True) if step.settings.decides)
    parts: list[Work | None] = []
    for number, part in enumerate(after):
        work: Work | None = part.load * 2 + part.run * VERIFICATION_TOKENS
        if number <= structure.block_count:
            runs = 2 if any(True for _ in chosen_groups(structure, number, replacing)) else 1
            work = part.load * 2 + part.run * (runs * tokens + deciding + VERIFICATION_TOKENS)
        for step, size in zip(steps, sizes, strict=True):
            chosen = {weight.name for weight in plan.selected[step.path]}
            for group in chosen_groups(structure, number, chosen):
                assert isinstance(step.settings, WeightPass)
                own = replace(size, tokens=tokens_of(group, structure, size.tokens))
                found = step.settings.work(group.weights, own, part.run)
                stored = sum(math.prod(w.shape) for w in group if step.settings.stored(w) != DENSE)
                found = None if found is None else found + Work(values=float(PASSES_OF_STORING * stored))
                work = None if found is None or work is None else work + found
        parts.append(work)
    return parts


def _verify_work(plan: Plan, before: Sequence[PartWork], after: Sequence[PartWork]) -> Work:
    """Three models are loaded: the artifact twice, and the source, whose every tensor is compared with the artifact's.

    Our own loader runs with reference layers, which dequantize a stored weight each time that it is used.
    """
    batch = run_of(after, VERIFICATION_TOKENS)
    stored = _stored_values(plan)
    dense = float(sum(part.values for part in after))
    source = float(sum(part.values for part in before))
    itemsize = plan.structure.dtype.itemsize
    needed = whole_verification_bytes(itemsize * dense, plan.weight_bytes, plan.source.checkpoint.nbytes)
    tokens = GENERATED_TOKENS if needed <= limit_bytes(plan.recipe.limits.memory) else FEWEST_TOKENS
    steps = 1 + REFERENCE_RUNS + tokens + (2 if _is_custom(plan) else 0)
    return (
        batch * (DENSE_RUNS + REFERENCE_RUNS)
        + run_of(after, PROMPT_TOKENS)
        + Work(
            values=PASSES_OF_DEQUANTIZING * stored * steps + dense * tokens + PASSES_OF_CHECKING * (dense + source),
            stored=2.0 * plan.weight_bytes + plan.source_bytes,
            hashed=plan.weight_bytes + itemsize * (dense + source),
            seconds=2 * PROCESS_SECONDS,
        )
    )


def _evaluate_work(plan: Plan, before: Sequence[PartWork], after: Sequence[PartWork]) -> Work:
    """Quality of both models, then the speed of each, and of the artifact with its kernels if it has stored weights."""
    settings, stored = plan.recipe.eval, _stored_values(plan)
    tokens = settings.data.samples * sample_tokens(plan.source, settings.data.length)
    load = Work(stored=float(plan.source_bytes + plan.weight_bytes), values=PASSES_OF_DEQUANTIZING * stored)
    found = Work()
    if set(settings.metrics) - {"size", "speed", "memory"}:
        found += load + run_of(before, tokens) + run_of(after, tokens) + Work(seconds=PROCESS_SECONDS)
        found += divergence_work(tokens, before[-1].outputs)
        if _is_custom(plan):
            found += Work(values=PASSES_OF_DEQUANTIZING * stored * settings.data.samples / settings.batch_size)
    limit = limit_bytes(plan.recipe.limits.memory)
    fits = speed_bytes(plan.source_bytes) <= limit  # otherwise no speed is measured
    if fits and {"speed", "memory"} & set(settings.metrics):
        found += load + _speed_work(plan.source, before) + _speed_work(plan.structure, after)
        if _is_custom(plan):
            found += Work(values=PASSES_OF_DEQUANTIZING * stored * (ALL_PREFILL_RUNS + ALL_DECODE_RUNS * DECODE_TOKENS))
    if fits and "speed" in settings.metrics and stored:
        found += Work(stored=float(plan.weight_bytes), values=PASSES_OF_DEQUANTIZING * stored)
        found += _speed_work(plan.structure, after)
    return found


def _speed_work(structure: Structure, parts: Sequence[PartWork]) -> Work:
    """Of measuring the speed of a model. A token that is generated alone reads every weight once."""
    prompt, generates = sample_tokens(structure, PREFILL_TOKENS), structure.model.can_generate()
    found = run_of(parts, prompt * ALL_PREFILL_RUNS) + Work(seconds=PROCESS_SECONDS)
    if not generates:
        return found + run_of(parts, prompt * SPEED_BATCH * ALL_BATCH_RUNS)
    weights = sum(part.run.products / 2 for part in parts)
    return found + run_of(parts, prompt * ALL_DECODE_RUNS) + Work(values=weights * DECODE_TOKENS * ALL_DECODE_RUNS)


def _is_custom(plan: Plan) -> bool:
    """Whether the stock loader uses the modeling file, whose layers dequantize a weight each time that it is used."""
    return plan.export_format is not None and plan.export_format.name == "custom"


def _stored_values(plan: Plan) -> float:
    """Number of the weights that are stored in another format."""
    return float(
        sum(math.prod(stored.weight.shape) for stored in plan.formats.values() if not stored.weight.is_function)
    )


def predict_stages(plan: Plan, measure: bool, device: torch.device) -> list[PredictedStage] | None:
    """Seconds of each stage on this machine; None for a run of less than some LONG_SECONDS, which isn't worth it.

    measure  the run evaluates the model before and after
    """
    works = stage_works(plan, measure)
    if sum(seconds(work.whole, ORDINARY) for work in works) < LONG_SECONDS:
        return None
    rates = measure_rates(plan.structure.dtype, device)
    return [
        {"name": work.name, "parts": [seconds(part, rates) for part in work.parts], "known": work.known}
        for work in works
    ]


def check_time(stages: Sequence[PredictedStage] | None, long: bool) -> None:
    """raises PreflightError for a run of more than LONGEST_SECONDS, unless the user has asked for a long one"""
    for problem in too_long(stages, long):
        raise problem


def too_long(stages: Sequence[PredictedStage] | None, long: bool) -> list[PreflightError]:
    """The problem that `check_time` raises; none if the run may take as long as it does."""
    needed = sum(sum(stage["parts"]) for stage in stages or ())
    if needed <= LONGEST_SECONDS or long:
        return []
    assert stages is not None
    slowest = max(stages, key=lambda stage: sum(stage["parts"]))
    return [
        PreflightError(
            f"about {needed / 3600:,.0f} hours of work on this machine, {sum(slowest['parts']) / 3600:,.0f} of them in "
            f"{slowest['name']}",
            where="time",
            hint="Set a smaller data.samples, choose a faster pass or machine, or pass --long.",
            data={"reason": "long", "seconds": needed, "slowest": slowest["name"]},
        )
    ]
