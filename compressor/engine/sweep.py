"""Runs the sweeps of a recipe: in each, its steps change one part after the other, and the result is stored.

In memory are the weights of one block (placement `stream`) or of all (`resident`, the same loop without freeing). The
inputs of a block are computed by the earlier blocks as they are stored. A resumed run computes activations again
through the stored blocks, so it is bit-identical to an uninterrupted run.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from compressor.artifact.export_format import ExportFormat
from compressor.engine.block_io import free_all
from compressor.engine.calibration_batch import (
    calibration_batches,
    verification_batch,
)
from compressor.engine.decisions import choose
from compressor.engine.plan import decided_plan
from compressor.engine.plan_records import Plan, Reshape
from compressor.engine.planned_ledger import ledger_of_run
from compressor.engine.rewrite_sweep import Reshaper, run_reshape
from compressor.engine.sweeper import Sweeper
from compressor.engine.walk import Written, walk
from compressor.engine.weight_sweep import run_weight_sweep
from compressor.layers import find_layer
from compressor.model.half_products import quick_products
from compressor.model.ledger import Ledger
from compressor.model.redefined_structure import with_token_gates
from compressor.model.stored_weight import StoredWeight
from compressor.model.structure import Structure
from compressor.process.memory import REWRITING_BLOCK_BYTES, return_large_blocks
from compressor.protocol import RewritePass, TokenPass, WeightPass
from compressor.recipe.recipe import Step


@dataclass(frozen=True)
class Outcome:
    """What the sweeps of a run have written.

    plan       the plan that the last sweep followed
    structure  the model as it was written
    files      of the last sweep, one per part of the model
    stored     weight name -> the weight in the format in which it was written
    ledger     what became of every tensor of the source
    """

    plan: Plan
    structure: Structure
    files: list[Path]
    stored: dict[str, StoredWeight]
    ledger: Ledger

    @property
    def export_format(self) -> ExportFormat:
        assert self.plan.export_format is not None  # a plan without an export format has problems, so there is no run
        return self.plan.export_format


def run_sweeps(sweeper: Sweeper) -> Outcome:
    """Run all sweeps of the recipe.

    raises Interrupted between parts after a request to stop; PassError naming the part when a pass fails
    """
    return_large_blocks()
    with quick_products(sweeper.structure.dtype), nullcontext() if sweeper.mapped is None else sweeper.mapped:
        return _run_sweeps(sweeper)


def _run_sweeps(sweeper: Sweeper) -> Outcome:
    plan = sweeper.first_plan
    files: list[Path] = []
    stored = Written()  # written by the last sweep that stored weights
    sweeps = sweeper.recipe.sweeps
    for number, steps in enumerate(sweeps):
        match steps[0].settings:
            case RewritePass():
                return_large_blocks(REWRITING_BLOCK_BYTES)
                plan = _begin_reshape(sweeper, plan, number, steps[0], Written())
                files = _run_reshape(sweeper, plan.reshape_of(steps[0]), number)
                return_large_blocks()
            case TokenPass():
                plan = _begin_reshape(sweeper, plan, number, steps[0], stored)
                _gate_tokens(sweeper, plan, steps[0], stored)
            case _:
                _prepare(sweeper, plan)
                stored = run_weight_sweep(sweeper, plan, number, steps, stored)
                files = stored.files
    if not files:  # no sweep has written a part
        stored = run_weight_sweep(sweeper, plan, len(sweeps), (), stored)
        files = stored.files
    elif not isinstance(sweeps[-1][0].settings, WeightPass):
        _run_verification_batch(sweeper, stored)
    structure, formats = sweeper.structure, dict(sorted(stored.formats.items()))
    ledger = ledger_of_run(plan.source, structure, plan.recipe, plan.reshapes, formats, sweeper.journal.lines)
    return Outcome(plan, structure, files, formats, ledger)


def _prepare(sweeper: Sweeper, plan: Plan) -> None:
    """Prepare the current model for the formats of the steps that store weights."""
    for format_name in sorted({stored.format_name for stored in plan.formats.values()}):
        find_layer(format_name).prepare(sweeper.structure.model)


def _begin_reshape(sweeper: Sweeper, plan: Plan, number: int, step: Step, before: Written) -> Plan:
    """The plan that holds from this step on: another one if the step makes a choice."""
    sweeper.begin(number, (step,))
    if not step.settings.decides:
        return plan
    return decided_plan(plan, step, choose(sweeper, plan.reshape_of(step), number, step, before))


def _run_reshape(sweeper: Sweeper, reshape: Reshape, number: int) -> list[Path]:
    """Let a step change the model itself. Later sweeps start from its result."""
    structure, step = sweeper.structure, reshape.step
    work = Reshaper(
        number,
        structure,
        reshape.after,
        reshape.facts,
        reshape.redefinition,
        sweeper.journal,
        calibration_batches(structure, sweeper.device, sweeper.samples, (step,), sweeper.spill),
        sweeper.device,
        lambda part: sweeper.seed_of(number, 0, part),
        sweeper.is_interrupted,
        sweeper.emit,
    )
    after, files = run_reshape(work, step)
    sweeper.structure, sweeper.needs = after, {}
    return files


def _gate_tokens(sweeper: Sweeper, plan: Plan, step: Step, before: Written) -> None:
    """Let a step add token gates to blocks. The weights stay as they are."""
    redefinition = plan.reshape_of(step).redefinition
    sweeper.structure, sweeper.needs = with_token_gates(sweeper.structure, redefinition), {}
    if before.formats:
        _prepare(sweeper, plan)


def _run_verification_batch(sweeper: Sweeper, stored: Written) -> None:
    """Run the verification batch through the current model."""
    structure = sweeper.structure
    (batch,) = sweeper.batches(())
    for part in walk(structure, [batch], sweeper.holder(partial(stored.source, structure))):
        if part.is_output_head:
            sweeper.verification_output = part.output(batch)
    free_all(structure)


def save_verification_batch(path: Path, structure: Structure, logits: Tensor, device: torch.device) -> None:
    batch = verification_batch(structure, device)
    save_file(
        {**{k: v.cpu().contiguous() for k, v in batch.items()}, "output": logits.float().cpu().contiguous()}, path
    )
