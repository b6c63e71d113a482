"""KL divergences computed a few predictions at a time, with their gradient."""

from __future__ import annotations

import pytest
import torch

from compressor.methods import divergence_gradient
from compressor.methods.divergence import kl_divergence
from compressor.methods.divergence_gradient import divergences


@pytest.mark.parametrize("shape", [(11, 7), (3, 4, 50), (0, 5), (2, 300)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_divergence_and_its_gradient_are_those_of_the_terms(shape, dtype, monkeypatch):
    monkeypatch.setattr(divergence_gradient, "CHUNK_BYTES", 2 * 4 * 50)  # so that there are several chunks
    generator = torch.Generator().manual_seed(0)
    dense, found = (torch.randn(shape, generator=generator, dtype=torch.float64).mul(3).to(dtype) for _ in range(2))
    weights = torch.rand(shape[:-1], generator=generator, dtype=torch.float64)
    slow, fast = found.clone().requires_grad_(), found.clone().requires_grad_()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    expected = kl_divergence(dense.to(wide).log_softmax(-1), slow.to(wide).log_softmax(-1))
    given = divergences(dense, fast)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6  # of sums of up to 300 terms of at most 20
    assert given.dtype == wide and torch.allclose(given, expected, rtol=tolerance, atol=20 * tolerance)
    (expected * weights).sum().backward()
    (given * weights).sum().backward()
    rounding = 2**-8 if dtype == torch.bfloat16 else tolerance  # gradients have the dtype of the logits
    assert torch.allclose(fast.grad, slow.grad, rtol=rounding, atol=tolerance)


def test_without_gradients_nothing_is_kept_for_them():
    logits = torch.randn(4, 9)
    assert not divergences(logits, logits).requires_grad and divergences(logits, logits).abs().max() == 0
