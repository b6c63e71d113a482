"""GPTQ's mathematics against slow obvious versions, exact identities and the worked example."""

from __future__ import annotations

import pytest
import torch
from raising import raises

from compressor.errors import PassError
from compressor.methods.quantization.hessian import Gram, inverse_factor
from compressor.methods.quantization.uniform_grid import dequantize, find_grid, quantize
from compressor.passes.gptq import (
    GPTQ,
    SAMPLED_ROWS,
    Factored,
    _check_identity,
    _output_errors,
    blend,
    column_order,
    pool,
    refine_scales,
    revive_dead,
    solve,
)

ORDERS = ("none", "static", "group_aware")


def problem(seed: int, rows: int = 8, columns: int = 64, tokens: int = 256, skew: float = 0.8):
    """Weights and the hessian of correlated inputs of unequal energy, float64."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64) / columns**0.5
    energy = torch.exp(skew * torch.randn(columns, generator=generator, dtype=torch.float64))
    x = torch.randn(tokens, columns, generator=generator, dtype=torch.float64) @ mix * energy
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return weight, Gram.zeros(columns, torch.float64, torch.device("cpu")).add(x).hessian()


def run(weight, hessian, *, width=32, stored=torch.float32, **settings):
    chosen = GPTQ(**{"group_size": 32 if width == 32 else -1, "scale_search": "minmax", **settings})
    order = column_order(hessian.diagonal(), chosen.act_order, width)
    factor = inverse_factor(hessian[order][:, order], chosen.percdamp, 1.0, "w")
    return solve(weight, factor.upper, hessian.diagonal(), order, chosen, width, stored), factor, order


def textbook(weight, hessian, grid, width, percdamp=0.01):
    """Optimal brain surgeon by the book: invert the hessian of the remaining columns anew for each column."""
    w = weight.clone()
    h = hessian + percdamp * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=hessian.dtype)
    codes = torch.empty_like(w)
    for j in range(w.shape[1]):
        inverse = torch.linalg.inv(h[j:, j:])
        scale = grid.scale[:, j // width].double()
        codes[:, j] = torch.round(w[:, j] / scale).clamp(grid.low, grid.high)
        error = (w[:, j] - codes[:, j] * scale) / inverse[0, 0]
        w[:, j:] -= torch.outer(error, inverse[0])
    return codes


def test_worked_example_of_the_specification():
    weight = torch.tensor([[0.9, -0.35, 0.62, 0.10], [-0.2, 0.75, -0.41, 0.33]])
    x = torch.tensor([[1, 0.5, -1, 2], [2, 1, 0, 1], [0, 1, 1, -1], [1, 1, 0.5, 0.5], [3, 1, -0.5, 1]])
    hessian = Gram.zeros(4, torch.float32, torch.device("cpu")).add(x).hessian()
    expected = torch.tensor([[6, 2.6, -0.8, 3], [2.6, 1.7, 0.2, 1], [-0.8, 0.2, 1, -1.3], [3, 1, -1.3, 2.9]])
    torch.testing.assert_close(hessian, expected)
    solved, factor, _ = run(weight, hessian, width=4, bits=3, act_order="none")
    upper = torch.tensor(
        [
            [1.050133, -1.827200, 1.367800, 0.155323],
            [0, 1.457852, -2.076540, -1.419376],
            [0, 0, 1.487392, 0.660160],
            [0, 0, 0, 0.584306],
        ]
    )
    torch.testing.assert_close(factor.upper, upper, atol=2e-5, rtol=2e-5)
    assert solved.codes.flatten(1).int().tolist() == [[3, 0, 1, 0], [-1, 3, -1, 2]]
    difference = weight - dequantize(solved.codes, solved.grid).flatten(1)
    assert float((difference @ hessian * difference).sum()) == pytest.approx(0.03299000, rel=1e-4)
    nearest = quantize(weight.view(2, 1, 4), solved.grid)
    assert nearest.flatten(1).int().tolist() == [[3, -1, 2, 0], [-1, 3, -2, 2]]
    again, _, order = run(weight, hessian, width=4, bits=3, act_order="static")
    assert order.tolist() == [0, 3, 1, 2] and torch.equal(again.codes, solved.codes)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("block", [32, 64, 512])
def test_isotropic_inputs_give_round_to_nearest_bit_for_bit(order, block):
    weight = torch.randn(16, 128, generator=torch.Generator().manual_seed(1))
    solved, _, _ = run(weight, 3.0 * torch.eye(128), act_order=order, block_size=block)
    grid = find_grid(weight.view(16, 4, 32), 4, True, "minmax", torch.float32)
    assert torch.equal(solved.codes.float(), quantize(weight.view(16, 4, 32), grid))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_squared_errors_equal_the_loss_they_stand_for(order, symmetric):
    """‖E‖² = tr(D H Dᵀ) to 1e-10 in float64: fails for a wrong sign, permutation, or missing update."""
    weight, hessian = problem(3)
    solved, factor, _ = run(weight, hessian, act_order=order, symmetric=symmetric)
    scale, zero = solved.grid.scale.double(), solved.grid.zero_point.double()
    rebuilt = (solved.codes.double() - zero.unsqueeze(-1)) * scale.unsqueeze(-1)
    difference = weight - rebuilt.flatten(1)
    damped = hessian + factor.damping * hessian.diagonal().mean() * torch.eye(64, dtype=torch.float64)
    direct = (difference @ damped * difference).sum(1)
    torch.testing.assert_close(solved.loss, direct, rtol=1e-10, atol=0)


def test_codes_equal_the_textbook_column_by_column():
    weight, hessian = problem(4)
    solved, _, _ = run(weight, hessian, width=64, act_order="none")
    assert torch.equal(solved.codes.flatten(1).double(), textbook(weight, hessian, solved.grid, 64))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("width", [8, 24, 32, 48, 80, 240])
@pytest.mark.parametrize("block", [32, 64, 128, 256])
def test_block_size_does_not_change_the_codes(block, width, order):
    """Nor where groups lie across blocks: a scale is searched on weights that have all errors before them."""
    weight, hessian = problem(5, columns=480, tokens=1024)
    base, _, _ = run(weight, hessian, width=width, act_order=order, block_size=512)
    other, _, _ = run(weight, hessian, width=width, act_order=order, block_size=block)
    assert torch.equal(base.codes, other.codes)
    torch.testing.assert_close(base.grid.scale, other.grid.scale, rtol=1e-6, atol=0)


def test_static_order_equals_solving_the_permuted_problem():
    weight, hessian = problem(6)
    order = column_order(hessian.diagonal(), "static", 64)
    assert hessian.diagonal()[order].diff().max() <= 0
    solved, _, _ = run(weight, hessian, width=64, act_order="static")
    permuted, _, _ = run(weight[:, order], hessian[order][:, order], width=64, act_order="none")
    back = torch.empty_like(permuted.codes.flatten(1))
    back[:, order] = permuted.codes.flatten(1)
    assert torch.equal(solved.codes.flatten(1), back)


def test_group_aware_order_keeps_groups_together():
    diagonal = torch.rand(128, generator=torch.Generator().manual_seed(0))
    order = column_order(diagonal, "group_aware", 32)
    assert sorted(order.tolist()) == list(range(128))
    for start in range(0, 128, 32):
        assert len({int(j) // 32 for j in order[start : start + 32]}) == 1


def test_scaling_the_hessian_by_a_power_of_two_changes_nothing():
    weight, hessian = problem(7)
    assert torch.equal(run(weight, hessian)[0].codes, run(weight, 4 * hessian)[0].codes)


def test_rows_are_independent():
    weight, hessian = problem(8)
    solved = run(weight, hessian)[0].codes
    flipped = run(weight.flip(0), hessian)[0].codes
    assert torch.equal(solved, flipped.flip(0))


@pytest.mark.parametrize("order", ORDERS)
def test_weights_on_the_grid_stay_where_they_are(order):
    codes = torch.randint(-8, 8, (4, 64), generator=torch.Generator().manual_seed(2)).double()
    codes[:, ::32], codes[:, 1::32] = -8, 7  # each group spans its whole range, so the scale is 1/8 and exact
    weight = (codes - 2) * 0.125
    _, hessian = problem(9, rows=4)
    solved, _, _ = run(weight, hessian, act_order=order, symmetric=False)
    assert torch.equal(solved.codes.flatten(1).double(), codes)
    assert (solved.grid.scale == 0.125).all() and (solved.grid.zero_point == 2).all()
    assert (solved.loss == 0).all()


def test_no_clamped_code_means_a_bounded_loss():
    weight, hessian = problem(10)
    solved, factor, _ = run(weight, hessian, act_order="none", width=64, symmetric=False, bits=8)
    inside = ((solved.codes > -128) & (solved.codes < 127)).flatten(1).all(1)
    assert inside.any()
    bound = solved.grid.scale[:, 0].double() ** 2 / 4 * (1 / factor.upper.diagonal() ** 2).sum()
    assert (solved.loss[inside] <= bound[inside] * (1 + 1e-9)).all()


def test_a_dead_column_neither_gives_nor_takes():
    weight, hessian = problem(11)
    keep = [j for j in range(64) if j != 20]
    with_dead = hessian.clone()
    with_dead[20] = 0
    with_dead[:, 20] = 0
    dead = revive_dead(with_dead)
    assert dead.nonzero().flatten().tolist() == [20]
    solved, _, _ = run(weight, with_dead, width=64, act_order="none")
    settings = GPTQ(group_size=-1, scale_search="minmax", act_order="none")
    reduced = hessian[keep][:, keep]
    factor = inverse_factor(reduced, 0.01, 1.0, "w")
    pinned = weight[:, keep].clone()
    other = solve(pinned, factor.upper, reduced.diagonal(), torch.arange(63), settings, 63, torch.float32)
    same_scale = other.grid.scale.eq(solved.grid.scale).flatten()
    assert same_scale.sum() >= 6
    assert torch.equal(other.codes.flatten(1)[same_scale], solved.codes.flatten(1)[:, keep][same_scale])


def test_refined_scales_never_raise_a_rows_loss():
    weight, hessian = problem(12, rows=16)
    solved, _, _ = run(weight, hessian)
    refined = refine_scales(weight.float(), solved.codes, solved.grid, hessian, torch.float32)

    def loss(grid):
        difference = weight - dequantize(solved.codes, grid).flatten(1).double()
        return (difference @ hessian * difference).sum(1)

    assert (loss(refined) <= loss(solved.grid) * (1 + 1e-6)).all()
    assert loss(refined).sum() < loss(solved.grid).sum()


def test_gptq_beats_round_to_nearest_on_correlated_inputs():
    ratios, totals = [], [0.0, 0.0]
    for seed in range(64):
        weight, hessian = problem(seed, rows=4, columns=32, skew=0.3)
        solved, _, _ = run(weight, hessian)
        losses = []
        for codes in (solved.codes, quantize(weight.float().view(4, 1, 32), solved.grid)):
            difference = weight - dequantize(codes, solved.grid).flatten(1).double()
            losses.append(float((difference @ hessian * difference).sum()))
        totals = [total + loss for total, loss in zip(totals, losses, strict=True)]
        ratios.append(losses[0] / losses[1])
    assert totals[0] < totals[1]
    assert sorted(ratios)[32] < 0.75


def test_token_order_and_batching_do_not_change_the_hessian():
    x = torch.randn(100, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = Gram.zeros(48, torch.float64, torch.device("cpu")).add(x)
    parts = Gram.zeros(48, torch.float64, torch.device("cpu"))
    for part in x.flip(0).split(7):
        parts.add(part)
    assert parts.tokens == whole.tokens == 100
    torch.testing.assert_close(parts.hessian(), whole.hessian(), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(whole.hessian(), 2 / 100 * x.T @ x, rtol=1e-13, atol=1e-13)


def test_hessian_panels_agree_with_one_product():
    x = torch.randn(64, 2100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = Gram.zeros(2100, torch.float64, torch.device("cpu")).add(x).hessian()
    torch.testing.assert_close(found, x.T @ x / 32, rtol=1e-12, atol=1e-12)
    assert torch.equal(found, found.T)


def test_factor_inverts_the_damped_hessian():
    _, hessian = problem(13)
    factor = inverse_factor(hessian, 0.01, 1.0, "w")
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(64, dtype=torch.float64)
    torch.testing.assert_close(factor.upper.T @ factor.upper, torch.linalg.inv(damped), rtol=1e-8, atol=1e-8)
    assert torch.equal(factor.upper, torch.triu(factor.upper))


def test_damping_ladder_climbs_and_says_so():
    """Indefinite by 5 % of the mean: 1 % damping can't help, 10 % can."""
    hessian = torch.eye(8)
    hessian[0, 0] = -0.05
    factor = inverse_factor(hessian, 0.01, 1.0, "w")
    assert factor.damping == pytest.approx(0.1)
    assert factor.dtype == "float64"
    assert len(factor.attempts) == 2
    assert inverse_factor(torch.diag(torch.tensor([1.0, 1.0, 1.0, -2.9])), 0.01, 1.0, "w") is None


