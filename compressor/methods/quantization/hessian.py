"""Sums the Hessian of calibration inputs, and computes the triangular factor that GPTQ uses."""

from __future__ import annotations

from dataclasses import dataclass, field

from compressor.errors import PassError
from compressor.lazy import torch


@dataclass
class Gram:
    """Sum of x xᵀ over tokens: matrix (in, in) float32 or float64. Only upper panels are summed before `hessian`."""

    matrix: torch.Tensor
    tokens: int = 0

    @classmethod
    def zeros(cls, features: int, dtype: torch.dtype, device: torch.device) -> Gram:
        return cls(torch.zeros(features, features, dtype=dtype, device=device))

    def add(self, x: torch.Tensor) -> Gram:
        """Add x (tokens, in). Products of 16-bit inputs are exact in float32."""
        from compressor.kernels.ops.hessian import (
            hessian_add_,
        )  # it imports torch, and settings must load without torch

        hessian_add_(self.matrix, x, 1.0, 1.0)
        self.tokens += x.shape[0]
        return self

    def hessian(self) -> torch.Tensor:
        """2 / tokens * sum, (in, in), symmetric by construction from the upper triangle."""
        upper = torch.triu(self.matrix)
        full = upper + torch.triu(self.matrix, 1).t()
        return full.mul_(2.0 / max(self.tokens, 1))


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

    J H J = L Lᵀ with J the reversal; R = J L J is upper, H = R Rᵀ, U = R⁻¹. Half the work of factoring H⁻¹.
    Tries float32, then float64, then 10 and 100 times the damping (at most max_percdamp). None if all of them fail.

    hessian  (in, in), not modified
    raises   PassError if the Hessian contains NaN or Inf
    """
    if not bool(torch.isfinite(hessian).all()):
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
        damped = hessian.to(dtype, copy=True)
        damped.diagonal().add_(damping * mean)
        name = str(dtype).removeprefix("torch.")
        lower, info = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if int(info) == 0:
            eye = torch.eye(len(damped), dtype=dtype, device=damped.device)
            upper = torch.linalg.solve_triangular(lower.flip(0, 1), eye, upper=True)
            if bool((upper.diagonal() > 0).all()) and bool(torch.isfinite(upper.diagonal()).all()):
                return Factor(upper, damping, name, tuple(attempts))
        attempts.append(f"{name}, damping {damping:g}: not positive definite")
    return None
