"""A pruned matrix, solved again, is the least-squares solution, and is used if it is better on held-out tokens."""

from __future__ import annotations

import pytest
import torch

from compressor.methods.pruning.reconstruction import (
    HELD_OUT_TOKENS,
    Calibration,
    Moments,
    output_errors,
    repair,
    solve,
)

KEPT = [0, 1, 3, 4, 7, 8]


def case(tokens=200, features=10, outputs=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(features, features, dtype=torch.float64, generator=generator)
    x = torch.randn(tokens, features, dtype=torch.float64, generator=generator) @ mixing + 0.7
    return x, torch.randn(outputs, features, dtype=torch.float64, generator=generator)


def moments_of(x):
    moments = Moments.zeros(x.shape[1], x.dtype, x.device)
    for part in x.split(64):
        moments.add(part)
    return moments


def test_without_a_bias_it_is_least_squares_with_a_penalty():
    x, weight = case()
    ridge = 0.03
    found, shift = solve(weight, KEPT, moments_of(x), ridge)
    damping = ridge * x.square().sum(0).mean()
    rows = torch.cat([x[:, KEPT], damping.sqrt() * torch.eye(len(KEPT), dtype=torch.float64)])
    wanted = torch.linalg.lstsq(rows, torch.cat([x @ weight.t(), torch.zeros(len(KEPT), 5, dtype=torch.float64)]))
    assert shift is None and found.allclose(wanted.solution.t(), rtol=1e-9)


def test_beside_a_bias_it_is_least_squares_with_an_intercept():
    x, weight = case()
    found, shift = solve(weight, KEPT, moments_of(x), 1e-12, has_bias=True)
    rows = torch.cat([x[:, KEPT], torch.ones(len(x), 1, dtype=torch.float64)], 1)
    wanted = torch.linalg.lstsq(rows, x @ weight.t()).solution.t()
    assert found.allclose(wanted[:, :-1], rtol=1e-7) and shift.allclose(wanted[:, -1], rtol=1e-7)


def test_with_all_kept_the_matrix_stays_as_the_penalty_goes():
    x, weight = case()
    errors = [float((solve(weight, range(10), moments_of(x), r)[0] / weight - 1).abs().max()) for r in (1e-2, 1e-9)]
    assert errors[1] < 1e-4 < errors[0]
    with pytest.raises(ValueError, match="ridge"):
        solve(weight, KEPT, moments_of(x), 0.0)


@pytest.mark.parametrize("has_bias", [False, True])
def test_the_tokens_it_is_solved_for_are_never_further_off_than_with_a_plain_cut(has_bias):
    for seed in range(5):
        x, weight = case(tokens=12, seed=seed)
        found, shift = solve(weight, KEPT, moments_of(x), 1e-9, has_bias)
        plain, solved = output_errors(weight, [(weight[:, KEPT], None), (found, shift)], KEPT, [x])
        assert solved <= plain * (1 + 1e-6)


def test_with_nothing_kept_the_bias_takes_the_mean_output():
    x, weight = case()
    found, shift = solve(weight, [], moments_of(x), has_bias=True)
    assert found.shape == (5, 0) and shift.allclose(weight @ x.mean(0))
    assert output_errors(weight, [(found, None)], [], [x]) == [pytest.approx(1.0)]


def test_inputs_that_are_all_zero_teach_nothing():
    _, weight = case()
    assert solve(weight, KEPT, moments_of(torch.zeros(4, 10)))[0].equal(weight[:, KEPT])


def test_the_error_is_that_of_the_outputs():
    x, weight = case()
    cut, shift = weight[:, KEPT] * 1.1, torch.arange(5.0, dtype=torch.float64)
    lost = (x @ weight.t() - x[:, KEPT] @ cut.t() - shift).square().sum()
    wanted = float(lost / (x @ weight.t()).square().sum())
    assert output_errors(weight, [(cut, shift)], KEPT, x.split(50)) == [pytest.approx(wanted, rel=1e-12)]


def calibration(batches):
    found = Calibration(len(batches))
    for batch in batches:
        found.add(batch)
    return found


def test_it_is_taken_only_where_held_out_tokens_come_nearer():
    x, weight = case(tokens=400)
    plain = weight[:, KEPT]
    better = repair(weight, KEPT, plain, calibration(x.split(100)))
    assert better.after < better.before and not better.weight.equal(plain)
    unlike, _ = case(tokens=100, seed=9)
    other = calibration([x[:8], -unlike * torch.arange(10)])  # inputs of another kind are held out
    worse = repair(weight, KEPT, plain, other)
    assert worse.weight.equal(plain) and worse.shift is None and worse.after > worse.before


def test_inputs_in_bfloat16_are_summed_as_exactly_as_float32_can():
    x, weight = case(tokens=400)
    low = x.bfloat16()
    found, wanted = (solve(weight, KEPT, calibration([one, one]).moments)[0] for one in (low, low.double()))
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-6 * float(wanted.abs().max()))


@pytest.mark.parametrize(("count", "held_out"), [(1, None), (2, [1]), (3, [1]), (9, [1, 5])])
def test_batches_are_split_in_two_parts(count, held_out):
    found = calibration([torch.full((8, 1), float(number)) for number in range(count)])
    if held_out is None:
        assert (found.moments.tokens, len(found.held_out[0])) == (6, 2)
    else:
        assert [int(x[0]) for x in found.held_out] == held_out
        assert found.moments.tokens == 8 * (count - len(held_out))
    assert float(found.moments.total) == 8 * sum(range(count)) - sum(float(x.sum()) for x in found.held_out)


def test_no_more_tokens_are_held_out_than_are_needed():
    found = calibration([torch.zeros(HELD_OUT_TOKENS // 2, 1)] * 16)
    assert sum(map(len, found.held_out)) == HELD_OUT_TOKENS
    assert found.moments.tokens == 7 * HELD_OUT_TOKENS


def test_more_damping_is_taken_where_sums_are_too_coarse():
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(400, 10, generator=generator)
    x = (spread + 3e4).float()  # a float32 sum of squares of 3e4 is exact to about 60 a token, and the variance is 1
    weight = torch.randn(5, 10, generator=generator).double()
    found = repair(weight, KEPT, weight[:, KEPT], calibration(x.split(100)), has_bias=True)
    assert found.weight.isfinite().all() and found.after <= found.before


def test_inputs_that_overflow_leave_the_plain_matrix():
    x, weight = case()
    x[3, 2] = torch.inf
    found, _ = solve(weight, KEPT, moments_of(x))
    assert found.equal(weight[:, KEPT])
