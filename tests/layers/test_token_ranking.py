"""Importance, similarity and counts of tokens, against worked examples and a slow obvious version."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from compressor.layers.structural.token_counts import block_macs, gate_macs, kept_tokens, split_removed, tokens_after
from compressor.layers.structural.token_ranking import (
    attention_graph,
    best_first,
    choose_tokens,
    combine_heads,
    drop_similar,
    head_weights,
    page_rank,
    partition,
)

WORKED = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.6, 0.2], [0.4, 0.4, 0.2]], dtype=torch.float64)[None, None]
GATE = {
    "similar": 0.3,
    "partition": "sequential",
    "order": "ISI",
    "iterations": 10,
    "tolerance": 0.0,
    "filter": None,
    "heads": "rms",
    "seed": 0,
}


def inputs(samples=2, tokens=12, heads=3, width=8, seed=0):
    """(graph, keys, valid, candidates) of random tokens, the first of which is protected."""
    generator = torch.Generator().manual_seed(seed)
    query, key = (torch.randn(samples, heads, tokens, width, generator=generator) for _ in range(2))
    valid = torch.ones(samples, tokens, dtype=torch.bool)
    candidates = valid.clone()
    candidates[:, 0] = False
    return attention_graph(query, key, 1.0, None), key, valid, candidates


def slow_choice(graph, keys, valid, candidates, keep, gate):
    """One sample, I'-S-I with the sequential split, in plain Python."""
    n = len(valid)
    alive = [i for i in range(n) if valid[i]]

    def rank(alive, iterations):
        total = {i: 0.0 for i in alive}
        for head in graph:
            rows = {i: {j: float(head[i, j]) for j in alive} for i in alive}
            s = {i: 1 / len(alive) for i in alive}
            for _ in range(iterations):
                s = {j: sum(s[i] * rows[i][j] / sum(rows[i].values()) for i in alive) for j in alive}
            for i in alive:
                total[i] += s[i] ** 2 / len(graph)
        return {i: math.sqrt(total[i]) for i in alive}

    left = [i for i in alive if candidates[i]]
    removed = len(left) - keep
    similar, _ = split_removed(len(left), removed, gate["similar"])
    score = rank(alive, 1)
    order = sorted(left, key=lambda i: (-score[i], i))
    half = len(left) // 2
    references, droppable = order[: len(left) - half], order[len(left) - half :]
    mean = keys.mean(0)
    cosine = torch.nn.functional.cosine_similarity
    closest = {a: max(float(cosine(mean[a], mean[b], dim=0)) for b in references) for a in droppable}
    removed = sorted(droppable, key=lambda a: (-round(closest[a], 6), -order.index(a)))[:similar]
    alive = [i for i in alive if i not in removed]
    score = rank(alive, gate["iterations"])
    best = sorted((i for i in left if i not in removed), key=lambda i: (-score[i], i))[:keep]
    return sorted([i for i in alive if not candidates[i]] + best)


def test_page_rank_gives_the_worked_example_and_its_limit():
    votes = [page_rank(WORKED, None, count, 0.0).flatten().tolist() for count in (1, 2, 3)]
    assert votes[0] == pytest.approx([0.366667, 0.433333, 0.2], abs=1e-6)
    assert votes[1] == pytest.approx([0.35, 0.45, 0.2]) and votes[2] == pytest.approx([0.345, 0.455, 0.2])
    limit = torch.tensor([12, 16, 7], dtype=torch.float64) / 35
    found = page_rank(WORKED, None, 1000, 0.0).flatten()
    assert torch.allclose(found, limit, atol=1e-12)
    apart = [float((torch.tensor(vote, dtype=torch.float64) - limit).abs().sum()) for vote in votes]
    assert apart == pytest.approx([0.047619, 0.0142857, 0.0042857], abs=1e-6)


