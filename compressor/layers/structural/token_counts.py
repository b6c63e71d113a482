"""How many tokens a gate leaves, and what a block costs for it: whole numbers that no data decides.

So a batch of samples of one length stays a rectangle, and the work a model does is known before it runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

SLACK = 1e-9  # of a product of a rate and a count that should be whole


def kept_tokens(tokens: int, keep: float, protected: int, minimum: int) -> int:
    """How many of a sample's tokens a gate leaves: the protected ones, and ceil(keep * others), but no fewer than
    `minimum` in all where there are so many.
    """
    others = max(0, tokens - protected)
    wanted = max(math.ceil(keep * others - SLACK), min(others, minimum - protected))
    return tokens - others + wanted


def tokens_after(tokens: int, keeps: Sequence[float], protected: int, minimum: int) -> int:
    """The same through one gate after the other."""
    for keep in keeps:
        tokens = kept_tokens(tokens, keep, protected, minimum)
    return tokens


def split_removed(others: int, removed: int, share: float) -> tuple[int, int]:
    """How many of the removed tokens the similarity stage takes, at most one of each pair, and the importance stage."""
    similar = min(round(share * removed), others // 2)  # round half to even
    return similar, removed - similar


def block_macs(tokens: int, left: int, before: int, after: int, width: int) -> int:
    """Multiply-accumulates of a block: n_in (4 d^2) + 2 n_in^2 d + n_out (2 r d^2) for the usual one.

    tokens, left   that enter, and that a gate between attention and MLP leaves
    before, after  entries of the matrices before and after it; 4 d^2 and 2 r d^2 where the MLP is r times as wide
    width          of all heads together; d
    """
    return tokens * before + 2 * tokens * tokens * width + left * after


def gate_macs(tokens: int, heads: int, width: int, iterations: int, similar: int, removed: int, order: str) -> int:
    """Multiply-accumulates of a gate's own for a sample without padding, at most: scores, similarities and votes.

    width    of one head
    similar  tokens that the similarity stage takes, of `removed`; a stage that takes none isn't run
    """
    if not removed:
        return 0
    votes = 1 if similar and order == "ISI" else 0
    if removed > similar or order == "IS":
        votes += iterations
        votes += 1 if similar and order != "IS" else 0  # sums of the rows that are left
    return heads * tokens * tokens * (width + votes) + (tokens * tokens * width if similar else 0)
