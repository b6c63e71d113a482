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
   A candidate whose loss alone is above twice the bound on the samples of the ranking is not measured again.
4. With `retry`, candidates that failed are tried again at the end of their tier.

The loss is KL(dense || masked) for each prediction, or cross-entropy with the data's labels for each sample. So the
loss of the dense model is 0, or its cross-entropy. The parts are then removed by the same physical pruning as in
`vtrans`; the bias of a removed part stays. Selective hard attention, the other half of the paper, isn't offered.

Cost: one run from the candidate's block to the output head for each evaluation, at most `max_evaluations` of them.
Memory: one block, one copy of the residual stream for each block, and 512 MB for outputs of the dense model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Literal

from pydantic import Field, NonNegativeFloat

from compressor.bounds import Count
from compressor.errors import Because, PassError, PreflightError, values_of
from compressor.lazy import torch
from compressor.methods.divergence import divergence_work
from compressor.methods.pruning.masked_forward import (
    Dense,
    Draw,
    Loss,
    Places,
    Reader,
    distilled,
    labelled,
    losses,
    masked,
    predictions,
    reader_columns,
)
from compressor.methods.pruning.model_size import model_size
from compressor.methods.pruning.pruned_parameters import prune
from compressor.methods.pruning.pruned_shapes import pruned_redefinition
from compressor.model.facts import PrunableModule
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
RANKED_SHARE = 0.25  # of the search part's samples
HOPELESS = (
    2.0  # times the bound: a candidate that is worse than this on the samples of the ranking isn't measured again
)
KEPT_OUTPUT_BYTES = 1 << 29
Gone = dict[str, set[int]]  # name of a prunable module -> heads or neurons that are removed
Losses = tuple[float, float]  # on the search part, and on the confirming part
Tier = Literal["blocks", "sub_blocks", "heads"]


