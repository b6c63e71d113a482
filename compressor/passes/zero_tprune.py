"""Zero-TPrune: drops tokens between attention and MLP, by the attention of the trained model itself.

Paper: Wang, Dedhia, Jha 2023/24, "Zero-TPrune: Zero-Shot Token Pruning through Leveraging of the Attention Graph in
Pre-Trained Transformers", arXiv 2305.17328. In a few blocks, a gate follows the residual addition after the attention.
It reads each head's attention A as a graph in which token i votes for token j with A_ij, and drops
- unimportant tokens: s <- A^T s from uniform (weighted PageRank); heads are combined by the root mean square over those
  whose s varies within bounds;
- tokens that are similar to another token: the less important half is compared with the other half by the cosine of
  head-averaged keys, and the closest are dropped. They are not merged.
The order is I'-S-I. One vote is used only to make the halves, so that many similar tokens don't outvote the others.
Then similar tokens are dropped, then unimportant ones by PageRank on the tokens that are left. The class token (of a
text the first and the last token) is never dropped.

MACs of a block of width d, MLP r times as wide, n tokens in and m left:  4 n d^2 + 2 n^2 d + 2 r m d^2.
Numbers of tokens depend only on n: m = ceil(keep * candidates) + protected; s_share of the dropped ones are dropped
by similarity.

No weight changes and no file gets smaller: only computation is saved. `keep` sets the rates. `target_macs` searches for
them on calibration data. It starts from all tokens, and lowers the rate of one gate by 0.05 until the target is
reached: always the gate that adds the least divergence from the unpruned model's output for the MACs that it saves (the
paper searches by Monte Carlo).

Where we differ from the paper: A^T s has no factor 1/N, so that s stays a distribution. The variance of a head is that
of n s, so it doesn't depend on n, and there are no bounds by default, since none helped (docs/passes/zero_tprune.md).
All candidates are compared in one matmul. Voting ends early by a tolerance.

Text: the number of tokens that are kept depends on the length of each sample; a batch is padded to its longest sample,
and masks are adjusted.
Cost: `keep` reads no data. `target_macs` costs a run of the model for each step of each gate.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Annotated, ClassVar, Literal, TypedDict, cast

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from compressor.bounds import MOST, Count
from compressor.errors import PassError, PreflightError
from compressor.layers.structural.token_counts import block_macs, gate_macs, kept_tokens, split_removed
from compressor.lazy import torch
from compressor.methods.divergence import kl_divergence
from compressor.model.class_changes import ClassChanges, changed_modules
from compressor.model.facts import BlockTokenAccount, GateParams, GateSettings, TokenAccount
from compressor.protocol import (
    DataSize,
    Decision,
    Fact,
    ModelFacts,
    PartWork,
    Redefinition,
    RunnableModel,
    TokenFacts,
    TokenPass,
    Traits,
    Work,
)

FEWEST = 4  # least number of tokens that a gate may leave
NOMINAL_TOKENS = 64  # of a text whose length isn't known
REACH = "Set more or earlier `blocks`, a smaller min_tokens, or a larger target_macs."
STEP = 0.05  # step of a keep rate in the search
POLISHING = 8  # largest number of rounds after the target is reached
PLACES = (1, 2, 3)  # quarters of the depth; earlier blocks can't tell yet which tokens matter

Rate = Annotated[float, Field(gt=0, le=1)]


class GateFigure(TypedDict):
    """A step of the search. macs: as a share of those of the dense model"""

    keep: dict[str, float]
    divergence: float
    macs: float


class GateDecision(TypedDict):
    """keep: the rate of each block with a gate, by its number"""

    keep: dict[str, float]
    figures: list[GateFigure]
    notes: list[str]


class ZeroTPrune(TokenPass):
    """Drop unimportant and redundant tokens in a few blocks, without training."""

    title: ClassVar[str] = "Drops tokens by the attention graph, which saves computation (Zero-TPrune)"
    paper: ClassVar[str] = "Wang et al. 2023/24, arXiv 2305.17328"

    keep: Rate | dict[int, Rate] | None = Field(
        None,
        description="Share of the tokens that each gate keeps, or a share for each block ({3: 0.9, 6: 0.8}). null: "
        "0.8.",
    )
    blocks: tuple[int, ...] | None = Field(
        None,
        description="Numbers of the blocks with a gate, from 0. null: those after a quarter, half and three quarters "
        "of the depth, and with target_macs any block from a quarter on.",
    )
    target_macs: float | None = Field(
        None, gt=0, lt=1, description="Share of the model's multiply-accumulates that is left. `keep` is searched for."
    )
    s_share: float = Field(
        0.3,
        ge=0,
        le=1,
        description="Share of the dropped tokens that are dropped because they are similar to another token.",
    )
    partition: Literal["sequential", "alternate", "random"] = Field(
        "sequential",
        description="How tokens are divided into those that may be dropped as similar and those they are compared "
        "with.",
    )
    order: Literal["ISI", "IS", "SI"] = Field(
        "ISI",
        description="Order of importance (I) and similarity (S). ISI: as in the paper, I'-S-I. IS: importance first. "
        "SI: similarity first, not guided by importance.",
    )
    iterations: tuple[Count, Count, Count] = Field(
        (30, 5, 1),
        description="Largest number of votes in the first quarter of the blocks, in the middle and in the last "
        "quarter.",
    )
    tolerance: float = Field(
        1e-3, ge=0, description="Stop voting when the importance changes by no more than this (L1 norm; it sums to 1)."
    )
    head_filter: tuple[float, float] | None = Field(
        None,
        description="Ignore heads whose variance of importance (times the number of tokens) is outside these two "
        "bounds. null: use all heads.",
    )
    head_aggregation: Literal["rms", "mean"] = Field("rms", description="How the importance of the heads is combined.")
    min_tokens: int = Field(
        8, ge=FEWEST, le=MOST, description="Smallest number of tokens of a sample that a gate keeps."
    )
    seed: int = Field(0, description="Seed of partition: random.")

    @model_validator(mode="after")
    def _one_way_to_say_where(self) -> ZeroTPrune:
        if isinstance(self.keep, dict):
            if self.blocks is not None:
                raise PydanticCustomError(
                    "keep-and-blocks", "keep and `blocks` both name blocks; give only one of them"
                )
            if not self.keep:
                raise PydanticCustomError("keep-without-blocks", "keep names no block")
        if self.keep is not None and self.target_macs is not None:
            raise PydanticCustomError(
                "keep-and-target", "target_macs searches for the rates that `keep` sets; give only one of them"
            )
        if self.blocks is not None and (not self.blocks or len(set(self.blocks)) < len(self.blocks)):
            raise PydanticCustomError("blocks-each-once", "blocks must name at least one block, and each only once")
        if self.head_filter is not None and not self.head_filter[0] < self.head_filter[1]:
            raise PydanticCustomError("head-filter-order", "the first bound of head_filter must be the smaller one")
        return self

    @property
    def traits(self) -> Traits:
        return Traits(
            reads="inputs" if self.target_macs is not None else "weights",
            breaks=frozenset({Fact.CONSTANT_TOKEN_COUNT}),
        )

    @property
    def decides(self) -> bool:
        return self.target_macs is not None

    @property
    def unplanned(self) -> str:
        return ""  # no size depends on the choice

    @property
    def sizes_are(self) -> Literal["exact", "upper bounds", "lower bounds"]:
        return "exact"

    def work(self, model: ModelFacts, data: DataSize, parts: Sequence[PartWork]) -> Work:
        """Of the search, as if all gates got the same rate in the end: each step of a gate tries a step of every gate.
        A trial runs the model from the changed gate on, half of the blocks with gates on average.
        """
        if self.target_macs is None:
            return Work()
        facts = model.tokens()
        rates = self._alike(facts, len(facts.blocks))
        steps = sum(round((1 - rate) / STEP) for rate in rates.values())
        trials = (steps + POLISHING) * (len(rates) + 1)
        behind = parts[1 + min(rates) : -1]
        found = sum((part.load + part.run * data.tokens for part in parts), Work())
        trial = sum((part.load + part.run * data.tokens for part in behind), Work()) * 0.5
        return found + (trial + parts[-1].run * data.samples) * trials

    def redefine(self, model: ModelFacts, decision: Decision | None) -> Redefinition:
        """The config with token gates. raises PreflightError for a block that is missing, is wrapped already or would
        leave too few tokens, and for a target that can't be reached
        """
        facts = model.tokens()
        modules = changed_modules(model.config)
        depth = len(facts.blocks)
        found = None if decision is None else cast(GateDecision, decision)
        rates = self._rates(depth) if found is None else {int(b): k for b, k in found["keep"].items()}
        if decision is None and self.target_macs is not None:
            rates = self._alike(facts, depth)
            self._check_target(facts, tuple(rates))
        elif decision is None:
            self._check(facts, rates)
        for block, gate in self.gates(facts, rates).items():
            path = f"{model.blocks}.{block}"
            if path in modules:
                raise PreflightError(
                    f"block {block} is a {modules[path]['form']} already, but a gate needs an unchanged block",
                    where="zero_tprune",
                    hint="Start from the checkpoint without this change, or name other `blocks`.",
                    data={"reason": "already-replaced", "block": block, "form": modules[path]["form"]},
                )
            modules[path] = {"form": "token_gate", "spec": gate, "shape": []}
        tokens = self.account(facts, rates, facts.tokens or NOMINAL_TOKENS)
        saved = 100 * (1 - tokens["macs_after"] / tokens["macs_before"])
        of = "" if facts.tokens else f" for a text of {NOMINAL_TOKENS} tokens"
        notes = [f"{saved:.2f} % fewer multiply-accumulates{of}, including those of the gates; weights stay unchanged"]
        if found is not None:
            notes += found["notes"]
        return Redefinition(
            ClassChanges(compressed_modules=modules),
            widths=(facts.width, facts.width),
            notes=tuple(notes),
            decision=decision,
            tokens=tokens,
        )

    def gates(self, facts: TokenFacts, rates: Mapping[int, float]) -> dict[int, GateParams]:
        """Settings of the `token_gate` of each block, from the first block that drops tokens."""
        before: list[float] = []
        found = {}
        for block in range(min(rates), len(facts.blocks)):
            keep = rates.get(block, 1.0)
            settings: GateSettings = {
                "keep": keep,
                "similar": self.s_share,
                "partition": self.partition,
                "order": self.order,
                "iterations": self._votes(block, len(facts.blocks)),
                "tolerance": self.tolerance,
                "filter": None if self.head_filter is None else list(self.head_filter),
                "heads": self.head_aggregation,
                "seed": self.seed,
                "minimum": self.min_tokens,
            }
            found[block] = facts.gate(block, before, settings)
            if keep < 1:
                before = [*before, keep]
        return found

    def account(self, facts: TokenFacts, rates: Mapping[int, float], tokens: int) -> TokenAccount:
        """Tokens and multiply-accumulates for one sample with this number of tokens."""
        rows: list[BlockTokenAccount] = []
        now, protected = tokens, sum(facts.protect)
        for number, block in enumerate(facts.blocks):
            keep = rates.get(number, 1.0)
            left = kept_tokens(now, keep, protected, self.min_tokens)
            similar, _ = split_removed(now - protected, now - left, self.s_share)
            votes = self._votes(number, len(facts.blocks))
            own = gate_macs(now, block.heads, block.width // block.heads, votes, similar, now - left, self.order)
            rows.append(
                {
                    "block": number,
                    "keep": keep,
                    "tokens": now,
                    "left": left,
                    "similar": similar,
                    "macs_before": block_macs(tokens, tokens, block.before, block.behind, block.width),
                    "macs_after": block_macs(now, left, block.before, block.behind, block.width),
                    "macs_of_gate": own,
                }
            )
            now = left
        gates = sum(row["macs_of_gate"] for row in rows)
        return {
            "tokens": tokens,
            "macs_before": sum(row["macs_before"] for row in rows) + facts.outside,
            "macs_after": sum(row["macs_after"] for row in rows) + facts.outside + gates,
            "macs_of_gates": gates,
            "outside": facts.outside,
            "patches": None if facts.patches is None else list(facts.patches),
            "blocks": rows,
        }

    def choose(self, model: RunnableModel) -> GateDecision:
        assert self.target_macs is not None
        facts = model.facts.tokens()
        rates = dict.fromkeys(self._places(len(facts.blocks)), 1.0)
        search = _Search(model, facts, self, rates)
        dense = search.macs(rates)
        now, divergence = dense, 0.0
        figures: list[GateFigure] = []
        while now > self.target_macs * dense:
            found = []
            for block in rates:
                lowered = self._lower(search, rates, block, now)
                if lowered is not None:
                    found.append((search.divergence(lowered, block), block, lowered))
            if not found:
                raise PassError(
                    f"{100 * now / dense:.1f} % of the multiply-accumulates is the least that gates in blocks "
                    f"{', '.join(map(str, rates))} can reach, {100 * self.target_macs:g} % was asked for",
                    where="zero_tprune.target_macs",
                    hint=REACH,
                    data={"blocks": list(rates), "least": now / dense, "target": self.target_macs},
                )
            _, block, rates = min(((d - divergence) / (now - search.macs(r)), b, r) for d, b, r in found)
            divergence = search.divergence(rates, block, settle=True)
            now = search.macs(rates)
            figures.append(
                {"keep": {str(b): r for b, r in rates.items()}, "divergence": divergence, "macs": now / dense}
            )
        rates, divergence = self._polish(search, rates, divergence, self.target_macs * dense)
        now, rates = search.macs(rates), self._without_clamps(facts, rates)
        message = ", ".join(f"{b}: {r:g}" for b, r in rates.items())
        note = (
            f"keep rates found: {message}; {search.measure} {divergence:.4g} on {search.samples} calibration samples, "
            f"{100 * now / dense:.2f} % of the multiply-accumulates"
        )
        return {"keep": {str(b): r for b, r in rates.items()}, "figures": figures, "notes": [note]}

    def _polish(
        self, search: _Search, rates: dict[int, float], divergence: float, goal: float
    ) -> tuple[dict[int, float], float]:
        """Raise rates with the rest of the budget, or shift it between gates, while this brings the outputs closer.

        A greedy step may save more than is needed, and the search never takes a step back.
        """
        for _ in range(POLISHING):
            tries = []
            for block, rate in rates.items():
                raised = {**rates, block: min(1.0, round(rate + STEP, 2))}
                if rate == 1:
                    continue
                tries.append(raised)
                lowered = (self._lower(search, raised, other, search.macs(raised)) for other in rates if other != block)
                tries += [found for found in lowered if found is not None]
            found = []
            for one in tries:
                if search.macs(one) <= goal:
                    first = min(block for block in rates if one[block] != rates[block])
                    found.append((search.divergence(one, first), first, one))
            best = min(found, key=lambda item: item[0], default=None)
            if best is None or best[0] >= divergence:
                break
            divergence, first, rates = best
            search.divergence(rates, first, settle=True)
        return rates, divergence

    def _without_clamps(self, facts: TokenFacts, rates: Mapping[int, float]) -> dict[int, float]:
        """Rates that already include the effect of min_tokens, if all samples have one length."""
        found = dict(rates)
        if facts.tokens is not None:
            now, protected = facts.tokens, sum(facts.protect)
            for block, rate in sorted(rates.items()):
                left = kept_tokens(now, rate, protected, self.min_tokens)
                if left != kept_tokens(now, rate, protected, 0):
                    found[block] = math.floor(10000 * (left - protected) / (now - protected)) / 10000
                now = left
        return found

    def _lower(self, search: _Search, rates: Mapping[int, float], block: int, now: int) -> dict[int, float] | None:
        """The rates with that of one block lowered by as many steps as save anything; None if there is none."""
        rate = rates[block]
        while (rate := round(rate - STEP, 2)) > 0:
            lowered = {**rates, block: rate}
            if search.macs(lowered) < now:  # min_tokens makes sure that enough tokens are left
                return lowered
        return None

    def _places(self, depth: int) -> tuple[int, ...]:
        """The blocks that get a gate. raises PreflightError for one that doesn't exist"""
        if isinstance(self.keep, dict):
            asked, where = tuple(sorted(self.keep)), "zero_tprune.keep"
        elif self.blocks is not None:
            asked, where = tuple(sorted(self.blocks)), "zero_tprune.blocks"
        elif self.target_macs is not None:
            return tuple(range(min(max(1, depth // 4), depth - 1), depth))
        else:
            return tuple(sorted({depth * quarter // 4 for quarter in PLACES}))
        if unknown := [block for block in asked if not 0 <= block < depth]:
            raise PreflightError(
                f"there is no block {unknown[0]}; the model has {depth} blocks",
                where=where,
                hint=f"Set block numbers from 0 to {depth - 1}.",
                data={"reason": "no-block", "block": unknown[0], "blocks": depth},
            )
        return asked

    def _rates(self, depth: int) -> dict[int, float]:
        places = self._places(depth)
        if isinstance(self.keep, dict):
            return {block: self.keep[block] for block in places}
        return dict.fromkeys(places, 0.8 if self.keep is None else self.keep)

    def _alike(self, facts: TokenFacts, depth: int) -> dict[int, float]:
        """For the plan: one rate for all gates that would reach the target."""
        assert self.target_macs is not None
        tokens, places = facts.tokens or NOMINAL_TOKENS, self._places(depth)
        rate = 1.0
        while rate > STEP:
            rate = round(rate - STEP, 2)
            found = self.account(facts, dict.fromkeys(places, rate), tokens)
            if found["macs_after"] <= self.target_macs * found["macs_before"]:
                break
        return dict.fromkeys(places, rate)

    def _check_target(self, facts: TokenFacts, places: tuple[int, ...]) -> None:
        """raises PreflightError for a target that even gates without cost can't reach, for samples of a known length"""
        assert self.target_macs is not None
        if facts.tokens is None:
            return
        least = self.account(facts, dict.fromkeys(places, STEP), facts.tokens)
        share = (least["macs_after"] - least["macs_of_gates"]) / least["macs_before"]
        if share > self.target_macs:
            raise PreflightError(
                f"gates in blocks {', '.join(map(str, places))} leave {100 * share:.1f} % of the multiply-accumulates "
                f"or more, {100 * self.target_macs:g} % was asked for",
                where="zero_tprune.target_macs",
                hint=REACH,
                data={"blocks": list(places), "least": share, "target": self.target_macs},
            )

    def _votes(self, block: int, depth: int) -> int:
        first, middle, last = self.iterations
        return first if 4 * block < depth else middle if 4 * block < 3 * depth else last

    def _too_few(self, facts: TokenFacts, rates: Mapping[int, float]) -> tuple[int, int] | None:
        """(block, tokens) if the rates alone would leave fewer than `FEWEST` tokens, for samples of a known length."""
        if facts.tokens is None:
            return None
        left = facts.tokens
        for block, rate in sorted(rates.items()):
            left = kept_tokens(left, rate, sum(facts.protect), 0)
            if left < FEWEST:
                return block, left
        return None

    def _check(self, facts: TokenFacts, rates: Mapping[int, float]) -> None:
        found = self._too_few(facts, rates)
        if found is not None:
            raise PreflightError(
                f"{found[1]} of {facts.tokens} tokens would be left after block {found[0]}; {FEWEST} is the least",
                where="zero_tprune.keep",
                hint=f"Set a larger keep for block {found[0]}, or for the blocks before it.",
                data={
                    "reason": "too-few",
                    "block": found[0],
                    "left": found[1],
                    "tokens": facts.tokens,
                    "least": FEWEST,
                },
            )


class _Search:
    """Measures the divergence from the unpruned model on calibration data. It keeps the states before a changed gate.

    samples  number of samples
    measure  name of the divergence: of the output distributions, or of pooled embeddings if the model has no head
    """

    def __init__(
        self, model: RunnableModel, facts: TokenFacts, settings: ZeroTPrune, rates: Mapping[int, float]
    ) -> None:
        self.model, self.facts, self.settings = model, facts, settings
        streams = [model.embeddings(batch) for batch in range(model.batches)]
        self.lengths = [(x.shape[0], x.shape[1]) for x in streams]
        self.samples = sum(count for count, _ in self.lengths)
        self.expected: list[torch.Tensor] = []
        self.states: dict[int, list[torch.Tensor]] = {min(rates): []}
        for batch, hidden in enumerate(streams):
            for block in range(min(rates)):
                with model.loaded(block + 1):
                    hidden = model.run(block + 1, batch, hidden)
            self.states[min(rates)].append(hidden)
        for output in self._outputs(min(rates), rates):
            self.expected.append(output)
        self.measure = "divergence" if self.expected[0].dim() == 2 else "1 - cosine of mean-pooled embeddings"

    def macs(self, rates: Mapping[int, float]) -> int:
        """Of all calibration samples."""
        found = {n: self.settings.account(self.facts, rates, n)["macs_after"] for _, n in self.lengths}
        return sum(count * found[n] for count, n in self.lengths)

    def divergence(self, rates: Mapping[int, float], block: int, settle: bool = False) -> float:
        """Mean over samples, with these rates. Before `block` they must be those of the last settling.

        settle  the next measurements start from these rates
        """
        if settle:
            self.states = {at: held for at, held in self.states.items() if at <= block}
        total = 0.0
        for batch, output in enumerate(self._outputs(block, rates, settle)):
            total += float(_divergence(self.expected[batch], output).sum())
        return total / self.samples

    def _outputs(self, block: int, rates: Mapping[int, float], settle: bool = True) -> Iterator[torch.Tensor]:
        """The model's output for each batch, from the last kept states before `block`. Settling keeps more states."""
        start = max(at for at in self.states if at <= block)
        hidden = list(self.states[start])
        depth = len(self.facts.blocks)
        gates = self.settings.gates(self.facts, rates)
        for at in range(start, depth):
            if settle and at in rates and at not in self.states:
                self.states[at] = list(hidden)
            with self.model.loaded(at + 1), self._gated(at, gates.get(at)):
                hidden = [self.model.run(at + 1, batch, x) for batch, x in enumerate(hidden)]
        for batch, x in enumerate(hidden):
            output = self.model.output_head(batch, x)
            yield (output if output.dim() == 2 else output.mean(1, keepdim=True)).double()

    @contextmanager
    def _gated(self, block: int, gate: GateParams | None) -> Iterator[None]:
        from compressor.layers.structural.token_gate import TokenGate

        with ExitStack() as stack:
            if gate is not None and gate["keep"] < 1:
                module = self.model.module(f"{self.model.facts.blocks}.{block}")
                stack.enter_context(TokenGate.wrapped(module, dict(gate)))
            yield


def _divergence(expected: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """(samples,): KL of two output distributions, or distance of pooled embeddings (samples, 1, d)."""
    if expected.dim() == 3:
        return 1 - torch.nn.functional.cosine_similarity(expected, found, dim=-1).flatten()
    return kl_divergence(expected.log_softmax(-1), found.log_softmax(-1))