def test_overflowing_inputs_are_an_error_that_names_the_weight():
    with raises(PassError, where="layer.7", reason="not-finite"):
        inverse_factor(torch.full((4, 4), float("nan")), 0.01, 1.0, "layer.7")


def test_blending_fills_up_to_the_wanted_tokens():
    small = Gram(torch.eye(2) * 6, 3)
    big = Gram(torch.tensor([[100.0, 50], [50, 100]]), 50)
    blended = blend(small, pool([small, big]), 10, share_inputs=True)
    pooled = (small.matrix + big.matrix) / 53
    torch.testing.assert_close(blended.hessian(), 2 * (small.matrix + 10 * pooled) / 13)
    alone = blend(small, pool([small, big]), 10, share_inputs=False)
    assert float(alone.matrix[0, 1]) == 0


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 1), (1, 5), (2, 33)])
def test_smallest_shapes_work(rows, columns):
    weight, hessian = problem(14, rows=rows, columns=columns)
    solved, _, _ = run(weight, hessian, width=columns)
    assert solved.codes.shape == (rows, 1, columns)


def test_settings_refuse_what_makes_no_sense():
    with pytest.raises(ValueError, match="max_percdamp"):
        GPTQ(percdamp=0.5, max_percdamp=0.1)
    with pytest.raises(ValueError, match="act_order"):
        GPTQ(act_order="desc")