@dataclass(frozen=True)
class Candidate:
    """What is removed together: heads or neurons of modules, for a whole sub-block all of them.

    block  the first block in which it lies
    """

    name: str
    block: int
    units: tuple[tuple[str, tuple[int, ...]], ...]


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
    def decides(self) -> bool:
        return True

    @property
    def unplanned(self) -> str:
        return "the run decides what is removed"

    @property
    def batch_samples(self) -> int | None:
        return SAMPLES_AT_ONCE

    def work(self, model: ModelFacts, data: DataSize, parts: Sequence[PartWork]) -> list[Work]:
        """As if every candidate were measured again after the ranking. An evaluation runs half of the blocks."""
        found = [rewritten(part.values) for part in parts]
        whole, ranked = self._evaluations(model)
        search = RANKED_SHARE * (1 - self.confirm) * data.tokens
        batches = max(1, -(-data.samples // SAMPLES_AT_ONCE))
        share = max(search, data.tokens / batches)  # of the tokens, at least one batch
        tokens = whole * data.tokens + ranked * share
        blocks, head = sum((block.run for block in parts[1:-1]), Work()), parts[-1]
        load = sum((block.load for block in parts[1:-1]), Work())
        found[0] += load * (1 + 0.5 * (whole + ranked)) + blocks * (data.tokens + 0.5 * tokens)
        found[0] += head.run * (data.tokens + tokens) + divergence_work(tokens, head.outputs)
        return found

    def _evaluations(self, model: ModelFacts) -> tuple[int, int]:
        """Largest numbers of losses that are measured: on all samples, and on those of the ranking."""
        sites = model.prunable(KINDS)
        whole, ranked = 1, 0
        for tier in self.tiers:
            left = self.max_evaluations - whole - ranked
            candidates = len(self._candidates(tier, sites))
            if self.order == "loss":
                ranked += (tried := min(candidates, left // 2))
                candidates = tried
            whole += min((2 if self.retry else 1) * candidates, self.max_evaluations - whole - ranked)
        return whole, ranked

    def choose(self, model: RunnableModel) -> Decision:
        """Search for the parts to remove. raises PassError for data that can't be used for the search"""
        sites = model.facts.prunable(KINDS)
        size = model_size(model.facts, sites, measure="parameters", of="blocks", tokens=1)
        trial = Trial.of(model, sites, self.loss, self.confirm)
        remember = Remembered(model, self.save_every)

        def enough(gone: Gone) -> bool:
            left = {site.name: site.units - len(gone.get(site.name, ())) for site in sites}
            return self.target is not None and size.of(left) <= (1 - self.target) * size.full

        def fits(gone: Gone) -> bool:
            return self._why_not_stock(model.facts, sites, gone) is None

        def measure(gone: Gone, ranks: bool = False) -> Losses:
            model.progress(f"evaluation {remember.count + 1}", remember.count / self.max_evaluations)
            return remember(lambda: trial.losses(gone, ranks))

        base = measure({})
        rank = partial(measure, ranks=True) if trial.is_sampled else None
        search = Search(self, base, measure, enough, sites, rank, fits)
        for tier in self.tiers:
            search.walk(self._candidates(tier, sites))
        return {
            **_decision(sites, search.gone),
            "log": search.log,
            "figures": {"dense": list(base), "after": list(search.now), "evaluations": remember.count},
        }

    def redefine(self, model: ModelFacts, decision: Decision | None) -> Redefinition:
        sites = model.prunable(KINDS)
        self._protected(sites)
        if self.export == "stock" and decision is None:
            self._check_stock(model, sites)
        if decision is None:  # the run decides how much is removed, maybe nothing
            decision = {"sites": {}, "hidden": None, "removed": []}
            return replace(pruned_redefinition(model, sites, decision, self.export), decision=None)
        return replace(pruned_redefinition(model, sites, decision, self.export), decision=decision)

    def rewrite(self, view: PartView, state: State) -> State:
        assert view.redefinition.decision is not None  # this pass always decides
        prune(view, view.facts.prunable(KINDS), view.redefinition.decision)
        return state

    def _protected(self, sites: Sequence[PrunableModule]) -> set[int]:
        """Numbers of protected blocks. raises PreflightError for one that doesn't exist"""
        count = 1 + max(site.block for site in sites)
        if wrong := [block for block in self.protect_layers if not -count <= block < count]:
            raise PreflightError(
                f"block {wrong[0]} is protected, but the model has {count} blocks",
                where="greedy_removal.protect_layers",
                hint=f"Set protect_layers to numbers from {-count} to {count - 1}.",
                data={"block": wrong[0], "blocks": count},
            )
        return {block % count for block in self.protect_layers}

    def _check_stock(self, model: ModelFacts, sites: Sequence[PrunableModule]) -> None:
        """raises PreflightError if nothing can be removed without a modeling file"""
        if other := [tier for tier in self.tiers if tier != "blocks"]:
            raise PreflightError(
                f"the tier {other[0]} makes blocks differ, which no config of a stock class describes",
                where="greedy_removal.tiers",
                hint="Set tiers: [blocks], or export: auto, which adds a modeling file.",
                data={"reason": "tier-not-stock", "tier": other[0]},
            )
        whys = (self._why_not_stock(model, sites, found) for found in self._removed_alone(sites))
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

    def _removed_alone(self, sites: Sequence[PrunableModule]) -> Iterator[Gone]:
        for candidate in self._candidates("blocks", sites):
            yield {name: set(units) for name, units in candidate.units}

    def _why_not_stock(self, model: ModelFacts, sites: Sequence[PrunableModule], gone: Gone) -> str | None:
        """Why the model's own class can't be made without these parts; None if it can, or need not be."""
        if self.export != "stock":
            return None
        try:
            pruned_redefinition(model, sites, _decision(sites, gone), self.export)
        except PreflightError as refusal:
            return Because(refusal.what, **refusal.data)
        return None

    def _candidates(self, tier: Tier, sites: Sequence[PrunableModule]) -> list[Candidate]:
        """Candidates of a tier, in forward order."""
        protected = self._protected(sites)
        open_sites = [site for site in sites if site.block not in protected]
        if tier == "heads":
            heads = [site for site in open_sites if site.kind == "heads" and not site.layout.per_layer]
            return [
                Candidate(f"{site.name} {unit}", site.block, ((site.name, (unit,)),))
                for site in heads
                for unit in range(site.units)
            ]
        whole = [site for site in open_sites if site.layout.removal is not None]
        units = {site.name: (site.name, tuple(range(site.units))) for site in whole}
        if tier == "sub_blocks":
            return [Candidate(site.name, site.block, (units[site.name],)) for site in whole]
        found = []
        for block in dict.fromkeys(site.block for site in whole):
            inside = [site for site in sites if site.block == block]
            if all(site.name in units for site in inside):
                found.append(Candidate(f"block {block}", block, tuple(units[site.name] for site in inside)))
        return found


def _decision(sites: Sequence[PrunableModule], gone: Gone) -> Decision:
    left = {s.name: [u for u in range(s.units) if u not in gone.get(s.name, ())] for s in sites}
    return {
        "sites": {name: units for name, units in left.items() if units},
        "hidden": None,
        "removed": [name for name, units in left.items() if not units],
    }


@dataclass
class Search:
    """State of the search: what was removed, and how each candidate did.

    base      losses of the dense model
    measure   losses with these heads and neurons removed
    enough    whether so much is removed that the search ends
    rank      the same on the samples of the ranking; None: on all samples of the search part
    fits      whether the model without these can be exported as the settings want it
    """

    settings: GreedyRemoval
    base: Losses
    measure: Callable[[Gone], Losses]
    enough: Callable[[Gone], bool]
    sites: Sequence[PrunableModule]
    rank: Callable[[Gone], Losses] | None = None
    fits: Callable[[Gone], bool] = lambda gone: True
    gone: Gone = field(default_factory=dict)
    log: list[dict[str, Any]] = field(default_factory=list)
    evaluations: int = 1

    def __post_init__(self) -> None:
        self.now = self.base

    def walk(self, candidates: Sequence[Candidate]) -> None:
        """Run one tier: rank the candidates, and remove them in that order if the losses allow it."""
        alone: dict[str, Losses] = {}
        at_first = {name: set(units) for name, units in self.gone.items()}
        order = [candidate for candidate in reversed(candidates) if self._may_go(candidate)]
        if self.settings.order == "loss":
            alone = self._ranking(order[: (self.settings.max_evaluations - self.evaluations) // 2])
            order = [candidate for candidate in order if candidate.name in alone]
            order.sort(key=lambda candidate: alone[candidate.name][0])  # stable: of equal ones, the later block first
        failed = self._try(order, {} if self.rank else alone, at_first)
        if self.settings.retry:
            self._try(failed, {}, {})

    def _ranking(self, candidates: Sequence[Candidate]) -> dict[str, Losses]:
        """Losses with each candidate removed alone, without those that are hopeless."""
        if self.rank is None or not candidates:
            return {candidate.name: self._with(candidate) for candidate in candidates}
        self.evaluations += 1 + len(candidates)
        before = self.rank(self.gone)
        alone = {candidate.name: self.rank(self._without(candidate)) for candidate in candidates}
        worst = before[0] + HOPELESS * self.settings.max_loss_increase
        for candidate in candidates:
            if alone[candidate.name][0] > worst:
                self.log.append({"what": candidate.name, "ranked": alone.pop(candidate.name)[0], "removed": False})
        return alone

    def _try(self, order: Sequence[Candidate], alone: dict[str, Losses], at_first: Gone) -> list[Candidate]:
        failed = []
        for candidate in order:
            if self.enough(self.gone) or not self._may_go(candidate):
                continue
            known = alone.get(candidate.name) if self.gone == at_first else None
            if known is None and not self._is_allowed_one_more():
                break
            found = known or self._with(candidate)
            bound = self.settings.max_loss_increase
            goes = all(after <= before + bound for after, before in zip(found, self.base, strict=True))
            self.log.append({"what": candidate.name, "search": found[0], "confirm": found[1], "removed": goes})
            if goes:
                self.gone = self._without(candidate)
                self.now = found
            else:
                failed.append(candidate)
        return failed

    def _is_allowed_one_more(self) -> bool:
        return self.evaluations < self.settings.max_evaluations

    def _with(self, candidate: Candidate) -> Losses:
        self.evaluations += 1
        return self.measure(self._without(candidate))

    def _without(self, candidate: Candidate) -> Gone:
        gone = {name: set(units) for name, units in self.gone.items()}
        for name, units in candidate.units:
            gone[name] = gone.get(name, set()) | set(units)
        return gone

    def _may_go(self, candidate: Candidate) -> bool:
        """Whether it may be removed: part is left, no module is emptied head by head, its kind keeps a module, and what
        is left can be exported.
        """
        after, whole = self._without(candidate), {name for name, units in candidate.units if len(units) > 1}
        by_name = {site.name: site for site in self.sites}
        if all(after[name] == self.gone.get(name, set()) for name, _ in candidate.units):
            return False
        for name, _ in candidate.units:
            is_gone = len(after[name]) == by_name[name].units
            if is_gone and name not in whole and by_name[name].units > 1:
                return False
            alike = [site for site in self.sites if site.kind == by_name[name].kind]
            if is_gone and all(len(after.get(site.name, ())) == site.units for site in alike):
                return False
        return self.fits(after)


@dataclass
class Trial:
    """Measures the model with parts removed. Streams of the last trial are reused up to the first changed block."""

    model: RunnableModel
    dense: Dense
    sites: Sequence[PrunableModule]
    places: Places
    each: list[int]  # predictions of one sample, by batch
    confirms: list[torch.Tensor]  # (samples,) bool of each batch
    ranking: list[int]  # batches of the ranking
    objective: Loss
    streams: list[list[torch.Tensor]] = field(default_factory=list)  # of each batch: before each block and after all
    gone: dict[int, Gone] = field(default_factory=dict)  # batch -> what its streams are without

    @classmethod
    def of(cls, model: RunnableModel, sites: Sequence[PrunableModule], loss: str, share: float) -> Trial:
        """Prepare trials on both parts of the samples. raises PassError if a part would be empty"""
        dense = Dense.of(model)
        rows = [len(stream) for stream in dense.before]
        total = sum(rows)
        confirming = round(total * share)
        if not 0 < confirming < total:
            raise PassError(
                f"{total} calibration samples can't be split into {1 - share:g} and {share:g}",
                where="greedy_removal.confirm",
                hint="Set a larger data.samples, or set confirm nearer to 0.5.",
            )
        drawn = torch.randperm(total, generator=model.generator)
        is_confirming = torch.zeros(total, dtype=torch.bool)
        is_confirming[drawn[:confirming]] = True
        confirms = list(is_confirming.split(rows))
        each = [
            predictions(model, dense, batch) // rows[batch] if loss == "distill" else 1 for batch in range(len(rows))
        ]
        ranking, ranked = [], 0
        for batch, chosen in enumerate(confirms):
            if ranked < RANKED_SHARE * (total - confirming):
                ranking.append(batch)
                ranked += int((~chosen).sum())
        readers = tuple(Reader(s.name, s.block + 1, s.output_projection, reader_columns(s.columns)) for s in sites)
        streams = [[stream] for stream in dense.before]
        objective = distilled(model, dense, keep_bytes=KEPT_OUTPUT_BYTES) if loss == "distill" else labelled(model)
        return cls(model, dense, sites, Places(readers), each, confirms, ranking, objective, streams)

    @property
    def is_sampled(self) -> bool:
        """Whether the ranking leaves out batches."""
        return len(self.ranking) < len(self.confirms)

    def losses(self, gone: Gone, ranks: bool = False) -> Losses:
        """Mean losses on both parts of the samples; 0 for a part without samples.

        ranks  measure on the samples of the ranking only
        """
        masks = {}
        for site in self.sites:
            if gone.get(site.name):
                masks[site.name] = torch.ones(1, site.units, device=self.model.device)
                masks[site.name][0, sorted(gone[site.name])] = 0
        draws = [Draw(batch, masks) for batch in (self.ranking if ranks else range(self.model.batches))]
        self._advance(draws, gone)
        sums, counts = [0.0, 0.0], [0, 0]
        with self.model.loaded(self.model.parts - 1):
            for draw in draws:
                last, confirms = self.streams[draw.batch][-1], self.confirms[draw.batch]
                found = losses(self.model, draw, self.places, last, self.objective).double().cpu()
                for part in (0, 1):
                    sums[part] += float(found[confirms == bool(part)].sum())
                    counts[part] += self.each[draw.batch] * int((confirms == bool(part)).sum())
        return sums[0] / max(1, counts[0]), sums[1] / max(1, counts[1])

    def _advance(self, draws: Sequence[Draw], gone: Gone) -> None:
        """Run the blocks of each batch from the first one that differs from the batch's last trial."""
        for draw in draws:
            streams, before = self.streams[draw.batch], self.gone.get(draw.batch, {})
            differs = [s.block for s in self.sites if gone.get(s.name, set()) != before.get(s.name, set())]
            del streams[min([*differs, len(streams) - 1]) + 1 :]
            self.gone[draw.batch] = gone
        for unit in range(min(len(self.streams[draw.batch]) for draw in draws), self.model.parts - 1):
            with self.model.loaded(unit), torch.no_grad():
                for draw in draws:
                    streams = self.streams[draw.batch]
                    if len(streams) == unit:
                        with masked(self.model, unit, draw.masks, self.places):
                            streams.append(self.model.run(unit, draw.batch, streams[-1]))


class Remembered:
    """Evaluations in order. Those of an interrupted run are read back."""

    def __init__(self, model: RunnableModel, save_every: int) -> None:
        self._model, self._save_every = model, save_every
        saved = model.saved()
        self._known: list[Losses] = []
        if saved is not None:
            self._known = [(float(a), float(b)) for a, b in saved[1]["losses"].tolist()]
        self.count = 0

    def __call__(self, measure: Callable[[], Losses]) -> Losses:
        if self.count == len(self._known):
            self._known.append(measure())
            if len(self._known) % self._save_every == 0:
                self._model.save(len(self._known), {"losses": torch.tensor(self._known, dtype=torch.float64)})
        self.count += 1
        return self._known[self.count - 1]
