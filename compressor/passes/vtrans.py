"""VTrans: removes heads, neurons and channels by masks with noise, under a variational information bottleneck.

Paper: Dutta, Gupta, Agarwal 2024, "VTrans: Accelerating Transformer Compression with Variational Information Bottleneck
based Pruning", arXiv 2406.05276. Only its abstract was read: masks on embeddings, heads and layers, up to 70 % more
compression than earlier methods, and a variant "Faster-VTrans" that trains masks alone. Formulas and constants marked
[code] are those of the public code of the same authors' variant for large models (TVA-Prune); [ours] is our choice.

Every head, neuron or channel u gets z = mu + sigma eps, eps ~ N(0, 1) drawn for each sample [code], which is multiplied
with its output. Weights stay unchanged. The masks minimize

    loss + kl_factor * sum over masks of charge * KL + l1 (s - s*) + l2 (s - s*)²

loss     KL(dense || masked) of the logits at temperature 1 [ours], or cross-entropy with labels
KL       1/2 log(1 + mu²/sigma²): noise hides the output of a unit that the loss doesn't need [code]
s        share of the size that is removed, with sigmoid(-10 log alpha) for each u, log alpha = log sigma²/mu² [code]
s*       the target, which rises during a warm-up; l1 and l2 maximize what everything else minimizes [code]

start: balanced [ours] sets mu = 1 and sigma² = kl_factor charge / c, where c is the curvature of the loss along the
mask (`compressor.methods.pruning.curvature`). While the noise is small, this is the minimum of loss and bottleneck, to
which training from nearly no noise (start: equal [code]) moves. It costs one pass over the calibration data. No step
of training follows by default [ours], because none made the choice better (docs/passes/vtrans.md); without steps the
target and the multipliers act only in the selection below.

Then heads, neurons and channels are removed in the order of log alpha until the target is reached; with a threshold of
0 [code] the target would be missed. mu is multiplied into the output projection [code], or replaced by a least-squares
repair of that matrix on the dense model's inputs [ours; TVA-Prune has its own repair]. The means of channels of the
residual stream are not multiplied in, since norms come after them.

What has a mask: a key-value head with its query heads; a column of the matrix after an MLP's activation; with `hidden`,
a channel of the residual stream, if only norms read the stream; with `layers`, a whole attention or MLP, whose bias
stays. They are found by running the model (`compressor.analysis.prunable_units`).

Cost: three runs of the model on the calibration data (forward, then forward and backward block by block), three for
each training step, one for the repair, and one Gram matrix of an output projection's inputs. Memory: one block, its
activations, one copy of the residual stream for each block, and 512 MB for blocks that stay in memory; with training
steps 512 MB for outputs of the dense model too. The masks are only a few numbers for each head or neuron.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, cast

from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator
from pydantic_core import PydanticCustomError

from compressor.bounds import MOST, Count
from compressor.errors import PreflightError
from compressor.methods.divergence import divergence_work
from compressor.methods.pruning.counted_work import kept_bytes, likelihood_work, load_again, repair_work
from compressor.methods.pruning.mask_training import Course, train_masks
from compressor.methods.pruning.masked_forward import MaskedProjection, Places, StreamNorm, projection_columns
from compressor.methods.pruning.model_size import model_size
from compressor.methods.pruning.pruned_parameters import prune
from compressor.methods.pruning.pruned_shapes import pruned_redefinition, width_key
from compressor.methods.pruning.reconstruction import HELD_OUT, HELD_OUT_TOKENS, RIDGE
from compressor.methods.pruning.size_budget import STREAM, Kept, Size, Unreachable, prune_to_size, target_size
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

HARD_FROM = 0.6  # of the prunable size; above it the authors' README has other constants for trained masks
HARD = "more than 0.6 is removed while weights stay unchanged; expect a large loss, and measure it"
STREAM_CHARGE = 30.0  # for the residual stream's mask [code]


class MaskDecision(PruningDecision):
    """means: of the masks of the units that stay, by the name of their prunable module"""

    means: Mapping[str, Sequence[float]]
    figures: Mapping[str, Any]


class VTrans(RewritePass):
    """Remove heads, neurons, channels and whole sub-blocks by masks with noise, down to a given size."""

    title: ClassVar[str] = "Prunes heads, neurons and channels by variational masks (VTrans)"
    paper: ClassVar[str] = "Dutta et al. 2024, arXiv 2406.05276"

    target: float = Field(0.2, ge=0, le=0.9, description="Share that is removed, of what `measure` and `of` name.")
    measure: Literal["parameters", "flops", "bytes"] = Field(
        "parameters",
        description="What the target counts. bytes decrease as parameters do. flops are multiplications for one token.",
    )
    of: Literal["blocks", "model"] = Field(
        "blocks",
        description="blocks: all blocks, with norms and biases. model: the whole model, with embeddings and output "
        "head.",
    )
    tokens: Count = Field(512, description="Number of keys that a query attends to, for measure: flops.")
    sites: tuple[Literal["heads", "ffn", "hidden", "layers"], ...] = Field(
        ("heads", "ffn"),
        min_length=1,
        description="What may be removed. hidden: channels of the residual stream. layers: whole sub-blocks.",
    )
    export: Literal["auto", "stock", "custom"] = Field(
        "auto",
        description="stock: keep the model's class, or stop with an error. custom: use a modeling file. auto: use one "
        "if needed.",
    )
    uniform: bool | None = Field(
        None, description="Keep the same number of units in every block. null: only if export is stock."
    )
    loss: Literal["distill", "task"] = Field(
        "distill",
        description="distill: distance from the dense model's outputs. task: cross-entropy with the data's labels.",
    )
    start: Literal["balanced", "equal"] = Field(
        "balanced",
        description="Noise of the masks before training. balanced: by the curvature of the loss, from one pass over "
        "the calibration data. equal: nearly none, in every mask.",
    )
    steps: int = Field(0, ge=0, le=MOST, description="Number of training steps of the masks; start: equal needs them.")
    samples: Count = Field(
        16, description="Largest number of calibration samples in a batch, and smallest number in a step."
    )
    mask_rate: PositiveFloat = Field(0.05, description="Learning rate of the masks. It decreases linearly to 0.")
    multiplier_rate: PositiveFloat = Field(0.1, description="Learning rate of the Lagrangian's multipliers.")
    warmup: float = Field(0.1, ge=0, le=0.9, description="Share of the steps over which the target rises from 0.")
    kl_factor: NonNegativeFloat = Field(1e-6, description="Weight of the information bottleneck in the loss.")
    heads_charge: PositiveFloat = Field(256.0, description="Factor of the bottleneck's term for heads.")
    align: Count = Field(
        8, description="Keep neurons and channels in multiples of this number. Heads are kept one by one."
    )
    reconstruct: bool = Field(
        True,
        description="Correct the output projections by least squares, instead of folding the masks' means into them.",
    )
    min_heads: Count = Field(1, description="Smallest number of key-value heads that each attention keeps.")
    min_ffn: float = Field(0.1, gt=0, le=1, description="Smallest share of its neurons that each MLP keeps.")
    min_hidden: float = Field(0.5, gt=0, le=1, description="Smallest share of the residual stream that is kept.")
    protect_layers: tuple[int, ...] = Field(
        (0, -1), description="Numbers of blocks whose sub-blocks stay, if `sites` names layers. -1 is the last."
    )
    save_every: Count = Field(
        50,
        description="Steps of curvature or training between two saved states. A resumed run starts from the last.",
    )

    @model_validator(mode="after")
    def _fits_together(self) -> VTrans:
        if len(set(self.sites)) < len(self.sites):
            raise PydanticCustomError("site-twice", "sites has a name twice")
        if self.start == "equal" and not self.steps:
            raise PydanticCustomError(
                "start-and-steps", "start: equal without training ranks nothing; set steps, or start: balanced"
            )
        if "layers" in self.sites and self._is_uniform:
            raise PydanticCustomError(
                "layers-and-uniform",
                "sites: layers removes other sub-blocks in each block; remove layers from it, or uniform and stock",
            )
        return self

    @property
    def traits(self) -> Traits:
        return Traits(reads="gradients" if self.decides else "weights")

    @property
    def decides(self) -> bool:
        return self.target > 0

    @property
    def unplanned(self) -> str:
        return "the run chooses what is removed, down to about the size shown" if self.decides else ""

    @property
    def batch_samples(self) -> int | None:
        return self.samples if self.decides else None

    @property
    def _is_uniform(self) -> bool:
        return self.export == "stock" if self.uniform is None else self.uniform

    @property
    def _kinds(self) -> tuple[str, ...]:
        """The kinds of structure to find in the model. For the stream alone also an MLP, to know its width."""
        named = tuple(kind for kind in ("heads", "ffn") if kind in self.sites)
        return ("heads", "ffn") if "layers" in self.sites else named or ("ffn",)

    def work(self, model: ModelFacts, data: DataSize, parts: Sequence[PartWork]) -> list[Work]:
        """A curvature or a training step runs the blocks forwards twice, and backwards, which is as much for frozen
        weights.
        """
        found = [rewritten(part.values) for part in parts]
        if not self.decides:
            return found
        blocks, output_head = parts[1:-1], parts[-1]
        samples = min(self.samples, data.samples)
        step = samples * data.tokens / max(1, data.samples)
        trained, measured = step * self.steps, data.tokens if self.start == "balanced" else 0
        dense = data.tokens if self.steps else 0  # as the reference for training
        for block in blocks:
            found[0] += block.load + block.run * (dense + 3 * (trained + measured))
        loads = 2 * self.steps + bool(self.steps) + (2 * math.ceil(measured / step) if measured else 0)
        found[0] += load_again(parts) * (loads - 1)
        found[0] += output_head.run * (2 * (trained + measured) + dense)
        found[0] += divergence_work(trained, output_head.outputs) + likelihood_work(measured, output_head.outputs)
        if self.reconstruct:
            solved: dict[int, list[tuple[int, int, int]]] = {}
            for prunable in model.prunable(self._kinds):
                outputs, inputs = _projection_shape(model, prunable)
                solved.setdefault(prunable.block, []).append((outputs, inputs, round((1 - self.target) * inputs)))
            for number, block in enumerate(blocks):
                found[number + 1] += block.run * data.tokens
                found[number + 1] += repair_work(block, data, solved.get(number, []))
        return found

    def memory(self, model: ModelFacts, data: DataSize, parts: Sequence[PartWork]) -> int:
        """As in `RewritePass`; for a repair second moments in float32 with two copies of a part in float64, four copies
        of an output projection in float64, and inputs that are held out. While masks are chosen: what is kept then.
        """
        found = super().memory(model, data, parts)
        if not self.decides:
            return found
        shapes = (
            [_projection_shape(model, prunable) for prunable in model.prunable(self._kinds)] if self.reconstruct else []
        )
        solving = max((20 * inputs**2 + 32 * outputs * inputs for outputs, inputs in shapes), default=0)
        held_out = min(HELD_OUT_TOKENS + data.batch, data.tokens / HELD_OUT)
        inputs = 4 * int(held_out) * max((inputs for _, inputs in shapes), default=0)
        return max(found + solving + inputs, kept_bytes(data if self.steps else DataSize(), parts))

    def choose(self, model: RunnableModel) -> MaskDecision:
        """Find the masks and prune to the target. raises PassError for data that can't be used for them"""
        facts = model.facts
        prunables = self._prunable(facts)
        size = self._size(facts, prunables)
        places, sizes, charges = self._masks(facts, prunables)
        course = Course(
            self.target, self.steps, self.samples, self.mask_rate, self.multiplier_rate, self.warmup, self.kl_factor,
            self.save_every, self.loss, self.start,
        )  # fmt: skip
        trained = train_masks(model, places, size, sizes, charges, course)
        figures = {"soft_removed": trained.removed, "last_loss": trained.losses[-1]} if trained.losses else {}
        return self.decided(model, prunables, size, trained.masks.scores(), trained.masks.means(), figures)

    def decided(
        self,
        model: RunnableModel,
        prunables: Sequence[PrunableModule],
        size: Size,
        scores: Mapping[str, Sequence[float]],
        means: Mapping[str, Sequence[float]],
        figures: Mapping[str, Any],
    ) -> MaskDecision:
        """Prune to the target by scores of heads, neurons and channels, whose masks have these means (none: 1)."""
        facts = model.facts
        removable: dict[tuple[str, ...], float] = {
            (prunable.name,): scores[_switch(prunable)][0] for prunable in self._removable(facts, prunables)
        }
        kept = self._prune_to_size(size, {**_whole(prunables, 0.0), **scores}, removable)
        decision = _decision(kept)
        folded = {}
        for prunable in prunables:
            switch = means[_switch(prunable)][0] if _switch(prunable) in means else 1.0
            units = means.get(prunable.name, [1.0] * prunable.units)
            if len(kept.units[prunable.name]) > 0:
                folded[prunable.name] = [float(f"{units[unit] * switch:.6g}") for unit in kept.units[prunable.name]]
        if (missed := 1 - self.target - kept.size / size.full) > 0.01:
            model.warn(
                "coarse-units",
                "vtrans.target",
                f"{missed:.1%} more than the target was removed, since single heads are large",
            )
        return {**decision, "means": folded, "figures": {"size": kept.size, "of": size.full, **figures}}

    def redefine(self, model: ModelFacts, decision: Decision | None) -> Redefinition:
        """The pruned config and shapes. raises PreflightError for an impossible target, or a model without `sites`"""
        prunables = self._prunable(model)
        size = self._size(model, prunables)
        if decision is None:  # an estimate: every sub-block loses the same share
            if self.export == "stock" and size.narrowest < size.width:  # refuses a stream that no stock model narrows
                narrowest: PruningDecision = {"sites": {}, "hidden": list(range(size.narrowest)), "removed": []}
                pruned_redefinition(model, prunables, narrowest, self.export)
            even = {part.name: [(unit + 0.5) / part.units for unit in range(part.units)] for part in size.parts}
            even[STREAM] = [(channel + 0.5) / max(size.width, 1) for channel in range(size.width)]
            kept = self._prune_to_size(
                size, even, {(prunable.name,): 2.0 for prunable in self._removable(model, prunables)}
            )
            return replace(
                pruned_redefinition(model, prunables, _decision(kept), self.export), notes=self._notes, decision=None
            )
        redefinition = pruned_redefinition(model, prunables, cast(MaskDecision, decision), self.export)
        return replace(redefinition, decision=decision, notes=self._notes, follows=self.reconstruct)

    def rewrite(self, view: PartView, state: State) -> State:
        if view.redefinition.decision is None:  # nothing is removed yet
            return state
        decision = cast(MaskDecision, view.redefinition.decision)
        prunables = view.facts.prunable(self._kinds)
        means = decision["means"]
        if self.reconstruct:  # an output projection that loses nothing needs no repair
            units = {own.name: own.units for own in prunables}
            means = {name: found for name, found in means.items() if len(found) < units[name]}
        prune(view, prunables, decision, factors=means, ridge=RIDGE if self.reconstruct else None)
        return state

    @property
    def _notes(self) -> tuple[str, ...]:
        return (HARD,) if self.target > HARD_FROM else ()

    def _prunable(self, facts: ModelFacts) -> tuple[PrunableModule, ...]:
        """What `sites` names in the model. raises ModelError, PreflightError if the model doesn't have it"""
        prunables = facts.prunable(self._kinds)
        fixed = [prunable for prunable in prunables if prunable.layout.per_layer]
        if fixed and not self._is_uniform:
            raise PreflightError(
                f"blocks can't differ in their number of {fixed[0].kind} ({fixed[0].layout.per_layer})",
                where=fixed[0].name,
                hint="Set uniform: true.",
                data={"reason": "blocks-differ", "kind": fixed[0].kind},
            )
        if self._is_uniform and (odd := _unequal(prunables)) is not None:
            raise PreflightError(
                f"it has {odd.units} heads or neurons, and others of its kind have another number",
                where=odd.name,
                hint="Set uniform: false.",
                data={"reason": "blocks-differ", "kind": odd.kind, "units": odd.units},
            )
        return prunables

    def _removable(self, facts: ModelFacts, prunables: Sequence[PrunableModule]) -> list[PrunableModule]:
        """Sub-blocks that may be removed whole. raises PreflightError for a protected block that doesn't exist"""
        if "layers" not in self.sites:
            return []
        count = 1 + max(prunable.block for prunable in prunables)
        if wrong := [block for block in self.protect_layers if not -count <= block < count]:
            raise PreflightError(
                f"block {wrong[0]} is protected, but the model has {count} blocks",
                where="vtrans.protect_layers",
                hint=f"Set protect_layers to numbers from {-count} to {count - 1}.",
                data={"block": wrong[0], "blocks": count},
            )
        protected = {block % count for block in self.protect_layers}
        return [
            prunable
            for prunable in prunables
            if prunable.block not in protected and prunable.layout.removal is not None
        ]

    def _size(self, facts: ModelFacts, prunables: Sequence[PrunableModule]) -> Size:
        size = model_size(
            facts,
            prunables,
            measure="flops" if self.measure == "flops" else "parameters",
            of=self.of,
            tokens=self.tokens,
            narrows="hidden" in self.sites,
        )
        allowed = self._head_counts(facts, prunables)
        parts = []
        for part in size.parts:
            if part.kind not in self.sites:
                parts.append(replace(part, least=part.units))
            elif part.kind == "heads":
                least = min(self.min_heads, part.units)
                parts.append(replace(part, least=least, allowed=allowed.get(part.units, ())))
            else:
                parts.append(replace(part, least=_share(part.units, self.min_ffn), align=min(self.align, part.units)))
        bounds = {"least_width": _share(size.width, self.min_hidden), "align_width": min(self.align, size.width) or 1}
        if self.export == "stock" and "hidden" in self.sites:
            bounds["align_width"] = self._stock_width_step(facts, prunables, allowed, size.width)
        return replace(size, parts=tuple(parts), **bounds)

    def _head_counts(self, facts: ModelFacts, prunables: Sequence[PrunableModule]) -> dict[int, tuple[int, ...]]:
        """Heads of an attention -> numbers of heads with which the class and its config can be made. Many classes need
        a divisor of the width. Empty if a modeling file can give each block its own number.
        """
        found: dict[int, tuple[int, ...]] = {}
        for prunable in prunables:
            keys, is_bound = prunable.layout.config, self.export == "stock" or prunable.layout.per_layer is not None
            if prunable.kind == "heads" and keys is not None and is_bound and prunable.units not in found:
                counts = range(1, prunable.units + 1)
                found[prunable.units] = tuple(n for n in counts if facts.builds(keys.of(n)) is None) or (
                    prunable.units,
                )
        return found

    def _stock_width_step(
        self, facts: ModelFacts, prunables: Sequence[PrunableModule], heads: Mapping[int, Sequence[int]], width: int
    ) -> int:
        """The smallest step of `align` whose multiples the class and its config accept as widths, with any number of
        heads that may be kept; the whole width if there is none.
        """
        key = width_key(facts)
        keys = next((s.layout.config for s in prunables if s.kind == "heads" and s.layout.config is not None), None)
        counts = [keys.of(n) for allowed in heads.values() for n in allowed] if keys is not None else []
        if key is None:
            return width
        for step in range(min(self.align, width), width, self.align):
            widths = range(width - width % step, 0, -step)
            pairs = [(kept, kept_width) for kept_width in widths for kept in counts or [{}]]
            # Rules of model classes are about divisors and products: two widths side by side show them.
            tried = [(kept, kept_width) for kept_width in widths[:2] for kept in counts or [{}]]
            if all(facts.accepts({**kept, key: kept_width}) is None for kept, kept_width in pairs) and all(
                facts.builds({**kept, key: kept_width}) is None for kept, kept_width in tried
            ):
                return step
        return width

    def _masks(
        self, facts: ModelFacts, prunables: Sequence[PrunableModule]
    ) -> tuple[Places, dict[str, int], dict[str, float]]:
        """Where masks are, how many heads or neurons each has, and its factor in the bottleneck's term."""
        removable = {prunable.name for prunable in self._removable(facts, prunables)}
        projections, sizes, charges = [], {}, {}
        for prunable in prunables:
            switch = _switch(prunable) if prunable.name in removable else None
            columns = projection_columns(prunable.columns)
            projections.append(
                MaskedProjection(prunable.name, prunable.block + 1, prunable.output_projection, columns, switch)
            )
            if prunable.kind in self.sites:
                sizes[prunable.name], charges[prunable.name] = (
                    prunable.units,
                    self.heads_charge if prunable.kind == "heads" else 1.0,
                )
            if switch is not None:
                sizes[switch], charges[switch] = 1, self.heads_charge
        norms: list[StreamNorm] = []
        if "hidden" in self.sites:
            residual = facts.residual
            sizes[STREAM], charges[STREAM] = residual.width, STREAM_CHARGE
            found = [
                (part, norm)
                for part, block in enumerate(residual.blocks, 1)
                for sublayer in block
                for norm in sublayer.norms
            ]
            found.append((len(residual.blocks) + 1, residual.end))
            norms = [StreamNorm(part, norm.module, norm.formula) for part, norm in found]
        return Places(tuple(projections), tuple(norms)), sizes, charges

    def _prune_to_size(
        self, size: Size, scores: Mapping[str, Sequence[float]], removable: Mapping[tuple[str, ...], float]
    ) -> Kept:
        goal = target_size(size.full, self.target)
        try:
            return prune_to_size(
                size, scores, goal, removable=removable, uniform=self._is_uniform, prunes_width="hidden" in self.sites
            )
        except Unreachable as error:
            reachable = int(1000 * (1 - error.least / size.full)) / 1000
            raise PreflightError(
                f"{self.target:g} of the {self.measure} can't be removed: with these sites, minimums and align, "
                f"the most is {reachable:g}",
                where="vtrans.target",
                hint=f"Set target to {reachable:g} or less, or allow more with sites, min_heads, min_ffn, align or of.",
                data={"target": self.target, "measure": self.measure, "reachable": reachable},
            ) from error


def _projection_shape(model: ModelFacts, prunable: PrunableModule) -> tuple[int, int]:
    """(outputs, inputs) of a sub-block's output projection."""
    inputs = sum(len(columns) for columns in prunable.columns)
    return math.prod(model.shapes[prunable.slices[0].parameter]) // inputs, inputs


def _switch(prunable: PrunableModule) -> str:
    """Name of the mask of a whole sub-block."""
    return f"{prunable.name} whole"


def _share(count: int, share: float) -> int:
    return max(1, round(count * share)) if count else 0


def _unequal(prunables: Sequence[PrunableModule]) -> PrunableModule | None:
    first: dict[str, int] = {}
    return next(
        (prunable for prunable in prunables if first.setdefault(prunable.kind, prunable.units) != prunable.units), None
    )


def _whole(prunables: Sequence[PrunableModule], score: float) -> dict[str, list[float]]:
    return {prunable.name: [score] * prunable.units for prunable in prunables}


def _decision(kept: Kept) -> PruningDecision:
    return {
        "sites": {name: list(units) for name, units in kept.units.items() if units},
        "hidden": None if kept.width is None else list(kept.width),
        "removed": [name for name, units in kept.units.items() if not units],
    }
