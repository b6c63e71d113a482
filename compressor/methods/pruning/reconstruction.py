"""Solves a pruned output projection again, so that its kept inputs give the output of the dense matrix.

An output projection W (out, n) keeps only the inputs in K. With the inputs X (tokens, n) of the dense model,

    W' = argmin |X W^T - X_K W'^T - 1 s^T|² + lambda |W'|²
       = W C[:, K] (C[K, K] + lambda I)^-1          lambda = ridge * mean of diag C

where C = X^T X and s = 0. If the output projection has a bias, s is its change: then C is the covariance of X, and
s = W mean(X) - W' mean(X_K). (The first form is that of Oshin Dutta et al., arXiv 2406.05276, and their code. Centring
C for a bias is our addition; it is least squares with an intercept.) Sums are float64: n² of them for one matrix.

With few tokens the result can be worse. So it is used only if it is nearer to the dense output on held-out tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from compressor.lazy import torch

RIDGE = 1e-2  # relative to the mean squared input; our choice, since the paper's text was not read
HELD_OUT = 4  # one batch of this many is held out


@dataclass
class Moments:
    """Sums over tokens. total (n,), gram (n, n), float64."""

    tokens: int
    total: torch.Tensor
    gram: torch.Tensor

    @classmethod
    def zeros(cls, features: int, device: torch.device) -> Moments:
        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        return cls(0, zeros(features), zeros(features, features))

    def add(self, x: torch.Tensor) -> None:
        """x (tokens, n)."""
        wide = x.to(torch.float64)
        self.tokens += len(wide)
        self.total += wide.sum(0)
        self.gram.addmm_(wide.t(), wide)


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
    wide, index = weight.to(torch.float64), torch.tensor(list(kept), dtype=torch.int64, device=weight.device)
    mean = moments.total / max(moments.tokens, 1)
    gram = moments.gram - moments.tokens * torch.outer(mean, mean) if has_bias else moments.gram
    damping = ridge * float(gram.diagonal().mean())
    solved = wide[:, index]
    if damping > 0 and len(kept):  # else there are no inputs
        inner = gram[index][:, index]
        inner.diagonal().add_(damping)
        factor = torch.linalg.cholesky(inner)
        solved = torch.cholesky_solve((wide @ gram[:, index]).t(), factor).t()
    return solved, wide @ mean - solved @ mean[index] if has_bias else None


def output_error(
    weight: torch.Tensor,
    cut: torch.Tensor,
    shift: torch.Tensor | None,
    kept: Sequence[int],
    batches: Iterable[torch.Tensor],
) -> float:
    """Mean of |W x - W' x_K - s|² over tokens, divided by the mean of |W x|²; 0 if there is no output."""
    wide = weight.to(torch.float64)
    difference = wide.clone()
    difference[:, torch.tensor(list(kept), dtype=torch.int64, device=weight.device)] -= cut.to(torch.float64)
    lost = given = 0.0
    for x in batches:
        apart = x.to(torch.float64) @ difference.t()
        lost += float((apart if shift is None else apart - shift).square().sum())
        given += float((x.to(torch.float64) @ wide.t()).square().sum())
    return lost / given if given else 0.0


def repair(
    weight: torch.Tensor,
    kept: Sequence[int],
    plain: torch.Tensor,
    inputs: Sequence[torch.Tensor] | Batches,
    ridge: float = RIDGE,
    has_bias: bool = False,
) -> Repair:
    """The solved matrix, or the plain one if that is nearer to the dense output on held-out batches.

    plain   the matrix without solving: W[:, kept], or that with factors
    inputs  batches of the output projection's inputs in the dense model, read twice
    """
    batches = inputs if isinstance(inputs, Batches) else Batches(lambda: iter(inputs), len(inputs))
    moments = Moments.zeros(weight.shape[1], weight.device)
    for x in batches.summed():
        moments.add(x)
    solved, shift = solve(weight, kept, moments, ridge, has_bias)
    before = output_error(weight, plain, None, kept, batches.held_out())
    after = output_error(weight, solved, shift, kept, batches.held_out())
    if after < before:
        return Repair(solved, shift, before, after)
    return Repair(plain, None, before, after)


@dataclass(frozen=True)
class Batches:
    """Calibration batches that can be read more than once, in two parts: one in HELD_OUT is held out.

    A single batch is divided by its tokens.
    """

    start: Callable[[], Iterator[torch.Tensor]]
    count: int

    def summed(self) -> Iterator[torch.Tensor]:
        return self._part(held_out=False)

    def held_out(self) -> Iterator[torch.Tensor]:
        return self._part(held_out=True)

    def _part(self, held_out: bool) -> Iterator[torch.Tensor]:
        for number, x in enumerate(self.start()):
            if self.count == 1:
                split = len(x) - len(x) // HELD_OUT
                yield x[split:] if held_out else x[:split]
            elif (number % min(self.count, HELD_OUT) == 1) == held_out:  # the second, and every fourth after it
                yield x