def test_page_rank_is_the_stationary_distribution_of_any_attention():
    graph = inputs(samples=3, tokens=9)[0].double()
    graph = graph / graph.sum(-1, keepdim=True)
    found = page_rank(graph, None, 1000, 0.0)
    assert torch.allclose(found.sum(-1), torch.ones(3, 3, dtype=torch.float64)) and bool((found >= 0).all())
    values, vectors = torch.linalg.eig(graph.transpose(-1, -2))
    first = (values - 1).abs().argmin(-1)
    wanted = vectors.real.gather(-1, first[..., None, None].expand(-1, -1, 9, 1)).squeeze(-1)
    assert torch.allclose(found, wanted / wanted.sum(-1, keepdim=True), atol=1e-8)
    # votes taken the other way round would end where they begin
    assert torch.allclose(page_rank(graph.transpose(-1, -2), None, 1, 0.0)[0, 0].std(), torch.tensor(0.0).double())
    assert float(found.std(-1).min()) > 1e-3


def test_a_doubly_stochastic_graph_leaves_tokens_equal_and_ties_go_to_the_first():
    ring = (torch.eye(6) + torch.eye(6).roll(1, 0)) / 2
    s = page_rank(ring[None, None], None, 50, 0.0)
    assert torch.allclose(s, torch.full_like(s, 1 / 6))
    valid = torch.ones(1, 6, dtype=torch.bool)
    assert best_first(torch.full((1, 6), 0.5), valid).tolist() == [[0, 1, 2, 3, 4, 5]]
    uniform, keys = torch.full((1, 2, 6, 6), 1 / 6), torch.ones(1, 2, 6, 4)
    candidates = valid.clone()
    candidates[:, 0] = False
    kept = choose_tokens(uniform, keys, valid, candidates, [3], {**GATE, "similar": 0.0})
    assert kept[0].tolist() == [True, True, True, True, False, False]


def test_voting_stops_for_each_head_alone():
    graph = torch.cat([WORKED, torch.full_like(WORKED, 1 / 3)])
    both = page_rank(graph, None, 40, 1e-3)
    assert torch.equal(both[:1], page_rank(WORKED, None, 40, 1e-3))
    assert torch.equal(both[:1], page_rank(WORKED, None, 5, 0.0))  # it moves by 0.0333 * 0.3^(t-2)
    assert torch.allclose(both[:1], page_rank(WORKED, None, 1000, 0.0), atol=1e-3)


def test_heads_are_combined_by_root_mean_square_of_those_that_tell_tokens_apart():
    heads = torch.tensor([[[0.34, 0.46, 0.2], [0.1, 0.8, 0.1]]], dtype=torch.float64)
    both = torch.ones(1, 2, dtype=torch.float64)
    assert combine_heads(heads, both, "rms")[0].tolist() == pytest.approx([0.250599, 0.652534, 0.158114], abs=1e-6)
    assert combine_heads(heads, both, "mean")[0].tolist() == pytest.approx([0.22, 0.63, 0.15])
    assert heads.var(-1, correction=0)[0].tolist() == pytest.approx([0.011289, 0.108889], abs=1e-6)
    everyone = torch.ones(1, 3, dtype=torch.bool)
    measure = [9 * 0.0112889, 9 * 0.1088889]  # of n s, n = 3
    assert head_weights(heads, everyone, (measure[0] - 1e-5, measure[0] + 1e-5)).tolist() == [[1, 0]]
    assert head_weights(heads, everyone, (0.5, 2.0)).tolist() == [[0, 1]]
    assert head_weights(heads, everyone, (5.0, 6.0)).tolist() == head_weights(heads, everyone, None).tolist()


def test_counts_and_work_are_those_of_the_worked_example():
    counts = [tokens_after(197, [0.8] * gates, 1, 8) for gates in range(4)]
    assert counts == [197, 158, 127, 102]
    assert split_removed(196, 39, 0.3) == (12, 27)
    assert [kept_tokens(n, 0.1, 2, 8) for n in (3, 8, 9, 100)] == [3, 8, 8, 12]
    assert kept_tokens(101, 0.29, 1, 4) == 30  # 0.29 * 100 is not 29 in binary
    small = {"tiny": (192, 1253683200), "small": (384, 4598882304), "base": (768, 17563828224)}
    for width, wanted in small.values():
        block = block_macs(197, 197, 4 * width**2, 8 * width**2, width)
        assert 12 * block + 196 * 768 * width + 1000 * width == wanted
    assert block_macs(197, 197, 4 * 384**2, 8 * 384**2, 384) == 378391296
    sizes = [197, 197, 197, 197, 158, 158, 158, 127, 127, 127, 102, 102, 102]
    blocks = [block_macs(n, left, 4 * 384**2, 8 * 384**2, 384) for n, left in pairwise(sizes)]
    assert sum(blocks) + 196 * 768 * 384 + 1000 * 384 == 3444215040
    assert gate_macs(197, 6, 64, 10, 12, 39, "ISI") == 6 * 197**2 * (64 + 1 + 1 + 10) + 197**2 * 64
    assert gate_macs(197, 6, 64, 10, 0, 0, "ISI") == 0


