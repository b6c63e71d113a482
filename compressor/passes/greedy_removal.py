"""Greedy removal: removes whole blocks, sub-blocks and heads, as long as the loss on calibration data allows it.

Paper: Nagarajan, Sen, Stevens, Raghunathan 2022, "AxFormer: Accuracy-driven Approximation of Transformers for Faster,
Smaller and more Accurate NLP Models", arXiv 2010.03688. Only its abstract was read: parts of a fine-tuned transformer
that harm it on its task are found and removed, and then it is up to 4.5 % more accurate, 2.5 times faster and 3.2 times
smaller on GLUE and SQuAD. The rest is our design:

1. Tiers are tried from coarse to fine: blocks, then sub-blocks (an attention or an MLP), then heads (a key-value head
   with its query heads). Parts of something that was removed are not tried.
2. In a tier, each candidate is removed alone, by masks of 0, and the loss is measured on a quarter of the search part
   of the calibration samples. This ranks the candidates. Of two with the same loss, the later block comes first. The
   ranking uses at most half of the evaluations that are left; earlier blocks that it doesn't reach are not tried.
3. In that order, each candidate is removed in addition to what was removed before. It stays removed if the loss is
   within `max_loss_increase` of the dense model's, on the search part and on a part that was not used for the ranking,
   since greedy choices overfit to the samples on which they are made. A candidate that lowers the loss always passes.
   As many candidates as can go together by their losses alone are removed and measured at once. If they exceed the
   bound, half as many are tried. A measurement ends as soon as the samples so far exceed the bound for all samples,
   since no loss is below 0. A candidate that alone, on the samples of the ranking, adds more than twice what the bound
   still allows is not measured again.
4. With `retry`, candidates that failed are tried again at the end of their tier.

The loss is KL(dense || masked) for each prediction, or cross-entropy with the data's labels for each sample. So the
loss of the dense model is 0, or its cross-entropy. The parts are then removed by the same physical pruning as in
`vtrans`; the bias of a removed part stays. Selective hard attention, the other half of the paper, isn't offered.

If more removals never lower the loss, this removes what trials one by one would remove.

Cost: one run from the candidate's block to the output head for each evaluation, at most `max_evaluations` of them.
Memory: one block, one copy of the residual stream for each block, 512 MB for outputs of the dense model, and 512 MB for
blocks that stay in memory.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, NotRequired, TypedDict, cast

from pydantic import Field, NonNegativeFloat

from compressor.bounds import Count
from compressor.errors import Because, PassError, PreflightError, values_of
from compressor.lazy import torch
from compressor.methods.divergence import divergence_work
from compressor.methods.pruning.counted_work import kept_bytes, load_again
from compressor.methods.pruning.model_size import model_size
from compressor.methods.pruning.pruned_parameters import prune
from compressor.methods.pruning.pruned_shapes import pruned_redefinition
from compressor.methods.pruning.removal_trials import RANKED_SHARE, Losses, Remembered, RemovedUnits, Trials
from compressor.model.facts import PrunableModule, PruningDecision
from compressor.protocol import (
    DataSize,
    Decision,
    ModelFacts,
    PartView,
    PartWork,
    Redefinition,
    RewritePass,
    RunnableModel,
    State,
    Traits,
    Work,
)
from compressor.protocol.work import rewritten

KINDS = ("heads", "ffn")
SAMPLES_AT_ONCE = 4  # of a batch; the ranking uses whole batches
HOPELESS = 2.0  # times what the bound still allows: a candidate that adds more than this alone isn't measured again
MEASURED_SHARE = 0.25  # of the candidates, to predict the time: measurements of all samples for each that is ranked
RemovedKey = frozenset[tuple[str, int]]  # the same as RemovedUnits, as a key
Tier = Literal["blocks", "sub_blocks", "heads"]


@dataclass(frozen=True)
class Candidate:
    """What is removed together: heads or neurons of modules, for a whole sub-block all of them.

    block  the first block in which it lies
    """

    name: str
    block: int
    units: tuple[tuple[str, tuple[int, ...]], ...]


class Tried(TypedDict):
    """Candidates that were tried together: their losses, or what they add alone if that was too much to measure them.

    measured  see `Losses`; without it, all samples were measured
    """

    what: str
    removed: bool
    search: NotRequired[float]
    confirm: NotRequired[float]
    measured: NotRequired[float]
    adds: NotRequired[float]


class RemovalFigures(TypedDict):
    """Losses on both parts of the samples, and the number of measurements."""

    dense: list[float]
    after: list[float]
    evaluations: int


class RemovalDecision(PruningDecision):
    """log: what was tried, in order"""

    log: list[Tried]
    figures: RemovalFigures


class GreedyRemoval(RewritePass):
    """Remove blocks, sub-blocks and heads one after the other while the loss on calibration data allows it."""

    title: ClassVar[str] = "Removes blocks, sub-blocks and heads while the loss stays within a bound"
    paper: ClassVar[str] = "Nagarajan et al. 2022, arXiv 2010.03688"

    max_loss_increase: NonNegativeFloat = Field(
        0.01, description="How much all removals together may increase the dense model's mean loss, in nats."
    )
    loss: Literal["distill", "task"] = Field(
        "distill",
        description="distill: distance from the dense model's outputs. task: cross-entropy with the data's labels.",
    )
    tiers: tuple[Tier, ...] = Field(
        ("sub_blocks", "heads"), min_length=1, description="Kinds of parts that are tried, in this order."
    )
    order: Literal["loss", "last_first"] = Field(
        "loss",
        description="loss: try the part that adds the least loss first. last_first: the last block first, without "
        "ranking.",
    )
    target: float | None = Field(
        None, gt=0, le=0.9, description="Stop when this share of the blocks' parameters is removed."
    )
    max_evaluations: Count = Field(200, description="Largest number of losses that are measured.")
    confirm: float = Field(0.3, gt=0, lt=1, description="Share of the samples that is used only to confirm a removal.")
    retry: bool = Field(False, description="Try failed parts again at the end of their tier.")
    export: Literal["auto", "stock", "custom"] = Field(
        "auto",
        description="stock: remove only blocks without which the model's class can be made; needs tiers: [blocks]. "
        "custom: use a modeling file. auto: use one if needed.",
    )
    protect_layers: tuple[int, ...] = Field((), description="Numbers of blocks that stay whole. -1 is the last.")
    save_every: Count = Field(
        16, description="Evaluations between two saved states. A resumed run starts from the last one."
    )

    @property
    def traits(self) -> Traits:
        return Traits(reads="inputs")

    @property
    def unplanned(self) -> str:
        return "the run decides what is removed"

    @property
    def batch_samples(self) -> int | None:
        return SAMPLES_AT_ONCE

    def work(self, model: ModelFacts, data: DataSize, parts: Sequence[PartWork]) -> list[Work]:
        """Of the ranking, and of one measurement of all samples for each MEASURED_SHARE of a candidate. An evaluation
        runs half of the blocks, and loads what isn't kept.
        """
        found = [rewritten(part.values) for part in parts]
        whole, ranked = self._evaluations(model)
        search = RANKED_SHARE * (1 - self.confirm) * data.tokens
        batches = max(1, -(-data.samples // SAMPLES_AT_ONCE))
        share = max(search, data.tokens / batches)  # of the tokens, at least one batch
        measured = 1 + (whole - 1) * (MEASURED_SHARE if self.order == "loss" else 1)
        tokens = measured * data.tokens + ranked * share
        blocks, output_head = sum((block.run for block in parts[1:-1]), Work()), parts[-1]
        load = sum((block.load for block in parts[1:-1]), Work())
        found[0] += load + load_again(parts) * (0.5 * (measured + ranked)) + blocks * (data.tokens + 0.5 * tokens)
        found[0] += output_head.run * (data.tokens + tokens) + divergence_work(tokens, output_head.outputs)
        return found

    def memory(self, model: ModelFacts, data: DataSize, parts: Sequence[PartWork]) -> int:
        """As in `RewritePass`, and during the search the blocks and outputs that are kept."""
        return max(super().memory(model, data, parts), kept_bytes(data, parts))

    def _evaluations(self, model: ModelFacts) -> tuple[int, int]:
        """Largest numbers of losses that are measured: on all samples, and on those of the ranking."""
        prunables = model.prunable(KINDS)
        whole, ranked = 1, 0
        for tier in self.tiers:
            left = self.max_evaluations - whole - ranked
            candidates = len(self._candidates(tier, prunables))
            if self.order == "loss":
                ranked += (tried := min(candidates, left // 2))
                candidates = tried
            whole += min((2 if self.retry else 1) * candidates, self.max_evaluations - whole - ranked)
        return whole, ranked

    def choose(self, model: RunnableModel) -> RemovalDecision:
        """Search for the parts to remove. raises PassError for data that can't be used for the search"""
        prunables = model.facts.prunable(KINDS)
        size = model_size(model.facts, prunables, measure="parameters", of="blocks", tokens=1)
        trials = Trials.of(model, prunables, self.loss, self.confirm)
        remember = Remembered(model, self.save_every)

        def enough(removed: RemovedUnits) -> bool:
            left = {prunable.name: prunable.units - len(removed.get(prunable.name, ())) for prunable in prunables}
            return self.target is not None and size.of(left) <= (1 - self.target) * size.full

        def fits(removed: RemovedUnits) -> bool:
            return self._why_not_stock(model.facts, prunables, removed) is None

        def remembered(measure: Callable[[], torch.Tensor]) -> torch.Tensor:
            model.progress(f"evaluation {remember.count + 1}", remember.count / self.max_evaluations)
            return remember(measure)

        def rank(removed: RemovedUnits) -> Losses:
            return trials.means(remembered(lambda: trials.sums(removed, trials.ranking)))

        def measure(removed: RemovedUnits) -> Losses:
            return trials.least(remembered(lambda: trials.sums_within(removed, limit)))

        base = trials.means(remembered(lambda: trials.sums({}, range(model.batches))))
        if not math.isfinite(base.search + base.confirm):
            raise PassError(
                "the loss of the model is not a finite number",
                where="greedy_removal",
                hint="Check the outputs of the model on the calibration data.",
                data={"reason": "not-finite"},
            )
        # a ranking on all samples needs all their losses
        limit = base.raised(self.max_loss_increase if trials.is_sampled else math.inf)
        search = Search(self, base, measure, enough, prunables, rank if trials.is_sampled else None, fits)
        for tier in self.tiers:
            search.walk(self._candidates(tier, prunables))
        return {
            **_decision(prunables, search.removed),
            "log": search.log,
            "figures": {"dense": list(base[:2]), "after": list(search.now[:2]), "evaluations": remember.count},
        }

    def redefine(self, model: ModelFacts, decision: Decision | None) -> Redefinition:
        prunables = model.prunable(KINDS)
        self._protected(prunables)
        if self.export == "stock" and decision is None:
            self._check_stock(model, prunables)
        if decision is None:  # the run decides how much is removed, maybe nothing
            whole: PruningDecision = {"sites": {}, "hidden": None, "removed": []}
            return replace(pruned_redefinition(model, prunables, whole, self.export), decision=None)
        return pruned_redefinition(model, prunables, cast(RemovalDecision, decision), self.export)

    def rewrite(self, view: PartView, state: State) -> State:
        decision = cast(RemovalDecision, view.redefinition.decision)  # this pass always decides
        prune(view, view.facts.prunable(KINDS), decision)
        return state

    def _protected(self, prunables: Sequence[PrunableModule]) -> set[int]:
        """Numbers of protected blocks. raises PreflightError for one that doesn't exist"""
        count = 1 + max(prunable.block for prunable in prunables)
        if wrong := [block for block in self.protect_layers if not -count <= block < count]:
            raise PreflightError(
                f"block {wrong[0]} is protected, but the model has {count} blocks",
                where="greedy_removal.protect_layers",
                hint=f"Set protect_layers to numbers from {-count} to {count - 1}.",
                data={"block": wrong[0], "blocks": count},
            )
        return {block % count for block in self.protect_layers}

    def _check_stock(self, model: ModelFacts, prunables: Sequence[PrunableModule]) -> None:
        """raises PreflightError if nothing can be removed without a modeling file"""
        if other := [tier for tier in self.tiers if tier != "blocks"]:
            raise PreflightError(
                f"the tier {other[0]} makes blocks differ, which no config of a stock class describes",
                where="greedy_removal.tiers",
                hint="Set tiers: [blocks], or export: auto, which adds a modeling file.",
                data={"reason": "tier-not-stock", "tier": other[0]},
            )
        whys = (self._why_not_stock(model, prunables, found) for found in self._removed_alone(prunables))
        last: str | None = "none may be removed"
        for last in whys:
            if last is None:
                return
        raise PreflightError(
            f"no block of {model.architecture} can be removed without a modeling file: {last}",
            where="greedy_removal.export",
            hint="Set export: auto, which adds a modeling file, or leave greedy_removal out.",
            data={"reason": "no-stock-model", "model": model.architecture, "because": values_of(last)},
        )

    def _removed_alone(self, prunables: Sequence[PrunableModule]) -> Iterator[RemovedUnits]:
        for candidate in self._candidates("blocks", prunables):
            yield {name: set(units) for name, units in candidate.units}

    def _why_not_stock(
        self, model: ModelFacts, prunables: Sequence[PrunableModule], removed: RemovedUnits
    ) -> str | None:
        """Why the model's own class can't be made without these parts; None if it can, or need not be."""
        if self.export != "stock":
            return None
        try:
            pruned_redefinition(model, prunables, _decision(prunables, removed), self.export)
        except PreflightError as refusal:
            return Because(refusal.what, **refusal.data)
        return None

    def _candidates(self, tier: Tier, prunables: Sequence[PrunableModule]) -> list[Candidate]:
        """Candidates of a tier, in forward order."""
        protected = self._protected(prunables)
        open_prunables = [prunable for prunable in prunables if prunable.block not in protected]
        if tier == "heads":
            heads = [
                prunable for prunable in open_prunables if prunable.kind == "heads" and not prunable.layout.per_layer
            ]
            return [
                Candidate(f"{prunable.name} {unit}", prunable.block, ((prunable.name, (unit,)),))
                for prunable in heads
                for unit in range(prunable.units)
            ]
        whole = [prunable for prunable in open_prunables if prunable.layout.removal is not None]
        units = {prunable.name: (prunable.name, tuple(range(prunable.units))) for prunable in whole}
        if tier == "sub_blocks":
            return [Candidate(prunable.name, prunable.block, (units[prunable.name],)) for prunable in whole]
        found = []
        for block in dict.fromkeys(prunable.block for prunable in whole):
            inside = [prunable for prunable in prunables if prunable.block == block]
            if all(prunable.name in units for prunable in inside):
                found.append(Candidate(f"block {block}", block, tuple(units[prunable.name] for prunable in inside)))
        return found


