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

With `rounding: nearest` this pass rounds the scaled weights itself. With `rounding: later` they stay dense, and a later
step with error feedback, gptq, rounds them. Such a step makes up for most of an error by the columns that come after,
so scales that are best for rounding to nearest are too strong for it. What it leaves of the rounding error e_j of a
column j is (e_j / U_jj)^2, with U as in gptq (Uᵀ U = H⁻¹, columns by decreasing diag(H)). Alpha is searched for that.

Where we differ from the paper's code, and why
- The error is that of the whole block's output for every producer, not that of the sub-block behind it: the same
  forward pass, and errors that cancel later count as such.
- Ranges of groups are searched for least error (`scale_search: mse`, as in rtn and gptq) in place of its search for
  clipping, during the search for alpha too.
- Features that one row makes, as under the query heads that share a value head, have one factor.
- A gain below 1 % of the square error is no reason to scale: it is within what rounding moves by chance.
- The search for a step with error feedback is ours; the paper composes with GPTQ by its own scales.

Cost per block: for each producer one run of the block up to the weights that read it. With `rounding: nearest`, `steps`
roundings of these weights, and as many runs of the block on `search_batches` batches. With `rounding: later`, `steps`
roundings of 512 of their rows, the second moments of their n inputs (tokens·n²) and a Cholesky factor (n³/3). Memory:
these weights once more in float32, and the block's outputs on those batches, or 8·n² bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NotRequired, TypedDict

from pydantic import Field

from compressor.bounds import Count
from compressor.errors import ShapeError
from compressor.lazy import torch
from compressor.methods.quantization.hessian import Gram
from compressor.methods.quantization.packed_codes import GroupSize, packed_params, quantization_format, store_nearest
from compressor.methods.quantization.uniform_grid import dequantize, find_grid, quantize
from compressor.model.weights import part_of
from compressor.protocol import BlockView, DataSize, Producer, Stage, Traits, Weight, WeightPass, Work
from compressor.protocol.work import cholesky

MIN_GAIN = 0.01  # of the square error; on the demo model at 3 bits smaller gains moved perplexity both ways
PERCDAMP = 0.01  # as gptq's default
SEARCHED_ROWS = 512  # of a weight, before gptq: errors of rows are alike, so a part of them orders the exponents
PASSES_OVER_VALUES = 6  # beside the search: scaled, rounded and written
PASSES_OF_PACKING = 80  # of a weight that is rounded here
SMALLEST = 1e-4  # mean magnitudes are not below it: a feature that is always zero would ask for an endless factor


class ScaleRecord(TypedDict):
    """What the report says of a weight.

    alpha        the exponent; None if nothing makes its input that could be scaled
    scaled_in    what makes its input
    error_ratio  error with the factors, as a share of the error without them
    """

    alpha: float | None
    scaled_in: NotRequired[str]
    error_ratio: NotRequired[float]


