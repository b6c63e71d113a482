"""Counts the work of metrics, spectra and errors of `low_rank`, for the passes that use them."""

from __future__ import annotations

from collections.abc import Sequence

from compressor.methods.factorization.low_rank import EXACT_INPUTS
from compressor.protocol.work import DataSize, Work, cholesky


def metric_work(inputs: int, data: DataSize) -> Work:
    """Of `stage_metrics` for one group: second moments of the tokens, and their Cholesky factor."""
    if not data.tokens:
        return Work()
    moments = data.tokens * float(inputs) ** 2
    if inputs <= EXACT_INPUTS:
        return Work(double=moments + inputs**3 / 3)
    return Work(products=moments) + cholesky(inputs)


def matmul_work(inputs: int, operations: float) -> Work:
    """Operations in the dtype of a metric of so many inputs."""
    return Work(double=operations) if inputs <= EXACT_INPUTS else Work(exact=operations)


def error_work(shape: Sequence[int]) -> Work:
    """Of `Metric.error`: the product of a change (out, in) and the lower triangle of L."""
    rows, inputs = shape
    return matmul_work(inputs, float(rows) * inputs**2)


def side_work(shape: Sequence[int]) -> Work:
    """Of `side`: W L, and the product of the result and its transpose."""
    rows, inputs = shape
    return matmul_work(inputs, 2.0 * rows * inputs**2) + Work(double=2.0 * rows * inputs * min(shape))


def spectrum_work(shape: Sequence[int]) -> Work:
    return side_work(shape) + Work(spectra=float(min(shape)) ** 3)


def factors_work(shape: Sequence[int], rank: float) -> Work:
    """Of `Spectrum.factors`, and of the matrix that they give: for its error, as it is put, and as it is read back."""
    rows, inputs = shape
    products = 2.0 * rows * inputs * rank
    solved = 0.0 if rows <= inputs else 3.0 * inputs**2 * rank
    return matmul_work(inputs, products + solved) + Work(exact=3 * 2.0 * rows * inputs * rank)
