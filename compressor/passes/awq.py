"""AWQ: scale the inputs of weights so that rounding spares the columns that large activations meet.

Paper: Lin, Tang, Tang, Yang, Chen, Wang, Xiao, Dang, Gan, Han 2023, "AWQ: Activation-aware Weight Quantization for LLM
Compression and Acceleration", arXiv 2306.00978.

Idea (section 3.2). A column that is multiplied by s > 1 before rounding, and whose input is divided by s, has an error
about s times smaller, as long as the group's largest value stays. The columns that matter are those of large inputs:

    s_j = m_j^alpha,  m_j = mean |x_j| over the calibration tokens,  alpha from a grid on [0, 1)

s is divided by sqrt(max s * min s), and alpha is the one with the least square error of the block's output while the
weights that read this input are rounded and all others are not. The division goes into what produces the input: a
norm's gain, or the rows of the matrix before (`BlockView.producers`). So nothing new runs at inference. Weights whose
input has no such producer are rounded as they are.

With `rounding: nearest` this pass rounds the scaled weights itself. With `rounding: none` they stay dense, and a later
step of the same sweep rounds them, such as gptq.

Where we differ from the paper's code, and why
- The error is that of the whole block's output for every producer, not that of the sub-block behind it: the same
  forward pass, and errors that cancel later count as such.
- Ranges of groups are searched for least error (`scale_search: mse`, as in rtn and gptq) in place of its search for
  clipping, during the search for alpha too.
- Features that one row makes, as under the query heads that share a value head, have one factor.

Cost per block: for each producer `steps` runs of the block on `search_batches` batches, and as many roundings of the
weights that read it. Memory: these weights once more in float32, and the block's outputs on those batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import Field

from compressor.bounds import Count
from compressor.errors import ShapeError
from compressor.lazy import torch
from compressor.methods.quantization.packed_codes import GroupSize, group_width, packed_spec, store, stored_form
from compressor.methods.quantization.uniform_grid import dequantize, find_grid, quantize
from compressor.model.weights import part_of
from compressor.protocol import BlockView, Group, Producer, Stage, Traits, Weight, WeightPass

SMALLEST = 1e-4  # mean magnitudes are not below it: a feature that is always zero would ask for an endless factor


class AWQ(WeightPass):
    """Scale weights by the size of their inputs, then round them to nearest or leave that to a later step."""

    title: ClassVar[str] = "Weights scaled by the size of their inputs before rounding, at no cost at inference"
    paper: ClassVar[str] = "Lin et al. 2023, arXiv 2306.00978"

    bits: Literal[2, 3, 4, 8] = Field(4, description="Bits per weight, of the rounding that the scales are chosen for.")
    group_size: GroupSize = Field(128, description="Inputs that share a scale; -1 is one scale per row.")
    symmetric: bool = Field(True, description="Grid centred on zero. False stores a zero point per group.")
    scale_search: Literal["minmax", "mse"] = Field("mse", description="Range by extremes, or shrunk for least error.")
    rounding: Literal["nearest", "none"] = Field(
        "nearest", description="Round the scaled weights here, or leave them dense for a later step, such as gptq."
    )
    steps: Count = Field(20, le=1000, description="Values of alpha that are tried, evenly spaced from 0.")
    search_batches: Count = Field(1, description="Calibration batches on which the block's outputs are compared.")

    @property
    def traits(self) -> Traits:
        stores = stored_form(self.bits, self.symmetric) if self.rounding == "nearest" else None
        return Traits(reads="inputs", stores=stores, rescales=True)

    def stored(self, weight: Weight) -> str | None:
        return self.traits.stores or "dense"

    def spec(self, weight: Weight) -> dict[str, Any]:
        return packed_spec(weight, self.bits, self.group_size, self.symmetric)

    def check(self, weights: Sequence[Weight]) -> list[tuple[str, dict[str, Any]]]:
        """Groups that don't fit; where this pass rounds, `plan` finds them by `spec`."""
        problems: list[tuple[str, dict[str, Any]]] = []
        for weight in weights if self.rounding == "none" else ():
            try:
                self.spec(weight)
            except ShapeError as error:
                problems.append((f"{weight.name}: {error.what} {error.hint}", error.data))
        return problems

    def block(self, view: BlockView) -> None:
        producers = view.producers()
        batches = range(min(self.search_batches, view.batches)) if producers else ()
        dense = [view.output(batch) for batch in batches]
        records: dict[str, dict[str, Any]] = {}
        for producer in producers:
            found = self._search(view, producer, dense)
            fold(view, producer, found.factors)
            for weight in _readers(view, producer):
                records[weight.name] = found.record
        for stage in view.stages(sequential=False):
            for group in stage:
                for weight in group:
                    self._finish(view, weight, records.get(weight.name, {"alpha": None}))

    def _search(self, view: BlockView, producer: Producer, dense: Sequence[torch.Tensor]) -> Scaling:
        """The exponent with the least error of the block's output, and its factors."""
        magnitude = magnitudes(view, producer)
        weights = _readers(view, producer)
        before = {weight.parameter: view.read(weight.parameter) for weight in weights}
        tried: list[tuple[float, float, torch.Tensor]] = []
        for step in range(self.steps):
            alpha = step / self.steps
            factors = factors_of(magnitude, alpha)
            columns = factors[_slices(producer, factors.device)]
            for name, value in before.items():
                rounded = value.clone()
                for weight in weights:
                    if weight.parameter == name:
                        part_of(rounded, weight).copy_(self._rounded(part_of(value, weight).float(), columns, view))
                view.write(name, rounded)
            error = sum(float((view.output(b) - wanted).float().square().sum()) for b, wanted in enumerate(dense))
            tried.append((error, alpha, factors))
        for name, value in before.items():
            view.write(name, value)
        error, alpha, factors = min(tried, key=lambda one: one[0])
        power = max(sum(float(wanted.float().square().sum()) for wanted in dense), 1e-30)
        figures = {"block_error": (error / power) ** 0.5, "block_error_unscaled": (tried[0][0] / power) ** 0.5}
        return Scaling(factors, {"alpha": alpha, "scaled_in": producer.name, **figures})

    def _rounded(self, matrix: torch.Tensor, columns: torch.Tensor, view: BlockView) -> torch.Tensor:
        """What a weight (out, in) float32 is after scaling, rounding and scaling back."""
        width = matrix.shape[1] if self.group_size == -1 else self.group_size
        grouped = (matrix * columns).view(len(matrix), -1, width)
        grid = find_grid(grouped, self.bits, self.symmetric, self.scale_search, view.dtype)
        return dequantize(quantize(grouped, grid), grid).view_as(matrix) / columns

    def _finish(self, view: BlockView, weight: Weight, record: dict[str, Any]) -> None:
        """Round a weight to nearest, as it is scaled by now, or keep it for the step that rounds it."""
        if self.rounding == "none":
            view.keep(weight, **record)
            return
        matrix = view.matrix(weight)
        grouped = matrix.view(len(matrix), -1, group_width(weight, self.group_size))
        grid = find_grid(grouped, self.bits, self.symmetric, self.scale_search, view.dtype)
        codes = quantize(grouped, grid)
        error = (dequantize(codes, grid) - grouped).norm() / matrix.norm().clamp(min=1e-30)
        store(view, weight, codes, grid, self.group_size, {"weight_error": float(error), **record})