@pytest.mark.parametrize("order", ["ISI", "IS", "SI"])
@pytest.mark.parametrize("how", ["sequential", "alternate", "random"])
def test_exactly_the_asked_number_stays_and_protected_tokens_always(order, how):
    graph, keys, valid, candidates = inputs(tokens=12)
    valid[1, 9:] = False
    candidates &= valid
    graph = graph.masked_fill(~valid[:, None, None, :], 0.0)
    graph = graph / graph.sum(-1, keepdim=True)
    for share in (0.0, 0.3, 1.0):
        gate = {**GATE, "order": order, "partition": how, "similar": share}
        kept = choose_tokens(graph, keys, valid, candidates, [6, 5], gate)
        assert kept.sum(1).tolist() == [7, 6] and bool(kept[:, 0].all()) and not bool((kept & ~valid).any())


def test_the_choice_is_that_of_a_slow_obvious_version():
    for seed in range(4):
        graph, keys, valid, candidates = inputs(samples=3, tokens=15, seed=seed)
        valid[2, 11:] = False
        candidates &= valid
        masked = graph.masked_fill(~valid[:, None, None, :], 0.0)
        graph = masked / masked.sum(-1, keepdim=True)
        counts = [8, 8, 5]
        kept = choose_tokens(graph, keys, valid, candidates, counts, GATE)
        for sample, count in enumerate(counts):
            wanted = slow_choice(graph[sample], keys[sample], valid[sample], candidates[sample], count, GATE)
            assert kept[sample].nonzero().flatten().tolist() == wanted


def test_permuting_tokens_permutes_the_choice():
    graph, keys, valid, candidates = inputs(tokens=20)
    order = torch.cat([torch.tensor([0]), 1 + torch.randperm(19, generator=torch.Generator().manual_seed(1))])
    kept = choose_tokens(graph, keys, valid, candidates, [9, 9], GATE)
    moved = choose_tokens(graph[:, :, order][..., order], keys[:, :, order], valid, candidates, [9, 9], GATE)
    assert torch.equal(moved, kept[:, order])


def test_padding_and_the_rest_of_a_batch_change_nothing():
    graph, keys, valid, candidates = inputs(samples=1, tokens=10)
    for how in ("sequential", "alternate", "random"):
        alone = choose_tokens(graph, keys, valid, candidates, [5], {**GATE, "partition": how})
        for before, behind in ((0, 4), (3, 2)):
            wide = torch.nn.functional.pad(graph, (before, behind, before, behind))
            long = torch.nn.functional.pad(keys, (0, 0, before, behind), value=0.7)
            masks = [torch.nn.functional.pad(mask, (before, behind)) for mask in (valid, candidates)]
            other = inputs(samples=1, tokens=10 + before + behind, seed=5)
            both = [torch.cat(pair) for pair in zip((wide, long, *masks), other)]
            padded = choose_tokens(*both, [5, 7], {**GATE, "partition": how})
            assert torch.equal(padded[:1, before : before + 10], alone)


def test_a_dropped_token_leaves_its_like_behind_and_duplicates_go_first():
    _, keys, _, candidates = inputs(samples=1, tokens=13)
    score = torch.linspace(1, 0.1, 13)[None]
    order = best_first(score, candidates)
    droppable = partition(order, candidates, "sequential", 0)
    assert droppable[0].nonzero().flatten().tolist() == list(range(7, 13))
    keys[:, :, 9], keys[:, :, 11] = keys[:, :, 2], keys[:, :, 5]
    dropped = drop_similar(keys, order, droppable, candidates, torch.tensor([2]))
    assert dropped[0].nonzero().flatten().tolist() == [9, 11]
    keys[:, :, 7:] = keys[:, :, 1:2]  # all alike: the least important goes, the one of higher index first
    dropped = drop_similar(keys, order, droppable, candidates, torch.tensor([2]))
    assert dropped[0].nonzero().flatten().tolist() == [11, 12]
