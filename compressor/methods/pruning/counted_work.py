"""Counts the work and the memory of searches, and of repaired output projections, for the passes that use them."""

from __future__ import annotations

from collections.abc import Sequence

from compressor.methods.pruning.masked_forward import KEPT_BLOCK_BYTES, KEPT_OUTPUT_BYTES
from compressor.methods.pruning.reconstruction import HELD_OUT
from compressor.protocol.work import DataSize, PartWork, Work

OUTPUT_BYTES = 4  # of a logit, at most
LIKELIHOOD_PASSES = 9  # a softmax, its cumulated sums, the product with the logits, and the slope of that


def kept_bytes(data: DataSize, parts: Sequence[PartWork]) -> int:
    """Of the blocks and of the dense model's outputs that stay in memory while a model is run again and again."""
    blocks = sum(part.load.stored for part in parts[1:-1])
    outputs = OUTPUT_BYTES * data.tokens * parts[-1].outputs
    return int(min(KEPT_BLOCK_BYTES, blocks) + min(KEPT_OUTPUT_BYTES, outputs))


def load_again(parts: Sequence[PartWork]) -> Work:
    """Of loading all blocks once more, except those that stay in memory."""
    load = sum((part.load for part in parts[1:-1]), Work())
    return load * max(0.0, 1 - KEPT_BLOCK_BYTES / load.stored) if load.stored else Work()


def likelihood_work(tokens: float, vocabulary: int) -> Work:
    """Of drawing a label for so many tokens, and of the slope of its likelihood."""
    return Work(values=float(LIKELIHOOD_PASSES * tokens * vocabulary))


def repair_work(block: PartWork, data: DataSize, projections: Sequence[tuple[int, int, int]]) -> Work:
    """Of solving the output projections of a block again, which takes one run of the block.

    projections  (outputs, inputs, inputs that are kept) of each
    """
    found = block.run * data.tokens
    held_out = data.tokens / HELD_OUT
    for outputs, inputs, kept in projections:
        moments = (data.tokens - held_out) * inputs**2  # of one triangle
        solve = 2.0 * outputs * (inputs - kept) * kept + kept**3 / 3 + 2.0 * outputs * kept**2
        errors = 3 * 2.0 * held_out * inputs * outputs
        found += Work(products=moments, exact=errors, double=solve)
    return found
