"""Defines the views of the model that a pass gets: a block or another part, or the whole model before a choice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol, TypedDict, TypeVar

from compressor.model.facts import Decision, ModelFacts, Redefinition
from compressor.model.weights import Group, Producer, Stage, Weight

if TYPE_CHECKING:
    import torch

    from compressor.layers.base import Layer
    from compressor.model.residual_records import Residual, ResidualNorm, ResidualSublayer

Folded = TypeVar("Folded")
Result = TypeVar("Result", covariant=True)
SLICE_ELEMENTS = 1 << 24  # of a parameter that are in float64 at once (`PartView.change`)
State = dict[str, "torch.Tensor"]  # what a RewritePass returns for the next part; the journal saves it


class Recorded(TypedDict, total=False):
    """What reports show of a weight, by the names that `BlockView.put` and `keep` take. A pass may add its own names.

    fallback           what the pass did in place of what was asked
    output_error       relative error of the weight's outputs on the calibration data; _rtn: that of rounding to nearest
    output_error_rows  number of evenly spaced rows of the weight whose output errors were computed
    input              name of the weight for whose input the outlier features were counted
    """

    fallback: str | None
    output_error: float | None
    output_error_rtn: float | None
    output_error_rows: int
    weight_error: float | None
    table_bound: float
    input: str
    outlier_features: int
    outlier_token_share: float
    outlier_magnitude: float


class Folds(Protocol[Result]):
    """The results of `BlockView.fold`, in the order of the groups.

    Those of experts that don't fit into memory are computed each time when they are asked for. So a pass should take
    one after the other, and keep only what it needs.
    """

    @property
    def tokens(self) -> Sequence[int]:
        """Number of rows that each group has got."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Result: ...

    def __iter__(self) -> Iterator[Result]: ...


class BlockView(Protocol):
    """A part of the model as a `WeightPass` sees it: the embeddings, a block or the output head.

    Only the weights that the step selected are shown as weights.
    """

    device: torch.device
    generator: torch.Generator  # seeded from (run seed, step, part)
    decision: Decision | None

    @property
    def index(self) -> int:
        """Block number in the whole model; -1: the embeddings, the number of blocks: the output head."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of dense weights and of stored scales."""
        ...

    def stages(self, sequential: bool = True) -> list[Stage]:
        """The selected groups in forward order. sequential=False puts all of them into one stage.

        Experts of one fused parameter are separate groups of one stage, since one run of the block gives all inputs.
        """
        ...

    def functions(self) -> list[Weight]:
        """The selected functions (`Weight.is_function`), in the order of the model's modules.

        A stage whose groups have one function each can be folded like one of weights, over the inputs of the modules.
        """
        ...

    def fold(
        self, stage: Stage, start: Callable[[Group], Folded], step: Callable[[Folded, torch.Tensor], Folded]
    ) -> Folds[Folded]:
        """Run the block, as it is now, once over the calibration batches, and fold the inputs of each group.

        `step(folded, x)` gets x (tokens, in_features), or (tokens, width) for a function, on the view's device and
        without padding. It is called once per batch in a fixed order. For an expert, x has only the tokens that are
        routed to it, and `step` may never be called. For experts that don't fit into memory, `start` and `step` are
        called when a result is asked for, and again if it is asked for again (`Folds`).
        """
        ...

    def inputs(self, group: Group) -> Iterator[torch.Tensor]:
        """The inputs (tokens, in_features) of this group for each batch, as the block is now. Runs the block again."""
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
        """Replace the weight by its quantized layer. `record` (JSON values) goes to the report's row of this weight.

        A weight may be put again. This replaces the earlier layer and its row.
        raises  PassError for a name that is nearly one of `Recorded`, or that the engine sets itself
        """
        ...

    def keep(self, weight: Weight, **record: Any) -> None:
        """Leave the weight dense, and report this in its row. `record` is the same as in `put`."""
        ...

    def producers(self) -> list[Producer]:
        """The producers of the selected weights' inputs, which can be scaled feature by feature, in forward order.

        Needs `Traits.rescales`. A group whose input has no such producer isn't listed.
        """
        ...

    def read(self, parameter: str) -> torch.Tensor:
        """A copy of a parameter of this part as it is now, in its own dtype: a norm's weight or bias, or any matrix."""
        ...

    def write(self, parameter: str, value: torch.Tensor) -> None:
        """Set a parameter of this part that stays dense to a new value of the same shape, rounded to its own dtype.

        Everything that runs later uses the new value. The artifact holds it, and the manifest has its distance from the
        source's value.
        """
        ...

    @property
    def batches(self) -> int:
        """How many calibration batches there are."""
        ...

    def progress(self, what: str, share: float | None = None) -> None:
        """Show that the pass works on `what`, such as a weight's name, and how much of it is done, from 0 to 1.

        Call it wherever more than a second may have passed. It changes nothing but the display.
        """
        ...

    def output(self, batch: int, stand_ins: Mapping[Weight, torch.nn.Module] | None = None) -> torch.Tensor:
        """The output of the block, as it is now, for a calibration batch, (samples, tokens, width).

        stand_ins  modules to call once in place of those that hold these weights (no experts), including their biases;
                   with stand-ins, gradients flow to the tensors by which these multiply
        """
        ...

    def warn(self, code: str, where: str, message: str, /, **data: Any) -> None:
        """Add a warning to the report. data: the values of the message by name, for programs"""
        ...


