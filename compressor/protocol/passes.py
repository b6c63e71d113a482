"""Defines the three kinds of passes, and the settings that all of them have.

- `WeightPass` stores weights in another format, block by block (gptq, bct, awq).
- `RewritePass` changes the model itself: parameters and their shapes (rotate, slicegpt, vtrans).
- `TokenPass` lets blocks drop tokens; parameters stay unchanged (zero_tprune, prefill_pruning).

A pass is a frozen set of settings. What it must remember during a run is either a `Decision`, which it makes before its
sweep, or, in a `RewritePass`, a `State`, which each part returns for the next one. The engine keeps both in the
journal.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from compressor.model.facts import Decision, ModelFacts, Redefinition
from compressor.model.weights import Weight
from compressor.protocol.views import BlockView, PartView, RunnableModel, State, WholeModel
from compressor.protocol.work import DataSize, PartWork, Work

if TYPE_CHECKING:
    import torch


class Fact(str, Enum):
    """A property of the whole model that a pass may need or break."""

    CONSTANT_TOKEN_COUNT = "constant_token_count"
    NORMS_FOLDED = "norms_folded"  # every norm on the residual stream is x / sqrt(mean(x^2) + eps) times a constant


@dataclass(frozen=True)
class Traits:
    """What a pass needs and what it leaves, so that `plan` can refuse an order of steps that can't work.

    `accepts` and `stores` are names of quantization formats (see `compressor.layers`); "dense" is the uncompressed one.
    They are names and not classes, because classes would import torch into the schema and the help.

    rescales  the pass uses `BlockView.producers`, which `plan` then finds on a probe model
    """

    reads: Literal["weights", "inputs", "gradients"]
    accepts: frozenset[str] = frozenset({"dense"})
    stores: str | None = None  # None: the weight keeps its format
    requires: frozenset[Fact] = frozenset()
    breaks: frozenset[Fact] = frozenset()
    provides: frozenset[Fact] = frozenset()
    rescales: bool = False


class Pass(BaseModel):
    """One recipe step: its settings, and what `plan` may ask about them. A pass is one of the three kinds below."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    title: ClassVar[str] = ""  # one line for `compress-model passes`
    paper: ClassVar[str] = ""  # authors, year, arXiv id

    only: tuple[str, ...] = Field(("*",), description="Globs over weight names that this step may touch.")
    except_: tuple[str, ...] = Field((), alias="except", description="Globs that are left out; wins over `only`.")

    @property
    def traits(self) -> Traits:
        raise NotImplementedError

    @property
    def decides(self) -> bool:
        """Whether the pass makes a choice over the whole model before its sweep, which costs a run of the model.

        `plan` then shows upper bounds. True if the class has its own `decide` or `choose`. A pass whose settings tell
        whether there is a choice overrides this property, too.
        """
        raise NotImplementedError

    @property
    def unplanned(self) -> str:
        """Why `plan` can't predict this pass's sizes exactly, as a clause; empty if it can."""
        return "it chooses over the whole model" if self.decides else ""

    @property
    def sizes_are(self) -> Literal["exact", "upper bounds", "lower bounds"]:
        """How the sizes that `plan` shows compare with the sizes that will be stored."""
        return "upper bounds" if self.decides else "exact"

    @property
    def batch_samples(self) -> int | None:
        """Largest number of calibration samples in a batch, for a pass that trains by batches; None: the engine's."""
        return None


