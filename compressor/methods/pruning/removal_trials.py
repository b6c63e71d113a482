"""Measures a model without some of its heads and neurons again and again, and remembers what was measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from compressor.errors import PassError
from compressor.lazy import torch
from compressor.methods.pruning.masked_forward import (
    KEPT_BLOCK_BYTES,
    Dense,
    Draw,
    Loss,
    MaskedProjection,
    Places,
    distilled,
    labelled,
    losses,
    masked,
    predictions,
    projection_columns,
)

if TYPE_CHECKING:
    from compressor.model.facts import PrunableModule
    from compressor.protocol import RunnableModel

RANKED_SHARE = 0.25  # of the search part's samples
LOOKS = 8  # how often a measurement of many batches is compared with its limit
RemovedUnits = dict[str, set[int]]  # name of a prunable module -> heads or neurons that are removed


class Losses(NamedTuple):
    """Mean losses on both parts of the samples.

    measured  share of the samples that were measured. Below 1 the losses are lower bounds: a sample that was not
              measured counts as 0, and no loss of a sample is below 0.
    """

    search: float
    confirm: float
    measured: float = 1.0

    def raised(self, increase: float) -> Losses:
        return Losses(self.search + increase, self.confirm + increase)

    def is_within(self, limit: Losses) -> bool:
        return self.search <= limit.search and self.confirm <= limit.confirm


@dataclass
class Trials:
    """Measures the model with parts removed. Streams of the last trial are reused up to the first changed block."""

    model: RunnableModel
    prunables: Sequence[PrunableModule]
    places: Places
    rows: list[int]  # samples of each batch
    each: torch.Tensor  # (samples,) predictions of a sample
    confirms: torch.Tensor  # (samples,) bool
    ranking: list[int]  # batches of the ranking
    objective: Loss
    streams: list[list[torch.Tensor]] = field(default_factory=list)  # of each batch: before each block and after all
    removed: dict[int, RemovedUnits] = field(default_factory=dict)  # batch -> what its streams are without

    @classmethod
    def of(cls, model: RunnableModel, prunables: Sequence[PrunableModule], loss: str, share: float) -> Trials:
        """Prepare trials on both parts of the samples. raises PassError if a part would be empty"""
        model.keep_blocks(KEPT_BLOCK_BYTES)
        dense = Dense.of(model)
        rows = [len(stream) for stream in dense.before]
        total = sum(rows)
        confirming = round(total * share)
        if not 0 < confirming < total:
            raise PassError(
                f"{total} calibration samples can't be split into {1 - share:g} and {share:g}",
                where="greedy_removal.confirm",
                hint="Set a larger data.samples, or set confirm nearer to 0.5.",
                data={"reason": "not-split", "samples": total, "share": share},
            )
        drawn = torch.randperm(total, generator=model.generator)
        confirms = torch.zeros(total, dtype=torch.bool)
        confirms[drawn[:confirming]] = True
        each = [
            predictions(model, dense, batch) // rows[batch] if loss == "distill" else 1 for batch in range(len(rows))
        ]
        ranking, ranked = [], 0
        for batch, chosen in enumerate(confirms.split(rows)):
            if ranked < RANKED_SHARE * (total - confirming):
                ranking.append(batch)
                ranked += int((~chosen).sum())
        projections = tuple(
            MaskedProjection(s.name, s.block + 1, s.output_projection, projection_columns(s.columns)) for s in prunables
        )
        streams = [[stream] for stream in dense.before]
        objective = distilled(model, dense) if loss == "distill" else labelled(model)
        counts = torch.tensor(each).repeat_interleave(torch.tensor(rows))
        return cls(model, prunables, Places(projections), rows, counts, confirms, ranking, objective, streams)

    @property
    def is_sampled(self) -> bool:
        """Whether the ranking leaves out batches."""
        return len(self.ranking) < len(self.rows)

    def means(self, sums: torch.Tensor) -> Losses:
        """Mean losses on those samples of both parts that were measured; 0 for a part without any.

        sums  (samples,) NaN for those that were not measured
        """
        known = ~sums.isnan()
        found = []
        for part in (~self.confirms & known, self.confirms & known):
            found.append(float(sums[part].sum()) / max(1, int(self.each[part].sum())))
        return Losses(found[0], found[1])

    def least(self, sums: torch.Tensor) -> Losses:
        """Mean losses on all samples of both parts, where those that were not measured (NaN) count as 0."""
        known = ~sums.isnan()
        return self.means(torch.where(known, sums, 0.0))._replace(measured=float(known.double().mean()))

    def sums_within(self, removed: RemovedUnits, limit: Losses) -> torch.Tensor:
        """(samples,) sums of losses of all samples, or NaN for those that aren't needed to see that the mean of a part
        is above its limit.

        An eighth of the batches is measured at a time. Those of the ranking come last, because a candidate is tried
        when its losses on them are small.
        """
        order = [*(batch for batch in range(len(self.rows)) if batch not in self.ranking), *self.ranking]
        at_once = max(1, len(order) // LOOKS)
        sums = torch.full((len(self.confirms),), math.nan, dtype=torch.float64)
        for start in range(0, len(order), at_once):
            sums = torch.where(sums.isnan(), self.sums(removed, order[start : start + at_once]), sums)
            if not self.least(sums).is_within(limit):
                break
        return sums

    def sums(self, removed: RemovedUnits, batches: Sequence[int]) -> torch.Tensor:
        """(samples,) float64: the loss of each sample, summed over its predictions; NaN for those in other batches.

        A loss that is NaN counts as infinite.
        """
        masks = {}
        for prunable in self.prunables:
            if removed.get(prunable.name):
                masks[prunable.name] = torch.ones(1, prunable.units, device=self.model.device)
                masks[prunable.name][0, sorted(removed[prunable.name])] = 0
        draws = [Draw(batch, masks) for batch in batches]
        self._advance(draws, removed)
        found = torch.full((len(self.confirms),), math.nan, dtype=torch.float64)
        parts = found.split(self.rows)
        with self.model.loaded(self.model.parts - 1):
            for draw in draws:
                last = self.streams[draw.batch][-1]
                measured = losses(self.model, draw, self.places, last, self.objective)
                parts[draw.batch].copy_(measured.nan_to_num(nan=math.inf, posinf=math.inf))
        return found

    def _advance(self, draws: Sequence[Draw], removed: RemovedUnits) -> None:
        """Run the blocks of each batch from the first one that differs from the batch's last trial."""
        for draw in draws:
            streams, before = self.streams[draw.batch], self.removed.get(draw.batch, {})
            differs = [s.block for s in self.prunables if removed.get(s.name, set()) != before.get(s.name, set())]
            del streams[min([*differs, len(streams) - 1]) + 1 :]
            self.removed[draw.batch] = removed
        for unit in range(min(len(self.streams[draw.batch]) for draw in draws), self.model.parts - 1):
            with self.model.loaded(unit), torch.no_grad():
                for draw in draws:
                    streams = self.streams[draw.batch]
                    if len(streams) == unit:
                        with masked(self.model, unit, draw.masks, self.places):
                            streams.append(self.model.run(unit, draw.batch, streams[-1]))


class Remembered:
    """Evaluations in order, each the sums of losses (samples,). Those of an interrupted run are read back."""

    def __init__(self, model: RunnableModel, save_every: int) -> None:
        self._model, self._save_every = model, save_every
        saved = model.saved()
        self._known: list[torch.Tensor] = [] if saved is None else list(saved[1]["sums"])
        self.count = 0

    def __call__(self, measure: Callable[[], torch.Tensor]) -> torch.Tensor:
        if self.count == len(self._known):
            self._known.append(measure())
            if len(self._known) % self._save_every == 0:
                self._model.save(len(self._known), {"sums": torch.stack(self._known)})
        self.count += 1
        return self._known[self.count - 1]
