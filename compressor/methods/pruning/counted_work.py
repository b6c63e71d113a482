"""Counts the work and the memory of searches, and of repaired output projections, for the passes that use them."""

from __future__ import annotations

from collections.abc import Sequence

from compressor.methods.pruning.masked_forward import KEPT_BLOCK_BYTES, KEPT_OUTPUT_BYTES
from compressor.methods.pruning.reconstruction import HELD_OUT
from compressor.protocol.work import DataSize, PartWork, Work

READS = 3  # of the inputs of an output projection: for its second moments, and twice for errors on held-out batches

OUTPUT_BYTES = 4  # of a logit, at most


def kept_bytes(data: DataSize, parts: Sequence[PartWork]) -> int:
    """Of the blocks and of the dense model's outputs that stay in memory while a model is run again and again."""
    blocks = sum(part.load.stored for part in parts[1:-1])
    outputs = OUTPUT_BYTES * data.tokens * parts[-1].outputs
    return int(min(KEPT_BLOCK_BYTES, blocks) + min(KEPT_OUTPUT_BYTES, outputs))


def repair_work(block: PartWork, data: DataSize, outputs: int, inputs: int, kept: int) -> Work:
    """Of `reconstruction.repair` for an output projection (outputs, inputs) that keeps so many inputs."""
    held_out = data.tokens / HELD_OUT
    moments = 2.0 * (data.tokens - held_out) * inputs**2
    solve = 2.0 * outputs * inputs * kept + kept**3 / 3 + 2.0 * outputs * kept**2
    errors = 2 * 4.0 * held_out * inputs * outputs
    return block.run * (READS * data.tokens) + Work(double=moments + solve + errors)