def of_rows(weight, hessian):
    """A solve and its output errors, as the pass computes them."""
    weight, hessian = weight.float(), hessian.float()
    solved, factor, order = run(weight, hessian)
    dead = torch.zeros(len(order), dtype=torch.bool)
    problem_ = Factored(hessian[order][:, order], hessian.diagonal(), order, dead, factor)
    return solved, problem_, _output_errors(weight, solved, problem_)


def test_a_solve_whose_loss_is_not_its_error_is_refused():
    """The identity is checked on real runs; a loss that is off by a tenth must not pass."""
    solved, factored, errors = of_rows(*problem(3, rows=300))
    loss = solved.loss[errors.rows]
    _check_identity(loss, errors, factored.damping, "w")
    with raises(PassError, where="w", reason="wrong-loss"):
        _check_identity(loss * 1.1, errors, factored.damping, "w")


def test_output_errors_are_those_of_evenly_spaced_rows():
    weight, hessian = problem(3, rows=300)
    solved, _, errors = of_rows(weight, hessian)
    rows = errors.rows
    assert len(rows) == SAMPLED_ROWS and (rows.diff() >= 2).all() and rows[0] == 0 and rows[-1] == 299
    grouped = weight.float().view(300, -1, 32)
    for codes, found in ((solved.codes, errors.of_solution), (quantize(grouped, solved.grid), errors.of_nearest)):
        error = (weight - dequantize(codes, solved.grid).view_as(weight))[rows]
        slow = ((error @ hessian) * error).sum() / ((weight[rows] @ hessian) * weight[rows]).sum()
        assert found == pytest.approx(float(slow) ** 0.5, rel=1e-4)
    few, _, of_all = of_rows(weight[:5], hessian)
    assert of_all.rows.tolist() == list(range(5)) and len(few.loss) == 5


def test_parts_of_rows_are_solved_as_all_together(monkeypatch):
    weight, hessian = (value.float() for value in problem(5, rows=70))
    whole, _, _ = run(weight, hessian)
    monkeypatch.setattr("compressor.passes.gptq.WORKING_ELEMENTS", 16 * 64)
    parts, _, _ = run(weight, hessian)
    assert torch.equal(parts.codes, whole.codes) and torch.equal(parts.grid.scale, whole.grid.scale)
    torch.testing.assert_close(parts.loss, whole.loss)
