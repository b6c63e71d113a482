"""Matrices as products of two thin ones, best for given inputs, and what such a product takes in bytes.

The error of a stand-in W' for a weight W (out, in) is that of its outputs on calibration inputs x with second moments
H = mean of x xᵀ, damped: E(W') = tr((W - W') H (W - W')ᵀ) = ‖(W - W') L‖², where H = L Lᵀ. Relative: E(W') / E(0).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from compressor.errors import PassError
from compressor.lazy import torch
from compressor.methods.quantization.hessian import Gram
from compressor.model.weights import Group, Stage
from compressor.protocol import Site

REFERENCE_BYTES = 2  # ratios are of the bytes of a weight in 16 bits, whatever dtype the model is held in
TINY = 1e-30  # in place of zeros that are divided by
LADDER = 3  # how often damping is raised tenfold before giving up
SCALE_BYTES = 4
EXACT_INPUTS = 1024  # up to which second moments are summed, and spectra found, in float64


@dataclass(frozen=True)
class Metric:
    """hessian  (in, in) float64, or float32 where there are many inputs; damped
    lower    L of H = L Lᵀ, of the same type
    damping  what was added to the diagonal, as a fraction of its mean; 0 where no input was seen and H = I
    """

    hessian: torch.Tensor
    lower: torch.Tensor
    damping: float

    @property
    def name(self) -> str:
        """For the report: what errors are of."""
        return "output" if self.damping else "weight"

    def error(self, change: torch.Tensor) -> float:
        """E of a change (out, in) of the weight."""
        return float((change.to(self.lower.dtype) @ self.lower).square().sum())

    def relative_error(self, matrix: torch.Tensor, stand_in: torch.Tensor) -> float:
        """E of the stand-in as a share of E of nothing."""
        return self.error(matrix - stand_in) / max(self.error(matrix), TINY)


def metric_of(hessian: torch.Tensor | None, features: int, damping: float, where: str) -> Metric:
    """The metric of second moments (in, in) known up to a factor; None, or all zero: H = I.

    raises PassError if they hold NaN or Inf, or if no damping makes them positive definite
    """
    if hessian is None or not bool(hessian.any()):
        device = None if hessian is None else hessian.device
        eye = torch.eye(features, dtype=torch.float64, device=device)
        return Metric(eye, eye, 0.0)
    if not bool(torch.isfinite(hessian).all()):
        raise PassError(
            "the calibration inputs of this weight overflow to NaN or Inf",
            where=where,
            hint="Set model.dtype: float32, or check the model's outputs on this data.",
            data={"reason": "not-finite"},
        )
    mean = float(hessian.double().diagonal().mean())
    for attempt in range(LADDER + 1):
        share = damping * 10**attempt
        damped = hessian.to(torch.float64, copy=True)
        damped.diagonal().add_(share * mean)
        lower, info = torch.linalg.cholesky_ex(damped)
        if int(info) == 0:
            return Metric(damped.to(hessian.dtype), lower.to(hessian.dtype), share)
    raise PassError(
        f"the Hessian of its inputs is not positive definite even with damping {share:g}",
        where=where,
        hint=f"Set a damping above {share:g} or more data.samples, or leave this weight out with `except`.",
        data={"reason": "not-positive-definite", "damping": share},
    )


def stage_metrics(site: Site, stage: Stage, damping: float, of_outputs: bool) -> list[tuple[Metric, int]]:
    """The metric of each group, and the tokens that it is from; H = I where no data is asked for, or none came."""
    if not of_outputs:
        return [(metric_of(None, group.in_features, damping, group.name), 0) for group in stage]

    def start(group: Group) -> Gram:
        exact = group.in_features <= EXACT_INPUTS
        return Gram.zeros(group.in_features, torch.float64 if exact else torch.float32, site.device)

    found = []
    for group, gram in zip(stage, site.fold(stage, start, Gram.add), strict=True):
        if gram.tokens < group.in_features:
            message = f"{gram.tokens} calibration tokens for {group.in_features} inputs"
            site.warn("few-tokens", group.name, message if gram.tokens else f"{message}; weights count alike")
        found.append((metric_of(gram.hessian(), group.in_features, damping, group.name), gram.tokens))
    return found


@dataclass(frozen=True)
class Spectrum:
    """W L = U Σ Vᵀ of a weight, from which its best stand-in of any rank follows.

    left    (out, n), U, of the metric's type as all of it
    values  (n,) σ, descending
    right   (n, in), Vᵀ L⁻¹
    """

    left: torch.Tensor
    values: torch.Tensor
    right: torch.Tensor

    def factors(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A (out, r) and C (r, in) with A C the optimum of E at this rank (Eckart and Young).

        A column of A and its row of C get the same norm, so that neither leaves the range of 16 bits before the other.
        """
        left, right = self.left[:, :rank] * self.values[:rank], self.right[:rank]
        sizes = [part.norm(dim=dim).clamp(min=TINY) for part, dim in ((left, 0), (right, 1))]
        balance = (sizes[1] / sizes[0]).sqrt()
        return left * balance, right / balance[:, None]

    def tails(self) -> torch.Tensor:
        """(n + 1,) E of the best stand-in of rank 0, 1, ... n, as a share of E(0)."""
        squares = self.values.square()
        left = torch.cat((squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)))
        return left / left[0].clamp(min=TINY)

    def rank_of_energy(self, energy: float) -> int:
        """The least rank whose share of Σ σ² reaches `energy`; at least 1."""
        kept = 1 - self.tails()
        reaches = (kept >= energy * (1 - 1e-12)).nonzero()
        return max(1, int(reaches[0])) if len(reaches) else len(self.values)


def spectrum(matrix: torch.Tensor, metric: Metric) -> Spectrum:
    """matrix (out, in)"""
    left, values, right = torch.linalg.svd(matrix.to(metric.lower.dtype) @ metric.lower, full_matrices=False)
    back = torch.linalg.solve_triangular(metric.lower, right, upper=False, left=False)
    return Spectrum(left, values, back)


def dense_bytes(shape: Sequence[int]) -> int:
    """What ratios are of: the weight in 16 bits."""
    return REFERENCE_BYTES * shape[0] * shape[1]


def value_bytes(values: str) -> int:
    """Of one stored number: float16, bfloat16 or int8."""
    return 1 if values == "int8" else 2


def low_rank_bytes(shape: Sequence[int], rank: int, values: str) -> int:
    """Of A (out, r) and C (r, in), and with int8 a scale for each r."""
    scale = SCALE_BYTES if values == "int8" else 0
    return rank * (value_bytes(values) * (shape[0] + shape[1]) + scale)


def largest_rank(shape: Sequence[int], size: int, values: str) -> int:
    """The largest rank that `size` bytes hold, at most min(shape); 0 if none does."""
    return min(size // low_rank_bytes(shape, 1, values), *shape)


def shrinks(shape: Sequence[int], size: int) -> bool:
    """Whether a weight stored in `size` bytes is smaller than in 16 bits."""
    return size < dense_bytes(shape)
