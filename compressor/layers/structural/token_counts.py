"""Computes how many tokens a gate keeps, and the work of a block: integers that don't depend on data.

So a batch of samples of one length stays a rectangle, and the work of a model is known before it runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

SLACK = 1e-9  # rounding of a product of a rate and a count that should be an integer


def kept_tokens(tokens: int, keep: float, protected: int, minimum: int) -> int:
    """Number of a sample's tokens that a gate keeps: the protected ones and ceil(keep * others), but at least `minimum`
    if the sample has that many.
    """
    others = max(0, tokens - protected)
    wanted = max(math.ceil(keep * others - SLACK), min(others, minimum - protected))
    return tokens - others + wanted


def tokens_after(tokens: int, keeps: Sequence[float], protected: int, minimum: int) -> int:
    """The same for several gates one after the other."""
    for keep in keeps:
        tokens = kept_tokens(tokens, keep, protected, minimum)
    return tokens


def split_removed(others: int, removed: int, share: float) -> tuple[int, int]:
    """Numbers of tokens that the similarity stage (at most one of each pair) and the importance stage remove."""
    similar = min(round(share * removed), others // 2)  # rounds half to even
    return similar, removed - similar


def block_macs(tokens: int, left: int, before: int, after: int, width: int) -> int:
    """Multiply-accumulates of a block: n_in (4 d^2) + 2 n_in^2 d + n_out (2 r d^2) for a usual one.

    tokens, left   that enter it, and that a gate between attention and MLP keeps
    before, after  entries of the matrices before and after the gate; 4 d^2 and 2 r d^2 for an MLP of r times the width
    width          of all heads together; d
    """
    return tokens * before + 2 * tokens * tokens * width + left * after


def gate_macs(tokens: int, heads: int, width: int, iterations: int, similar: int, removed: int, order: str) -> int:
    """Upper bound of a gate's own multiply-accumulates for a sample without padding: scores, similarities and votes.

    width    of one head
    similar  tokens that the similarity stage removes, of `removed`; a stage that removes none doesn't run
    """
    if not removed:
        return 0
    votes = 1 if similar and order == "ISI" else 0
    if removed > similar or order == "IS":
        votes += iterations
        votes += 1 if similar and order != "IS" else 0  # sums of the remaining rows
    return heads * tokens * tokens * (width + votes) + (tokens * tokens * width if similar else 0)
