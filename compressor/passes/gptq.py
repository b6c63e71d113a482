"""GPTQ: rounds one input column at a time, and corrects the columns that follow for its error.

Paper: Frantar, Ashkboos, Hoefler, Alistarh 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", arXiv 2210.17323.

Idea. For each matrix, minimize the change of its outputs on calibration inputs, tr(D H Dᵀ) with D = W - Q and
H = 2/N Σ x xᵀ over the tokens x that the layer sees in the model as compressed so far. Columns are rounded in a fixed
order. The error of each is spread over the columns that are not yet rounded, along the rows of U, with Uᵀ U = H⁻¹. Then
D = E U and tr(D H Dᵀ) = ‖E‖². This identity is checked in every run (on up to 128 rows of each weight).

Where we differ from the paper, and why
- Columns are rounded by decreasing diag(H), with groups fixed beforehand (`act_order: static`), so no index is stored.
  `act_order: group` is the reference's `desc_act`: groups are made of the ordered columns, and their index is stored.
- Scales are searched for the least error (`scale_search: mse`) and rounded to their stored dtype before the solve.
- U comes from one reversed Cholesky factorization and one triangular inversion; H⁻¹ is never computed.
- A column whose inputs are 0 for all calibration tokens keeps its nearest code instead of becoming zero.
- An expert that saw few tokens uses the Hessians of the other experts too (our rule; not in the paper).
Not offered: asymmetric calibration.

Cost per group of weights with n inputs and m outputs together: tokens·n²/2 multiply-adds for H, n³/3 for U, m·n²/2 to
solve. Memory: 8·n² bytes for H and U, 4·m·n for one weight, and 80 MiB for the working copies of a part of its rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from compressor.bounds import Count
from compressor.errors import PassError
from compressor.lazy import torch
from compressor.methods.direct_operations import direct_operations
from compressor.methods.quantization.hessian import Factor, Gram, inverse_factor, permuted
from compressor.methods.quantization.packed_codes import (
    GroupSize,
    group_width,
    packed_params,
    quantization_format,
    store,
)
from compressor.methods.quantization.uniform_grid import Grid, dequantize, find_grid, quantize
from compressor.protocol import BlockView, DataSize, Folds, Group, Stage, Traits, Weight, WeightPass, Work
from compressor.protocol.work import inverse_factor as factor_work

SUB_BLOCK = 32  # columns updated one by one before a small GEMM; the best of 16, 32, 64 for 1024..4096 inputs
WORKING_ELEMENTS = 1 << 22  # of the rows that are solved at a time: 16 MiB in float32
SAMPLED_ROWS = 128  # of a weight, evenly spaced; the output errors of all rows would cost more than the solve
PASSES_OVER_VALUES = 80  # copies, rounding and packing of a weight, beside the solve; packing takes most of it
IDENTITY_TOLERANCE = 1e-2  # for float32 sums over a whole matrix; the tests require 1e-10 in float64


class GPTQ(WeightPass):
    """Round the columns one by one, and correct the columns that follow for each error."""

    title: ClassVar[str] = "Quantizes weights to 2-8 bits with second-order error feedback (GPTQ)"
    paper: ClassVar[str] = "Frantar et al. 2022, arXiv 2210.17323"

    bits: Literal[2, 3, 4, 8] = Field(4, description="Bits per weight.")
    group_size: GroupSize = Field(128, description="Inputs that share a scale. -1: one scale per row.")
    symmetric: bool = Field(
        True, description="true: the grid is centred on zero. false: a zero point is stored per group."
    )
    scale_search: Literal["minmax", "mse", "hessian_diag"] = Field(
        "mse",
        description="How a scale is chosen. minmax: by the extremes. mse: with the least squared error. hessian_diag: "
        "with the least squared error, weighted by diag(H).",
    )
    refine_scales: bool = Field(
        False, description="Refit the scales to the chosen codes by least squares. It never increases the loss."
    )
    act_order: Literal["none", "static", "group_aware", "group"] = Field(
        "static",
        description="Order in which columns are quantized. none: as they are stored. static: by decreasing diag(H). "
        "group_aware: by diag(H) within groups and between them. group: by decreasing diag(H), with groups made of "
        "columns in that order (stores an index and needs a modeling file).",
    )
    block_size: Literal[32, 64, 128, 256, 512] = Field(
        128, description="Columns per lazy update. It changes only the speed."
    )
    percdamp: float = Field(
        0.01,
        gt=0,
        lt=1,
        description="Damping as a fraction of the mean of diag(H), where H is the Hessian of the inputs.",
    )
    max_percdamp: float = Field(1.0, gt=0, le=1, description="Largest damping that is tried for a weight.")
    on_failure: Literal["rtn", "error"] = Field(
        "rtn", description="If no damping helps. rtn: round to nearest. error: stop."
    )
    dead_columns: Literal["rtn", "zero"] = Field(
        "rtn", description="Weights of inputs that were always zero. rtn: the nearest code. zero: 0."
    )
    true_sequential: bool = Field(
        True, description="Calibrate later matrices of a block on the outputs of those that are already quantized."
    )
    hessian_dtype: Literal["float32", "float64"] = Field(
        "float32", description="Dtype in which H is summed and factored."
    )
    min_tokens: Count | Literal["auto"] = Field(
        "auto",
        description="Calibration tokens below which a weight gets a warning, and below an eighth of which the run ends "
        "with an error. auto: in_features.",
    )
    min_tokens_per_expert: Count | Literal["auto"] = Field(
        "auto",
        description="Number of calibration tokens below which `sparse_expert` applies. auto: max(64, in_features / "
        "32).",
    )
    sparse_expert: Literal["blend", "rtn", "error"] = Field(
        "blend",
        description="An expert with few tokens. blend: mix in the other experts' Hessian. rtn: round to nearest. "
        "error: stop.",
    )

    @model_validator(mode="after")
    def _ceiling_is_above(self) -> GPTQ:
        if self.max_percdamp < self.percdamp:
            raise ValueError(f"max_percdamp {self.max_percdamp} is below percdamp {self.percdamp}")
        return self

    @property
    def traits(self) -> Traits:
        return Traits(reads="inputs", stores=quantization_format(self.bits, self.symmetric, self._permutes_groups))

    def format_params(self, weight: Weight) -> dict[str, Any]:
        return packed_params(weight, self.bits, self.group_size, self.symmetric, self._permutes_groups)

    def work(self, weights: Sequence[Weight], data: DataSize, run: Work) -> Work:
        """The counts at the top of this file."""
        inputs, outputs = weights[0].in_features, sum(weight.out_features for weight in weights)
        count = float(outputs * inputs)
        sampled = sum(min(SAMPLED_ROWS, weight.out_features) for weight in weights)
        errors = 3 * 2.0 * sampled * inputs**2  # of the solution, of rounding to nearest, and of the weight itself
        return factor_work(inputs) + Work(
            products=data.tokens * float(inputs) ** 2,
            exact=count * inputs + errors,
            searched=0.0 if self.scale_search == "minmax" else count,
            values=PASSES_OVER_VALUES * count,
        )

    def memory(self, weights: Sequence[Weight], data: DataSize) -> int:
        """H and its factor, five copies of a weight in float32, and the rows that are solved at a time."""
        inputs, largest = weights[0].in_features, max(weight.out_features for weight in weights)
        size = 8 if self.hessian_dtype == "float32" else 20
        return size * inputs**2 + 5 * largest * inputs + 5 * 4 * WORKING_ELEMENTS

    def folded(self, weights: Sequence[Weight], data: DataSize) -> int:
        return (4 if self.hessian_dtype == "float32" else 8) * weights[0].in_features ** 2

    @property
    def _permutes_groups(self) -> bool:
        return self.act_order == "group" and self.group_size != -1

    def block(self, view: BlockView) -> None:
        dtype = getattr(torch, self.hessian_dtype)
        for stage in view.stages(sequential=self.true_sequential):
            grams = view.fold(stage, lambda group: Gram.zeros(group.in_features, dtype, view.device), Gram.add)
            chosen = [self._choose(view, stage, number, grams.tokens) for number in range(len(stage))]
            pooled = _pooled([blend for blend in chosen if isinstance(blend, Blend)], grams)
            for number, (group, choice) in enumerate(zip(stage, chosen, strict=True)):
                gram = None if choice == "rtn" else grams[number]
                if gram is not None and isinstance(choice, Blend):
                    gram = blend(gram, pooled[choice.siblings], choice.wanted, share_inputs=len(group.weights) > 1)
                self._solve_group(view, group, gram)

    def _choose(
        self, view: BlockView, stage: Stage, number: int, tokens: Sequence[int]
    ) -> Literal["own", "rtn"] | Blend:
        """Whether a group is solved with its own second moments, with blended ones, or rounded to nearest.

        tokens  of each group
        """
        group, seen = stage[number], tokens[number]
        if group.expert is not None:
            siblings = tuple(at for at, other in enumerate(stage) if _same_layer(other, group))
            return self._choose_for_expert(view, group, seen, siblings, any(tokens[at] for at in siblings))
        wanted = group.in_features if self.min_tokens == "auto" else self.min_tokens
        if seen < wanted / 8:
            raise PassError(
                f"{seen} calibration tokens for {group.in_features} inputs are too few",
                where=group.name,
                hint=f"Set a larger data.samples or data.length, or min_tokens: {seen}.",
                data={"reason": "few-tokens", "tokens": seen, "inputs": group.in_features},
            )
        if seen < wanted:
            message = f"{seen} calibration tokens for {group.in_features} inputs"
            view.warn("few-tokens", group.name, message, tokens=seen, inputs=group.in_features)
        return "own"

    def _choose_for_expert(
        self, view: BlockView, group: Group, tokens: int, siblings: tuple[int, ...], others: bool
    ) -> Literal["own", "rtn"] | Blend:
        """The same for an expert. others: any expert of its layer has got a token"""
        wanted = max(64, group.in_features // 32)
        if self.min_tokens_per_expert != "auto":
            wanted = self.min_tokens_per_expert
        if tokens >= wanted:
            return "own"
        seen = f"the expert got {tokens} of the {wanted} calibration tokens that it needs"
        if self.sparse_expert == "error":
            raise PassError(
                seen,
                where=group.name,
                hint="Set a larger data.samples, or sparse_expert: blend.",
                data={"reason": "sparse-expert", "tokens": tokens, "wanted": wanted},
            )
        view.warn("sparse-expert", group.name, f"{seen}; {self.sparse_expert}", tokens=tokens, wanted=wanted)
        return "rtn" if self.sparse_expert == "rtn" or not others else Blend(siblings, wanted)

    def _solve_group(self, view: BlockView, group: Group, gram: Gram | None) -> None:
        """Solve the weights of a group one after the other, with one Hessian and one factorization.

        They are stored after both are given up, since packing and unpacking codes takes memory too.
        """
        tokens = gram.tokens if gram else 0
        for weight, stored in zip(group, self._solved(view, group, gram), strict=True):
            record = {**stored.record, "calibration_tokens": tokens}
            store(view, weight, stored.codes, stored.grid, self.group_size, record, stored.index)

    def _solved(self, view: BlockView, group: Group, gram: Gram | None) -> list[Rounded]:
        """The weights of a group as they are to be stored."""
        width, problem = group_width(group.weights[0], self.group_size), None
        if gram is not None:
            problem = self._factored(gram, width, group.name)
            if problem is None and self.on_failure == "error":
                raise PassError(
                    f"its Hessian is not positive definite even with damping {self.max_percdamp:g}",
                    where=group.name,
                    hint="Set a larger data.samples or max_percdamp, or on_failure: rtn.",
                    data={"reason": "not-positive-definite", "damping": self.max_percdamp},
                )
            if problem is None:
                view.warn("not-positive-definite", group.name, "no damping helped; rounded to nearest")
        if problem is None:
            return [self._nearest(view, weight, width) for weight in group]
        return [self._solved_weight(view, weight, width, problem) for weight in group]

    def _solved_weight(self, view: BlockView, weight: Weight, width: int, problem: Factored) -> Rounded:
        matrix = view.matrix(weight)
        with direct_operations():
            return self._solved_matrix(matrix, weight.name, view.dtype, width, problem)

    def _solved_matrix(
        self, matrix: torch.Tensor, name: str, stored: torch.dtype, width: int, problem: Factored
    ) -> Rounded:
        """The same, from the values of the weight (out, in), which are changed; stored: dtype of the scales on disk."""
        if self.dead_columns == "zero":
            matrix[:, problem.dead] = 0
        column_of = problem.order  # number of each solved column in the weight
        if self._permutes_groups:  # from here on, all columns are in rounding order
            matrix, problem = matrix[:, column_of], problem.in_visiting_order()
        solved = solve(matrix, problem.factor.upper, problem.diagonal, problem.order, self, width, stored)
        errors = _output_errors(matrix, solved, problem)
        _check_identity(solved.loss[errors.rows], errors, problem.damping, name)
        if self.refine_scales:
            back = torch.argsort(problem.order)
            grid = refine_scales(matrix, solved.codes, solved.grid, permuted(problem.hessian, back), stored)
            solved = replace(solved, grid=grid)
            errors = _output_errors(matrix, solved, problem)
        record = {
            "output_error": errors.of_solution,
            "output_error_rtn": errors.of_nearest,
            "output_error_rows": len(errors.rows),
            "damping": problem.factor.damping,
            "factored_in": problem.factor.dtype,
            "failed_attempts": list(problem.factor.attempts),
            "dead_columns": int(problem.dead.sum()),
            "fallback": None,
        }
        if not self._permutes_groups:
            return Rounded(solved.codes, solved.grid, record)
        back = torch.argsort(column_of)
        return Rounded(solved.codes.flatten(1)[:, back], solved.grid, record, back // width)

    def _nearest(self, view: BlockView, weight: Weight, width: int) -> Rounded:
        """The fallback: round to nearest. The report has a warning already."""
        matrix = view.matrix(weight)
        grouped = matrix.view(len(matrix), -1, width)
        search = "mse" if self.scale_search == "hessian_diag" else self.scale_search
        grid = find_grid(grouped, self.bits, self.symmetric, search, view.dtype)
        index = torch.arange(matrix.shape[1], device=matrix.device) // width if self._permutes_groups else None
        return Rounded(quantize(grouped, grid).to(torch.int8), grid, {"fallback": "rtn"}, index)

    def _factored(self, gram: Gram, width: int, where: str) -> Factored | None:
        """The Hessian in rounding order, and its factor. None if no damping makes it positive definite.

        The sum of the Gram is given up, so that only the Hessian and its factor are in memory.
        """
        dead = revive_dead(gram.matrix)
        diagonal = gram.diagonal()
        order = column_order(diagonal, self.act_order, width)
        hessian = gram.take(order)
        factor = inverse_factor(hessian, self.percdamp, self.max_percdamp, where)
        if factor is None:
            return None
        return Factored(hessian, diagonal, order, dead, replace(factor, upper=factor.upper.float()))


@dataclass(frozen=True)
class Rounded:
    """A weight as it is to be stored.

    codes   (out, ...) int8
    record  values for the report
    index   (in,) the group of each input; None: groups are neighbours
    """

    codes: torch.Tensor
    grid: Grid
    record: dict[str, Any]
    index: torch.Tensor | None = None


@dataclass(frozen=True)
class Factored:
    """A factored Hessian.

    hessian   (in, in) in rounding order, with a diagonal for dead columns
    diagonal  (in,) of the Hessian, columns as in the weight
    order     (in,) int64, the columns in rounding order
    dead      (in,) bool, columns of the weight whose inputs were always zero
    factor    of the damped `hessian`
    """

    hessian: torch.Tensor
    diagonal: torch.Tensor
    order: torch.Tensor
    dead: torch.Tensor
    factor: Factor

    @property
    def damping(self) -> float:
        """The value that was added to the diagonal."""
        return self.factor.damping * float(self.hessian.diagonal().mean())

    def in_visiting_order(self) -> Factored:
        """The same for a weight whose columns are in rounding order."""
        order = torch.arange(len(self.order)).to(self.order)
        return Factored(self.hessian, self.hessian.diagonal(), order, self.dead[self.order], self.factor)

    def loss(self, error: torch.Tensor) -> torch.Tensor:
        """d H dᵀ for each row d of an error (out, in), without damping; (out,) float64."""
        ordered = error[:, self.order].to(self.hessian.dtype)
        return ((ordered @ self.hessian) * ordered).sum(1).double().clamp(min=0)


@dataclass(frozen=True)
class OutputErrors:
    """Squared change of the outputs over the calibration data, for sampled rows of a weight; float64 (rows,).

    rows     (rows,) int64, which rows
    loss     of the weights as they are stored
    square   of the change of each row's weights, whatever the inputs are
    nearest  of the same grid with each weight rounded to nearest
    power    squares of the outputs themselves
    """

    rows: torch.Tensor
    loss: torch.Tensor
    square: torch.Tensor
    nearest: torch.Tensor
    power: torch.Tensor

    @property
    def of_solution(self) -> float:
        return float((self.loss.sum() / self.power.sum().clamp(min=1e-30)).sqrt())

    @property
    def of_nearest(self) -> float:
        return float((self.nearest.sum() / self.power.sum().clamp(min=1e-30)).sqrt())


def _output_errors(weight: torch.Tensor, solved: Solution, problem: Factored) -> OutputErrors:
    """Of at most SAMPLED_ROWS rows: a wrong solve is wrong in every row."""
    rows = torch.linspace(0, len(weight) - 1, min(SAMPLED_ROWS, len(weight)), device=weight.device).long()
    chosen, codes = weight[rows], solved.codes[rows]
    grid = replace(solved.grid, scale=solved.grid.scale[rows], zero_point=solved.grid.zero_point[rows])
    error = chosen - dequantize(codes, grid).view_as(chosen)
    plain = chosen - dequantize(quantize(chosen.view(codes.shape), grid), grid).view_as(chosen)
    loss, nearest, power = problem.loss(torch.cat([error, plain, chosen])).view(3, -1)
    return OutputErrors(rows, loss, error.square().sum(1).double(), nearest, power)


@dataclass(frozen=True)
class Solution:
    """Result of a solve.

    codes  (out, groups, group_size) int8, in the column order of the weight
    loss   (out,) ‖E‖² of each row
    """

    codes: torch.Tensor
    grid: Grid
    loss: torch.Tensor


@dataclass(frozen=True)
class Blend:
    """An expert with few tokens. siblings: numbers of all groups of its layer, itself included"""

    siblings: tuple[int, ...]
    wanted: int


def _pooled(blends: Sequence[Blend], grams: Folds[Gram]) -> dict[tuple[int, ...], Gram]:
    """The sums of the siblings of these experts, before any of them is given up."""
    found: dict[tuple[int, ...], Gram] = {}
    for siblings in dict.fromkeys(blend.siblings for blend in blends):
        found[siblings] = pool(grams[at] for at in siblings)
    return found


def pool(siblings: Iterable[Gram]) -> Gram:
    """The sum of the moments of the experts of a layer."""
    total: Gram | None = None
    for gram in siblings:
        total = total or Gram(torch.zeros_like(gram.matrix))
        total = Gram(total.matrix.add_(gram.matrix), total.tokens + gram.tokens)
    assert total is not None, "an expert is its own sibling"
    return total


def blend(gram: Gram, pooled: Gram, wanted: int, share_inputs: bool) -> Gram:
    """Fill the moments of an expert with few tokens up to `wanted` tokens, from the pooled moments of all experts.

    H' = (n H + k H_all) / (n + k), k = wanted. Experts that read the layer's own input can share whole matrices. The
    inputs of a down projection are private features of each expert, so only the mean of the diagonal is shared.
    """
    mean = pooled.matrix / pooled.tokens
    if not share_inputs:
        mean = torch.eye(len(mean), dtype=mean.dtype, device=mean.device) * mean.diagonal().mean()
    return Gram(gram.matrix + wanted * mean, gram.tokens + wanted)


def revive_dead(hessian: torch.Tensor) -> torch.Tensor:
    """Give inputs that were always zero a diagonal entry (in place). Returns (in,) bool: which inputs these are.

    The entry is the mean over the other columns, so the damping is the same as without them.
    """
    dead = hessian.diagonal() == 0
    live = hessian.diagonal()[~dead]
    hessian.diagonal()[dead] = live.mean() if len(live) else 1.0
    return dead


def column_order(diagonal: torch.Tensor, act_order: str, width: int) -> torch.Tensor:
    """Rounding order (in,) int64. group_aware keeps the members of a group together."""
    if act_order == "none":
        return torch.arange(len(diagonal), device=diagonal.device)
    if act_order in ("static", "group"):
        return torch.argsort(diagonal, descending=True, stable=True)
    groups = diagonal.view(-1, width)
    inside = torch.argsort(groups, dim=1, descending=True, stable=True)
    between = torch.argsort(groups.amax(1), descending=True, stable=True)
    return (inside + width * torch.arange(len(groups), device=diagonal.device).unsqueeze(1))[between].flatten()


def solve(
    weight: torch.Tensor,
    upper: torch.Tensor,
    diagonal: torch.Tensor,
    order: torch.Tensor,
    settings: GPTQ,
    width: int,
    stored: torch.dtype,
) -> Solution:
    """Round the columns of `weight` in `order`, and spread each error over the following columns along U.

    weight    (out, in) float32 or float64
    upper     (in, in) U of the permuted, damped Hessian
    diagonal  (in,) of the Hessian, not permuted; weights of the scale search of hessian_diag
    stored    dtype of the scales on disk

    With act_order none or group_aware, each group's grid is found when the group is reached, on the weights as updated
    by all columns before it. With static, or with one group per row, it is found before the solve. act_order group is
    the same as none, on a weight and a Hessian that are already permuted. Rows don't depend on each other, and parts of
    them are solved one after the other, so that the working copies stay small.
    """
    importance = diagonal.view(-1, width).to(weight.dtype)
    parts = [
        _solve_rows(rows, upper, importance, order, settings, width, stored)
        for rows in weight.split(max(1, WORKING_ELEMENTS // weight.shape[1]))
    ]
    codes, scale, zero_point, loss = (torch.cat(found) for found in zip(*parts, strict=True))
    return Solution(codes, Grid(settings.bits, settings.symmetric, scale, zero_point), loss)


@dataclass
class _Rows:
    """Some rows of a weight while they are solved (`solve`). Its columns lie in rounding order, each contiguous.

    work, errors, codes  (in, out): the weight with the errors of all columns before, the error of each rounded column
                         divided by its diagonal entry of U, and the codes
    scale, zero          (groups, out)
    group_of             (in,) the group of each column
    width                columns of a group
    search               finds the grid of a group of columns from its weights and their importance
    is_fresh             the grid of a group is found when the group is reached
    """

    work: torch.Tensor
    errors: torch.Tensor
    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    upper: torch.Tensor
    importance: torch.Tensor
    group_of: torch.Tensor
    width: int
    grid: Grid
    search: Callable[[torch.Tensor, torch.Tensor], Grid]
    is_fresh: bool

    @property
    def whole(self) -> int:
        """Columns that must not be in different blocks. A group whose scale is searched when it is reached lies in one
        block, and in one sub-block or in whole sub-blocks. Only then do all of its columns have the errors of all
        columns before it.
        """
        return self.width if self.is_fresh else 1

    def spread(self, start: int, middle: int, stop: int) -> None:
        """Correct columns `middle` to `stop` - 1 for the errors of columns `start` to `middle` - 1."""
        upper = self.upper[start:middle, middle:stop]
        self.work[middle:stop].addmm_(upper.t(), self.errors[start:middle], alpha=-1)

    def round_block(self, start: int, stop: int) -> None:
        """Round columns `start` to `stop` - 1, which have the errors of all columns before them, in sub-blocks."""
        own = self.whole if SUB_BLOCK % self.whole else SUB_BLOCK
        cuts = [sub for first in range(start, stop, own) for sub in range(first, min(first + own, stop), SUB_BLOCK)]
        for sub, end in pairwise([*cuts, stop]):
            self._round_sub_block(sub, end)
            if end < stop:
                self.spread(sub, end, stop)

    def _round_sub_block(self, sub: int, end: int) -> None:
        """Round columns one by one; groups that begin among them get their grid first."""
        from compressor.kernels.ops.gptq_solve import gptq_solve_  # imports torch, which loading settings must not

        part = (self.work[sub:end], self.errors[sub:end], self.codes[sub:end], self.upper[sub:end, sub:end])
        grids = (self.scale, None if self.grid.symmetric else self.zero)
        starts = [j for j in range(sub, end) if self.is_fresh and j % self.width == 0]
        for begin, until in pairwise(sorted({sub, *starts, end})):
            if begin in starts:
                self._find_grid(begin)
            low, high = self.grid.low, self.grid.high
            gptq_solve_(*part, self.group_of[sub:end], *grids, begin - sub, until - sub, low, high)

    def _find_grid(self, begin: int) -> None:
        """Find the grid of the group whose first column is `begin`, on the weights as updated so far."""
        group = int(self.group_of[begin])
        columns = self.work[begin : begin + self.width].t()
        found = self.search(columns.reshape(len(columns), 1, self.width).float(), self.importance[group : group + 1])
        self.scale[group], self.zero[group] = found.scale[:, 0], found.zero_point[:, 0]


def _solve_rows(
    weight: torch.Tensor,
    upper: torch.Tensor,
    importance: torch.Tensor,
    order: torch.Tensor,
    settings: GPTQ,
    width: int,
    stored: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scales, zero points and losses of some rows (`solve`)."""
    out, columns = weight.shape

    def search(grouped: torch.Tensor, important: torch.Tensor) -> Grid:
        return find_grid(grouped, settings.bits, settings.symmetric, settings.scale_search, stored, important)

    grid = search(weight.view(out, -1, width), importance)
    work = weight.t().contiguous()[order]  # (in, out): a column of the matrix is contiguous; indexing before is slow
    rows = _Rows(
        work,
        errors=torch.empty_like(work),
        codes=torch.empty_like(work),
        scale=grid.scale.t().contiguous().to(weight.dtype),
        zero=grid.zero_point.t().contiguous().to(weight.dtype),
        upper=upper,
        importance=importance,
        group_of=order // width,
        width=width,
        grid=grid,
        search=search,
        is_fresh=settings.act_order in ("none", "group_aware", "group") and columns > width,
    )
    block = int(settings.block_size)
    if rows.whole % block:
        block = -(-block // rows.whole) * rows.whole
    for start, middle, stop in _steps(0, columns, block):
        if middle == stop:
            rows.round_block(start, stop)
        else:
            rows.spread(start, middle, stop)
    codes = torch.empty(columns, out, dtype=torch.int8, device=work.device)
    codes[order] = rows.codes.to(torch.int8)
    scale, zero = (values.t().contiguous().float() for values in (rows.scale, rows.zero))
    return codes.t().contiguous().view(out, -1, width), scale, zero, rows.errors.square_().sum(0)


def _steps(start: int, stop: int, block: int) -> Iterator[tuple[int, int, int]]:
    """Steps of a solve by halves: (start, stop, stop) rounds a block, (start, middle, stop) gives the errors of columns
    start to middle - 1 to columns middle to stop - 1.
    """
    blocks = -(-(stop - start) // block)
    if blocks <= 1:
        yield start, stop, stop
        return
    middle = start + blocks // 2 * block
    yield from _steps(start, middle, block)
    yield start, middle, stop
    yield from _steps(middle, stop, block)


def refine_scales(
    weight: torch.Tensor, codes: torch.Tensor, grid: Grid, hessian: torch.Tensor, stored: torch.dtype
) -> Grid:
    """Scales that minimize tr(D H Dᵀ) for fixed codes, row by row. They are kept only if they lower the stored loss.

    Row i: s = (Bᵀ H B)⁻¹ Bᵀ H w, where B (in, groups) holds the row's codes minus zero point, block by group; float64.
    """
    out, groups, width = codes.shape
    h = hessian.double().view(groups, width, groups, width)
    scale = grid.scale.clone()
    for row in range(out):
        b = codes[row].double() - grid.zero_point[row].double().unsqueeze(-1)  # (groups, width)
        hb = torch.einsum("gihj,hj->gih", h, b)  # (groups, width, groups)
        normal = torch.einsum("gi,gih->gh", b, hb)
        normal.diagonal().add_(1e-8 * normal.diagonal().mean() + 1e-300)
        right = torch.einsum("gih,gi->h", hb, weight[row].double().view(groups, width))
        found = torch.linalg.solve(normal, right).to(stored).float()
        least = torch.finfo(stored).smallest_normal if stored != torch.float16 else 0.0  # see `round_scale`
        if bool((found > least).all()):
            losses = []
            for candidate in (scale[row], found):
                d = weight[row].double() - (b * candidate.double().unsqueeze(-1)).flatten()
                losses.append(float(d @ hessian.double() @ d))
            if losses[1] < losses[0]:
                scale[row] = found
    return Grid(grid.bits, grid.symmetric, scale, grid.zero_point)


def _same_layer(group: Group, other: Group) -> bool:
    return group.weights[0].parameter == other.weights[0].parameter


def _check_identity(loss: torch.Tensor, errors: OutputErrors, damping: float, where: str) -> None:
    """Check ‖E‖² = tr(D H Dᵀ). It holds for a correct solve with any data, so a difference is an error of this code.

    loss     (rows,) ‖E‖² of the rows of `errors`
    damping  the value that was added to the Hessian's diagonal
    """
    direct = float(errors.loss.sum() + damping * errors.square.sum())
    found = float(loss.sum())
    if abs(found - direct) > IDENTITY_TOLERANCE * max(found, direct) + 1e-12:
        raise PassError(
            f"the check of the solve failed: ‖E‖² {found:.6g}, tr(D H Dᵀ) {direct:.6g}",
            where=where,
            hint="Set hessian_dtype: float64, and report this message with the recipe and the model's name.",
            data={"reason": "wrong-loss", "loss": found, "direct": direct},
        )


__all__ = ["GPTQ", "Factor", "Solution", "blend", "column_order", "refine_scales", "revive_dead", "solve"]
