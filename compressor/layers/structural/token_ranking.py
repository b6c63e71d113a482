"""Chooses by attention the tokens to drop: the mathematics of Zero-TPrune.

Wang, Dedhia, Jha 2023/24, arXiv 2305.17328. Token i votes for token j with its attention A_ij. So the importance s of
tokens is the stationary distribution of a walk on that graph (weighted PageRank). The similarity of two tokens is the
cosine of their keys. This module knows no models. A sample's result does not depend on other samples in its batch or on
padding.

Shapes: b samples, h heads, n tokens. Every selection breaks ties by index, so it is deterministic.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from compressor.layers.structural.token_counts import split_removed


def attention_graph(query: Tensor, key: Tensor, scaling: float, valid: Tensor | None) -> Tensor:
    """The attention weights: (b, h, n, n) float32, rows sum to 1, padding gets 0.

    query  (b, h, n, width), key (b, h or a divisor of it, n, width)
    valid  (b, n) bool; None: all are tokens
    """
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = torch.matmul(query.float() * scaling, key.float().transpose(2, 3))
    if valid is not None:
        scores = scores.masked_fill(~valid[:, None, None, :], -math.inf)
    return scores.softmax(-1)


def page_rank(graph: Tensor, alive: Tensor | None, iterations: int, tolerance: float) -> Tensor:
    """Importance of each token for each head, (b, h, n): s <- A^T s from uniform, sum 1.

    graph       (b, h, n, n), rows sum to 1
    alive       (b, n) bool: tokens that vote and get votes, others get 0; None: all
    iterations  upper limit; a head of a sample stops when s changes by no more than `tolerance` (L1)
    """
    b, h, n, _ = graph.shape
    if alive is None:
        s = graph.new_full((b, h, 1, n), 1 / n)
    else:
        voters = alive.to(graph.dtype)[:, None, None, :]
        start = voters / voters.sum(-1, keepdim=True)
        total = (graph @ voters.transpose(2, 3)).transpose(2, 3)  # sum of each row over the remaining tokens
        share, lost = torch.where(total > 0, 1 / total, 0), (total == 0).to(graph.dtype)
        s = start.expand(b, h, 1, n)
    moving = None
    for step in range(iterations):
        if alive is None:
            following = s @ graph
        else:  # rows of the remaining graph sum to 1; a token that attended only to removed tokens votes for all
            following = (s * share) @ graph * voters + (s * lost).sum(-1, keepdim=True) * start
        if step + 1 == iterations:
            return (following if moving is None else torch.where(moving, following, s)).squeeze(2)
        distance = (following - s).abs().sum(-1, keepdim=True)
        s = following if moving is None else torch.where(moving, following, s)
        moving = distance > tolerance if moving is None else moving & (distance > tolerance)
        if not moving.any():
            break
    return s.squeeze(2)


def head_weights(importance: Tensor, candidates: Tensor, bounds: Sequence[float] | None) -> Tensor:
    """1 for heads whose variance of importance is within bounds, else 0: (b, h).

    A head's measure is the population variance of n s over the n candidates, which is 0 for a uniform s and any n. If a
    sample has no head within the bounds, all of its heads count.

    importance  (b, h, n); candidates (b, n) bool
    """
    if bounds is None:
        return importance.new_ones(importance.shape[:2])
    mask = candidates[:, None, :].to(importance.dtype)
    count = mask.sum(-1, keepdim=True).clamp_min(1)
    scaled = importance * count
    mean = (scaled * mask).sum(-1, keepdim=True) / count
    variance = ((scaled - mean).square() * mask).sum(-1) / count.squeeze(-1)
    within = (variance >= bounds[0]) & (variance <= bounds[1])
    return (within | ~within.any(1, keepdim=True)).to(importance.dtype)


def combine_heads(importance: Tensor, weights: Tensor, how: str) -> Tensor:
    """(b, n) from (b, h, n): the root mean square (a token that matters to few heads is kept), or the mean."""
    weights = (weights / weights.sum(1, keepdim=True)).unsqueeze(-1)
    if how == "mean":
        return (importance * weights).sum(1)
    return (importance.square() * weights).sum(1).sqrt()


def best_first(score: Tensor, candidates: Tensor) -> Tensor:
    """Indices (b, n) of candidates by decreasing score >= 0 (of equal ones the lower index first); then all others."""
    return score.masked_fill(~candidates, -1.0).sort(dim=1, descending=True, stable=True).indices


def partition(order: Tensor, candidates: Tensor, how: str, seed: int) -> Tensor:
    """The half of the candidates that may be dropped as similar, (b, n) bool. The other half are references.

    order       candidates from the most to the least important
    sequential  the less important half (of an odd number the smaller one)
    alternate   every second candidate, beginning with the second
    random      a seeded half, the same for a sample in any batch
    """
    count = candidates.sum(1, keepdim=True)
    if how == "random":
        place = candidates.cumsum(1) - 1  # among the candidates, so that padding before them doesn't matter
        mixed = ((place + 1) * 2654435761 + seed * 40503) % 4294967296  # Knuth's multiplicative hash
        mixed = (mixed * 2246822519 + (mixed >> 15)) % 4294967296
        order = best_first(mixed.double(), candidates)
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, places)
    if how == "sequential":
        return candidates & (rank >= count - count // 2)
    if how == "alternate":
        return candidates & (rank % 2 == 1)
    return candidates & (rank < count // 2)


def drop_similar(keys: Tensor, order: Tensor, droppable: Tensor, candidates: Tensor, removed: Tensor) -> Tensor:
    """The `removed` (b,) droppable tokens that are most similar to a reference, (b, n) bool.

    Of equal ones the less important is dropped first, then the one of higher index. References are never dropped, so
    a token similar to each dropped one is kept.

    keys  (b, h, n, width), averaged over heads
    """
    unit = F.normalize(keys.float().mean(1), dim=-1)
    alike = torch.matmul(unit, unit.transpose(1, 2))
    references = candidates & ~droppable
    closest = alike.masked_fill(~references[:, None, :], -math.inf).amax(-1).masked_fill(~droppable, -math.inf)
    worst_first = order.flip(1)
    chosen = closest.gather(1, worst_first).sort(dim=1, descending=True, stable=True).indices
    return first_of(worst_first.gather(1, chosen), removed)


def first_of(order: Tensor, count: Tensor) -> Tensor:
    """(b, n) bool: the first count (b,) of each row's indices (b, n)."""
    places = torch.arange(order.shape[1], device=order.device)
    return torch.zeros_like(order, dtype=torch.bool).scatter_(1, order, places < count[:, None])