class AWQ(WeightPass):
    """Scale weights by the size of their inputs, then round them to nearest or leave that to a later step."""

    title: ClassVar[str] = "Scales weights by the size of their inputs before rounding; inference costs the same"
    paper: ClassVar[str] = "Lin et al. 2023, arXiv 2306.00978"

    bits: Literal[2, 3, 4, 8] = Field(4, description="Bits per weight, of the rounding that the scales are chosen for.")
    group_size: GroupSize = Field(128, description="Inputs that share a scale; -1 is one scale per row.")
    symmetric: bool = Field(True, description="Grid centred on zero. False stores a zero point per group.")
    scale_search: Literal["minmax", "mse"] = Field("mse", description="Range by extremes, or shrunk for least error.")
    rounding: Literal["nearest", "later"] = Field(
        "nearest", description="Round the scaled weights here, or leave them dense for a later gptq step."
    )
    steps: Count = Field(20, le=1000, description="Values of alpha that are tried, evenly spaced from 0.")
    search_batches: Count = Field(1, description="Calibration batches on which the block's outputs are compared.")

    @property
    def traits(self) -> Traits:
        stores = quantization_format(self.bits, self.symmetric) if self.rounding == "nearest" else None
        return Traits(reads="inputs", stores=stores, rescales=True)

    def stored(self, weight: Weight) -> str | None:
        if weight.is_function or weight.role == "embedding":  # refused, since its format stands for matrices
            return quantization_format(self.bits, self.symmetric)
        return self.traits.stores or "dense"

    def format_params(self, weight: Weight) -> dict[str, Any]:
        return packed_params(weight, self.bits, self.group_size, self.symmetric)

    def check(self, weights: Sequence[Weight]) -> list[tuple[str, dict[str, Any]]]:
        """Groups that don't fit; where this pass rounds, `plan` finds them by `format_params`."""
        problems: list[tuple[str, dict[str, Any]]] = []
        for weight in weights if self.rounding == "later" else ():
            if weight.is_function:
                continue
            try:
                self.format_params(weight)
            except ShapeError as error:
                problems.append((f"{weight.name}: {error.what} {error.hint}", error.data))
        return problems

    def work(self, weights: Sequence[Weight], data: DataSize, run: Work) -> Work:
        """As if each group had its own producer. Its inputs need a run of the block up to it. In a usual block all of
        these together take about one run.
        """
        inputs = weights[0].in_features
        rows = [weight.out_features for weight in weights]
        found = run * (0.25 * data.tokens) + Work(values=float(PASSES_OVER_VALUES * sum(rows) * inputs))
        if self.rounding == "later":
            searched = float(self.steps * inputs * sum(min(out, SEARCHED_ROWS) for out in rows))
            moments = Work(products=data.tokens * float(inputs) ** 2) + cholesky(inputs)
            return found + moments + Work(searched=searched, values=PASSES_OVER_VALUES * searched)
        searched = float(self.steps * inputs * sum(rows))
        runs = run * (self.steps * min(data.tokens, self.search_batches * data.batch))
        stored = Work(searched=float(inputs * sum(rows)), values=float(PASSES_OF_PACKING * inputs * sum(rows)))
        return found + runs + stored + Work(searched=searched, values=PASSES_OVER_VALUES * searched)

    def memory(self, weights: Sequence[Weight], data: DataSize) -> int:
        """All weights of a producer in their own dtype twice, and one of them five times in float32; before a later
        step their sampled rows, and H with a copy and its factor.
        """
        inputs, rows = weights[0].in_features, [weight.out_features for weight in weights]
        if self.rounding == "later":
            return 12 * inputs**2 + 20 * inputs * sum(min(out, SEARCHED_ROWS) for out in rows) + 8 * inputs * max(rows)
        return 4 * inputs * sum(rows) + 20 * inputs * max(rows)

    def block(self, view: BlockView) -> None:
        producers = view.producers()
        batches = range(min(self.search_batches, view.batches)) if producers and self.rounding == "nearest" else ()
        dense = [view.output(batch) for batch in batches]
        records: dict[str, ScaleRecord] = {}
        for producer in producers:
            weights, seen = _consumers(view, producer), inputs_of(view, producer, self.rounding == "later")
            error_of = (
                self._feedback_error(view, seen, weights)
                if self.rounding == "later"
                else self._block_error(view, weights, dense)
            )
            factors, record = self._search(view, seen.magnitudes(producer), producer, error_of)
            if record["alpha"]:
                fold(view, producer, factors)
            records |= {weight.name: record for weight in weights}
        for stage in view.stages(sequential=False):
            for group in stage:
                for weight in group:
                    self._finish(view, weight, records.get(weight.name, {"alpha": None}))

    def _search(
        self,
        view: BlockView,
        magnitude: torch.Tensor,
        producer: Producer,
        error_of: Callable[[torch.Tensor], float],
    ) -> tuple[torch.Tensor, ScaleRecord]:
        """The factors (slices,) float32 of the least error, and what the report says of them.

        error_of  factors of the features (in,) -> square error of the weights that read them, rounded
        """
        tried: list[tuple[float, float, torch.Tensor]] = []
        for step in range(self.steps):
            view.progress(f"search behind {producer.name}", step / self.steps)
            alpha = step / self.steps
            factors = factors_of(magnitude, alpha)
            tried.append((error_of(factors[_slices(producer, factors.device)]), alpha, factors))
        best = min(tried, key=lambda one: one[0])
        if best[0] > (1 - MIN_GAIN) * tried[0][0]:
            best = tried[0]
        ratio = (best[0] / max(tried[0][0], 1e-30)) ** 0.5
        return best[2], {"alpha": best[1], "scaled_in": producer.name, "error_ratio": ratio}

    def _block_error(
        self, view: BlockView, weights: Sequence[Weight], dense: Sequence[torch.Tensor]
    ) -> Callable[[torch.Tensor], float]:
        """The change of the block's output by rounding these weights.

        dense  what the block gives of the batches that are compared
        """
        before = {weight.parameter: view.read(weight.parameter) for weight in weights}

        def error_of(columns: torch.Tensor) -> float:
            for name, value in before.items():
                rounded = value.clone()
                for weight in weights:
                    if weight.parameter == name:
                        part_of(rounded, weight).copy_(self._rounded(part_of(value, weight).float(), columns, view))
                view.write(name, rounded)
            error = sum(float((view.output(b) - wanted).float().square().sum()) for b, wanted in enumerate(dense))
            for name, value in before.items():
                view.write(name, value)
            return error

        return error_of

    def _feedback_error(
        self, view: BlockView, seen: Inputs, weights: Sequence[Weight]
    ) -> Callable[[torch.Tensor], float]:
        """What error feedback leaves of the rounding of these weights; of plain rounding where H can't be factored."""
        kept = seen.feedback()
        sampled = [_some_rows(view.matrix(weight)) for weight in weights]

        def error_of(columns: torch.Tensor) -> float:
            errors = (((self._rounded(rows, columns, view) - rows) * kept).square().sum() for rows in sampled)
            return float(sum(errors))

        return error_of

    def _rounded(self, matrix: torch.Tensor, columns: torch.Tensor, view: BlockView) -> torch.Tensor:
        """What a weight (out, in) float32 is after scaling, rounding and scaling back."""
        width = matrix.shape[1] if self.group_size == -1 else self.group_size
        grouped = (matrix * columns).view(len(matrix), -1, width)
        grid = find_grid(grouped, self.bits, self.symmetric, self.scale_search, view.dtype)
        return dequantize(quantize(grouped, grid), grid).view_as(matrix) / columns

    def _finish(self, view: BlockView, weight: Weight, record: ScaleRecord) -> None:
        """Round a weight to nearest, as it is scaled by now, or keep it for the step that rounds it."""
        if self.rounding == "later":
            view.keep(weight, **record)
            return
        store_nearest(view, weight, self.bits, self.group_size, self.symmetric, self.scale_search, record)


