"""Runs a model block by block with masks on the units of its sub-blocks, and computes the masks' gradients.

The forward pass keeps only the stream before each block. The backward pass visits the blocks in reverse order and runs
each one again with gradients. So the memory is that of one block and of one stream per block, and a block's weights are
loaded twice per step. Only the masks have gradients, not the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from compressor.errors import PassError
from compressor.lazy import torch
from compressor.methods.pruning.size_budget import STREAM

if TYPE_CHECKING:
    from compressor.model.norms import Norm
    from compressor.protocol import RunnableModel


OutputHead = Callable[[slice], "torch.Tensor"]  # some samples of a batch -> the masked model's output
# (batch, stream after the last block, output head) -> losses (samples,) of some samples at a time, in order
Loss = Callable[[int, "torch.Tensor", OutputHead], Iterator["torch.Tensor"]]
KEPT_BLOCK_BYTES = 1 << 29  # of blocks that stay in memory between two runs of the model
KEPT_OUTPUT_BYTES = 1 << 29  # of the dense model's outputs
HEAD_TOKENS = 512  # tokens that pass the output head at once: for a vocabulary of 128,000 their logits need 262 MB


@dataclass(frozen=True)
class MaskedProjection:
    """The output projection of a sub-block, which reads its units.

    name     of the sub-block
    part     number of its part of the model (1 is the first block)
    columns  (features,) int64: the unit of each column of the module's input
    switch   name of the mask of the whole sub-block, if it has one
    """

    name: str
    part: int
    module: str
    columns: torch.Tensor
    switch: str | None = None


@dataclass(frozen=True)
class StreamNorm:
    """A norm that reads the residual stream, and the number of its part of the model."""

    part: int
    module: str
    norm: Norm


@dataclass(frozen=True)
class Places:
    """The places of the masks."""

    projections: tuple[MaskedProjection, ...]
    norms: tuple[StreamNorm, ...] = ()

    def names(self, part: int) -> list[str]:
        found = [
            name
            for projection in self.projections
            if projection.part == part
            for name in (projection.name, projection.switch)
        ]
        return [name for name in found if name is not None]


@dataclass
class Draw:
    """One calibration batch of a step, and its masks (samples, units), by name. A missing mask changes nothing."""

    batch: int
    masks: dict[str, torch.Tensor]
    entered: list[torch.Tensor] = field(default_factory=list)  # the stream before each block, and after the last


def projection_columns(units: Sequence[Sequence[int]]) -> torch.Tensor:
    """The unit of each column, from the columns of each unit."""
    unit_of = {column: unit for unit, columns in enumerate(units) for column in columns}
    assert sorted(unit_of) == list(range(len(unit_of))), "every column belongs to one unit"
    return torch.tensor([unit_of[column] for column in range(len(unit_of))])


def masked_norm(
    x: torch.Tensor, z: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, norm: Norm
) -> torch.Tensor:
    """The norm of a stream whose channels are multiplied by z.

    rms    over the old width, with dropped channels as zeros
    layer  mean and variance weighted by z: over the kept channels only if z is 0 or 1

    x        (samples, tokens, width)
    z        (samples, 1, width)
    returns  x's shape; channels with z = 0 are 0
    """
    if norm.kind == "rms":
        y = x * z
        squares = y.square()
        mean = squares.mean(-1, keepdim=True) if norm.divisor is None else squares.sum(-1, keepdim=True) / norm.divisor
        y = y * torch.rsqrt(mean + norm.eps)
    else:
        weights = z.clamp(min=0)  # a negative mean is no share
        total = weights.sum(-1, keepdim=True).clamp(min=1e-6)
        y = x - (x * weights).sum(-1, keepdim=True) / total
        y = y * torch.rsqrt((y.square() * weights).sum(-1, keepdim=True) / total + norm.eps) * z
    if weight is not None:
        y = y * (norm.offset + weight)
    return y if bias is None else y + bias * z


@contextmanager
def masked(model: RunnableModel, part: int, masks: Mapping[str, torch.Tensor], places: Places) -> Iterator[None]:
    """Multiply the inputs of a part's output projections by their masks while the part runs."""
    with ExitStack() as stack:
        for projection in places.projections:
            if projection.part == part and (z := _expanded(projection, masks)) is not None:
                module = model.module(projection.module)
                stack.callback(module.register_forward_pre_hook(_multiplied(z)).remove)
        for place in places.norms:
            if place.part == part and STREAM in masks:
                hook = _renormed(masks[STREAM].unsqueeze(1), place.norm)
                stack.callback(model.module(place.module).register_forward_hook(hook).remove)
        yield


