"""The search of greedy_removal: what is tried together, what is measured, and what goes."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch

from compressor.analysis.model_facts import facts_of
from compressor.errors import PassError
from compressor.methods.pruning.removal_trials import Losses, Trials
from compressor.model.structure import read_structure
from compressor.passes.greedy_removal import Candidate, GreedyRemoval, Search
from tests.support import model_in_memory, tiny
from tests.support.raising import raises


class Additive:
    """Losses that add up over removed parts; the confirming samples may give other losses."""

    def __init__(self, costs, confirm=None):
        self.costs, self.confirm, self.asked = costs, confirm or costs, 0

    def __call__(self, removed):
        self.asked += 1
        names = [f"{prunable} {unit}" for prunable, units in removed.items() for unit in units]
        return Losses(sum(self.costs[name] for name in names), sum(self.confirm[name] for name in names))


class Site:
    def __init__(self, name, units, kind="heads"):
        self.name, self.units, self.kind = name, units, kind


def walked(costs, confirm=None, enough=lambda removed: False, prunables=None, **settings):
    prunables = prunables or [Site("a", 3), Site("b", 3)]
    measure = Additive(costs, confirm)
    search = Search(GreedyRemoval(**settings), Losses(0.0, 0.0), measure, enough, prunables)
    search.walk(
        [Candidate(f"{s.name} {u}", n, ((s.name, (u,)),)) for n, s in enumerate(prunables) for u in range(s.units)]
    )
    return search, measure


COSTS = {"a 0": 0.02, "a 1": 0.5, "a 2": 0.01, "b 0": 0.03, "b 1": -0.02, "b 2": 0.04}


def removed(search):
    return [name for row in search.log if row["removed"] for name in row["what"].split(" + ")]


def one_by_one(costs, order, bound):
    """The slow obvious search: each is removed if the losses without it stay within the bound."""
    removed = []
    for name in order:
        if all(sum(part[one] for one in [*removed, name]) <= bound for part in costs):
            removed.append(name)
    return removed


def test_the_cheapest_go_first_and_the_sum_stays_within_the_bound():
    search, measure = walked(COSTS, max_loss_increase=0.05)
    assert removed(search) == ["b 1", "a 2", "a 0", "b 0"]  # 0.04; with b 2 it would be 0.08
    assert search.now.search == pytest.approx(0.04) and measure.asked == search.evaluations - 1
    assert [
        row["what"] for row in search.log if not row["removed"]
    ] == []  # a 1 and b 2 are the last of their prunables


@pytest.mark.parametrize("seed", range(30))
def test_what_goes_together_is_what_goes_one_by_one(seed):
    draw = random.Random(seed)
    prunables = [Site(name, 9) for name in "abcd"]  # no more than 8 of one go within the bound, so none is emptied
    names = [f"{prunable.name} {unit}" for prunable in prunables for unit in range(9)]
    costs = {name: draw.expovariate(1) for name in names}
    confirm = {name: cost * draw.uniform(0.5, 2) for name, cost in costs.items()}
    bound = draw.uniform(0.5, 3)
    search, measure = walked(costs, confirm, prunables=prunables, max_loss_increase=bound)
    order = sorted(reversed(names), key=lambda name: costs[name])
    assert removed(search) == one_by_one([costs, confirm], order, bound) != []
    assert measure.asked < 2 * len(names) - 6  # the ranking, and fewer than one by one


@pytest.mark.parametrize("seed", range(10))
def test_a_group_that_loses_more_than_its_parts_is_divided(seed):
    draw = random.Random(seed)
    prunables = [Site("a", 40)]
    costs = {f"a {unit}": draw.uniform(0.1, 1) for unit in range(40)}

    class Squared(Additive):
        def __call__(self, removed):
            found = super().__call__(removed)
            return Losses(found.search**2, found.confirm**2)

    measure = Squared(costs)
    search = Search(GreedyRemoval(max_loss_increase=9), Losses(0.0, 0.0), measure, lambda removed: False, prunables)
    search.walk([Candidate(f"a {unit}", 0, (("a", (unit,)),)) for unit in range(40)])
    order = sorted(reversed(costs), key=costs.__getitem__)
    assert removed(search) == one_by_one([costs], order, 3.0)


def test_what_the_confirming_part_does_not_bear_stays():
    search, _ = walked(COSTS, {**COSTS, "a 2": 9.0}, max_loss_increase=0.05)
    assert "a 2" not in removed(search)
    assert any(row["what"] == "a 2" and not row["removed"] for row in search.log)


def test_the_search_ends_at_its_target_and_at_its_number_of_evaluations():
    search, _ = walked(COSTS, enough=lambda removed: sum(map(len, removed.values())) >= 2, max_loss_increase=1)
    assert sum(map(len, search.removed.values())) == 2
    for most in (1, 4, 8):
        _, measure = walked(COSTS, max_loss_increase=1, max_evaluations=most)
        assert measure.asked <= most - 1  # one is the dense model's
    search, _ = walked(COSTS, order="last_first", max_loss_increase=0.05)
    assert [row["what"] for row in search.log][:2] == ["b 2", "b 1"]


def test_trials_from_kept_streams_are_those_of_whole_runs(tmp_path):
    model = tiny.build("llama", dtype=torch.float64)
    whole = model_in_memory.Whole(model, model_in_memory.token_batches(2, 3, 6))
    prunables = facts_of(read_structure(tiny.save("llama", tmp_path / "m", dtype=torch.float64)), 0).prunable()
    trial = Trials.of(whole, prunables, "distill", 0.3)
    names = {prunable.kind + str(prunable.block): prunable.name for prunable in prunables}
    sequence = [{}, {names["ffn1"]: {1, 5}}, {names["heads0"]: {0}}, {names["heads0"]: {0}, names["ffn1"]: {3}}, {}]
    assert trial.is_sampled
    for removed, batches in itertools.product(sequence, ([0, 1], trial.ranking)):
        found = trial.sums(removed, batches)
        fresh = Trials.of(model_in_memory.Whole(model, whole.inputs), prunables, "distill", 0.3).sums(removed, batches)
        assert torch.allclose(found, fresh, rtol=1e-12, atol=0, equal_nan=True)
        assert (trial.means(found) == Losses(0.0, 0.0)) == (not removed)
        assert int((~found.isnan()).sum()) == 3 * len(batches)


def test_a_candidate_that_is_hopeless_alone_is_not_measured_again():
    measure, rank = Additive(COSTS), Additive({name: 2 * cost for name, cost in COSTS.items()})
    prunables = [Site("a", 3), Site("b", 3)]
    settings = GreedyRemoval(max_loss_increase=0.03)
    search = Search(settings, Losses(0.0, 0.0), measure, lambda removed: False, prunables, rank)
    search.walk(
        [Candidate(f"{s.name} {u}", n, ((s.name, (u,)),)) for n, s in enumerate(prunables) for u in range(s.units)]
    )
    # after b 1, a 2 and a 0 the bound allows 0.02 more; b 0 and b 2 add 0.06 and 0.08 on the samples of the ranking
    assert [row["what"] for row in search.log if "adds" in row] == ["b 0", "b 2"]
    assert removed(search) == ["b 1", "a 2", "a 0"]
    assert measure.asked + rank.asked == search.evaluations - 1 and rank.asked == 7


def test_a_ranking_leaves_half_of_the_evaluations_for_removals():
    search, measure = walked(COSTS, max_loss_increase=1, max_evaluations=7)
    assert removed(search) == ["b 1", "b 0"] and measure.asked == 4  # b 2 is the last of its prunable


def test_a_measurement_that_ends_early_decides_as_the_whole_one(tmp_path):
    prunables = facts_of(read_structure(tiny.save("llama", tmp_path / "m", dtype=torch.float64)), 0).prunable()
    whole = model_in_memory.Whole(tiny.build("llama", dtype=torch.float64), model_in_memory.token_batches(8, 3, 6))
    trials = Trials.of(whole, prunables, "distill", 0.3)
    ended = 0
    for prunable, unit in itertools.product(prunables, (0, 1)):
        removed = {prunable.name: {unit}}
        sums = trials.sums(removed, range(8))
        losses = trials.means(sums)
        for factor in (0.2, 0.9, 1.1, 5.0):
            limit = Losses(losses.search * factor, losses.confirm * factor)
            found = trials.sums_within(removed, limit)
            known = ~found.isnan()
            assert torch.allclose(found[known], sums[known], rtol=1e-12)
            assert trials.least(found).is_within(limit) == losses.is_within(limit) == (factor > 1)
            assert known.all() or factor < 1
            ended += int(not known.all())
    assert ended > len(prunables)


def test_a_loss_that_is_not_a_number_exceeds_every_bound(tmp_path):
    prunables = facts_of(read_structure(tiny.save("llama", tmp_path / "m")), 0).prunable()
    trials = Trials.of(
        model_in_memory.Whole(tiny.build("llama"), model_in_memory.token_batches(2, 3, 6)), prunables, "distill", 0.3
    )
    trials.objective = lambda batch, last, head: iter([torch.full((3,), math.nan)])
    found = trials.sums_within({prunables[0].name: {0}}, Losses(1e9, 1e9))
    assert found.isinf().any() and not trials.least(found).is_within(Losses(1e9, 1e9))


def test_a_model_without_finite_losses_is_refused(tmp_path):
    path = tiny.save("llama", tmp_path / "m")
    model = tiny.build("llama")
    with torch.no_grad():
        model.lm_head.weight[0] = math.nan
    whole = model_in_memory.Whole(model, model_in_memory.token_batches(4, 3, 6))
    whole.facts = facts_of(read_structure(path), 0)
    with raises(PassError, where="greedy_removal", reason="not-finite"):
        GreedyRemoval().choose(whole)
