"""Counts the work of a pass by kind, so that `plan` can predict its time from the measured rates of a machine."""

from __future__ import annotations

from dataclasses import astuple, dataclass


@dataclass(frozen=True)
class Work:
    """Amounts of work. Kinds differ in what limits their speed, so each has a rate of its own.

    products  floating-point operations of matmuls in the model's dtype (two for each multiply-add)
    exact     floating-point operations of matmuls in float32
    factors   floating-point operations of Cholesky factorizations and triangular inversions in float32
    spectra   n^3 of each eigenvalue or singular value decomposition of an n x n matrix in float64
    searched  weights for which the scale with the least squared error is searched, and that are rounded with it
    values    values that elementwise operations read, once for each time that they are read
    stored    bytes that are read from or written to files
    """

    products: float = 0.0
    exact: float = 0.0
    factors: float = 0.0
    spectra: float = 0.0
    searched: float = 0.0
    values: float = 0.0
    stored: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, factor: float) -> Work:
        return Work(*(factor * amount for amount in astuple(self)))


def factor_operations(width: int) -> float:
    """Of a Cholesky factorization and the inversion of its triangle: n^3 / 3 each."""
    return 2 / 3 * width**3
