"""Holds what all sweeps of a run share, and the current model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from compressor.analysis.input_producers import producers_of
from compressor.data.samples import Samples
from compressor.engine.block_io import PartSource
from compressor.engine.block_view import BlockView, Needs
from compressor.engine.calibration_batch import (
    CalibrationBatch,
    calibration_batches,
    verification_batch,
)
from compressor.engine.events import Emit, Progress
from compressor.engine.plan_records import Plan
from compressor.engine.walk import Holder, Part
from compressor.model.mapped_tensors import MappedTensors
from compressor.model.spill import SpillFolder
from compressor.model.structure import Structure
from compressor.recipe.recipe import Recipe, Step
from compressor.storage.journal import Journal


@dataclass
class Sweeper:
    """What all sweeps of a run share, and the current model.

    The plan that a sweep follows is its argument, because a pass that chooses shapes makes the sweeps after it follow
    another plan than `first_plan`, which was made before the run.

    verification_output  of the stored model for the verification batch, after the last part has run
    spill   where the batches' hidden states lie; None: in memory, if the plan says that they fit
    mapped  makes the parameters of experts; None: in memory, if the plan says that they fit
    """

    first_plan: Plan
    journal: Journal
    samples: Samples | None
    device: torch.device
    seed: int
    emit: Emit
    is_interrupted: Callable[[], bool]
    verification_output: Tensor | None = None
    needs: Needs = field(default_factory=dict)
    structure: Structure = field(init=False)
    progress: Progress = field(init=False)
    spill: SpillFolder | None = field(init=False)
    mapped: MappedTensors | None = field(init=False)

    def __post_init__(self) -> None:
        self.structure, self.progress = self.first_plan.source, Progress(self.emit)
        parts = self.journal.work / "parts"
        self.spill = SpillFolder(parts / "hidden") if self.first_plan.sizes.spills else None
        is_mapped = self.first_plan.sizes.maps_experts and self.device.type == "cpu"
        self.mapped = MappedTensors(parts) if is_mapped else None

    @property
    def recipe(self) -> Recipe:
        return self.first_plan.recipe

    def begin(self, number: int, steps: tuple[Step, ...]) -> None:
        """Report the beginning of a sweep."""
        parts, passes = self.structure.block_count + 2, [step.name for step in steps]
        self.emit({"event": "sweep", "sweep": number, "parts": parts, "passes": passes})

    def batches(self, steps: tuple[Step, ...]) -> list[CalibrationBatch]:
        """Calibration batches before the embeddings (none if no step reads inputs), and last the verification batch."""
        found = calibration_batches(self.structure, self.device, self.samples, steps, self.spill)
        return [*found, CalibrationBatch.before_embeddings(verification_batch(self.structure, self.device))]

    def holder(self, source: Callable[[int], PartSource | None], **options: Any) -> Holder:
        return Holder(self.structure, self.device, source, self.is_interrupted, mapped=self.mapped, **options)

    def seed_of(self, *place: int) -> int:
        return int.from_bytes(hashlib.sha256(repr((self.seed, *place)).encode()).digest()[:8], "little") >> 1

    def view(self, plan: Plan, sweep: int, step: Step, part: Part, seed: int) -> BlockView:
        """The view of a loaded part for a step. It has all batches except the last, the verification batch."""
        return BlockView(
            part.structure,
            part.number,
            frozenset(weight.name for weight in plan.selected[step.path]),
            part.batches[:-1],
            part.batches[-1],
            self.device,
            torch.Generator().manual_seed(seed),
            self.needs,
            part.installed,
            selected_functions=plan.functions_of(step, part.number),
            rescalable=producers_of(plan.producers, part.structure, part.number),
            tell=partial(self.progress, sweep, part.number),
            mapped=self.mapped,
        )
