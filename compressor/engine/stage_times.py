"""Predicts how long each stage of a run takes, from counts of its work and the measured rates of this machine.

The counts are those of the algorithms (`WeightPass.work`, and here the runs of the blocks). What the machine does in a
second is measured (`machine_rates`). A stage with a pass that doesn't count its work has no prediction.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from compressor.engine.events import PredictedStage
from compressor.engine.machine_rates import measure_rates, seconds
from compressor.engine.plan_records import Plan
from compressor.errors import PreflightError
from compressor.model.structure import Structure
from compressor.model.weights import Group
from compressor.protocol import WeightPass
from compressor.protocol.work import Work
from compressor.recipe.recipe import Step

PROBE_TOKENS = 64
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")  # keys of configs
LONG_SECONDS = 20.0
LONGEST_SECONDS = 24 * 3600.0
# of a laptop, to know whether measuring this machine is worth two seconds
ORDINARY = Work(products=2e11, exact=1e11, factors=5e10, spectra=2e9, searched=2e7, values=1e9, stored=5e8)


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
    works = [_sweep_work(plan, number, steps) for number, steps in enumerate(plan.recipe.sweeps)]
    works.append(StageWork("write", (Work(stored=2.0 * plan.weight_bytes),)))
    probe = _run_of(plan.structure, PROBE_TOKENS)
    works.append(StageWork("verify", (probe + Work(stored=float(plan.source_bytes + plan.weight_bytes)),)))
    if measure:
        tokens = plan.recipe.eval.data.samples * plan.recipe.eval.data.length
        both = _run_of(plan.source, tokens) + _run_of(plan.structure, tokens)
        works.append(StageWork("evaluate", (both + Work(stored=float(plan.source_bytes + plan.weight_bytes)),)))
    return works


def _sweep_work(plan: Plan, number: int, steps: Sequence[Step]) -> StageWork:
    """Of a sweep: its steps on each part, and one run of the calibration tokens through the part as it is stored."""
    structure, tokens = plan.structure, _calibration_tokens(plan, steps)
    known = True
    parts = []
    for part in range(structure.block_count + 2):
        work = _part_work(structure, part, tokens + PROBE_TOKENS)
        for step in steps:
            if not isinstance(step.settings, WeightPass):
                known = False
                continue
            chosen = {weight.name for weight in plan.selected[step.path]}
            for stage in structure.stages(part):
                for group in stage:
                    kept = Group(tuple(weight for weight in group if weight.name in chosen))
                    if not kept.weights:
                        continue
                    found = step.settings.work(kept.weights, _tokens_of(kept, structure, tokens))
                    known = known and found is not None
                    work += found or Work()
        parts.append(work)
    return StageWork(f"sweep {number}", tuple(parts), known)


def _tokens_of(group: Group, structure: Structure, tokens: int) -> int:
    """Of the calibration tokens those that reach a group: an expert gets its share of them."""
    return tokens if group.expert is None else round(tokens * _routed_share(structure))


def _routed_share(structure: Structure) -> float:
    """Share of the tokens that one expert gets if all get the same."""
    config = structure.model.config.get_text_config()
    experts = next((value for key in EXPERT_COUNTS if isinstance(value := getattr(config, key, None), int)), 1)
    return min(1.0, getattr(config, "num_experts_per_tok", experts) / max(experts, 1))


def _run_of(structure: Structure, tokens: int) -> Work:
    return sum((_part_work(structure, part, tokens) for part in range(structure.block_count + 2)), Work())


def _part_work(structure: Structure, part: int, tokens: int) -> Work:
    """Of running tokens through a part once."""
    products = 0.0
    for stage in structure.stages(part) if part else []:
        for group in stage:
            share = _tokens_of(group, structure, tokens)
            products += sum(2.0 * math.prod(weight.shape) * share for weight in group if not weight.is_function)
    return Work(products=products)


def _calibration_tokens(plan: Plan, steps: Sequence[Step]) -> int:
    data = plan.recipe.data
    return data.samples * data.length if any(step.settings.traits.reads != "weights" for step in steps) else 0


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
    needed = sum(sum(stage["parts"]) for stage in stages or ())
    if needed > LONGEST_SECONDS and not long:
        assert stages is not None
        slowest = max(stages, key=lambda stage: sum(stage["parts"]))
        raise PreflightError(
            f"about {needed / 3600:,.0f} hours of work on this machine, {sum(slowest['parts']) / 3600:,.0f} of them in "
            f"{slowest['name']}",
            where="time",
            hint="Set a smaller data.samples, choose a faster pass or machine, or pass --long.",
            data={"reason": "long", "seconds": needed, "slowest": slowest["name"]},
        )
