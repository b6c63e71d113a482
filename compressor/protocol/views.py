"""What a pass is shown of the model while it works: a block or another part, or all of it before a choice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from compressor.model.facts import Decision, ModelFacts, Redefinition
from compressor.model.weights import Group, Producer, Stage, Weight

if TYPE_CHECKING:
    import torch

    from compressor.layers.base import Layer
    from compressor.model.residual_records import Residual, ResidualNorm, ResidualSublayer

Folded = TypeVar("Folded")
State = dict[str, "torch.Tensor"]  # what a RewritePass passes on from part to part; the journal saves it


class BlockView(Protocol):
    """A part of the model as a `WeightPass` sees it: the embeddings, a block or the output head.

    Only the weights that the step selected are shown as weights.
    """

    device: torch.device
    generator: torch.Generator  # seeded from (run seed, step, part)
    decision: Decision | None

    @property
    def index(self) -> int:
        """Block number, counted over the whole model; -1: the embeddings, the number of blocks: the output head."""
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
        self, stage: Stage, start: Callable[[Group], Folded], step: Callable[[Folded, torch.Tensor], Folded]
    ) -> list[Folded]:
        """Replay the block once over the calibration batches as it is now, folding each group's inputs.

        `step(folded, x)` gets x of shape (tokens, in_features), of a function (tokens, width), on the view's device,
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
        """Replace the weight by its quantized layer; `record` (JSON values) goes to the report's row of this weight.

        A weight may be put again, which replaces what was put and its row.
        """
        ...

    def keep(self, weight: Weight, **record: Any) -> None:
        """Leave the weight dense, and say so in the report's row of it; `record` as for `put`."""
        ...

    def producers(self) -> list[Producer]:
        """What produces the inputs of the selected weights, feature by feature, in forward order.

        Needs `Traits.rescales`. Groups whose input has no such producer are in none.
        """
        ...

    def read(self, parameter: str) -> torch.Tensor:
        """A copy of a parameter of this part as it is now, in its own dtype; a norm's gain or bias, or any matrix."""
        ...

    def write(self, parameter: str, value: torch.Tensor) -> None:
        """Give a parameter of this part, which stays dense, a new value of its shape; rounded to its own dtype.

        Whatever runs later sees it. The artifact holds it, and the manifest says how far it is from the source's.
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

    def warn(self, code: str, where: str, message: str) -> None:
        """Add a warning to the report."""
        ...


class PartView(Protocol):
    """A part of the model as a `RewritePass` sees it: its parameters, and the signals of the residual stream."""

    device: torch.device
    generator: torch.Generator  # seeded from (run seed, step, part)
    facts: ModelFacts
    redefinition: Redefinition

    @property
    def residual(self) -> Residual: ...

    @property
    def index(self) -> int:
        """Block number; -1: the embeddings, the number of blocks: the output head."""
        ...

    @property
    def path(self) -> str:
        """Of the block's module."""
        ...

    @property
    def sublayers(self) -> tuple[ResidualSublayer, ...]:
        """Where the branches of this block leave the stream and come back; none in embeddings and output head."""
        ...

    def read(self, parameter: str) -> torch.Tensor:
        """A parameter as it is now, float64."""
        ...

    def write(self, parameter: str, value: torch.Tensor) -> None:
        """Its new value, of the shape that `redefine` promised; rounded once, when the part is stored."""
        ...

    def warn(self, code: str, where: str, message: str) -> None:
        """Add a warning to the report."""
        ...

    def signals(self, norm: ResidualNorm) -> Iterator[torch.Tensor]:
        """What a norm of this part reads, (tokens, width) for each calibration batch, of the model unchanged."""
        ...

    def inputs(self, module: str) -> Iterator[torch.Tensor]:
        """What a module of this part reads, (tokens, features) for each calibration batch, of the model unchanged.

        While parts are written this is so where the redefinition `follows`.
        """
        ...

    def states(self) -> list[torch.Tensor]:
        """The stream that enters this part, (samples, tokens, width) of each calibration batch, in the model's dtype;
        of the embeddings, what they give.
        """
        ...

    def projected(self, bases: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        """The stream after the first len(bases) sublayers of this part, (tokens, width) float64 for each batch.

        At each of these the stream is projected onto the columns (width, w) of its basis, as it already was in the
        parts before (`RewritePass.projections`). Without bases: what enters the block, or what the embeddings give.
        """
        ...


class WholeModel(Protocol):
    """The model as the steps before left it, for a choice that no block can make alone (`WeightPass.decide`)."""

    def views(self) -> Iterator[BlockView]:
        """Embeddings, blocks and output head in order, one in memory at a time; each is good until the next is taken.

        Nothing can be put or written: what the sweep will do is not known yet, so inputs are those of the model
        unchanged.
        """
        ...


class RunnableModel(Protocol):
    """The model as a pass may run it, with gradients, before it chooses new shapes or token gates (`choose`).

    Parts are numbered as they are stored: 0 the embeddings, 1 to n the blocks, n + 1 the output head. Calibration
    batches have no padding. Weights never take gradients; hooks that a pass sets on modules are its own to remove.
    """

    facts: ModelFacts
    device: torch.device
    generator: torch.Generator  # seeded from (run seed, step)

    @property
    def parts(self) -> int: ...

    @property
    def batches(self) -> int:
        """How many calibration batches there are."""
        ...

    def labels(self, batch: int) -> torch.Tensor | None:
        """(samples,) int64 where the data has them."""
        ...

    def module(self, path: str) -> torch.nn.Module: ...

    def loaded(self, part: int) -> AbstractContextManager[None]:
        """The part's weights are in memory inside; those of blocks no longer, embeddings and output head stay."""
        ...

    def embeddings(self, batch: int) -> torch.Tensor:
        """The stream before block 0, (samples, tokens, width) in the model's dtype."""
        ...

    def run(self, part: int, batch: int, hidden: torch.Tensor) -> torch.Tensor:
        """The stream after a loaded block; records gradients where the caller does."""
        ...

    def output_head(self, batch: int, hidden: torch.Tensor, samples: slice = ...) -> torch.Tensor:
        """The model's output for (some of) a batch's samples, whose stream after the last block is given; gradients as
        in `run`.
        """
        ...

    def views(self, bases: Callable[[PartView], list[torch.Tensor]] | None = None) -> Iterator[PartView]:
        """Embeddings, blocks and output head in order, loaded; each is good until the next is taken, none is writable.

        bases  of a block's sublayers: the stream then goes on projected onto them; None leaves it as it is
        """
        ...

    def save(self, step: int, tensors: dict[str, torch.Tensor]) -> None:
        """Make the progress of a long choice durable; only the last one is kept."""
        ...

    def saved(self) -> tuple[int, dict[str, torch.Tensor]] | None:
        """What an interrupted run saved last."""
        ...

    def warn(self, code: str, where: str, message: str) -> None:
        """Add a warning to the report."""
        ...
