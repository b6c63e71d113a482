"""Approximates matrices by products of two thin ones, optimal for given inputs, and computes the bytes of the factors.

The error of an approximation W' of a weight W (out, in) is that of its outputs on calibration inputs x with damped
second moments H = mean of x xᵀ: E(W') = tr((W - W') H (W - W')ᵀ) = ‖(W - W') L‖², where H = L Lᵀ. The relative error
is E(W') / E(0).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from compressor.errors import PassError
from compressor.lazy import torch
from compressor.methods.quantization.hessian import Gram
from compressor.model.weights import Group, Stage
from compressor.protocol import BlockView

REFERENCE_BYTES = 2  # ratios refer to the bytes of a weight in 16 bits, for any dtype of the model
TINY = 1e-30  # replaces a divisor of 0
LADDER = 3  # how often damping is increased tenfold before the error
SCALE_BYTES = 4
PANEL = 1024  # columns of L in one product
EXACT_INPUTS = 1024  # up to this number, second moments and their products are computed in float64


@dataclass(frozen=True)
class Metric:
    """hessian  (in, in) float64, or float32 if there are many inputs; damped
    lower    L of H = L Lᵀ, of the same dtype
    damping  added to the diagonal, as a fraction of its mean; 0 if there was no input and H = I
    """

    hessian: torch.Tensor
    lower: torch.Tensor
    damping: float

    @property
    def name(self) -> str:
        """What the errors measure, for the report."""
        return "output" if self.damping else "weight"

    def error(self, change: torch.Tensor) -> float:
        """E of a change (out, in) of the weight. Products with the zeros above the diagonal of L are left out."""
        change, features, total = change.to(self.lower.dtype), len(self.lower), 0.0
        for start in range(0, features, PANEL):
            stop = min(start + PANEL, features)
            total += float((change[:, start:] @ self.lower[start:, start:stop]).square().sum())
        return total

    def relative_error(self, matrix: torch.Tensor, stand_in: torch.Tensor) -> float:
        """E of the approximation divided by E(0)."""
        return self.error(matrix - stand_in) / max(self.error(matrix), TINY)


def metric_of(hessian: torch.Tensor | None, features: int, damping: float, where: str) -> Metric:
    """The metric of second moments (in, in), which are known up to a factor. None, or all zero: H = I.

    hessian  it is damped in place, so that only L is a second matrix of this size
    raises   PassError if they contain NaN or Inf, or if no damping makes them positive definite
    """
    if hessian is None or not bool(hessian.any()):
        device = None if hessian is None else hessian.device
        eye = torch.eye(features, dtype=_work_dtype(features), device=device)
        return Metric(eye, eye, 0.0)
    if not bool(torch.isfinite(hessian).all()):
        raise PassError(
            "the calibration inputs of this weight overflow to NaN or Inf",
            where=where,
            hint="Set model.dtype: float32, or check the model's outputs on this data.",
            data={"reason": "not-finite"},
        )
    mean = float(hessian.diagonal().double().mean())
    share = 0.0
    for attempt in range(LADDER + 1):
        before, share = share, damping * 10**attempt
        hessian.diagonal().add_((share - before) * mean)
        for dtype in dict.fromkeys((hessian.dtype, torch.float64)):
            lower, info = torch.linalg.cholesky_ex(hessian.to(dtype))
            if int(info) == 0:
                return Metric(hessian, lower.to(hessian.dtype), share)
    raise PassError(
        f"the Hessian of its inputs is not positive definite even with damping {share:g}",
        where=where,
        hint=f"Set a damping above {share:g} or more data.samples, or leave this weight out with `except`.",
        data={"reason": "not-positive-definite", "damping": share},
    )


def stage_metrics(view: BlockView, stage: Stage, damping: float, of_outputs: bool) -> Iterator[tuple[Metric, int]]:
    """The metric of each group, and its number of tokens. H = I without data, or if no token reached the group."""
    if not of_outputs:
        yield from ((metric_of(None, group.in_features, damping, group.name), 0) for group in stage)
        return

    def start(group: Group) -> Gram:
        return Gram.zeros(group.in_features, _work_dtype(group.in_features), view.device)

    for group, gram in zip(stage, view.fold(stage, start, Gram.add), strict=True):
        if gram.tokens < group.in_features:
            message = f"{gram.tokens} calibration tokens for {group.in_features} inputs"
            shown = message if gram.tokens else f"{message}; weights count alike"
            view.warn("few-tokens", group.name, shown, tokens=gram.tokens, inputs=group.in_features)
        yield metric_of(gram.hessian(), group.in_features, damping, group.name), gram.tokens


def moments_bytes(features: int) -> int:
    """Bytes of the second moments of inputs with so many features."""
    return (8 if features <= EXACT_INPUTS else 4) * features**2


def _work_dtype(features: int) -> torch.dtype:
    return torch.float64 if features <= EXACT_INPUTS else torch.float32


@dataclass(frozen=True)
class Spectrum:
    """W L = U Σ Vᵀ of a weight, which gives its best approximation of any rank.

    matrix  (out, in) W, in the metric's dtype
    basis   (n, n) U if out <= in, otherwise V; n = min(out, in)
    values  (n,) σ, descending
    """

    matrix: torch.Tensor
    metric: Metric
    basis: torch.Tensor
    values: torch.Tensor

    def factors(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A (out, r) and C (r, in) with A C the optimum of E at this rank (Eckart and Young): U Uᵀ W, or W L V Vᵀ L⁻¹.

        A column of A and its row of C have the same norm, so that both stay in the range of 16 bits.
        """
        kept, lower = self.basis[:, :rank], self.metric.lower
        if len(self.matrix) <= self.matrix.shape[1]:
            left, right = kept, kept.t() @ self.matrix
        else:
            left = self.matrix @ (lower @ kept)
            right = torch.linalg.solve_triangular(lower, kept.t(), upper=False, left=False)
        sizes = [part.norm(dim=dim).clamp(min=TINY) for part, dim in ((left, 0), (right, 1))]
        balance = (sizes[1] / sizes[0]).sqrt()
        return left * balance, right / balance[:, None]

    def tails(self) -> torch.Tensor:
        """(n + 1,) E of the best approximation of rank 0, 1, ... n, divided by E(0)."""
        squares = self.values.square()
        left = torch.cat((squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)))
        return left / left[0].clamp(min=TINY)

    def rank_of_energy(self, energy: float) -> int:
        """The smallest rank whose share of Σ σ² is at least `energy`; at least 1."""
        kept = 1 - self.tails()
        reaches = (kept >= energy * (1 - 1e-12)).nonzero()
        return max(1, int(reaches[0])) if len(reaches) else len(self.values)


