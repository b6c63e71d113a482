"""Measures the distance of a compressed model's predictions from the dense model's."""

from __future__ import annotations

from compressor.lazy import torch
from compressor.protocol.work import Work

PASSES_OVER_LOGITS = 12  # two log-softmax, their difference and its sum; and the dense model's logits


def kl_divergence(
    dense: torch.Tensor, compressed: torch.Tensor, working: tuple[torch.Tensor, torch.Tensor] | None = None
) -> torch.Tensor:
    """(...,) KL(dense || compressed) in nats: the sum of p (log p - log q) over the classes.

    dense, compressed  (..., classes) log-probabilities log p and log q
    working            None, or where no gradients are needed two tensors of their shape: the first one receives p, and
                       the second one, which may be `dense` itself, is overwritten
    """
    probabilities, terms = working or (None, None)
    p = torch.exp(dense, out=probabilities)
    return torch.mul(p, torch.sub(dense, compressed, out=terms), out=terms).sum(-1)


def divergence_work(tokens: float, vocabulary: int) -> Work:
    """Of comparing the logits of so many tokens with the dense model's."""
    return Work(values=float(PASSES_OVER_LOGITS * tokens * vocabulary))