def masked_output_head(model: RunnableModel, draw: Draw, places: Places, last: torch.Tensor) -> OutputHead:
    """The output of a draw from its stream after the last block."""

    def output_head(samples: slice) -> torch.Tensor:
        rows = {name: z[samples] for name, z in draw.masks.items()}
        with masked(model, model.parts - 1, rows, places):
            return model.output_head(draw.batch, last[samples], samples)

    return output_head


def run_blocks(model: RunnableModel, draws: Sequence[Draw], places: Places, streams: Sequence[torch.Tensor]) -> None:
    """Run all blocks without gradients. Every draw keeps the stream before each of them."""
    for draw, stream in zip(draws, streams, strict=True):
        draw.entered = [stream]
    for part in range(1, model.parts - 1):
        with model.loaded(part), torch.no_grad():
            for draw in draws:
                fixed = {name: z.detach() for name, z in draw.masks.items()}
                with masked(model, part, fixed, places):
                    draw.entered.append(model.run(part, draw.batch, draw.entered[-1]))


def gradients(
    model: RunnableModel,
    draws: Sequence[Draw],
    places: Places,
    streams: Sequence[torch.Tensor],
    loss: Loss,
    weight: float = 1.0,
    watched: Callable[[int], AbstractContextManager[None]] = lambda part: nullcontext(),
) -> float:
    """The sum of the losses times `weight`. Gradients are added to `.grad` of the draws' masks, which are leaves.

    watched  entered for each block while it runs with gradients
    """
    run_blocks(model, draws, places, streams)
    total = 0.0
    slopes: list[torch.Tensor] = []
    output_head = model.parts - 1
    with model.loaded(output_head), torch.enable_grad():
        for draw in draws:
            last = draw.entered[-1].detach().requires_grad_()
            for losses in loss(draw.batch, last, masked_output_head(model, draw, places, last)):
                whole = weight * losses.sum()
                whole.backward()
                total += float(whole.detach())
            assert last.grad is not None
            slopes.append(last.grad)
    for part in range(output_head - 1, 0, -1):
        with model.loaded(part), watched(part), torch.enable_grad():
            for number, draw in enumerate(draws):
                before = draw.entered[part - 1].detach().requires_grad_()
                with masked(model, part, draw.masks, places):
                    after = model.run(part, draw.batch, before)
                torch.autograd.backward(after, slopes[number])
                assert before.grad is not None
                slopes[number] = before.grad
                draw.entered.pop()
    return total


def check_batches(model: RunnableModel) -> None:
    """raises PassError if there is no calibration batch"""
    if not model.batches:
        raise PassError(
            "no calibration batch was given",
            where="data",
            hint="Set data.source and data.samples in the recipe.",
            data={"reason": "no-batch"},
        )


@dataclass(frozen=True)
class Dense:
    """The dense model as the reference: the stream of each batch before and after the blocks."""

    before: list[torch.Tensor]
    after: list[torch.Tensor]

    @classmethod
    def of(cls, model: RunnableModel) -> Dense:
        """raises PassError if there is no calibration batch"""
        check_batches(model)
        with model.loaded(0), torch.no_grad():
            before = [model.embeddings(batch) for batch in range(model.batches)]
        draws = [Draw(batch, {}) for batch in range(model.batches)]
        run_blocks(model, draws, Places(()), before)
        return cls(before, [draw.entered[-1] for draw in draws])


def distilled(model: RunnableModel, dense: Dense) -> Loss:
    """Distance of the output from the dense model's: KL(dense || masked) of logits, summed over a sample's predictions.

    For a model without an output head it is the squared error of the last hidden states divided by their variance,
    summed over tokens and averaged over channels. Up to KEPT_OUTPUT_BYTES of the dense model's outputs are kept from
    call to call, and the others are computed each time.
    """
    kept: dict[tuple[int, int], torch.Tensor] = {}

    def dense_output(batch: int, part: slice) -> torch.Tensor:
        if (batch, part.start) in kept:
            return kept[batch, part.start]
        with torch.no_grad():
            output = model.output_head(batch, dense.after[batch][part], part)
        if sum(one.nbytes for one in kept.values()) + output.nbytes <= KEPT_OUTPUT_BYTES:
            kept[batch, part.start] = output
        return output

    def loss(batch: int, last: torch.Tensor, output_head: OutputHead) -> Iterator[torch.Tensor]:
        for part in slices(last):
            wanted = dense_output(batch, part)
            found = output_head(part)
            yield (_squared_error if is_hidden(wanted, last) else _divergence)(found, wanted)

    return loss