def choose_tokens(
    graph: Tensor, keys: Tensor, valid: Tensor, candidates: Tensor, counts: Sequence[int], gate: Mapping[str, Any]
) -> Tensor:
    """The kept tokens, (b, n) bool: those of `valid` that are not candidates, and the best candidates.

    counts  number of candidates of each sample that are kept
    gate    similar (share of the removed tokens that the similarity stage removes), partition, order, iterations,
            tolerance, filter (bounds of `head_weights` or None), heads (rms | mean), seed
    order   ISI: a single vote guides the partition, similar tokens are dropped, then the unimportant ones of the rest,
            by PageRank on the rest. IS: the unimportant are dropped first. SI: the partition follows the positions
    """

    def importance(alive: Tensor, among: Tensor, iterations: int) -> Tensor:
        everywhere = None if bool(alive.all()) else alive
        s = page_rank(graph, everywhere, iterations, gate["tolerance"])
        return combine_heads(s, head_weights(s, among, gate["filter"]), gate["heads"])

    def unlike(score: Tensor, among: Tensor, removed: Sequence[int]) -> Tensor:
        order = best_first(score, among)
        droppable = partition(order, among, gate["partition"], gate["seed"])
        return among & ~drop_similar(keys, order, droppable, among, _like(removed, graph))

    others = candidates.sum(1).tolist()
    split = [split_removed(n, n - kept, gate["similar"]) for n, kept in zip(others, counts)]
    similar = [s for s, _ in split]
    protected = valid & ~candidates
    left = candidates
    if gate["order"] == "IS":
        score = importance(valid, left, gate["iterations"])
        kept = [n - i for n, (_, i) in zip(others, split)]
        similar = [min(s, k // 2) for s, k in zip(similar, kept)]
        kept = [count + s for count, s in zip(counts, similar)]  # the first stage removes what the second can't
        left = first_of(best_first(score, left), _like(kept, graph)) & left
        return protected | (unlike(score, left, similar) if any(similar) else left)
    if any(similar):
        guided = gate["order"] == "ISI"
        score = importance(valid, left, 1) if guided else _by_place(left)
        left = unlike(score, left, similar)
    if all(i == 0 for _, i in split):
        return protected | left
    score = importance(protected | left, left, gate["iterations"])
    return protected | first_of(best_first(score, left), _like(counts, graph))


def _by_place(candidates: Tensor) -> Tensor:
    return candidates.flip(1).cumsum(1).flip(1).to(torch.float32)  # decreases from the first to the last


def _like(counts: Sequence[int], tensor: Tensor) -> Tensor:
    return torch.tensor(counts, device=tensor.device)
