"""Counts the work of second moments, principal axes and rotated parameters, for the passes that use them."""

from __future__ import annotations

from collections.abc import Sequence

from compressor.protocol.views import SLICE_ELEMENTS
from compressor.protocol.work import DataSize, PartWork, Work, eigenvectors, orthogonal, rewritten

PASSES_OVER_TOKENS = 8  # a token is converted to float64, checked, scaled and copied


def rotated_work(values: int, width: int) -> Work:
    """Of multiplying parameters with so many values by a matrix with so many columns, in float64."""
    return Work(double=2.0 * values * width) + rewritten(values)


def changed_bytes(parts: Sequence[PartWork]) -> int:
    """Memory for the new parameters of the largest part, at most float32, and three copies of a slice in float64."""
    return 4 * max(part.values for part in parts) + 3 * 8 * SLICE_ELEMENTS


def covariance_work(data: DataSize, width: int) -> Work:
    """Of the second moments of the stream."""
    return Work(double=2.0 * data.tokens * width**2, values=float(PASSES_OVER_TOKENS * data.tokens * width))


def pooled_work(parts: Sequence[PartWork], sublayers: Sequence[int], data: DataSize, width: int) -> Work:
    """Of `pooled_covariance` and its axes: each block runs once to go on, and once for each norm.

    sublayers  how many each block has
    """
    found = covariance_work(data, width) + parts[-1].run * data.tokens + eigenvectors(width)
    for part, norms in zip(parts[1:-1], sublayers, strict=True):
        found += part.load + part.run * ((1 + norms) * data.tokens) + covariance_work(data, width) * norms
    return found


def projected_work(data: DataSize, width: int, kept: int) -> Work:
    """Of projecting the stream onto a basis once, in float64."""
    return Work(double=4.0 * data.tokens * width * kept, values=float(PASSES_OVER_TOKENS * data.tokens * width))


def axes_work(data: DataSize, width: int, kept: int) -> Work:
    """Of the axes of the stream at one sublayer, mixed by a random orthogonal matrix. The run isn't counted."""
    mixed = orthogonal(kept) + Work(double=2.0 * width * kept**2)
    return covariance_work(data, width) + eigenvectors(width) + mixed
