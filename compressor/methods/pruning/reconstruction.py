"""Solves a pruned output projection again, so that its kept inputs give the output of the dense matrix.

An output projection W (out, n) keeps only the inputs in K. With the inputs X (tokens, n) of the dense model,

    W' = argmin |X W^T - X_K W'^T - 1 s^T|² + lambda |W'|²
       = W C[:, K] (C[K, K] + lambda I)^-1          lambda = ridge * mean of diag C
       = W[:, K] + (W[:, D] C[D, K] - lambda W[:, K]) (C[K, K] + lambda I)^-1

where D are the removed inputs, C = X^T X and s = 0. The last form is the one that is computed, since D is the smaller
set. If the output projection has a bias, s is its change: then C is the covariance of X, and s = W mean(X) -
W' mean(X_K). (The first form is that of Oshin Dutta et al., arXiv 2406.05276, and their code. Centring C for a bias is
our addition; it is least squares with an intercept.) C is summed in float32, as GPTQ's Hessian is, or in float64 for a
float64 model, and solved in float64.

With few tokens the result can be worse. So it is used only if it is nearer to the dense output on held-out tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from compressor.lazy import torch
from compressor.methods.quantization.hessian import Gram, mirror_

RIDGE = 1e-2  # relative to the mean squared input; our choice, since the paper's text was not read
HELD_OUT = 4  # one batch of this many is held out
HELD_OUT_TOKENS = 8192  # that are enough to compare two matrices; they are kept in memory


@dataclass
class Moments:
    """Sums over tokens.

    total  (n,) float64
    gram   of (n, n); its dtype is that of the sums
    """

    total: torch.Tensor
    gram: Gram

    @classmethod
    def zeros(cls, features: int, dtype: torch.dtype, device: torch.device) -> Moments:
        return cls(
            torch.zeros(features, dtype=torch.float64, device=device),
            Gram.zeros(features, torch.promote_types(dtype, torch.float32), device),
        )

    @property
    def tokens(self) -> int:
        return self.gram.tokens

    def add(self, x: torch.Tensor) -> None:
        """x (tokens, n)."""
        self.total += x.sum(0, dtype=torch.float64)
        self.gram.add(x)


@dataclass
class Calibration:
    """Inputs of an output projection, one batch after the other: sums of most of them, and the others as they are.

    One batch in HELD_OUT is held out, until these have HELD_OUT_TOKENS. A single batch is divided by its tokens.

    batches   how many there will be
    held_out  (tokens, n) each
    """

    batches: int
    moments: Moments | None = None
    held_out: list[torch.Tensor] = field(default_factory=list)
    _seen: int = 0

    def add(self, x: torch.Tensor) -> None:
        """x (tokens, n)."""
        if self.moments is None:
            self.moments = Moments.zeros(x.shape[1], x.dtype, x.device)
        number, self._seen = self._seen, self._seen + 1
        if self.batches == 1:
            split = len(x) - len(x) // HELD_OUT
            self.moments.add(x[:split])
            self.held_out.append(x[split:])
        elif number % min(self.batches, HELD_OUT) == 1 and sum(map(len, self.held_out)) < HELD_OUT_TOKENS:
            self.held_out.append(x)  # the second, and every fourth after it
        else:
            self.moments.add(x)


@dataclass(frozen=True)
class Repair:
    """weight (out, len(K)) and shift (out,) or None, and errors on held-out tokens: mean squared, relative to the mean
    squared dense output, before (columns removed) and after (solved). `weight` is the better of the two.
    """

    weight: torch.Tensor
    shift: torch.Tensor | None
    before: float
    after: float


def solve(
    weight: torch.Tensor, kept: Sequence[int], moments: Moments, ridge: float = RIDGE, has_bias: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """W' (out, len(kept)) and s (out,), which is None without a bias; float64.

    weight  W (out, n)
    ridge   above 0, so that the solution is unique for any number of tokens
    """
    if ridge <= 0:
        raise ValueError(f"ridge is {ridge}; without one there may be many solutions")
    wide = weight.to(torch.float64)
    is_kept = torch.zeros(wide.shape[1], dtype=torch.bool, device=weight.device)
    is_kept[list(kept)] = True
    mean = moments.total / max(moments.tokens, 1)
    gram = moments.gram.matrix
    mirror_(gram)

    def block(rows: torch.Tensor) -> torch.Tensor:
        """C[rows, K] in float64."""
        own = gram[rows][:, is_kept].to(torch.float64)
        return own - moments.tokens * torch.outer(mean[rows], mean[is_kept]) if has_bias else own

    squares = gram.diagonal().to(torch.float64)
    damping = ridge * float((squares - moments.tokens * mean.square() if has_bias else squares).mean())
    solved = wide[:, is_kept]
    if 0 < damping < math.inf and len(kept):  # else there are no inputs, or they overflow
        inner = block(is_kept)
        damping, factor = _damped_factor(inner, damping)
        missing = wide[:, ~is_kept] @ block(~is_kept) - damping * solved
        solved = solved + torch.cholesky_solve(missing.t(), factor).t()
    return solved, wide @ mean - solved @ mean[is_kept] if has_bias else None


def _damped_factor(inner: torch.Tensor, damping: float) -> tuple[float, torch.Tensor]:
    """The damping that was needed, and the lower factor of inner + damping I. `inner` is overwritten.

    C is summed in float32. If few directions are much larger than all others, or a mean much larger than the deviations
    from it, the rounding of these sums can exceed the damping. Then ten times as much is tried.
    """
    added = 0.0
    while True:
        inner.diagonal().add_(damping - added)
        factor, failed = torch.linalg.cholesky_ex(inner)
        if not bool(failed):
            return damping, factor
        damping, added = 10 * damping, damping


def output_errors(
    weight: torch.Tensor,
    slices: Sequence[tuple[torch.Tensor, torch.Tensor | None]],
    kept: Sequence[int],
    batches: Iterable[torch.Tensor],
) -> list[float]:
    """For each (W', s) the mean of |W x - W' x_K - s|² over tokens, divided by the mean of |W x|²; 0 without output."""
    wide, index = weight.to(torch.float64), torch.tensor(list(kept), dtype=torch.int64, device=weight.device)
    differences = []
    for pruned, _ in slices:
        difference = wide.clone()
        difference[:, index] -= pruned.to(torch.float64)
        differences.append(difference)
    given, lost = 0.0, [0.0] * len(slices)
    for batch in batches:
        x = batch.to(torch.promote_types(batch.dtype, torch.float32))
        given += float((x @ wide.to(x.dtype).t()).double().square().sum())
        for number, (difference, (_, shift)) in enumerate(zip(differences, slices, strict=True)):
            apart = (x @ difference.to(x.dtype).t()).double()
            lost[number] += float((apart if shift is None else apart - shift).square().sum())
    return [one / given if given else 0.0 for one in lost]


def repair(
    weight: torch.Tensor,
    kept: Sequence[int],
    plain: torch.Tensor,
    inputs: Calibration,
    ridge: float = RIDGE,
    has_bias: bool = False,
) -> Repair:
    """The solved matrix, or the plain one if that is nearer to the dense output on held-out batches.

    kept    ascending
    plain   the matrix without solving: W[:, kept], or that with factors
    inputs  of the output projection in the dense model, at least one batch
    """
    assert inputs.moments is not None
    solved, shift = solve(weight, kept, inputs.moments, ridge, has_bias)
    before, after = output_errors(weight, [(plain, None), (solved, shift)], kept, inputs.held_out)
    if after < before:
        return Repair(solved, shift, before, after)
    return Repair(plain, None, before, after)
