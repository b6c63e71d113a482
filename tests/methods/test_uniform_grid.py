"""Quantization grids against the formulas of their definition."""

from __future__ import annotations

import pytest
import torch

from compressor.kernels.ops.scale_ranges import round_scale
from compressor.methods.quantization.uniform_grid import dequantize, find_grid, quantize


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


@pytest.mark.parametrize("search", ["minmax", "mse"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("size", [3e-8, 6e-8, 5e-7, 5e-6, 7e-5, 6e-4, 5e-3])
def test_small_float16_weights_keep_the_accuracy_of_their_grid(size, bits, symmetric, search):
    """Scales from the least float16 number up: the error is that of float32 scales, or float16's own step."""
    w = (weights(7, rows=8) * size).half().float()
    half = find_grid(w, bits, symmetric, search, torch.float16)
    exact = find_grid(w, bits, symmetric, search, torch.float32)
    assert torch.equal(half.scale, half.scale.half().float()) and bool((half.scale > 0).all())
    found, ideal = ((dequantize(quantize(w, grid), grid) - w).norm() for grid in (half, exact))
    # rounding a scale to half a unit of 2**-24, or up by a whole one, moves each value by up to 2**(bits-1) of them
    assert found <= 1.1 * ideal + 2.0 ** (bits - 25) * w.numel() ** 0.5
    assert found <= w.norm() * 1.01


def test_float16_scales_are_exact_where_the_weights_allow_it():
    """Multiples of the least number by 8-bit codes need a scale of that number."""
    w = torch.randint(-120, 121, (2, 1, 32), generator=torch.Generator().manual_seed(0)) * 2.0**-24
    grid = find_grid(w, 8, True, "minmax", torch.float16)
    assert (grid.scale == 2.0**-24).all() and torch.equal(dequantize(quantize(w, grid), grid), w)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_largest_float16_weights_do_not_overflow_in_float16(bits, symmetric):
    w = weights(8) / 3
    w[0, 0, 0], w[1, 0, :2], w[2, 0, 0] = -65504.0, torch.tensor([65504.0, -65504.0]), 65504.0
    grid = find_grid(w, bits, symmetric, "minmax", torch.float16)
    rebuilt = (quantize(w, grid).half() - grid.zero_point.half().unsqueeze(-1)) * grid.scale.half().unsqueeze(-1)
    assert bool(torch.isfinite(rebuilt).all())
    allowed = 1.01 * grid.scale.unsqueeze(-1) + w.abs() * 2.0**-9  # a step, and float16 rounding of scale and product
    assert bool(((rebuilt.float() - w).abs() <= allowed).all())


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_other_types_round_scales_to_nearest_and_stop_at_their_least_normal_number(stored):
    scale = torch.tensor([0.0, 1e-42, 1e-9, 0.0123456, 7.7])
    least = torch.tensor(torch.finfo(stored).smallest_normal)
    assert torch.equal(round_scale(scale, stored), torch.maximum(scale.to(stored).float(), least))


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
