"""DSFormer: writes each matrix as sparse combinations of a few dense atoms.

Paper: Chand, Prabhu, Kumar 2023, "DSFormer: Effective Compression of Text-Transformers by Dense-Sparse Weight
Factorization", arXiv 2312.13211. Only its abstract could be read; no code is published. It says: a weight matrix is
expressed as the product of a small dense and a semi-structured sparse matrix; a straight-through factorizer (STF)
learns all factorizations of a model jointly, for the accuracy of the final task; the compression is up to 40 % better
than that of low-rank factorizers. Everything below is therefore our reading, and our own choices are marked.

Factorization [details ours]. The inputs of W (out, in) are split into blocks of B. W_b, the columns of block b, is

    W_b ≈ S_b D_b    D_b (m, B) dense, shared by all outputs    S_b (out, m) with exactly k entries a row
    y = Σ_b (x_b D_bᵀ) S_bᵀ + bias

With one block and k = m this is a product of two thin matrices, so low rank is a special case.

Solver [ours]. It minimizes E = tr((W - W') H (W - W')ᵀ), where H is the damped second moments of the inputs in the
model as compressed so far. Blocks are solved one after the other, `sweeps` times. In a block, `rounds` times: the
supports of all rows by a step of ADMM, their values by conjugate gradients, then D_b in closed form (`sparse_coding`).
A change is kept only if E falls. Atoms start as the directions of the block's SVD. If there are more atoms than
directions, rows of W_b chosen by k-means++ are added. Measured on MiniLM and the demo model, this solver ends below
batched orthogonal matching pursuit (3 pursuits in each of 2 sweeps) at a tenth of its time.

Comparison with low rank. The best product of two thin matrices in no more bytes (`low_rank`) is compared too, after
rounding, and the one with the smaller E is stored. If E is equal, the thin matrices are stored, since they run faster.
If the thin matrices are worse before they are rounded, they are not computed, only their E.

Sizes [ours]. `ratio` is the share of bytes that is kept, of the weight in 16 bits, whatever dtype the model has. Among
the pairs (m, k) that fill these bytes to within 1 %, the one with k / m nearest to `density` is used. Of 0.25 to 0.85,
the best for matrices of MiniLM was 0.35 to 0.45, and for the demo model 0.35 to 0.55. The positions of a row's entries
are stored as numbers or as one bit for each atom, whichever is smaller.

Refinement, the paper's STF as a post-training step [ours]. With `refine_steps`, all factors of a block are trained
together towards the outputs of the dense block for the same inputs, including the choice of atoms (`joint_training`).
It uses Adam on seeded batches, keeps the best result on a held-out tenth of the batches, and uses that only if it is
better after rounding.

Not offered: patterns such as 2:4 on S. It is an error if no damping makes the second moments positive definite.

Cost per matrix: 6·out·m² multiply-adds for each block, round and sweep, out·in² for the blocks' targets in each sweep
and for each E, and the spectrum of the low-rank factors, (out + in)·n² + 2·n³ with n = min(out, in) in float64.
Memory: H and L, 8·in² bytes, 16·in² up to 1024 inputs, and 40·out·in for working copies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from compressor.bounds import Count
from compressor.errors import Because, ShapeError
from compressor.lazy import torch
from compressor.methods.factorization.counted_work import (
    error_work,
    matmul_work,
    metric_work,
    side_work,
)
from compressor.methods.factorization.factor_pass import FactorPass
from compressor.methods.factorization.low_rank import (
    TINY,
    Metric,
    dense_bytes,
    largest_rank,
    least_error,
    shrinks,
    spectrum,
    stage_metrics,
)
from compressor.methods.factorization.sparse_coding import (
    SparseFactors,
    balance,
    block_bytes,
    choose_shape,
    factorize,
    refit_values,
)
from compressor.protocol import BlockView, DataSize, Weight, Work

if TYPE_CHECKING:
    from compressor.layers.low_rank_linear import LowRankLinear
    from compressor.layers.sparse_factor_linear import SparseFactorLinear

FORMAT, RIVAL, DENSE = "sparse_factor_linear", "low_rank_linear", "dense"
DEFAULT_RATIO = 0.5
WIDEST_BLOCK = 384  # the cost of a pursuit grows with k² m, and k and m grow with the block
NARROWEST_BLOCK = 8
RATIO_TOLERANCE = 0.01
# Of a round, beside its products; our measurement for 2048 rows and 200 atoms. Much of it is the choice of the largest.
PASSES_OVER_COEFFICIENTS = 500


@dataclass(frozen=True)
class Problem:
    """A matrix (out, in) to factorize, its metric, and the error of leaving it out.

    report  shows the share of the work that is done
    """

    matrix: torch.Tensor
    metric: Metric
    whole: float
    block: int
    generator: torch.Generator
    report: Callable[[float], None]

    def relative_error(self, layer: SparseFactorLinear | LowRankLinear) -> float:
        """Of the matrix as a layer stores it."""
        return self.metric.error(self.matrix - layer.matrix(torch.float32)) / max(self.whole, TINY)


@dataclass(frozen=True)
class Solved:
    """A weight that was stored, with the original matrix (out, in) and the metric, which its refinement needs."""

    weight: Weight
    matrix: torch.Tensor
    layer: SparseFactorLinear | LowRankLinear
    metric: Metric
    record: dict[str, Any]

    def factors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """atoms, values and index as stored. Thin factors are one block in which every row combines all atoms."""
        from compressor.layers.low_rank_linear import LowRankLinear

        first, second = self.layer.factors(torch.float32)
        if not isinstance(self.layer, LowRankLinear):
            return first, second, self.layer.index()
        index = torch.arange(first.shape[1], device=first.device).expand(len(first), 1, -1).contiguous()
        return second[None], first[:, None], index

    def lower(self) -> torch.Tensor:
        """(blocks, B, B) float32"""
        block = self.factors()[0].shape[2]
        starts = range(0, self.matrix.shape[1], block)
        parts = [self.metric.hessian[start : start + block, start : start + block] for start in starts]
        return torch.linalg.cholesky(torch.stack(parts)).float()

    def with_factors(self, atoms: torch.Tensor, values: torch.Tensor, index: torch.Tensor) -> Solved:
        """The same weight with these factors, rounded to their stored dtype."""
        from compressor.layers.low_rank_linear import LowRankLinear

        layer: SparseFactorLinear | LowRankLinear
        if isinstance(self.layer, LowRankLinear):
            layer = LowRankLinear.pack(values[:, 0], atoms[0], self.layer.values)
        else:
            even = balance(SparseFactors(atoms, values, index))
            layer = type(self.layer).pack(even.atoms, even.values, even.index, self.layer.values)
        return replace(self, layer=layer)


class DSFormer(FactorPass):
    """Store a few dense atoms for each block of inputs, and coefficients of a fixed number of them for each output."""

    title: ClassVar[str] = "Factorizes weights into dense atoms and sparse coefficients (DSFormer), or low rank"
    paper: ClassVar[str] = "Chand, Prabhu & Kumar 2023, arXiv 2312.13211"
    keeps_block: ClassVar[bool] = True
    format_name: ClassVar[str] = FORMAT

    ratio: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Share of each weight's bytes in 16 bits that is kept. null: 0.5, unless atoms and k are set.",
    )
    density: float = Field(
        0.45, gt=0, le=1, description="With ratio: the value for k / atoms, as near as the bytes allow."
    )
    block_size: Count | None = Field(
        None, description="Inputs that share atoms. null: the largest divisor of a weight's inputs up to 384."
    )
    atoms: Count | None = Field(None, le=4096, description="Number of atoms of a block. It replaces ratio.")
    k: Count | None = Field(None, description="Number of atoms of each block that an output combines.")
    values: Literal["float16", "bfloat16", "int8"] = Field(
        "float16", description="Dtype in which all numbers are stored."
    )
    metric: Literal["output", "weight"] = Field(
        "output",
        description="Error that is minimized. output: of the outputs on calibration data. weight: of the weights (no "
        "data).",
    )
    sweeps: int = Field(2, ge=1, le=10, description="How often all blocks of a weight are solved one after the other.")
    rounds: int = Field(
        4, ge=1, le=50, description="Updates of the coefficients and of the atoms for each block and sweep."
    )
    refine_steps: int = Field(
        0,
        ge=0,
        le=5000,
        description="Training steps in which a block's factors learn the dense block's outputs together.",
    )
    refine_rate: float = Field(
        1e-3, gt=0, le=0.1, description="Learning rate of the refinement, relative to the size of the trained values."
    )
    damping: float = Field(
        0.01,
        gt=0,
        le=1,
        description="Damping as a fraction of the mean of diag(H), where H is the Hessian of the inputs.",
    )
    max_rel_error: float | None = Field(
        None, gt=0, le=1, description="Leave a matrix dense if its error exceeds this share of the squared output."
    )

    @model_validator(mode="after")
    def _one_size(self) -> DSFormer:
        if (self.atoms is None) != (self.k is None):
            raise PydanticCustomError("half-size", "atoms and k belong together: give both, or ratio")
        if self.atoms is not None and self.ratio is not None:
            raise PydanticCustomError("ratio-and-atoms", "ratio chooses atoms and k: give one or the other")
        if self.refine_steps and self.metric == "weight":
            raise PydanticCustomError(
                "refining-without-data", "refine_steps needs calibration data: set metric: output"
            )
        if self.atoms is not None and self.k is not None and self.k > self.atoms:
            raise PydanticCustomError(
                "too-few-atoms",
                f"k is {self.k}, but there are only {self.atoms} atoms",
                {"k": self.k, "atoms": self.atoms},
            )
        return self

    @property
    def unplanned(self) -> str:
        return "a matrix that is stored as low rank has a few bytes less"

    @property
    def sizes_are(self) -> Literal["exact", "upper bounds", "lower bounds"]:
        return "upper bounds"

    def stored(self, weight: Weight) -> str | None:
        if weight.is_function or weight.role == "embedding":  # refused at any size
            return FORMAT
        return FORMAT if self._shape(weight) else DENSE

    def alternatives(self, weight: Weight) -> tuple[str, ...]:
        return (RIVAL,) if self.max_rel_error is None else (RIVAL, DENSE)

    def format_params(self, weight: Weight) -> dict[str, Any]:
        block = self._block(weight)
        atoms, k = self._shape(weight) or (1, 1)
        return {"block": block, "atoms": atoms, "k": k, "values": self.values}

    def _block(self, weight: Weight) -> int:
        """Width of the blocks. raises ShapeError if the weight's inputs have no such blocks"""
        inputs = weight.in_features
        divisors = [n for n in range(1, inputs + 1) if inputs % n == 0]
        if self.block_size is None:
            widest = max(n for n in divisors if n <= WIDEST_BLOCK)
            if widest >= min(NARROWEST_BLOCK, inputs):
                return widest
            wider = min(n for n in divisors if n > WIDEST_BLOCK)
            raise ShapeError(
                f"{inputs} inputs have no divisor from {NARROWEST_BLOCK} to {WIDEST_BLOCK}",
                where=weight.name,
                hint=f"Set block_size to {wider}, or leave this weight out with `except`.",
                data={"reason": "no-block", "inputs": inputs, "narrowest": NARROWEST_BLOCK, "widest": WIDEST_BLOCK},
            )
        if inputs % self.block_size:
            wanted = self.block_size
            near = sorted(sorted(divisors, key=lambda n: abs(n - wanted))[:3])
            choice = f"{', '.join(map(str, near[:-1]))} or {near[-1]}"
            raise ShapeError(
                f"block_size {self.block_size} does not divide in_features {inputs}.",
                where=weight.name,
                hint=f"Set block_size to {choice}, or leave this weight out with `except`.",
                data={"block_size": self.block_size, "inputs": inputs, "near": near},
            )
        return self.block_size

    def _shape(self, weight: Weight) -> tuple[int, int] | None:
        """(atoms, k); None if the weight would not get smaller."""
        try:
            block = self._block(weight)
        except ShapeError:
            return 1, 1  # `format_params` raises the error
        if self.atoms is not None and self.k is not None:
            size = block_bytes(weight.shape, block, self.atoms, self.k, self.values)
            return (self.atoms, self.k) if shrinks(weight.shape, size) else None
        wanted = int((self.ratio or DEFAULT_RATIO) * dense_bytes(weight.shape))
        return choose_shape(weight.shape, block, wanted, self.density, self.values, RATIO_TOLERANCE)

    def work(self, weights: Sequence[Weight], data: DataSize, run: Work) -> Work:
        found = metric_work(weights[0].in_features, data)
        for weight in weights:
            if (shape := self._shape(weight)) is not None:
                found += self._solve_work(weight.shape, self._block(weight), shape[0])
        if self.refine_steps:  # of the whole block: forwards, and twice as much backwards; this group's share of it
            values = sum(float(weight.out_features * weight.in_features) for weight in weights)
            share = min(1.0, 2 * values / max(run.products, 1.0))
            found += run * (3.0 * self.refine_steps * data.batch * share)
        return found

    def _solve_work(self, shape: tuple[int, ...], block: int, atoms: int) -> Work:
        """Of a weight (out, in) whose blocks of inputs have so many atoms."""
        rows, inputs = shape
        blocks = inputs // block
        a_round = 8.0 * rows * atoms**2 + 4.0 * rows * block * atoms
        targets = (2 * self.sweeps - 1) * float(rows) * inputs**2
        errors = 4  # of the weight left out, of the rounded factors before and after they are refitted, of the rival
        rounds = self.sweeps * blocks * self.rounds
        first = Work(double=2.0 * rows * block**2, spectra=float(block) ** 3) * blocks
        solved = matmul_work(inputs, rounds * a_round + targets) + error_work(shape) * errors
        passes = Work(values=float(PASSES_OVER_COEFFICIENTS * rounds * rows * atoms))
        rival = side_work(shape) + Work(spectra=float(min(shape)) ** 3)
        return first + solved + passes + rival

    def memory(self, weights: Sequence[Weight], data: DataSize) -> int:
        """H with its factor and one copy, working copies of a weight, and the spectrum of its smaller side."""
        inputs, largest = weights[0].in_features, max(weight.out_features for weight in weights)
        return 12 * inputs**2 + 40 * largest * inputs + 24 * min(inputs, largest) ** 2

    def block(self, view: BlockView) -> None:
        refines = bool(self.refine_steps and view.stages())
        wanted = [view.output(batch) for batch in range(view.batches)] if refines else []
        solved = self._solve(view)
        if refines and solved:
            self._refine(view, solved, wanted)

    def output_head(self, view: BlockView) -> None:
        self._solve(view)

    def _solve(self, view: BlockView) -> list[Solved]:
        """Store every weight of the view. Returns those that did not stay dense."""
        solved = []
        for stage in view.stages():
            metrics = stage_metrics(view, stage, self.damping, self.metric == "output")
            for group, (metric, tokens) in zip(stage, metrics, strict=True):
                for weight in group:
                    if (found := self._store(view, weight, metric, tokens)) is not None:
                        solved.append(found)
        return solved

    def _refine(self, view: BlockView, solved: list[Solved], wanted: list[torch.Tensor]) -> None:
        """Train all factors of the block. Store them again if, after rounding, they are better on held-out batches."""
        from compressor.methods.factorization.joint_training import StraightThrough, mean_loss, split, train

        def stand_in(one: Solved) -> StraightThrough:
            return StraightThrough(*one.factors(), one.lower(), view.bias(one.weight))

        def loss(modules: list[StraightThrough]) -> float:
            places = {one.weight: module for one, module in zip(solved, modules, strict=True)}
            return mean_loss(lambda batch: view.output(batch, places), wanted, split(len(wanted))[1])

        modules = [stand_in(one) for one in solved]
        before = loss(modules)
        places = {one.weight: module for one, module in zip(solved, modules, strict=True)}
        train(
            modules,
            lambda batch: view.output(batch, places),
            wanted,
            self.refine_steps,
            self.refine_rate,
            view.generator,
        )
        refined = [one.with_factors(*module.factors()) for one, module in zip(solved, modules, strict=True)]
        after = loss([stand_in(one) for one in refined])
        is_better = after < before
        if not is_better:
            message = f"training did not lower the block's loss of {before:.3g}"
            view.warn("not-refined", solved[0].weight.name, message, before=before, after=after)
        for one in refined if is_better else solved:
            error = one.metric.relative_error(one.matrix, one.layer.matrix(torch.float32))
            losses = {"refine_loss_before": before, "refine_loss": after if is_better else before}
            more = {**one.record, **losses, "relative_error": error, "output_error": error**0.5}
            view.put(one.weight, one.layer, **more)

    def _store(self, view: BlockView, weight: Weight, metric: Metric, tokens: int) -> Solved | None:
        """Store a weight. Returns None if it stays dense."""
        record: dict[str, Any] = {"calibration_tokens": tokens, "metric": metric.name, "damping": metric.damping}
        shape = self._shape(weight)
        if shape is None:
            self.leave_dense(
                view, weight, "the result of these settings is not smaller than the weight in 16 bits", record
            )
            return None
        block = self._block(weight)
        size = block_bytes(weight.shape, block, *shape, self.values)
        self._check_ratio(view, weight, size)
        matrix = view.matrix(weight)
        report = partial(view.progress, weight.name)
        problem = Problem(matrix, metric, metric.error(matrix), block, view.generator, report)
        layer, error = self._sparse(problem, *shape)
        rival, rival_error = self._low_rank(problem, largest_rank(weight.shape, size, self.values), error)
        record |= {"relative_error": error, "relative_error_svd": rival_error, "chosen": "sparse"}
        best: SparseFactorLinear | LowRankLinear = layer
        if rival is not None and rival_error is not None and rival_error <= error:
            best, error = rival, rival_error
            record |= {"chosen": "low_rank", "fallback": "svd"}
        if self.max_rel_error is not None and error > self.max_rel_error:
            why = f"error {error:.3g} is above max_rel_error {self.max_rel_error:g}"
            self.leave_dense(view, weight, Because(why, error=error, limit=self.max_rel_error), record)
            return None
        record["output_error"] = error**0.5
        view.put(weight, best, **record)
        return Solved(weight, matrix, best, metric, record)

    def _check_ratio(self, view: BlockView, weight: Weight, size: int) -> None:
        if self.atoms is not None:
            return
        wanted = (self.ratio or DEFAULT_RATIO) * dense_bytes(weight.shape)
        if size < (1 - RATIO_TOLERANCE) * wanted:
            message = f"uses {size} of the {wanted:.0f} bytes asked for: no pair of atoms and k fills them better"
            view.warn("ratio-missed", weight.name, message, bytes=size, wanted=wanted)

    def _sparse(self, problem: Problem, atoms: int, k: int) -> tuple[SparseFactorLinear, float]:
        """The sparse factors of the matrix in their stored format, and the relative error."""
        from compressor.layers.sparse_factor_linear import SparseFactorLinear

        matrix, metric = problem.matrix, problem.metric
        solve = partial(factorize, matrix, metric, problem.block, atoms, k, self.sweeps, self.rounds)
        found = balance(solve(problem.generator, report=problem.report))
        layer = SparseFactorLinear.pack(found.atoms, found.values, found.index, self.values)
        error = problem.relative_error(layer)
        if self.values == "int8":  # rounding atoms is coarse here, so coefficients are solved again
            rounded = SparseFactors(*layer.factors(torch.float32), layer.index())
            found = refit_values(matrix, metric, rounded)
            again = SparseFactorLinear.pack(found.atoms, found.values, found.index, self.values)
            again_error = problem.relative_error(again)
            if again_error < error:
                return again, again_error
        return layer, error

    def _low_rank(self, problem: Problem, rank: int, rival: float) -> tuple[LowRankLinear | None, float | None]:
        """The low-rank factors of this rank and their relative error.

        No factors if even rank 1 does not fit into the bytes, or if the error before rounding is above that of the
        rival: rounding can't make the best factors of a rank better.
        """
        from compressor.layers.low_rank_linear import LowRankLinear

        if not rank:
            return None, None
        problem.report(1.0)
        least = least_error(problem.matrix, problem.metric, rank)
        if least > rival:
            return None, least
        layer = LowRankLinear.pack(*spectrum(problem.matrix, problem.metric).factors(rank), self.values)
        return layer, problem.relative_error(layer)
