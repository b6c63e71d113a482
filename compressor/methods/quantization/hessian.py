"""Sums the Hessian of calibration inputs, and computes the triangular factor that GPTQ uses."""

from __future__ import annotations

from dataclasses import dataclass, field

from compressor.errors import PassError
from compressor.lazy import torch
from compressor.methods.quantization.inverse_root import inverse_root_

MIRROR_BLOCK = 1024  # rows and columns that are transposed together


@dataclass
class Gram:
    """Sum of x xᵀ over tokens: matrix (in, in) float32 or float64. Only its upper triangle is defined."""

    matrix: torch.Tensor
    tokens: int = 0

    @classmethod
    def zeros(cls, features: int, dtype: torch.dtype, device: torch.device) -> Gram:
        return cls(torch.zeros(features, features, dtype=dtype, device=device))

    def add(self, x: torch.Tensor) -> Gram:
        """Add x (tokens, in). Products of 16-bit inputs are exact in float32."""
        from compressor.kernels.ops.hessian_add import (
            hessian_add_,
        )  # it imports torch, and settings must load without torch

        hessian_add_(self.matrix, x, 1.0, 1.0)
        self.tokens += x.shape[0]
        return self

    def hessian(self, order: torch.Tensor | None = None) -> torch.Tensor:
        """2 / tokens * sum, (in, in), symmetric by construction from the upper triangle.

        order  (in,) int64: rows and columns of the result; None: as they are
        """
        mirror_(self.matrix)
        full = self.matrix.clone() if order is None else permuted(self.matrix, order)
        return full.mul_(2.0 / max(self.tokens, 1))

    def take(self, order: torch.Tensor) -> torch.Tensor:
        """The Hessian in this order. The sum is given up, to save the memory of one matrix."""
        taken = self.hessian(order)
        self.matrix = self.matrix.new_empty(0, 0)
        return taken

    def diagonal(self) -> torch.Tensor:
        """Diagonal of the Hessian, (in,), a tensor of its own."""
        return self.matrix.diagonal() * (2.0 / max(self.tokens, 1))


def mirror_(matrix: torch.Tensor) -> None:
    """Copy the upper triangle of a square matrix onto the lower one."""
    for start in range(0, len(matrix), MIRROR_BLOCK):
        stop = start + MIRROR_BLOCK
        diagonal = matrix[start:stop, start:stop]
        diagonal.copy_(torch.triu(diagonal) + torch.triu(diagonal, 1).t())
        for right in range(stop, len(matrix), MIRROR_BLOCK):
            block = slice(right, right + MIRROR_BLOCK)
            matrix[block, start:stop] = matrix[start:stop, block].t()


def permuted(matrix: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """matrix[order][:, order], with one copy."""
    result = torch.empty_like(matrix)
    for rows, to in zip(order.split(MIRROR_BLOCK), result.split(MIRROR_BLOCK), strict=True):
        torch.index_select(matrix[rows], 1, order, out=to)
    return result


@dataclass(frozen=True)
class Factor:
    """upper     U with Uᵀ U = (H + damping I)⁻¹, (in, in)
    damping   added to the diagonal, as a fraction of its mean
    attempts  earlier attempts, for the report
    """

    upper: torch.Tensor
    damping: float
    dtype: str
    attempts: tuple[str, ...] = field(default=())


def inverse_factor(hessian: torch.Tensor, percdamp: float, max_percdamp: float, where: str) -> Factor | None:
    """U of the damped Hessian by one reversed Cholesky and one triangular inversion.

    H = R Rᵀ with R upper, U = R⁻¹: half the work of factoring H⁻¹, and one copy of H (`inverse_root`). Tries float32,
    then float64, then 10 and 100 times the damping (at most max_percdamp). None if all of them fail.

    hessian  (in, in), not modified
    raises   PassError if the Hessian contains NaN or Inf
    """
    if not bool(torch.isfinite(hessian.sum())) and not bool(torch.isfinite(hessian).all()):
        raise PassError(
            "the calibration inputs of this weight overflow to NaN or Inf",
            where=where,
            hint="Set model.dtype: float32, or check the model's outputs on this data.",
            data={"reason": "not-finite"},
        )
    mean = float(hessian.diagonal().mean())
    ladder = [(hessian.dtype, percdamp), (torch.float64, percdamp)]
    ladder += [(torch.float64, min(factor * percdamp, max_percdamp)) for factor in (10, 100)]
    attempts: list[str] = []
    for dtype, damping in dict.fromkeys(ladder):
        upper = hessian.to(dtype, copy=True)
        upper.diagonal().add_(damping * mean)
        name = str(dtype).removeprefix("torch.")
        found = inverse_root_(upper)
        if found and bool((upper.diagonal() > 0).all()) and bool(torch.isfinite(upper.diagonal()).all()):
            return Factor(upper.triu_(), damping, name, tuple(attempts))
        attempts.append(f"{name}, damping {damping:g}: not positive definite")
    return None
