"""Counts the work of a pass by kind, so that `plan` can predict its time from the measured rates of a machine."""

from __future__ import annotations

from dataclasses import astuple, dataclass

PASSES_OVER_PARAMETERS = 6  # a parameter is converted to float64, changed, and rounded to its own dtype


@dataclass(frozen=True)
class Work:
    """Amounts of work. Kinds differ in what limits their speed, so each has a rate of its own.

    products  floating-point operations of matmuls in the model's dtype (two for each multiply-add)
    exact     floating-point operations of matmuls in float32
    double    floating-point operations of matmuls in float64
    factors   columns of triangular factorizations and inversions in float32, beside their large matmuls (`exact`)
    spectra   n^3 of each eigenvalue or singular value decomposition of an n x n matrix in float64
    searched  weights for which the scale with the least squared error is searched, and that are rounded with it
    values    values that elementwise operations read, once for each time that they are read
    stored    bytes that are read from or written to files
    hashed    bytes of which the SHA-256 is computed
    seconds   seconds that depend neither on the model nor on the machine's rates, such as the start of a process
    """

    products: float = 0.0
    exact: float = 0.0
    double: float = 0.0
    factors: float = 0.0
    spectra: float = 0.0
    searched: float = 0.0
    values: float = 0.0
    stored: float = 0.0
    hashed: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, factor: float) -> Work:
        return Work(*(factor * amount for amount in astuple(self)))


@dataclass(frozen=True)
class DataSize:
    """The calibration data of a step, as far as work and memory depend on it. All are 0 if the step reads only weights.

    samples  number of samples
    tokens   number of tokens of all samples; of a group of weights: those that reach it, for an expert its share
    batch    number of tokens that run through a block at once
    """

    samples: int = 0
    tokens: int = 0
    batch: int = 0


@dataclass(frozen=True)
class PartWork:
    """The work of a part of the model (embeddings, a block, the output head).

    values   number of its parameters
    outputs  number of values that it gives for each token; of the output head the number of its logits
    load     of reading its weights from files
    run      of running one token through it
    """

    values: int
    outputs: int
    load: Work
    run: Work


def inverse_factor(width: int) -> Work:
    """A Cholesky factorization and the inversion of its triangle in float32: n^3 / 3 operations each.

    Nearly all of them are in large matmuls. The diagonal blocks take a time that grows with the number of columns: at
    1,024 columns nine tenths of the whole, at 14,336 a tenth (our measurement).
    """
    return Work(exact=2 / 3 * width**3, factors=float(width))


def cholesky(width: int) -> Work:
    """A Cholesky factorization in float32."""
    return Work(exact=width**3 / 3, factors=width / 2)


def eigenvectors(width: int) -> Work:
    """Eigenvalues and eigenvectors of a symmetric matrix in float64, and the check that these are orthogonal."""
    return Work(spectra=float(width) ** 3, double=2.0 * width**3)


def orthogonal(width: int) -> Work:
    """A random orthogonal matrix by a QR decomposition in float64, in the time of three spectra (our measurement)."""
    return Work(spectra=3.0 * width**3)


def rewritten(values: int) -> Work:
    """Giving so many parameters new values, without the products that compute them."""
    return Work(values=float(PASSES_OVER_PARAMETERS * values))
