"""The factor of a Hessian by halves against LAPACK's three steps."""

from __future__ import annotations

import pytest
import torch

from compressor.methods.quantization import inverse_root
from compressor.methods.quantization.hessian import Gram, mirror_, permuted
from compressor.methods.quantization.inverse_root import inverse_root_


def positive(size: int, seed: int = 0) -> torch.Tensor:
    x = torch.randn(3 * size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.t() @ x / size


@pytest.mark.parametrize("size", [1, 8, 9, 16, 40, 77])
def test_the_factor_is_the_upper_cholesky_factor_of_the_inverse(size, monkeypatch):
    """It is unique: upper, with a positive diagonal. Three steps of LAPACK have it too, by way of the inverse."""
    monkeypatch.setattr(inverse_root, "LEAF", 8)
    matrix = positive(size)
    found = matrix.clone()
    assert inverse_root_(found)
    slow = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(matrix)), upper=True)
    torch.testing.assert_close(found.triu(), slow, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("at", [0, 20, 39])
def test_a_matrix_that_is_not_positive_definite_is_told(at, monkeypatch):
    monkeypatch.setattr(inverse_root, "LEAF", 8)
    matrix = positive(40)
    matrix[at, at] = -1
    assert not inverse_root_(matrix)


def test_only_the_upper_triangle_is_read(monkeypatch):
    monkeypatch.setattr(inverse_root, "LEAF", 8)
    whole, half = positive(40), positive(40)
    half[torch.ones_like(half).tril(-1).bool()] = torch.nan
    for matrix in (whole, half):
        assert inverse_root_(matrix)
    assert torch.equal(whole.triu(), half.triu())


def test_a_gram_in_an_order_is_the_permuted_hessian(monkeypatch):
    monkeypatch.setattr("compressor.methods.quantization.hessian.MIRROR_BLOCK", 16)
    x = torch.randn(100, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gram, order = Gram.zeros(40, torch.float64, x.device).add(x), torch.randperm(40)
    expected = x.t() @ x / 50
    torch.testing.assert_close(gram.diagonal(), expected.diagonal())
    torch.testing.assert_close(gram.hessian(), expected)
    taken = gram.take(order)
    torch.testing.assert_close(taken, expected[order][:, order])
    assert torch.equal(taken, taken.t()) and gram.matrix.numel() == 0 and gram.tokens == 100


def test_mirroring_reads_the_upper_triangle_alone(monkeypatch):
    monkeypatch.setattr("compressor.methods.quantization.hessian.MIRROR_BLOCK", 16)
    full = positive(40)
    half = full.clone()
    half[torch.ones_like(half).tril(-1).bool()] = torch.nan
    mirror_(half)
    assert torch.equal(half, full.triu() + full.triu(1).t())
    order = torch.randperm(40)
    assert torch.equal(permuted(full, order), full[order][:, order])
