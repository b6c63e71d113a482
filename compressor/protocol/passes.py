"""The three kinds of passes, and the settings that all of them have.

- `WeightPass` stores weights in another format, block by block (gptq, bct, awq).
- `RewritePass` changes the model itself: parameters and their shapes (rotate, slicegpt, vtrans).
- `TokenPass` lets blocks drop tokens; parameters stay as they are (zero_tprune, prefill_pruning).

A pass is a frozen set of settings. What it has to remember during a run is either a `Decision`, which it makes before
its sweep, or, in a `RewritePass`, a `State`, which goes from part to part. The engine keeps both in the journal.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from compressor.model.facts import Decision, ModelFacts, Redefinition
from compressor.model.weights import Weight
from compressor.protocol.views import BlockView, PartView, RunnableModel, State, WholeModel

if TYPE_CHECKING:
    import torch


class Fact(str, Enum):
    """A property of the whole model that a pass may need or break. Each has a checker in `testing.py`."""

    CONSTANT_TOKEN_COUNT = "constant_token_count"
    NORMS_FOLDED = "norms_folded"  # every norm on the residual stream is x / sqrt(mean(x^2) + eps), times one number


@dataclass(frozen=True)
class Traits:
    """What a pass needs and leaves behind, so that `plan` can refuse an order that can't work.

    accepts and stores are names of quantization formats (see `compressor.layers`); "dense" is the uncompressed one.
    Names rather than classes, because classes would import torch into the schema and the help.

    rescales  the pass asks for `BlockView.producers`, which `plan` then finds on a probe model
    """

    reads: Literal["weights", "inputs", "gradients"]
    accepts: frozenset[str] = frozenset({"dense"})
    stores: str | None = None  # None: the weight keeps its format
    requires: frozenset[Fact] = frozenset()
    breaks: frozenset[Fact] = frozenset()
    provides: frozenset[Fact] = frozenset()
    rescales: bool = False


class Pass(BaseModel):
    """One recipe step: its settings, and what `plan` may ask of them. A pass is one of the three kinds below."""

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
        """Whether the pass makes a choice over the whole model before its sweep; it costs a run of the model.

        `plan` then shows upper bounds.
        """
        return False

    @property
    def unplanned(self) -> str:
        """Why `plan` can't know this pass's sizes exactly, as a clause; empty if it knows."""
        return "it chooses over the whole model" if self.decides else ""

    @property
    def sizes_are(self) -> Literal["exact", "upper bounds", "lower bounds"]:
        """What the sizes that `plan` shows are, compared with those that will be stored."""
        return "upper bounds" if self.decides else "exact"

    @property
    def batch_samples(self) -> int | None:
        """Most calibration samples of a batch, for a pass that takes steps by batches; None leaves it to the engine."""
        return None


class WeightPass(Pass):
    """Stores the weights that a recipe selects in another format, one part of the model after the other.

    Each selected weight is either put in its format (`BlockView.put`) or kept dense (`BlockView.keep`). `block` does
    the work; embeddings and output head go through it too, unless the pass treats them in another way. Nothing is
    carried from part to part: what has to be known of the whole model is a `Decision`.
    """

    def stored(self, weight: Weight) -> str | None:
        """Name of the format this pass would leave for `weight`: that of its traits, unless kinds of weights differ.

        "dense" for a weight that is selected and stays dense (`BlockView.keep`).
        """
        return self.traits.stores

    def alternatives(self, weight: Weight) -> tuple[str, ...]:
        """Formats that the run may leave for `weight` instead of `stored`; "dense" where it may `keep` it.

        None is larger than what `spec` lets `plan` predict, except "dense": there `plan` counts the larger of the two.
        """
        return ()

    def spec(self, weight: Weight) -> dict[str, Any] | None:
        """Parameters of the format that this pass would leave for `weight`; None if the format keeps its own.

        `plan` predicts bytes from it. raises ShapeError when the settings don't fit the weight
        """
        return None

    def check(self, weights: Sequence[Weight]) -> list[tuple[str, dict[str, Any]]]:
        """Further problems with the selected weights, for `plan` to list (one sentence each, and its values)."""
        return []

    def decide(self, model: WholeModel) -> Decision | None:
        """A choice over the whole model, before the sweep; every view then has it as `view.decision`."""
        return None

    def embeddings(self, view: BlockView) -> None:
        self.block(view)

    def block(self, view: BlockView) -> None:
        raise NotImplementedError

    def output_head(self, view: BlockView) -> None:
        self.block(view)


class RewritePass(Pass):
    """Changes the model's own parameters, their shapes, or both, in a sweep of its own.

    It stands before every step that stores weights in another format, and leaves a dense model that later steps start
    from. `redefine` says what the model will be, `survey` may look at all of it first, and `rewrite` writes one part
    after the other. What `survey` and `rewrite` return goes to the next call of `rewrite`, in an interrupted run too.
    """

    keeps_function: ClassVar[bool] = False  # the model computes what it did, except for rounding

    def choose(self, model: RunnableModel) -> Decision:
        """What only a run of the model can tell of its new shapes, as JSON; asked for where the pass `decides`."""
        raise NotImplementedError

    def redefine(self, model: ModelFacts, decision: Decision | None) -> Redefinition:
        """The new config and shapes of the model; `plan` counts parameters from it.

        decision  what `choose` said; None before the run, when a pass that decides says what it can promise
        raises ShapeError, PreflightError
        """
        raise NotImplementedError

    def survey(self, views: Iterator[PartView]) -> State:
        """What has to be known of the whole model first, from its parts in order. Nothing can be written yet."""
        return {}

    def rewrite(self, view: PartView, state: State) -> State:
        """Write the new parameters of one part; returns the state for the next one."""
        raise NotImplementedError

    def projections(self, state: State) -> list[torch.Tensor]:
        """The bases (width, w) of the sublayers of the part that left this state, for the signals of the next.

        Asked for where the redefinition `follows`; without it signals are seen in `survey` alone. An empty list: the
        signals are those of the model unchanged.
        """
        return []


class TokenPass(Pass):
    """Lets blocks drop tokens. It writes no parameter, so it may stand before or after steps that store weights."""

    def choose(self, model: RunnableModel) -> Decision:
        """What only a run of the model can tell of its token gates, as JSON; asked for where the pass `decides`."""
        raise NotImplementedError

    def redefine(self, model: ModelFacts, decision: Decision | None) -> Redefinition:
        """The config of the model with token gates; it has the shapes that the model has. As in `RewritePass`."""
        raise NotImplementedError
