"""Counts the work of repaired output projections, for the passes that use them."""

from __future__ import annotations

from compressor.methods.pruning.reconstruction import HELD_OUT
from compressor.protocol.work import DataSize, PartWork, Work

READS = 3  # of the inputs of an output projection: for its second moments, and twice for errors on held-out batches


def repair_work(block: PartWork, data: DataSize, outputs: int, inputs: int, kept: int) -> Work:
    """Of `reconstruction.repair` for an output projection (outputs, inputs) that keeps so many inputs."""
    held_out = data.tokens / HELD_OUT
    moments = 2.0 * (data.tokens - held_out) * inputs**2
    solve = 2.0 * outputs * inputs * kept + kept**3 / 3 + 2.0 * outputs * kept**2
    errors = 2 * 4.0 * held_out * inputs * outputs
    return block.run * (READS * data.tokens) + Work(double=moments + solve + errors)
