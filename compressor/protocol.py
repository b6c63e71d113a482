"""What the author of a pass sees: Pass, Site, Weight, Group, Traits, Fact, Decision.

A pass is a frozen bag of settings with one required function, `block`. The engine calls it once per block with a
`Site`, the block as a pass may see it. Whatever a pass has to remember from one block to the next lives in `carry`.
Nothing here imports torch at run time, so that the schema, the help and the list of passes are instant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from compressor.model.facts import BlockTokens as BlockTokens
from compressor.model.facts import Decision as Decision
from compressor.model.facts import ModelFacts as ModelFacts
from compressor.model.facts import PrunableModule as PrunableModule
from compressor.model.facts import Remodel as Remodel
from compressor.model.facts import TokenFacts as TokenFacts
from compressor.model.weights import FUNCTION_ROLES as FUNCTION_ROLES
from compressor.model.weights import Group as Group
from compressor.model.weights import Stage as Stage
from compressor.model.weights import Weight as Weight

if TYPE_CHECKING:
    import torch

    from compressor.layers.base import Layer
    from compressor.model.residual_records import Residual, ResidualNorm, ResidualSublayer

State = TypeVar("State")
Carry = dict[str, "torch.Tensor"]  # flat; saved by the journal; empty at the start


class Fact(str, Enum):
    """A truth about the whole model that a pass may need or break. Each has a checker in `testing.py`."""

    CONSTANT_TOKEN_COUNT = "constant_token_count"
    NORMS_FOLDED = "norms_folded"  # every norm on the residual stream is x / sqrt(mean(x^2) + eps), times one number


@dataclass(frozen=True)
class Traits:
    """What a pass needs and leaves behind, so that `plan` can refuse an order that can't work.

    accepts and stores are names of stored forms (see `compressor.layers`); "dense" is the uncompressed form. Names
    rather than classes, because classes would pull torch into the schema and the help.
    """

    reads: Literal["weights", "inputs", "gradients"]
    accepts: frozenset[str] = frozenset({"dense"})
    stores: str | None = None  # None keeps the form
    requires: frozenset[Fact] = frozenset()
    breaks: frozenset[Fact] = frozenset()
    provides: frozenset[Fact] = frozenset()


class Site(Protocol):
    """A block (or the head) as a pass may see it. Only the weights this step selected are visible."""

    device: torch.device
    generator: torch.Generator  # seeded from (run seed, step, block)
    decision: Decision | None

    @property
    def index(self) -> int:
        """Block number, counted over the whole model; -1 is the stem, the number of blocks the head."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Type of what stays dense, and of stored scales."""
        ...

    def stages(self, sequential: bool = True) -> list[Stage]:
        """The selected groups in forward order. sequential=False puts all of them into one stage.

        Experts of one fused parameter are separate groups of one stage, since one replay feeds all of them.
        """
        ...

    def functions(self) -> list[Weight]:
        """The selected functions (`Weight.is_function`), in the order of the model's modules.

        A stage of groups of one function each can be folded like one of weights: over what its module is called with.
        """
        ...

    def fold(
        self, stage: Stage, start: Callable[[Group], State], step: Callable[[State, torch.Tensor], State]
    ) -> list[State]:
        """Replay the block once over the calibration batches as it is now, folding each group's inputs.

        `step(state, x)` gets x of shape (tokens, in_features), of a function (tokens, width), on the site's device,
        without padding; it is called once per batch in a fixed order, and for an expert only with the tokens routed to
        it (maybe never).
        """
        ...

    def inputs(self, group: Group) -> Iterator[torch.Tensor]:
        """The batches (tokens, in_features) that this group reads now; replays the block."""
        ...

    def matrix(self, weight: Weight) -> torch.Tensor:
        """A copy of the weight as it is now, (out_features, in_features) float32."""
        ...

    def bias(self, weight: Weight) -> torch.Tensor | None:
        """The bias (out_features,) in its own dtype, if there is one."""
        ...

    def gain(self, function: Weight) -> torch.Tensor:
        """The weight (width,) of a norm, in its own dtype."""
        ...

    def put(self, weight: Weight, layer: Layer, **record: Any) -> None:
        """Replace the weight by its stored form; `record` (JSON values) goes to the report's row of this weight.

        A weight may be put again, which replaces what was put and its row.
        """
        ...

    @property
    def batches(self) -> int:
        """How many calibration batches there are."""
        ...

    def output(self, batch: int, stand_ins: Mapping[Weight, torch.nn.Module] | None = None) -> torch.Tensor:
        """What the block as it is now makes of a calibration batch, (samples, tokens, width).

        stand_ins  modules to call in place of those that hold these weights (no experts), biases included, for this
                   once; with any, gradients flow to whatever they multiply by
        """
        ...

    def keep(self, weight: Weight, **record: Any) -> None:
        """Leave the weight dense, as it is, and say so in the report's row of it; `record` as for `put`."""
        ...

    def warn(self, code: str, where: str, message: str) -> None:
        """Add a warning to the report."""
        ...


