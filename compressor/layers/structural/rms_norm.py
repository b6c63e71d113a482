"""Computes a norm whose gain and shift are folded into its consumers, also on a narrower residual stream.

    y = x / sqrt(sum(x²) / D + eps)

D is the *original* width of the residual stream (Ashkboos et al. 2024, arXiv 2401.15024), so that a stream that is
rotated by an orthogonal matrix and sliced to its first d values has the scale of the whole stream. With a divisor of d
a model would load too, but with wrong outputs, so the divisor is stored. Sums are float32. No tensors.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor

from compressor.layers.base import Layer


class RmsNorm(Layer):
    """A norm without parameters over the last dimension.

    features  width of its input, d
    width     divisor of the sum of squares, D
    """

    format_name = "rms_norm"
    stands_for = "norm"
    weight_only = False

    def __init__(self, features: int, width: int, eps: float) -> None:
        super().__init__()
        self.normalized_shape = (features,)
        self.divisor, self.eps = width, eps

    @classmethod
    def empty(cls, shape: tuple[int, ...], format_params: dict[str, Any], dtype: torch.dtype, bias: bool) -> Self:
        return cls(shape[0], **format_params)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) / self.divisor + self.eps)).to(x.dtype)

    def format_params(self) -> dict[str, Any]:
        return {"width": self.divisor, "eps": self.eps}

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def extra_repr(self) -> str:
        return f"{self.normalized_shape[0]} of {self.divisor}, eps={self.eps}"