@dataclass
class Inputs:
    """What the weights behind a producer read on calibration data.

    total   sum of |x| of each feature (features,) float64
    gram    second moments, if they are needed
    """

    total: torch.Tensor
    gram: Gram | None
    tokens: int = 0

    def add(self, x: torch.Tensor) -> Inputs:
        self.total += x.abs().sum(0, dtype=torch.float64)
        self.tokens += len(x)
        if self.gram is not None:
            self.gram.add(x)
        return self

    def magnitudes(self, producer: Producer) -> torch.Tensor:
        """Mean |x| of what the producer makes: (slices,) float64, the mean over each slice; 1 for an empty slice."""
        mean = self.total / max(1, self.tokens)
        slices = _slices(producer, mean.device)
        count = max(producer.slices) + 1
        features = torch.bincount(slices, minlength=count)
        total = torch.zeros(count, dtype=torch.float64, device=mean.device).index_add_(0, slices, mean)
        return torch.where(features > 0, total / features.clamp(min=1), 1.0)

    def feedback(self) -> torch.Tensor:
        """1 / U_jj of each feature (in,) float32: the share of a column's rounding error that error feedback leaves.

        All 1 where the second moments can't be factored. They are used up: two matrices are in memory at a time.
        """
        assert self.gram is not None
        matrix, self.gram = self.gram.matrix, None
        matrix.triu_()
        matrix += matrix.triu(1).t()
        return feedback_shares(matrix) if self.tokens else torch.ones(len(matrix), device=matrix.device)


