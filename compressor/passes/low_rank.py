"""Low rank: replaces each matrix by the product of two thin ones, the best for the calibration inputs.

Paper: Cahyawijaya 2021, "Greenformers: Improving Computation and Memory Efficiency in Transformer Models via Low-Rank
Approximation", arXiv 2108.10808. Only its abstract was read; what follows is our reading of automatic factorization.

Objective. W (out, in) ≈ A C with A (out, r) and C (r, in) that minimize E = tr((W - A C) H (W - A C)ᵀ), where H is the
damped second moments of the inputs. With H = L Lᵀ and W L = U Σ Vᵀ, the optimum is A = U_r Σ_r, C = V_rᵀ L⁻¹, and E is
the sum of σ² beyond r (Eckart and Young).

Our choices
- The metric is H; `metric: weight` gives the plain SVD. Inputs are those of the model as compressed so far.
- The rank comes from one of: `ratio`, the share of bytes that is kept, of the weight in 16 bits, whatever the model's
  dtype; `rank`; `energy`, the least rank that keeps this share of Σ σ²; `budget`, bytes of all selected matrices. With
  a budget, each next rank goes to the matrix whose share of Σ σ² it raises most per byte, and a matrix that becomes as
  large as dense is stored dense.
- A matrix that would not get smaller stays dense, and so does one beyond `max_rel_error`, with a row and a warning.
- Solvers other than the SVD (the toolkit's semi-NMF) are not offered: they can't be better.

Cost per matrix: about 10 times in³ + out·in·min(out, in) multiply-adds, in float64 up to 1024 inputs. With a budget it
is twice as much, plus one run of the whole model.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal, TypedDict, cast

from pydantic import Field, PositiveInt, model_validator
from pydantic_core import PydanticCustomError

from compressor.bounds import Count
from compressor.errors import Because
from compressor.lazy import torch
from compressor.methods.factorization.counted_work import error_work, factors_work, metric_work, spectrum_work
from compressor.methods.factorization.factor_pass import FactorPass
from compressor.methods.factorization.low_rank import (
    Metric,
    Spectrum,
    dense_bytes,
    largest_rank,
    low_rank_bytes,
    shrinks,
    spectrum,
    stage_metrics,
)
from compressor.protocol import BlockView, DataSize, Decision, Weight, WholeModel, Work

FORMAT, DENSE = "low_rank_linear", "dense"
DEFAULT_RATIO = 0.5


class RankDecision(TypedDict):
    """ranks: of each weight; null means dense"""

    ranks: dict[str, int | None]
    bytes: int
    budget_bytes: int
    relative_errors: dict[str, float]


class LowRank(FactorPass):
    """Replace each matrix by two thin ones, by an SVD that calibration inputs weight."""

    title: ClassVar[str] = "Factorizes weights into two thin matrices by an SVD weighted with calibration data"
    paper: ClassVar[str] = "Cahyawijaya 2021, Greenformers, arXiv 2108.10808"
    format_name: ClassVar[str] = FORMAT

    ratio: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Share of each weight's bytes in 16 bits that is kept. null: 0.5, unless another setting gives the "
        "rank.",
    )
    rank: Count | None = Field(None, description="The rank of all selected weights.")
    energy: float | None = Field(
        None, gt=0, lt=1, description="Use the smallest rank that keeps this share of the squared output."
    )
    budget: PositiveInt | None = Field(
        None, description="Bytes that the selected matrices may use. The ranks are chosen over the whole model."
    )
    values: Literal["float16", "bfloat16", "int8"] = Field(
        "float16", description="Dtype in which both factors are stored."
    )
    metric: Literal["output", "weight"] = Field(
        "output",
        description="Error that is minimized. output: of the outputs on calibration data. weight: of the weights (no "
        "data).",
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
    def _one_rule(self) -> LowRank:
        rules = [name for name in ("ratio", "rank", "energy", "budget") if getattr(self, name) is not None]
        if len(rules) > 1:
            raise PydanticCustomError(
                "several-rules", f"{' and '.join(rules)} each set the rank: give only one of them", {"rules": rules}
            )
        return self

    @property
    def decides(self) -> bool:
        return self.budget is not None

    @property
    def _may_stay_dense(self) -> bool:
        return self.budget is not None or self.energy is not None or self.max_rel_error is not None

    @property
    def unplanned(self) -> str:
        if self.budget is not None:
            return "it chooses ranks over the whole model"
        return "the run decides the rank of a matrix, or that it stays dense" if self._may_stay_dense else ""

    @property
    def sizes_are(self) -> Literal["exact", "upper bounds", "lower bounds"]:
        return "upper bounds" if self._may_stay_dense else "exact"

    def stored(self, weight: Weight) -> str | None:
        if weight.is_function or weight.role == "embedding":  # refused at any size
            return FORMAT
        return FORMAT if self._planned_rank(weight.shape) else DENSE

    def alternatives(self, weight: Weight) -> tuple[str, ...]:
        return (DENSE,) if self._may_stay_dense else ()

    def format_params(self, weight: Weight) -> dict[str, Any]:
        return {"rank": self._planned_rank(weight.shape), "values": self.values}

    def _planned_rank(self, shape: Sequence[int]) -> int:
        """The rank, or its maximum if the run decides it; 0 if it would not make the weight smaller."""
        most = largest_rank(shape, dense_bytes(shape) - 1, self.values)
        if self.rank is not None:
            return self.rank if self.rank <= most else 0
        if self.energy is not None or self.budget is not None:
            return most
        return largest_rank(shape, int((self.ratio or DEFAULT_RATIO) * dense_bytes(shape)), self.values)

    def check(self, weights: Sequence[Weight]) -> list[tuple[str, dict[str, Any]]]:
        if self.budget is None:
            return []
        matrices = [weight.shape for weight in weights if not weight.is_function]
        least = sum(min(low_rank_bytes(shape, 1, self.values), dense_bytes(shape)) for shape in matrices)
        if least > self.budget:
            message = (
                f"the budget is {self.budget:,} bytes, and all {len(matrices)} matrices at rank 1 are {least:,} bytes"
            )
            values = {"budget": self.budget, "least": least, "matrices": len(matrices), "rank": 1}
            return [(message, {"reason": "budget-too-small", **values})]
        return []

    def work(self, weights: Sequence[Weight], data: DataSize, run: Work) -> Work:
        spectra = sum((spectrum_work(weight.shape) for weight in weights), Work())
        found = metric_work(weights[0].in_features, data) + spectra
        if self.decides:
            found *= 2
        for weight in weights:
            rank = float(self._planned_rank(weight.shape))
            found += error_work(weight.shape) * 2 + factors_work(weight.shape, rank)
        return found

    def memory(self, weights: Sequence[Weight], data: DataSize) -> int:
        """H with its factor and one copy, three copies of a weight, and the spectrum of its smaller side in float64."""
        inputs, largest = weights[0].in_features, max(weight.out_features for weight in weights)
        return 12 * inputs**2 + 16 * largest * inputs + 40 * min(inputs, largest) ** 2

    def decide(self, model: WholeModel) -> RankDecision:
        """Ranks of all matrices within the budget; null means dense."""
        tails: dict[str, list[float]] = {}
        shapes: dict[str, tuple[int, int]] = {}
        dense: dict[str, int] = {}
        for view in model.views():
            for stage in view.stages(sequential=False):
                for group, (metric, _) in zip(stage, self._metrics(view, stage), strict=True):
                    for weight in group:
                        found = spectrum(view.matrix(weight), metric)
                        tails[weight.name] = found.tails().tolist()
                        shapes[weight.name] = (weight.out_features, weight.in_features)
                        dense[weight.name] = weight.out_features * weight.in_features * view.dtype.itemsize
        assert self.budget is not None
        ranks, size = share_out(tails, shapes, dense, self.budget, self.values)
        errors = {name: 0.0 if rank is None else tails[name][rank] for name, rank in ranks.items()}
        return {"ranks": ranks, "bytes": size, "budget_bytes": self.budget, "relative_errors": errors}

    def block(self, view: BlockView) -> None:
        for stage in view.stages():
            for group, (metric, tokens) in zip(stage, self._metrics(view, stage), strict=True):
                for weight in group:
                    self._store(view, weight, metric, tokens)

    def _metrics(self, view: BlockView, stage: Any) -> Iterator[tuple[Metric, int]]:
        return stage_metrics(view, stage, self.damping, self.metric == "output")

    def _store(self, view: BlockView, weight: Weight, metric: Metric, tokens: int) -> None:
        record: dict[str, Any] = {"calibration_tokens": tokens, "metric": metric.name, "damping": metric.damping}
        if not self._planned_rank(weight.shape):
            self.leave_dense(view, weight, "no product of rank 1 or more is smaller than the weight in 16 bits", record)
            return
        matrix = view.matrix(weight)
        found = spectrum(matrix, metric)
        rank = self._rank(weight, found, view.decision)
        if rank is None:
            self.leave_dense(view, weight, "the rank that it needs would not make it smaller", record)
            return
        from compressor.layers.low_rank_linear import LowRankLinear

        left, right = found.factors(rank)
        layer = LowRankLinear.pack(left, right, self.values)
        error = metric.relative_error(matrix, layer.matrix(torch.float32))
        record |= {"rank": rank, "relative_error": error, "output_error": error**0.5}
        if self.max_rel_error is not None and error > self.max_rel_error:
            del record["output_error"]  # of factors that are not stored
            why = f"error {error:.3g} is above max_rel_error {self.max_rel_error:g}"
            self.leave_dense(view, weight, Because(why, error=error, limit=self.max_rel_error), record)
            return
        view.put(weight, layer, **record)

    def _rank(self, weight: Weight, found: Spectrum, decision: Decision | None) -> int | None:
        """The rank; None means dense."""
        if decision is not None:
            return cast(RankDecision, decision)["ranks"][weight.name]
        if self.energy is not None:
            rank = found.rank_of_energy(self.energy)
            return rank if shrinks(weight.shape, low_rank_bytes(weight.shape, rank, self.values)) else None
        return self._planned_rank(weight.shape)


def share_out(
    tails: dict[str, list[float]],
    shapes: dict[str, tuple[int, int]],
    dense: dict[str, int],
    budget: int,
    values: str,
) -> tuple[dict[str, int | None], int]:
    """Ranks within the budget, and the bytes that they take; None means dense.

    Every matrix starts at rank 1, or dense if that is not larger. Then the step that lowers the error of
    its matrix most per byte is taken again and again, while it fits. A matrix whose next step doesn't fit is finished.
    Within a matrix, each step lowers the error less than the one before. So no other order gets more out of the bytes,
    except for the last few bytes and for the step back to dense.

    tails  name -> error of rank 0, 1, ..., as a share of the error of rank 0
    dense  name -> bytes of the dense matrix
    """
    ranks: dict[str, int | None] = {}
    size = 0
    steps: list[tuple[float, str, int | None, int]] = []

    def offer(name: str) -> None:
        rank = ranks[name]
        if rank is None:
            return
        step = low_rank_bytes(shapes[name], 1, values)
        if rank < largest_rank(shapes[name], dense_bytes(shapes[name]) - 1, values):
            heapq.heappush(steps, (-(tails[name][rank] - tails[name][rank + 1]) / step, name, rank + 1, step))
        else:
            more = max(1, dense[name] - rank * step)
            heapq.heappush(steps, (-tails[name][rank] / more, name, None, more))

    for name, shape in sorted(shapes.items()):
        ranks[name] = 1 if largest_rank(shape, dense_bytes(shape) - 1, values) else None
        size += low_rank_bytes(shape, 1, values) if ranks[name] else dense[name]
        offer(name)
    while steps:
        gain, name, rank, more = heapq.heappop(steps)
        if gain < 0 and size + more <= budget:
            ranks[name] = rank
            size += more
            offer(name)
    return ranks, size
