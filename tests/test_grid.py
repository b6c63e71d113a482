"""Quantization grids against the formulas of their definition."""

from __future__ import annotations

import pytest
import torch

from compressor.grid import dequantize, find_grid, quantize


def weights(seed: int = 0, rows: int = 6, groups: int = 3, size: int = 32) -> torch.Tensor:
    return torch.randn(rows, groups, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_symmetric_min_max_scale_is_the_extreme_over_half_the_levels(bits):
    w = weights()
    grid = find_grid(w, bits, True, "minmax", torch.float32)
    torch.testing.assert_close(grid.scale, w.abs().amax(-1) / ((2**bits - 1) / 2))
    assert (grid.zero_point == 0).all()
    assert quantize(w, grid).min() >= -(2 ** (bits - 1)) and quantize(w, grid).max() <= 2 ** (bits - 1) - 1


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_asymmetric_error_is_at_most_half_a_step_plus_the_zero_points_rounding(bits):
    w = weights(1)
    grid = find_grid(w, bits, False, "minmax", torch.float32)
    error = (dequantize(quantize(w, grid), grid) - w).abs()
    assert (error <= grid.scale.unsqueeze(-1) * 1.0001).all()


def test_a_group_without_negative_weights_keeps_its_top():
    """A mirrored range would clip everything above 7/15 of the largest weight."""
    w = weights(2).abs()
    grid = find_grid(w, 4, True, "minmax", torch.float32)
    error = (dequantize(quantize(w, grid), grid) - w).abs()
    assert (error <= 0.5001 * grid.scale.unsqueeze(-1)).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_an_empty_group_gets_scale_one_and_zero_codes(symmetric):
    grid = find_grid(torch.zeros(2, 1, 8), 4, symmetric, "mse", torch.bfloat16)
    assert (grid.scale == 1).all()
    assert (dequantize(quantize(torch.zeros(2, 1, 8), grid), grid) == 0).all()


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_scales_are_exactly_representable_in_their_stored_type(stored):
    for search in ("minmax", "mse"):
        grid = find_grid(weights(3), 4, True, search, stored)
        assert torch.equal(grid.scale, grid.scale.to(stored).float())


def test_a_scale_that_would_underflow_is_raised_to_the_smallest_normal():
    grid = find_grid(torch.full((1, 1, 8), 1e-9), 4, True, "minmax", torch.float16)
    assert float(grid.scale) == pytest.approx(torch.finfo(torch.float16).tiny)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_searched_range_never_has_more_error_than_the_extremes(bits):
    w = weights(4, rows=40)

    def loss(grid):
        return (dequantize(quantize(w, grid), grid) - w).abs().pow(2.4).sum(-1)

    searched = find_grid(w, bits, True, "mse", torch.float32)
    plain = find_grid(w, bits, True, "minmax", torch.float32)
    assert (loss(searched) <= loss(plain) * (1 + 1e-5)).all()
    assert loss(searched).sum() < 0.97 * loss(plain).sum()


def test_the_coarse_search_is_close_to_an_exhaustive_one():
    """Coarse then fine steps against every hundredth: the total error stays within 2 %."""
    w = weights(5, rows=64, groups=1, size=64)
    top = w.abs().amax(-1)
    best = torch.full_like(top, torch.inf)
    for step in range(61):
        scale = top * (1 - step / 100) / 7.5
        error = (torch.round(w / scale.unsqueeze(-1)).clamp(-8, 7) * scale.unsqueeze(-1) - w).abs().pow(2.4).sum(-1)
        best = torch.minimum(best, error)
    grid = find_grid(w, 4, True, "mse", torch.float32)
    found = (dequantize(quantize(w, grid), grid) - w).abs().pow(2.4).sum(-1)
    assert found.sum() <= 1.02 * best.sum()


def test_importance_moves_the_range_to_what_matters():
    w = weights(6, rows=20, groups=1)
    importance = torch.ones(1, 32)
    importance[0, :4] = 1000
    grid = find_grid(w, 3, True, "hessian_diag", torch.float32, importance)
    plain = find_grid(w, 3, True, "mse", torch.float32)

    def weighted(g):
        return ((dequantize(quantize(w, g), g) - w).square() * importance).sum()

    assert weighted(grid) < weighted(plain)