def _decision(prunables: Sequence[PrunableModule], removed: RemovedUnits) -> PruningDecision:
    left = {s.name: [u for u in range(s.units) if u not in removed.get(s.name, ())] for s in prunables}
    return {
        "sites": {name: units for name, units in left.items() if units},
        "hidden": None,
        "removed": [name for name, units in left.items() if not units],
    }


def _without(removed: RemovedUnits, candidates: Sequence[Candidate]) -> RemovedUnits:
    found = {name: set(units) for name, units in removed.items()}
    for candidate in candidates:
        for name, units in candidate.units:
            found[name] = found.get(name, set()) | set(units)
    return found


def _frozen(removed: RemovedUnits) -> RemovedKey:
    return frozenset((name, unit) for name, units in removed.items() for unit in units)


@dataclass
class Search:
    """State of the search: what was removed, and how each candidate did.

    base      losses of the dense model
    measure   losses with these heads and neurons removed, which may be lower bounds if they exceed the bound
    enough    whether so much is removed that the search ends
    rank      losses on the samples of the ranking; None: those of `measure`
    fits      whether the model without these can be exported as the settings want it
    """

    settings: GreedyRemoval
    base: Losses
    measure: Callable[[RemovedUnits], Losses]
    enough: Callable[[RemovedUnits], bool]
    prunables: Sequence[PrunableModule]
    rank: Callable[[RemovedUnits], Losses] | None = None
    fits: Callable[[RemovedUnits], bool] = lambda removed: True
    removed: RemovedUnits = field(default_factory=dict)
    log: list[Tried] = field(default_factory=list)
    evaluations: int = 1

    def __post_init__(self) -> None:
        self.now = self.base
        self.limit = self.base.raised(self.settings.max_loss_increase)
        self._known: dict[RemovedKey, Losses] = {_frozen(self.removed): self.base}

    def walk(self, candidates: Sequence[Candidate]) -> None:
        """Run one tier: rank the candidates, and remove them in that order if the losses allow it."""
        adds: dict[str, float] = {}
        order = [candidate for candidate in reversed(candidates) if self._may_be_removed(candidate, self.removed)]
        if self.settings.order == "loss":
            order = order[: (self.settings.max_evaluations - self.evaluations) // 2]
            adds = self._ranking(order)
            order.sort(key=lambda candidate: adds[candidate.name])  # stable: of equal ones, the later block first
        failed = self._try(order, adds)
        if self.settings.retry:
            self._try(failed, {})

    def _ranking(self, candidates: Sequence[Candidate]) -> dict[str, float]:
        """What each candidate alone adds to the loss, on the samples of the ranking."""
        alone = {candidate.name: _without(self.removed, [candidate]) for candidate in candidates}
        if self.rank is None or not candidates:
            return {name: self._measured(removed).search - self.now.search for name, removed in alone.items()}
        self.evaluations += 1 + len(candidates)
        before = self.rank(self.removed).search
        return {name: self.rank(removed).search - before for name, removed in alone.items()}

    def _try(self, order: Sequence[Candidate], adds: dict[str, float]) -> list[Candidate]:
        """Remove candidates in this order as the losses allow it. Returns those that were measured and failed.

        adds  what each adds to the loss alone, if it is known
        """
        failed: list[Candidate] = []
        waiting, most = deque(order), len(order)
        suspects = 0  # of the next candidates, so many exceed the bound together
        while group := self._next(waiting, adds, max(1, suspects // 2) if suspects else most):
            removed = _without(self.removed, group)
            if _frozen(removed) not in self._known and self.evaluations >= self.settings.max_evaluations:
                break
            found = self._measured(removed)
            goes = found.is_within(self.limit)
            what = " + ".join(c.name for c in group)
            row: Tried = {"what": what, "search": found.search, "confirm": found.confirm, "removed": goes}
            if found.measured != 1:
                row["measured"] = found.measured
            self.log.append(row)
            if goes:
                self.removed, self.now = removed, found
                suspects = max(0, suspects - len(group))
                most *= 2
            elif len(group) == 1:
                failed += group
                suspects, most = 0, 1
            else:
                waiting.extendleft(reversed(group))
                suspects = len(group)
        return failed

    def _next(self, waiting: deque[Candidate], adds: dict[str, float], most: int) -> list[Candidate]:
        """Take the next candidates that are to be removed together: as many as the bound allows by what each adds
        alone, but at least one, and at most `most`. Without what they add, it is one.
        """
        group: list[Candidate] = []
        predicted = self.now.search
        while waiting and len(group) < most:
            candidate, removed = waiting[0], _without(self.removed, group)
            more = adds.get(candidate.name)
            if group and (more is None or predicted + more > self.limit.search):
                break
            if self.enough(removed) or not self._may_be_removed(candidate, removed):
                if group:
                    break  # it may go if the group may not
                waiting.popleft()
                continue
            waiting.popleft()
            if more is not None and more > HOPELESS * (self.limit.search - self.now.search):
                self.log.append({"what": candidate.name, "adds": more, "removed": False})
                continue
            predicted += more or 0.0
            group.append(candidate)
        return group

    def _measured(self, removed: RemovedUnits) -> Losses:
        """Losses without these, which are measured once."""
        if _frozen(removed) not in self._known:
            self.evaluations += 1
            self._known[_frozen(removed)] = self.measure(removed)
        return self._known[_frozen(removed)]

    def _may_be_removed(self, candidate: Candidate, removed: RemovedUnits) -> bool:
        """Whether it may be removed: part is left, no module is emptied head by head, its kind keeps a module, and what
        is left can be exported.
        """
        after, whole = _without(removed, [candidate]), {name for name, units in candidate.units if len(units) > 1}
        by_name = {prunable.name: prunable for prunable in self.prunables}
        if all(after[name] == removed.get(name, set()) for name, _ in candidate.units):
            return False
        for name, _ in candidate.units:
            is_removed = len(after[name]) == by_name[name].units
            if is_removed and name not in whole and by_name[name].units > 1:
                return False
            alike = [prunable for prunable in self.prunables if prunable.kind == by_name[name].kind]
            if is_removed and all(len(after.get(prunable.name, ())) == prunable.units for prunable in alike):
                return False
        return self.fits(after)