class StreamSite(Protocol):
    """A unit as a pass that reshapes the model sees it: its parameters, and the signals of its residual stream."""

    device: torch.device
    generator: torch.Generator  # seeded from (run seed, step, unit)
    facts: ModelFacts
    remodel: Remodel

    @property
    def residual(self) -> Residual: ...

    @property
    def index(self) -> int:
        """Block number; -1 is the stem, the number of blocks the head."""
        ...

    @property
    def path(self) -> str:
        """Of the block's module."""
        ...

    @property
    def sites(self) -> tuple[ResidualSublayer, ...]:
        """Where the branches of this block leave the stream and come back; none in stem and head."""
        ...

    def read(self, parameter: str) -> torch.Tensor:
        """A parameter as it is now, float64."""
        ...

    def write(self, parameter: str, value: torch.Tensor) -> None:
        """Its new value, of the shape that `remodel` promised; rounded once, when the unit is stored."""
        ...

    def warn(self, code: str, where: str, message: str) -> None:
        """Add a warning to the report."""
        ...

    def signals(self, norm: ResidualNorm) -> Iterator[torch.Tensor]:
        """What a norm of this unit reads, (tokens, width) for each calibration batch, of the model unchanged."""
        ...

    def inputs(self, module: str) -> Iterator[torch.Tensor]:
        """What a module of this unit reads, (tokens, features) for each calibration batch, of the model unchanged.

        While units are written this is so where the remodel `follows`.
        """
        ...

    def states(self) -> list[torch.Tensor]:
        """The stream as it comes into this unit, (samples, tokens, width) of each calibration batch, in the model's
        dtype; of the stem, what it gives.
        """
        ...

    def projected(self, bases: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        """The stream after the first len(bases) sites of this unit, (tokens, width) float64 for each calibration batch.

        At each of these the stream is projected onto the columns (width, w) of its basis, as it already was in the
        units before (`Pass.projections`). Without bases: what comes into the block, or of the stem what it gives.
        """
        ...


class WholeModel(Protocol):
    """The model as the steps before left it, for a choice that no block can make alone."""

    def sites(self) -> Iterator[Site]:
        """Stem, blocks and head in order, one in memory at a time; each is good until the next is taken.

        Nothing can be put: what the sweep will do is not known yet, so inputs are those of the model unchanged.
        """
        ...


class ShapingModel(Protocol):
    """The model as a reshaping pass may see it before it chooses the new shapes (`Pass.choose`).

    Units are numbered as they are stored: 0 the stem, 1 to n the blocks, n + 1 the head. Calibration batches have no
    padding. Weights never take gradients; hooks that a pass sets on modules are its own to remove.
    """

    facts: ModelFacts
    device: torch.device
    generator: torch.Generator  # seeded from (run seed, step)

    @property
    def units(self) -> int: ...

    @property
    def batches(self) -> int:
        """How many calibration batches there are."""
        ...

    def labels(self, batch: int) -> torch.Tensor | None:
        """(samples,) int64 where the data has them."""
        ...

    def module(self, path: str) -> torch.nn.Module: ...

    def loaded(self, unit: int) -> AbstractContextManager[None]:
        """The unit's weights are in memory inside; of blocks no longer, stem and head stay."""
        ...

    def stem(self, batch: int) -> torch.Tensor:
        """The stream before block 0, (samples, tokens, width) in the model's dtype."""
        ...

    def run(self, unit: int, batch: int, hidden: torch.Tensor) -> torch.Tensor:
        """The stream after a loaded block; records gradients where the caller does."""
        ...

    def head(self, batch: int, hidden: torch.Tensor, samples: slice = ...) -> torch.Tensor:
        """The model's output for (some of) a batch's samples, whose stream after the last block is given; gradients as
        in `run`.
        """
        ...

    def sites(self, bases: Callable[[StreamSite], list[torch.Tensor]] | None = None) -> Iterator[StreamSite]:
        """Stem, blocks and head in order, loaded; each is good until the next is taken, and nothing can be written.

        bases  of a block's sites: the stream goes on projected onto them; None leaves it as it is
        """
        ...

    def save(self, step: int, tensors: dict[str, torch.Tensor]) -> None:
        """Make the state of a long choice durable; only the last one is kept."""
        ...

    def saved(self) -> tuple[int, dict[str, torch.Tensor]] | None:
        """What an interrupted run saved last."""
        ...

    def warn(self, code: str, where: str, message: str) -> None:
        """Add a warning to the report."""
        ...


class Pass(BaseModel):
    """One recipe step. Holds settings only; whatever changes during a run is in `carry`."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    title: ClassVar[str] = ""  # one line for `compress-model passes`
    paper: ClassVar[str] = ""  # authors, year, arXiv id
    keeps_function: ClassVar[bool] = False  # of a pass that rewrites: the model computes what it did, but for rounding

    only: tuple[str, ...] = Field(("*",), description="Globs over weight names that this step may touch.")
    except_: tuple[str, ...] = Field((), alias="except", description="Globs that are left out; wins over `only`.")

    @property
    def traits(self) -> Traits:
        raise NotImplementedError

    def stored(self, weight: Weight) -> str | None:
        """Name of the form this pass would leave for `weight`: that of its traits, unless kinds of weights differ.

        "dense" for a weight that is selected and better left as it is (`Site.keep`).
        """
        return self.traits.stores

    def alternatives(self, weight: Weight) -> tuple[str, ...]:
        """Forms that the run may leave for `weight` instead of `stored`; "dense" where it may `keep` it.

        None is larger than what `spec` lets `plan` predict, but for "dense": there `plan` counts the larger of the two.
        """
        return ()

    def spec(self, weight: Weight) -> dict[str, Any] | None:
        """Settings of the stored form this pass would leave for `weight`; None if the form keeps its own.

        `plan` predicts bytes from it. Raises ShapeError when the settings don't fit the weight.
        """
        return None

    def check(self, weights: Sequence[Weight]) -> list[tuple[str, dict[str, Any]]]:
        """Further problems with the selected weights, for `plan` to list (one sentence each, and its values)."""
        return []

    @property
    def decides(self) -> bool:
        """Whether `decide`, or of a reshaping pass `choose`, has anything to do; it costs a run of the whole model.

        `plan` then shows upper bounds.
        """
        return False

    @property
    def unplanned(self) -> str:
        """Why `plan` can't know this pass's sizes exactly, as a clause; empty if it knows."""
        return "it chooses over the whole model" if self.decides else ""

    @property
    def sizes_are(self) -> Literal["exact", "upper bounds", "lower bounds"]:
        """What the sizes that follow from `spec` are, compared with those that will be stored."""
        return "upper bounds" if self.decides else "exact"

    def decide(self, model: WholeModel) -> Decision | None:
        """A choice over the whole model, before the sweep; every site then has it as `site.decision`."""
        return None

    @property
    def batch_samples(self) -> int | None:
        """Most calibration samples of a batch, for a pass that takes steps by batches; None leaves it to the engine."""
        return None

    @property
    def reshapes(self) -> bool:
        """Whether this pass changes the model's own parameters and their shapes (`choose` to `projections`).

        Such a step has a sweep of its own, before every step that stores weights in another form, and leaves a dense
        model that later steps start from.
        """
        return False

    @property
    def rewrites(self) -> bool:
        """Of a reshaping pass: whether it writes parameters (`survey` to `projections`).

        One that doesn't changes only what blocks do with theirs, which may be stored in any form by then.
        """
        return self.reshapes

    def choose(self, model: ShapingModel) -> Decision:
        """What only a run of the model can tell of its new shapes, as JSON; asked for where the pass `decides`."""
        raise NotImplementedError

    def remodel(self, model: ModelFacts, decision: Decision | None) -> Remodel:
        """What becomes of the model's definition; `plan` counts parameters from it.

        decision  what `choose` said; None before the run, when a pass that decides says what it can promise
        raises ShapeError, PreflightError
        """
        raise NotImplementedError

    def survey(self, sites: Iterator[StreamSite], carry: Carry) -> Carry:
        """What has to be known of the whole model first, from its units in order. Nothing can be written yet."""
        return carry

    def reshape(self, site: StreamSite, carry: Carry) -> Carry:
        """Write the new parameters of one unit."""
        raise NotImplementedError

    def projections(self, carry: Carry) -> list[torch.Tensor]:
        """The bases (width, w) of the sites of the unit that left this carry, for the signals of the next.

        Asked for where the remodel `follows`; without it signals are seen in `survey` alone. None at all: the signals
        go on as those of the model unchanged.
        """
        return []

    def stem(self, site: Site, carry: Carry) -> Carry:
        return carry

    def block(self, site: Site, carry: Carry) -> Carry:
        raise NotImplementedError

    def head(self, site: Site, carry: Carry) -> Carry:
        return carry