def feedback_shares(hessian: torch.Tensor) -> torch.Tensor:
    """1 / U_jj (in,) float32 of second moments (in, in) known up to a factor, with columns by decreasing diag(H).

    With J the reversal of that order, J H J = L Lᵀ and U = J L⁻¹ J, so 1 / U_jj is a diagonal entry of L. All 1 if no
    damping up to 1 makes H positive definite.
    """
    diagonal = hessian.diagonal().clone()
    mean = float(diagonal[diagonal > 0].mean()) if bool((diagonal > 0).any()) else 1.0
    order = torch.argsort(torch.where(diagonal == 0, mean, diagonal), descending=True, stable=True).flip(0)
    hessian = hessian[order[:, None], order]
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = mean
    added = 0.0
    for damping in (PERCDAMP, 10 * PERCDAMP, 100 * PERCDAMP):
        hessian.diagonal().add_((damping - added) * mean)
        added = damping
        for dtype in (torch.float32, torch.float64):
            lower, info = torch.linalg.cholesky_ex(hessian.to(dtype))
            if int(info) == 0:
                shares = torch.empty(len(hessian), device=hessian.device)
                shares[order] = lower.diagonal().float()
                return shares
    return torch.ones(len(hessian), device=hessian.device)


def inputs_of(view: BlockView, producer: Producer, with_gram: bool) -> Inputs:
    """What all groups that read the producer's features read, in one run of the block."""
    stage = _first_stage(view, producer)
    features = stage[0].in_features
    gram = Gram.zeros(features, torch.float32, view.device) if with_gram else None
    seen = Inputs(torch.zeros(features, dtype=torch.float64, device=view.device), gram)
    view.fold(stage, lambda group: seen, Inputs.add)
    return seen


def _first_stage(view: BlockView, producer: Producer) -> Stage:
    """The first selected groups that read the features, of those that one replay feeds."""
    read = {consumer.parameter for consumer in producer.consumers}
    stages = (tuple(group for group in stage if group.weights[0].parameter in read) for stage in view.stages())
    return next(stage for stage in stages if stage)


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


def _some_rows(matrix: torch.Tensor) -> torch.Tensor:
    """At most SEARCHED_ROWS rows of a weight (out, in), evenly spaced; each is rounded by itself."""
    if len(matrix) <= SEARCHED_ROWS:
        return matrix
    return matrix[torch.linspace(0, len(matrix) - 1, SEARCHED_ROWS, device=matrix.device).long()]


def _along(factors: torch.Tensor, axis: int, value: torch.Tensor) -> torch.Tensor:
    """Factors of one axis in a shape that multiplies a whole parameter."""
    return factors.view([-1 if at == axis else 1 for at in range(value.dim())])


def _slices(producer: Producer, device: torch.device) -> torch.Tensor:
    return torch.tensor(producer.slices, device=device)


def _consumers(view: BlockView, producer: Producer) -> list[Weight]:
    """The selected weights that read what the producer makes."""
    read = {consumer.parameter for consumer in producer.consumers}
    return [w for stage in view.stages() for group in stage for w in group if w.parameter in read]