@dataclass(frozen=True)
class Scaling:
    """factors  (slices,) float32, one for each slice of the producer
    record   for the report's rows of the weights that read it
    """

    factors: torch.Tensor
    record: dict[str, Any]


@dataclass
class Magnitude:
    """Sum of |x| of each feature (features,) float64 over so many tokens."""

    total: torch.Tensor
    tokens: int = 0

    def add(self, x: torch.Tensor) -> Magnitude:
        return Magnitude(self.total + x.abs().sum(0, dtype=torch.float64), self.tokens + len(x))


def magnitudes(view: BlockView, producer: Producer) -> torch.Tensor:
    """Mean |x| of what the producer makes, over the calibration tokens: (slices,) float64, the mean over the features
    of each slice; 1 for slices that make none.
    """
    read = {consumer.parameter for consumer in producer.consumers}
    stage: Stage = next(
        found
        for stage in view.stages()
        if (found := tuple(group for group in stage if group.weights[0].parameter in read))
    )

    def start(group: Group) -> Magnitude:
        return Magnitude(torch.zeros(group.in_features, dtype=torch.float64, device=view.device))

    seen = view.fold(stage, start, Magnitude.add)
    mean = sum((one.total for one in seen[1:]), seen[0].total) / max(1, sum(one.tokens for one in seen))
    slices = _slices(producer, mean.device)
    count = max(producer.slices) + 1
    features = torch.bincount(slices, minlength=count)
    total = torch.zeros(count, dtype=torch.float64, device=mean.device).index_add_(0, slices, mean)
    return torch.where(features > 0, total / features.clamp(min=1), 1.0)


def factors_of(magnitude: torch.Tensor, alpha: float) -> torch.Tensor:
    """s = m^alpha over sqrt(max s * min s), (slices,) float32; all 1 for alpha 0."""
    raw = magnitude.clamp(min=SMALLEST) ** alpha
    return (raw / (raw.max() * raw.min()).sqrt()).float()


def fold(view: BlockView, producer: Producer, factors: torch.Tensor) -> None:
    """Divide what makes the features by their factors (slices,), and multiply what reads them."""
    slices = _slices(producer, factors.device)
    used = torch.zeros(len(factors), dtype=torch.bool, device=factors.device)
    used[slices] = True
    for maker in producer.makers:
        value = view.read(maker.parameter)
        by = torch.ones(value.shape[maker.axis], device=factors.device)
        by[: len(factors)] = torch.where(used, factors, 1.0)
        view.write(maker.parameter, (value.float() + maker.offset) / _along(by, maker.axis, value) - maker.offset)
    for consumer in producer.consumers:
        value = view.read(consumer.parameter)
        view.write(consumer.parameter, value.float() * _along(factors[slices], consumer.axis, value))


def _along(factors: torch.Tensor, axis: int, value: torch.Tensor) -> torch.Tensor:
    """Factors of one axis in a shape that multiplies a whole parameter."""
    return factors.view([-1 if at == axis else 1 for at in range(value.dim())])


def _slices(producer: Producer, device: torch.device) -> torch.Tensor:
    return torch.tensor(producer.slices, device=device)


def _readers(view: BlockView, producer: Producer) -> list[Weight]:
    """The selected weights that read what the producer makes."""
    read = {consumer.parameter for consumer in producer.consumers}
    return [w for stage in view.stages() for group in stage for w in group if w.parameter in read]