class PartView(Protocol):
    """A part of the model as a `RewritePass` sees it: its parameters, and the activations of the residual stream."""

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
        """Path of the block's module."""
        ...

    @property
    def sublayers(self) -> tuple[ResidualSublayer, ...]:
        """The sublayers that read from the residual stream and add to it; none in embeddings and output head."""
        ...

    def read(self, parameter: str) -> torch.Tensor:
        """A parameter as it is now, float64."""
        ...

    def write(self, parameter: str, value: torch.Tensor) -> None:
        """Set its new value, of the shape that `redefine` promised. It is rounded once, when the part is stored."""
        ...

    def change(self, parameter: str, change: Callable[[torch.Tensor], torch.Tensor], axis: int) -> None:
        """Set its new value to `change` of the present one, as `write`, but without a whole copy in float64.

        change  (slice of the parameter in float64, of about SLICE_ELEMENTS) -> its new value. Slices have the whole of
                `axis`, which alone may get another length. It is called when the part is stored, and must depend on
                nothing that changes
        """
        ...

    def warn(self, code: str, where: str, message: str, /, **data: Any) -> None:
        """Add a warning to the report. data: the values of the message by name, for programs"""
        ...

    def signals(self, norm: ResidualNorm) -> Iterator[torch.Tensor]:
        """Inputs of a norm of this part in the unchanged model, (tokens, width) for each calibration batch."""
        ...

    def inputs(self, module: str) -> Iterator[torch.Tensor]:
        """Inputs of a module of this part in the unchanged model, (tokens, features) for each calibration batch.

        While parts are written, this is available only if the redefinition `follows`.
        """
        ...

    def inputs_of(self, modules: Sequence[str]) -> Iterator[list[torch.Tensor]]:
        """`inputs` of several modules, for each calibration batch from one run of this part."""
        ...

    def progress(self, what: str, share: float | None = None) -> None:
        """Show what the pass works on in this part, and how much of it is done. See `BlockView.progress`."""
        ...

    def states(self) -> list[torch.Tensor]:
        """The residual stream before this part, (samples, tokens, width) for each calibration batch, in the model's
        dtype. For the embeddings: their output.
        """
        ...

    def projected(self, bases: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        """The residual stream after the first len(bases) sublayers of this part, (tokens, width) float64 per batch.

        At each of these sublayers the stream is projected onto the columns (width, w) of its basis, as in the parts
        before (`RewritePass.projections`). Without bases: the stream before the block, or the output of the embeddings.
        """
        ...


class WholeModel(Protocol):
    """The model after the earlier steps, for a choice over more than one block (`WeightPass.decide`)."""

    def views(self) -> Iterator[BlockView]:
        """Embeddings, blocks and output head in order, one in memory at a time. Each is valid until the next is taken.

        Nothing can be put or written. It isn't known yet what the sweep will do, so inputs are those of the unchanged
        model.
        """
        ...


class RunnableModel(Protocol):
    """The model, which a pass may run with gradients before it chooses new shapes or token gates (`choose`).

    Numbers of parts: 0 the embeddings, 1 to n the blocks, n + 1 the output head. Calibration batches have no padding.
    Weights never get gradients. A pass must remove the hooks that it sets on modules.
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
        """Labels (samples,) int64; None if the data has none."""
        ...

    def module(self, path: str) -> torch.nn.Module: ...

    def loaded(self, part: int) -> AbstractContextManager[None]:
        """The part's weights are in memory inside this context. Embeddings and output head stay in memory after it,
        and so do blocks as `keep_blocks` allows.
        """
        ...

    def keep_blocks(self, nbytes: int) -> None:
        """Keep blocks in memory once they are loaded, those that are loaded first, up to so many bytes together."""
        ...

    def embeddings(self, batch: int) -> torch.Tensor:
        """The residual stream before block 0, (samples, tokens, width) in the model's dtype."""
        ...

    def run(self, part: int, batch: int, hidden: torch.Tensor) -> torch.Tensor:
        """The residual stream after a loaded block. Gradients are recorded if the caller records them."""
        ...

    def output_head(self, batch: int, hidden: torch.Tensor, samples: slice = ...) -> torch.Tensor:
        """The model's output for some or all samples of a batch, from the residual stream after the last block.
        Gradients are as in `run`.
        """
        ...

    def views(self, bases: Callable[[PartView], list[torch.Tensor]] | None = None) -> Iterator[PartView]:
        """Embeddings, blocks and output head in order, loaded. Each is valid until the next is taken; none is writable.

        bases  returns the bases of a block's sublayers, onto which the stream is then projected; None: no projection
        """
        ...

    def save(self, step: int, tensors: dict[str, torch.Tensor]) -> None:
        """Save the progress of a long choice. Only the last saved progress is kept."""
        ...

    def saved(self) -> tuple[int, dict[str, torch.Tensor]] | None:
        """The progress that an interrupted run saved last."""
        ...

    def progress(self, what: str, share: float | None = None) -> None:
        """Show what a long choice is doing, and how much of it is done. See `BlockView.progress`."""
        ...

    def warn(self, code: str, where: str, message: str, /, **data: Any) -> None:
        """Add a warning to the report. data: the values of the message by name, for programs"""
        ...
