"""Defines the known activations by their formulas, and recognizes a module that computes one of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from compressor.lazy import torch

Function = Callable[["torch.Tensor"], "torch.Tensor"]


@dataclass(frozen=True)
class Known:
    """An activation: its formula, and the numbers that give the error bound and the range of its lookup table.

    steepness  max |f'|; curvature max |f''|
    reach      beyond +-reach the function equals its asymptotes to 2e-6, so a lookup table ends there
    slopes     of the asymptotes on the left and on the right
    """

    formula: Function
    steepness: float
    curvature: float
    reach: float
    slopes: tuple[float, float]


def _gelu(x: torch.Tensor) -> torch.Tensor:
    return x * 0.5 * torch.erfc(-x / math.sqrt(2.0))


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def _silu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(x)


def _quick_gelu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(1.702 * x)


# GELU: f'' = phi(x) (2 - x^2), largest at 0: 2 phi(0) = sqrt(2 / pi); f' is largest at sqrt(2). SiLU and its scaled
# form: f''(0) = a / 2. The others by differentiation. tests/layers/test_lookup_tables.py scans all of them at a million
# points.
KNOWN = {
    "gelu": Known(_gelu, 1.128905, math.sqrt(2 / math.pi), 8.0, (0.0, 1.0)),
    "gelu_tanh": Known(_gelu_tanh, 1.1290, math.sqrt(2 / math.pi), 8.0, (0.0, 1.0)),
    "silu": Known(_silu, 1.099840, 0.5, 16.0, (0.0, 1.0)),
    "quick_gelu": Known(_quick_gelu, 1.099840, 0.851, 10.0, (0.0, 1.0)),
    "tanh": Known(lambda x: torch.tanh(x), 1.0, 4 / (3 * math.sqrt(3)), 8.0, (0.0, 0.0)),
    "sigmoid": Known(lambda x: torch.sigmoid(x), 0.25, 1 / (6 * math.sqrt(3)), 16.0, (0.0, 0.0)),
}


def recognize(module: Callable[[torch.Tensor], torch.Tensor]) -> str | None:
    """The known activation that a module computes to 1e-6, found by running it; None if it computes none of them."""
    x = torch.linspace(-12.0, 12.0, 4801)
    result = module(x)
    for name, known in KNOWN.items():
        exact = known.formula(x.double())
        if result.shape == x.shape and bool(((result.double() - exact).abs() <= 1e-6 * (1 + exact.abs())).all()):
            return name
    return None
