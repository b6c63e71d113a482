"""Measures the distance of a compressed model's predictions from the dense model's."""

from __future__ import annotations

from compressor.lazy import torch
from compressor.protocol.work import Work

PASSES_OVER_LOGITS = 12  # two log-softmax, their difference and its sum; and the dense model's logits


def divergence_terms(dense: torch.Tensor, compressed: torch.Tensor) -> torch.Tensor:
    """(..., classes): p (log p - log q), whose sum over the classes is KL(dense || compressed), in nats.

    dense, compressed  (..., classes) logits
    """
    before, after = dense.log_softmax(-1), compressed.log_softmax(-1)
    return before.exp() * (before - after)


def divergences(dense: torch.Tensor, compressed: torch.Tensor) -> torch.Tensor:
    """(...,) KL(dense || compressed) in nats, float32 or wider. Gradients flow to `compressed` only.

    The sum of `divergence_terms` over the classes. A few predictions are computed at a time, and no copy of the logits
    is made for the gradient but the gradient itself.

    dense, compressed  (..., classes) logits
    """
    from compressor.methods.divergence_gradient import Divergences  # it imports torch, and settings load without torch

    return Divergences.apply(dense, compressed)


def divergence_work(tokens: float, vocabulary: int) -> Work:
    """Of comparing the logits of so many tokens with the dense model's."""
    return Work(values=float(PASSES_OVER_LOGITS * tokens * vocabulary))