def spectrum(matrix: torch.Tensor, metric: Metric) -> Spectrum:
    """The spectrum of a weight (out, in), from the eigenvalues of its smaller `side`.

    σ² below 1e-16 of the largest is rounding, so σ has half the digits of float64. They are enough: only sums of σ²
    and the span of the first vectors are used.
    """
    matrix = matrix.to(metric.lower.dtype)
    squares, basis = torch.linalg.eigh(side(matrix, metric))
    values = squares.flip(0).clamp(min=0).sqrt()
    return Spectrum(matrix, metric, basis.flip(1).to(matrix.dtype), values.to(matrix.dtype))


def least_error(matrix: torch.Tensor, metric: Metric, rank: int) -> float:
    """E of the best approximation of this rank, divided by E(0), in a third of the time of `spectrum`."""
    squares = torch.linalg.eigvalsh(side(matrix, metric)).clamp(min=0)
    return float(squares[: len(squares) - rank].sum() / squares.sum().clamp(min=TINY))


def side(matrix: torch.Tensor, metric: Metric) -> torch.Tensor:
    """The smaller of (W L)(W L)ᵀ and (W L)ᵀ(W L), float64. Its eigenvalues are σ²."""
    seen = (matrix.to(metric.lower.dtype) @ metric.lower).double()
    return seen @ seen.t() if len(seen) <= seen.shape[1] else seen.t() @ seen


def dense_bytes(shape: Sequence[int]) -> int:
    """Bytes of the weight in 16 bits, to which ratios refer."""
    return REFERENCE_BYTES * shape[0] * shape[1]


def value_bytes(values: str) -> int:
    """Bytes of one stored number: float16, bfloat16 or int8."""
    return 1 if values == "int8" else 2


def low_rank_bytes(shape: Sequence[int], rank: int, values: str) -> int:
    """Bytes of A (out, r) and C (r, in), and for int8 of a scale for each r."""
    scale = SCALE_BYTES if values == "int8" else 0
    return rank * (value_bytes(values) * (shape[0] + shape[1]) + scale)


def largest_rank(shape: Sequence[int], size: int, values: str) -> int:
    """The largest rank that fits into `size` bytes, at most min(shape); 0 if none fits."""
    return min(size // low_rank_bytes(shape, 1, values), *shape)


def shrinks(shape: Sequence[int], size: int) -> bool:
    """Whether a weight stored in `size` bytes is smaller than in 16 bits."""
    return size < dense_bytes(shape)