def labelled(model: RunnableModel) -> Loss:
    """Cross-entropy with the data's labels. raises PassError if there are none, or they don't fit"""

    def loss(batch: int, last: torch.Tensor, output_head: OutputHead) -> Iterator[torch.Tensor]:
        labels = model.labels(batch)
        if labels is None:
            raise PassError(
                "the calibration data has no labels",
                where="loss: task",
                hint="Set loss: distill, or use data with a label column and data.pack: false.",
                data={"reason": "no-labels"},
            )
        for part in slices(last):
            found = wide(output_head(part))
            wanted = labels[part].to(found.device)
            if found.dim() != 2 or int(wanted.max()) >= found.shape[-1] or int(wanted.min()) < 0:
                shape = "x".join(map(str, found.shape[1:]))
                raise PassError(
                    f"labels up to {int(labels.max())} don't fit outputs of {shape} for each sample",
                    where="loss: task",
                    hint="Set loss: distill, or use labels that the model's output head was trained for.",
                    data={"reason": "labels", "largest": int(labels.max()), "shape": list(found.shape[1:])},
                )
            yield torch.nn.functional.cross_entropy(found, wanted, reduction="none")

    return loss


def losses(model: RunnableModel, draw: Draw, places: Places, last: torch.Tensor, loss: Loss) -> torch.Tensor:
    """(samples,) without gradients, from the stream after the last block."""
    with torch.no_grad():
        fixed = Draw(draw.batch, {name: z.detach() for name, z in draw.masks.items()})
        return torch.cat(
            [part.detach() for part in loss(draw.batch, last, masked_output_head(model, fixed, places, last))]
        )


def predictions(model: RunnableModel, dense: Dense, batch: int) -> int:
    """Number of predictions of the model for a batch: one per token, or one per sample."""
    with torch.no_grad():
        one = model.output_head(batch, dense.after[batch][:1], slice(0, 1))
    return len(dense.after[batch]) * (one.shape[1] if one.dim() == 3 else 1)


def slices(stream: torch.Tensor) -> Iterator[slice]:
    at_once = max(1, HEAD_TOKENS // stream.shape[1])
    for start in range(0, len(stream), at_once):
        yield slice(start, start + at_once)


def wide(output: torch.Tensor) -> torch.Tensor:
    """The output in float32 or wider."""
    return output if output.dtype == torch.float64 else output.float()


def is_hidden(output: torch.Tensor, stream: torch.Tensor) -> bool:
    """Whether a model's output is its hidden states, which have the stream's width, and not logits."""
    return output.dim() == 3 and output.shape[-1] == stream.shape[-1]


def _divergence(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    from compressor.methods.divergence_gradient import divergences  # it imports torch, and settings load without torch

    return divergences(wanted, found).reshape(len(found), -1).sum(1)


def _squared_error(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    found, wanted = wide(found), wide(wanted)
    return (found - wanted).square().mean(-1).sum(1) / wanted.var()


def _expanded(projection: MaskedProjection, masks: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """(samples, features): the mask of each column of the output projection's input."""
    z = masks[projection.name][:, projection.columns] if projection.name in masks else None
    if projection.switch is None or projection.switch not in masks:
        return z
    switch = masks[projection.switch]
    return switch.expand(-1, len(projection.columns)) if z is None else z * switch


def _multiplied(z: torch.Tensor) -> Callable[..., Any]:
    def hook(_module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0]
        # (samples, tokens, features), or samples and tokens flattened
        apart = x.reshape(len(z), -1, x.shape[-1])
        return ((apart * z.to(x.dtype).unsqueeze(1)).view(x.shape), *args[1:])

    return hook


def _renormed(z: torch.Tensor, norm: Norm) -> Callable[..., Any]:
    def hook(module: Any, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        x = args[0]
        work = torch.float64 if x.dtype == torch.float64 else torch.float32
        weight, bias = (
            None if (value := getattr(module, name, None)) is None else value.to(work) for name in ("weight", "bias")
        )
        apart = x.reshape(len(z), -1, x.shape[-1]).to(work)
        found = masked_norm(apart, z.to(work), weight, bias, norm)
        return found.view(x.shape).to(output.dtype)

    return hook