class WeightPass(Pass):
    """Stores the weights that a recipe selects in another format, one part of the model after the other.

    Each selected weight is either put in its format (`BlockView.put`) or kept dense (`BlockView.keep`). `block` does
    the work, also for embeddings and output head, unless the pass handles them in another way. A pass keeps no state
    from part to part. What it must know about the whole model is a `Decision`.
    """

    keeps_block: ClassVar[bool] = False  # it holds values of all weights of a block at once

    @property
    def decides(self) -> bool:
        return type(self).decide is not WeightPass.decide

    def stored(self, weight: Weight) -> str | None:
        """Name of the format that this pass would leave for `weight`: `Traits.stores`, unless kinds of weights differ.

        "dense" for a selected weight that stays dense (`BlockView.keep`).
        """
        return self.traits.stores

    def alternatives(self, weight: Weight) -> tuple[str, ...]:
        """Formats that the run may leave for `weight` instead of `stored`; "dense" if it may `keep` the weight.

        None of them may be larger than `plan` predicts from `format_params`. The exception is "dense": for it, `plan`
        counts the larger of the two.
        """
        return ()

    def format_params(self, weight: Weight) -> dict[str, Any] | None:
        """Parameters of the format that this pass would leave for `weight`; None if the format doesn't change.

        `plan` predicts bytes from them. raises ShapeError if the settings don't fit the weight
        """
        return None

    def check(self, weights: Sequence[Weight]) -> list[tuple[str, dict[str, Any]]]:
        """Further problems of the selected weights, which `plan` lists (one sentence each, and its values)."""
        return []

    def work(self, weights: Sequence[Weight], data: DataSize, run: Work) -> Work | None:
        """The work on weights that read the same input, for `decide` and for the sweep.

        The engine counts the runs of the part for `fold` and for the next part, and two more if the pass `decides`.
        Further runs are counted here, as `run * tokens`.

        data  the calibration tokens that reach these weights
        run   the work of running one token through the part
        returns  None: it isn't known, so `plan` predicts no time for the sweep
        """
        return None

    def memory(self, weights: Sequence[Weight], data: DataSize) -> int:
        """Bytes of the working copies that exist at once for weights that read the same input, beside the block itself.

        The default is enough for second moments with two factors, and for five float32 copies of the largest weight.
        """
        inputs, largest = weights[0].in_features, max(weight.out_features for weight in weights)
        return (12 * inputs**2 if data.tokens else 0) + 20 * largest * inputs

    def folded(self, weights: Sequence[Weight], data: DataSize) -> int:
        """Bytes of what `BlockView.fold` returns for weights that read the same input.

        Those of all experts of a layer exist at once, if they fit into memory; `memory` counts those of one. The
        default is enough for second moments in float32.
        """
        return 4 * weights[0].in_features ** 2 if data.tokens else 0

    def decide(self, model: WholeModel) -> Decision | None:
        """A choice over the whole model, before the sweep. Every view then has it as `view.decision`."""
        return None

    def embeddings(self, view: BlockView) -> None:
        self.block(view)

    def block(self, view: BlockView) -> None:
        raise NotImplementedError

    def output_head(self, view: BlockView) -> None:
        self.block(view)


class RewritePass(Pass):
    """Changes the model's own parameters, their shapes, or both, in a separate sweep.

    It comes before every step that stores weights in another format, and leaves a dense model from which later steps
    start. `redefine` describes the new model, `survey` may read the whole model first, and `rewrite` writes one part
    after the other. What `survey` and `rewrite` return is given to the next call of `rewrite`, also in a resumed run.
    """

    keeps_function: ClassVar[bool] = False  # the model computes the same as before, except for rounding

    @property
    def decides(self) -> bool:
        return type(self).choose is not RewritePass.choose

    def work(self, model: ModelFacts, data: DataSize, parts: Sequence[PartWork]) -> list[Work] | None:
        """The work on each part. What comes before the first part is written, `choose` and `survey`, counts in part 0.

        The engine counts that each part is loaded, read, and written once.

        parts    embeddings, blocks and output head of the model before this step
        returns  None: it isn't known, so `plan` predicts no time for the sweep
        """
        return None

    def memory(self, model: ModelFacts, data: DataSize, parts: Sequence[PartWork]) -> int:
        """Bytes of the working copies that exist at once, beside one part of the model and a batch.

        The default is enough for the new parameters of the largest part in float64 and in the model's dtype, and for
        one more copy of the largest parameter in float64.
        """
        largest = max((math.prod(shape) for shape in model.shapes.values()), default=0)
        return 10 * max(part.values for part in parts) + 8 * largest

    def choose(self, model: RunnableModel) -> Decision:
        """The choice of the new shapes, if it needs a run of the model, as JSON. Called if the pass `decides`."""
        raise NotImplementedError

    def redefine(self, model: ModelFacts, decision: Decision | None) -> Redefinition:
        """The new config and shapes of the model. `plan` counts parameters from them.

        decision  result of `choose`; None before the run, when a pass that decides returns what it can promise
        raises ShapeError, PreflightError
        """
        raise NotImplementedError

    def survey(self, views: Iterator[PartView]) -> State:
        """Read all parts of the model in order, and return what `rewrite` needs to know. Nothing can be written yet."""
        return {}

    def rewrite(self, view: PartView, state: State) -> State:
        """Write the new parameters of one part. Returns the state for the next one."""
        raise NotImplementedError

    def projections(self, state: State) -> list[torch.Tensor]:
        """The bases (width, w) of the sublayers of the part that returned this state, for the stream of the next part.

        Called if the redefinition `follows`; without it, only `survey` has activations. With an empty list, the
        activations are those of the unchanged model.
        """
        return []


class TokenPass(Pass):
    """Lets blocks drop tokens. It writes no parameter, so it may stand before or after steps that store weights."""

    @property
    def decides(self) -> bool:
        return type(self).choose is not TokenPass.choose

    def work(self, model: ModelFacts, data: DataSize, parts: Sequence[PartWork]) -> Work | None:
        """The work of `choose`. See `RewritePass.work`."""
        return None

    def choose(self, model: RunnableModel) -> Decision:
        """The choice of the token gates, if it needs a run of the model, as JSON. Called if the pass `decides`."""
        raise NotImplementedError

    def redefine(self, model: ModelFacts, decision: Decision | None) -> Redefinition:
        """The config of the model with token gates. The shapes stay the same. See `RewritePass.redefine`."""
        raise NotImplementedError
