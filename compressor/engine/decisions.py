"""Makes the choices of a step over the whole model before its sweep: once, then read from the journal."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from compressor.engine.block_io import free_all
from compressor.engine.block_view import BlockView
from compressor.engine.calibration_batch import (
    batch_labels,
    calibration_batches,
)
from compressor.engine.choice_view import ModelView, WholeModelView
from compressor.engine.events import warning_event
from compressor.engine.line_facts import DecisionFacts
from compressor.engine.plan_records import Plan, Reshape
from compressor.engine.sweeper import Sweeper
from compressor.engine.walk import Part, Written, walk
from compressor.errors import Notice, PassError
from compressor.model.facts import Decision
from compressor.protocol import RewritePass, TokenPass, WeightPass
from compressor.recipe.recipe import Step


def decide(
    sweeper: Sweeper, plan: Plan, number: int, steps: tuple[Step, ...], before: Written
) -> list[Decision | None]:
    """The choice of each step of a sweep that stores weights."""
    decisions: list[Decision | None] = []
    for position, step in enumerate(steps):
        if not step.settings.decides:
            decisions.append(None)
            continue
        view = _whole_model(sweeper, plan, number, position, step, before)

        def made(_warnings: list[Notice], step: Step = step, view: WholeModelView = view) -> Decision | None:
            assert isinstance(step.settings, WeightPass)
            return step.settings.decide(view)

        decisions.append(_decided(sweeper, number, position, step, made))
    return decisions


def _whole_model(
    sweeper: Sweeper, plan: Plan, number: int, position: int, step: Step, before: Written
) -> WholeModelView:
    """The model as earlier sweeps left it, for a step that decides before its sweep."""
    structure = sweeper.structure
    hold = sweeper.holder(partial(before.source, structure), stopped="stopped while deciding")

    def begin() -> Iterator[Part]:
        return walk(structure, sweeper.batches((step,)), hold)

    def view(part: Part) -> BlockView:
        return sweeper.view(plan, number, step, part, sweeper.seed_of(number, position, part.number, -1))

    return WholeModelView(begin, view)


def choose(sweeper: Sweeper, planned: Reshape, number: int, step: Step, before: Written) -> Decision:
    """The choice of a step that redefines the model, which is planned until then as if it chose nothing."""
    structure = sweeper.structure

    def made(warnings: list[Notice]) -> Decision:
        assert isinstance(step.settings, RewritePass | TokenPass)
        view = ModelView(
            number,
            planned.facts,
            structure,
            calibration_batches(structure, sweeper.device, sweeper.samples, (step,), sweeper.spill),
            batch_labels(sweeper.samples, sweeper.device, step),
            sweeper.device,
            lambda part: torch.Generator().manual_seed(sweeper.seed_of(number, 0, part, -1)),
            sweeper.journal,
            sweeper.recipe.model.placement == "resident",
            sweeper.is_interrupted,
            warnings,
            partial(before.source, structure),
            partial(sweeper.progress, number),
        )
        try:
            return step.settings.choose(view)
        finally:
            view.close()

    decision = _decided(sweeper, number, 0, step, made)
    assert decision is not None
    return decision


def _decided(
    sweeper: Sweeper,
    number: int,
    position: int,
    step: Step,
    decide: Callable[[list[Notice]], Decision | None],
) -> Decision | None:
    """The decision of a step: read from the journal, or made now and committed with the warnings of its list."""
    key, journal = f"{number}/decision/{position}", sweeper.journal
    if journal.done(key) is None:
        sweeper.emit({"event": "decide", "sweep": number, "pass": step.name})
        warnings: list[Notice] = []
        try:
            made = decide(warnings)
        except torch.OutOfMemoryError as error:
            hint = "Set a smaller data.samples or data.length, then begin again with --fresh."
            raise PassError(
                f"{step.name} ran out of memory", hint=hint, data={"reason": "memory", "pass": step.name}
            ) from error
        free_all(sweeper.structure)
        text = json.dumps(None if made is None else dict(made), sort_keys=True)
        facts = DecisionFacts(json.loads(text), tuple(warnings)).to_json()
        journal.commit(key, f"s{number:02d}-decision-{position:02d}.json", lambda path: _write_text(path, text), facts)
        for warning in warnings:
            sweeper.emit(warning_event(warning))
    line = journal.done(key)
    assert line is not None
    return DecisionFacts.of(line).decision


def _write_text(path: Path, text: str) -> None:
    path.write_text(text)
