"""Measures the curvature of the loss along each mask at the dense model, from one backward pass.

A mask z on a unit's signal x changes the loss by about 1/2 c (z - 1)². For the distance from the dense model's outputs,
c is the Fisher information. It is the mean square of the slope of a log-likelihood whose labels are drawn from the
model's own outputs:

    c = 1/N sum over positions p of (sum over the unit's features of x_p * dL/dx_p)²     N predictions

Positions are taken one by one, as if each had a mask of its own. A sum over a sample's positions before the square
would be the curvature of one mask for all of them, but has far fewer terms, and ranks units worse (docs/passes/vtrans).
Channels of the residual stream have one mask for a sample, since they are read in many places.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from compressor.errors import PassError
from compressor.lazy import torch
from compressor.methods.pruning.masked_forward import (
    Draw,
    Loss,
    MaskedProjection,
    OutputHead,
    Places,
    gradients,
    is_hidden,
    labelled,
    slices,
    wide,
)
from compressor.methods.pruning.size_budget import STREAM
from compressor.methods.pruning.variational_masks import seeded

if TYPE_CHECKING:
    from compressor.protocol import RunnableModel

ROWS = 64  # predictions whose classes are drawn at once


class Curvature:
    """Sums over the calibration batches that have been run.

    total        mask -> (units,) float32: sum of squared slopes
    predictions  outputs of the model so far, one for a token or one for a sample
    """

    def __init__(self, sizes: Mapping[str, int], is_labelled: bool, seed: int) -> None:
        self.total = {name: torch.zeros(count) for name, count in sizes.items()}
        self.predictions = 0
        self._is_labelled, self._seed = is_labelled, seed

    def add(self, model: RunnableModel, places: Places, streams: Mapping[int, torch.Tensor]) -> None:
        """Run batches forwards and backwards. raises PassError for slopes that are NaN or infinite

        streams  batch -> its residual stream before the first block
        """
        draws = [Draw(batch, {}) for batch in streams]
        if STREAM in self.total:
            for draw, stream in zip(draws, streams.values(), strict=True):
                draw.masks[STREAM] = torch.ones(len(stream), len(self.total[STREAM]), device=model.device)
                draw.masks[STREAM].requires_grad_()
        loss = self._counted(labelled(model) if self._is_labelled else drawn_labels(model, self._seed))
        watched = partial(self._watched, model, places)
        gradients(model, draws, places, list(streams.values()), loss, watched=watched)
        for draw in draws:
            for name, z in draw.masks.items():
                assert z.grad is not None
                self.total[name] += z.grad.square().sum(0).cpu()
        if not all(bool(torch.isfinite(total).all()) for total in self.total.values()):
            raise PassError(
                "the slopes of the loss are NaN or infinite on the calibration data",
                where="mask curvature",
                hint="Set model.dtype: float32, or check the model's outputs on this data.",
                data={"reason": "not-finite", "step": 0, "returns": 0},
            )

    def mean(self) -> torch.Tensor:
        """(all units,) per prediction, in the order of the masks."""
        return torch.cat(list(self.total.values())) / max(1, self.predictions)

    def tensors(self) -> dict[str, torch.Tensor]:
        sums = {f"curvature_{number}": total.clone() for number, total in enumerate(self.total.values())}
        return {"predictions": torch.tensor(self.predictions), **sums}

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.predictions = int(tensors["predictions"])
        self.total = {name: tensors[f"curvature_{number}"] for number, name in enumerate(self.total)}

    def _counted(self, loss: Loss) -> Loss:
        def counted(batch: int, last: torch.Tensor, output_head: OutputHead) -> Iterator[torch.Tensor]:
            def shaped(samples: slice) -> torch.Tensor:
                output = output_head(samples)
                self.predictions += len(output) * (output.shape[1] if output.dim() == 3 else 1)
                return output

            yield from loss(batch, last, shaped)

        return counted

    @contextmanager
    def _watched(self, model: RunnableModel, places: Places, part: int) -> Iterator[None]:
        """Add the squared slopes of a part's masks while the part runs backwards."""
        with ExitStack() as stack:
            for projection in places.projections:
                if projection.part == part and {projection.name, projection.switch} & self.total.keys():
                    hook = self._slopes_added(projection)
                    stack.callback(model.module(projection.module).register_forward_pre_hook(hook).remove)
            yield

    def _slopes_added(self, projection: MaskedProjection) -> Callable[..., Any]:
        is_one_each = bool((projection.columns.diff() == 1).all())  # a unit is a column
        columns = None if is_one_each else projection.columns

        def add(slope: torch.Tensor, x: torch.Tensor) -> None:
            each = (slope.float() * x.float()).flatten(0, -2)  # (positions, features)
            if projection.switch in self.total:
                self.total[projection.switch] += each.sum(1).square().sum().cpu()
            if projection.name in self.total:
                total = self.total[projection.name]
                if columns is not None:
                    grouped = each.new_zeros(len(each), len(total))
                    each = grouped.index_add_(1, columns.to(each.device), each)
                total += each.square_().sum(0).cpu()

        def hook(_module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
            x = args[0]
            if not x.requires_grad:  # it doesn't depend on the block's input
                return args
            own = x.view_as(x)  # its slope is that of this projection alone
            own.register_hook(lambda slope: add(slope, x.detach()))
            return (own, *args[1:])

        return hook


def drawn_labels(model: RunnableModel, seed: int) -> Loss:
    """The slope of -log-likelihood of labels drawn from the model's own outputs, times these outputs, for each sample.

    So its gradient is that of the likelihood, whose mean square is the second derivative of `distilled` at the dense
    model. For hidden states the labels are normal numbers around them, with the variance by which `distilled` divides.
    """

    def loss(batch: int, last: torch.Tensor, output_head: OutputHead) -> Iterator[torch.Tensor]:
        generator = seeded(seed, "labels", batch)
        for part in slices(last):
            found = wide(output_head(part))
            if is_hidden(found, last):
                slope = torch.randn(found.shape, generator=generator).to(found)
                slope *= math.sqrt(2 / found.shape[-1]) / found.detach().std()
            else:
                slope = likelihood_slope(found.detach(), generator)
            yield torch.einsum("ni,ni->n", found.flatten(1), slope.flatten(1))

    return loss


def likelihood_slope(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """p - one-hot of a class that is drawn from p = softmax, for each prediction; its covariance is diag(p) - p p^T.

    logits  (..., classes)
    """
    slope = logits.softmax(-1)
    for row in slope.flatten(0, -2).split(ROWS):
        cumulated = row.cumsum(-1)
        drawn = torch.rand(len(row), 1, generator=generator).to(row) * cumulated[:, -1:]
        label = torch.searchsorted(cumulated, drawn, right=True).clamp_(max=row.shape[1] - 1)
        row.scatter_add_(1, label, row.new_full(label.shape, -1.0))
    return slope
