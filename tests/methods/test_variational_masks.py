"""Masks of the variational bottleneck, the size of a model under them, and the pruning that meets a budget."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from compressor.methods.pruning.size_budget import STREAM, Part, Size, Unreachable, prune_to_size, target_size
from compressor.methods.pruning.variational_masks import (
    Masks,
    kl_divergence,
    lagrangian,
    log_alpha,
    noise,
    soft_keep,
    warmed,
)


def drawn(units, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(units, generator=generator, dtype=torch.float64)
    return mean, 3 * torch.randn(units, generator=generator, dtype=torch.float64) - 3


def test_the_divergence_has_the_values_worked_out_by_hand():
    mean = torch.ones(3, dtype=torch.float64)
    alpha = torch.tensor([-5.0, 0.0, 2.0], dtype=torch.float64)
    found = kl_divergence(mean, alpha)
    assert log_alpha(mean, alpha).tolist() == pytest.approx(alpha.tolist(), abs=1e-7)
    assert [round(value, 4) for value in found.tolist()] == [2.5034, 0.3466, 0.0635]
    slow = [0.5 * math.log(1 + 1 / (math.exp(value) + 1e-8)) for value in alpha.tolist()]
    assert found.tolist() == pytest.approx(slow, rel=1e-12)


def test_more_noise_never_brings_a_unit_back():
    mean, log_variance = drawn(400)
    before = log_alpha(mean, log_variance)
    after = log_alpha(mean, log_variance + 0.5)
    assert bool((after > before).all())
    kept = soft_keep(before)
    assert bool((soft_keep(after) <= kept).all())
    assert bool(((kept > 0.5) == (before < 0)).all())


def test_the_target_rises_in_a_straight_line_and_then_stays():
    assert [warmed(0.4, step, 4) for step in range(6)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])
    assert warmed(0.4, 0, 0) == 0.4


def test_multipliers_ascend_while_masks_descend():
    removed, multipliers = (torch.tensor(v, requires_grad=True) for v in (0.1, [0.5, 2.0]))
    value = lagrangian(removed, 0.3, multipliers)
    value.backward()
    assert float(value.detach()) == pytest.approx(0.5 * -0.2 + 2.0 * 0.04)
    assert float(removed.grad) == pytest.approx(0.5 + 2 * 2.0 * -0.2)
    assert multipliers.grad.tolist() == pytest.approx([-0.2, 0.04])


def test_noise_depends_on_nothing_but_its_seeds():
    first = noise(3, 5, 7, 0, 2)
    noise(9, 2, 1)
    torch.randn(4)
    assert noise(3, 5, 7, 0, 2).equal(first)
    assert not noise(3, 5, 7, 1, 2).equal(first) and not noise(3, 5, 7, 0, 3).equal(first)


def test_masks_start_at_one_and_nearly_without_noise():
    masks = Masks.fresh({"a": 3000, "b": 1}, torch.Generator().manual_seed(0))
    assert [len(part) for part in masks.split(masks.mean).values()] == [3000, 1]
    # 3,000 draws of deviation 0.01: their mean is within 5 deviations of 0.01 / sqrt(3000)
    assert float(masks.mean.mean()) == pytest.approx(1, abs=1e-3)
    assert float(masks.log_variance.mean()) == pytest.approx(-9, abs=1e-3)
    assert masks.scores()["b"][0] == pytest.approx(9, abs=0.1) and masks.means()["b"][0] == pytest.approx(1, abs=0.05)


# sizes


def llama_like(d, head_dim, kv, group, ffn, blocks, vocabulary=0):
    attention = [Part(f"a{n}", "heads", n, kv, 0, head_dim * (2 * group + 2)) for n in range(blocks)]
    mlp = [Part(f"m{n}", "ffn", n, ffn, 0, 3) for n in range(blocks)]
    return Size((*attention, *mlp), 0, d, vocabulary)


def test_a_group_weighs_what_was_worked_out_by_hand():
    size = llama_like(2048, 64, 4, 8, 8192, 1)
    counts = {"a0": 4, "m0": 8192}
    group = size.of(counts) - size.of({**counts, "a0": 3})
    neuron = size.of(counts) - size.of({**counts, "m0": 8191})
    assert (group, neuron, group // neuron) == (2_359_296, 6_144, 384)


def test_the_size_is_linear_in_counts_and_width_and_soft_counts_agree_with_whole_ones():
    size = llama_like(24, 4, 3, 2, 10, 2, vocabulary=50)
    soft = size.of({name: torch.tensor(float(n)) for name, n in {"a0": 2, "a1": 3, "m0": 7, "m1": 0}.items()}, 20)
    slow = 50 * 20
    for heads, neurons in ((2, 7), (3, 0)):
        slow += 20 * 4 * heads * 2 * 2  # queries and output, two query heads to a group
        slow += 20 * 4 * heads * 2  # keys and values
        slow += 3 * 20 * neurons
    assert float(soft) == slow == size.of({"a0": 2, "a1": 3, "m0": 7, "m1": 0}, 20)


@pytest.mark.parametrize(("full", "share", "target"), [(1000, 0.3, 700), (10, 0.25, 7), (7, 0.1, 6), (100, 0.0, 100)])
def test_the_target_is_the_largest_size_that_is_small_enough(full, share, target):
    assert target_size(full, share) == target


# the cut


def flat(*units, **more):
    """Parts of unit weight 10 and 1 in turn."""
    parts = [
        Part(f"p{n}", ("heads", "ffn")[n % 2], n // 2, count, (10, 1)[n % 2], **more) for n, count in enumerate(units)
    ]
    return Size(tuple(parts), 5)


def random_scores(size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    found = {part.name: torch.randn(part.units, generator=generator).tolist() for part in size.parts}
    return found | {STREAM: torch.randn(size.width, generator=generator).tolist()}


def measured(size, kept):
    return size.of({name: len(units) for name, units in kept.units.items()}, kept.width and len(kept.width))


@pytest.mark.parametrize("seed", range(5))
def test_the_cut_meets_its_target_within_a_hundredth_and_keeps_the_minimums(seed):
    size = flat(4, 30, 4, 30, least=2)
    for share in (0.1, 0.3, 0.45):
        target = target_size(size.full, share)
        kept = prune_to_size(size, random_scores(size, seed), target)
        assert measured(size, kept) == kept.size <= target <= kept.size + 0.01 * size.full
        assert all(len(units) >= 2 for units in kept.units.values())


def test_without_refill_the_units_that_go_are_those_of_the_lowest_scores():
    size = Size((Part("p", "ffn", 0, 8, 3), Part("q", "ffn", 1, 8, 3)), 0)
    scores = random_scores(size, 3)
    ranked = sorted((score, name, unit) for name in "pq" for unit, score in enumerate(scores[name]))
    kept = prune_to_size(size, scores, 3 * 11)
    dropped = {(name, unit) for _, name, unit in ranked[:5]}
    assert {(name, unit) for name in "pq" for unit in range(8) if unit not in kept.units[name]} == dropped


def test_what_fits_again_after_a_heavy_unit_went_is_taken_back():
    size = Size((Part("p0", "heads", 0, 2, 10), Part("p1", "ffn", 0, 12, 1, least=9)), 5)
    scores = {"p0": [9.0, -1.0], "p1": [-2.0] * 3 + [5.0] * 9, STREAM: []}
    kept = prune_to_size(size, scores, size.full - 10)
    assert kept.units == {"p0": (0,), "p1": tuple(range(12))}  # 3 of 1 went first, then one of 10, which is enough


def test_lighter_units_go_where_a_heavy_one_would_lead_far_past_the_target():
    size = Size((Part("p0", "heads", 0, 2, 50), Part("p1", "ffn", 0, 12, 1)), 5)
    scores = {"p0": [9.0, -1.0], "p1": [-2.0] * 3 + [5.0] * 9, STREAM: []}
    kept = prune_to_size(size, scores, size.full - 6)
    assert kept.units["p0"] == (0, 1) and len(kept.units["p1"]) == 6
    kept = prune_to_size(size, scores, size.full - 20)  # all neurons but one weigh 11
    assert kept.units == {"p0": (0,), "p1": tuple(range(12))} and kept.size == size.full - 50


def test_no_target_keeps_everything():
    size = flat(4, 30)
    kept = prune_to_size(size, random_scores(size), size.full)
    assert kept.units == {"p0": tuple(range(4)), "p1": tuple(range(30))} and kept.size == size.full


@pytest.mark.parametrize("units", [32, 30])
def test_aligned_counts_are_multiples_or_all(units):
    size = Size(tuple(Part(f"p{n}", "ffn", n, units, 7, least=3, align=8) for n in range(4)), 0)
    for seed, share in itertools.product(range(3), (0.1, 0.4, 0.7)):
        target = target_size(size.full, share)
        kept = prune_to_size(size, random_scores(size, seed), target)
        assert all(len(found) % 8 == 0 or len(found) == units for found in kept.units.values())
        assert kept.size <= target < kept.size + 8 * 7


def test_uniform_counts_are_the_same_in_every_block_with_each_blocks_own_units():
    size = flat(4, 24, 4, 24)
    scores = random_scores(size, 1)
    kept = prune_to_size(size, scores, target_size(size.full, 0.35), uniform=True)
    for one, other in (("p0", "p2"), ("p1", "p3")):
        assert len(kept.units[one]) == len(kept.units[other]) < (4 if one == "p0" else 24)
    for name, units in kept.units.items():
        best = sorted(range(len(scores[name])), key=lambda unit: -scores[name][unit])
        assert set(units) == set(best[: len(units)])


def test_the_width_of_the_stream_is_cut_with_everything_that_lies_along_it():
    size = llama_like(24, 4, 4, 2, 16, 3, vocabulary=40)
    size = Size(size.parts, 0, 24, 40, least_width=8, align_width=4)
    for seed in range(4):
        target = target_size(size.full, 0.4)
        kept = prune_to_size(size, random_scores(size, seed), target, prunes_width=True)
        assert kept.width is not None and len(kept.width) >= 8 and len(kept.width) % 4 == 0
        assert measured(size, kept) == kept.size <= target
    assert prune_to_size(size, random_scores(size), target).width is None


def test_a_part_goes_as_a_whole_where_its_switch_scores_lowest_and_the_last_of_a_kind_stays():
    size = Size(tuple(Part(f"p{n}", "ffn", n, 10, 2, rest=3, least=5) for n in range(3)), 9)
    assert size.of({"p0": 0, "p1": 10, "p2": 10}) == size.full - 20 - 3
    scores = random_scores(size) | {}
    kept = prune_to_size(size, scores, size.full - 23, removable={("p1",): -99.0})
    assert kept.units["p1"] == () and kept.size == size.full - 23
    everything = {(f"p{n}",): -99.0 + n for n in range(3)}
    with pytest.raises(Unreachable) as caught:
        prune_to_size(size, scores, 0, removable=everything)
    assert caught.value.least == size.full - 2 * 23 - 5 * 2


def test_a_target_out_of_reach_says_the_smallest_size():
    size = flat(4, 30, least=3)
    with pytest.raises(Unreachable) as caught:
        prune_to_size(size, random_scores(size), 10)
    assert caught.value.least == 5 + 30 + 3
