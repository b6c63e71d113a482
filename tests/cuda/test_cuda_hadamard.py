"""The CUDA Hadamard product, emulated: its matrices, hostile rows."""

from __future__ import annotations

import numpy as np
import pytest

from cuda_ext.cases import arrays, hadamard


def product(library, x: np.ndarray, kind: int = arrays.FLOAT32) -> np.ndarray:
    """x H, float64, of x (rows, n)"""
    given = arrays.GuardedArray(arrays.to_bits(x, kind))
    y = arrays.GuardedArray(arrays.to_bits(np.full(x.shape, np.nan), kind))
    assert hadamard.launcher(library)(given.address, y.address, *x.shape, 1.0, kind, None) == 0
    return arrays.to_float64(y.read(), kind)


@pytest.mark.parametrize("m", [12, 20, 28, 36])
def test_the_matrix_of_a_run_has_orthogonal_rows_of_ones(emulated, m):
    """x is the identity, so y is the matrix that the kernel has, and exact in float16."""
    matrix = product(emulated, np.eye(m), arrays.FLOAT16)
    assert (np.abs(matrix) == 1).all()
    assert (matrix @ matrix.T == m * np.eye(m)).all()
    assert (matrix == hadamard.paley(m)).all()


@pytest.mark.parametrize("n", [24, 40, 56, 96])
def test_sylvesters_factor_is_outside(emulated, n):
    m = hadamard.factor(n)
    outside = np.array([[1.0]])
    while len(outside) < n // m:
        outside = np.kron([[1, 1], [1, -1]], outside)
    assert (product(emulated, np.eye(n)) == np.kron(outside, hadamard.paley(m))).all()


@pytest.mark.parametrize("n", [16, 80])
def test_nan_and_infinity_stay_in_their_rows(emulated, n):
    x = np.ones((5, n))
    x[1, 3], x[3, 5] = np.nan, np.inf
    result = product(emulated, x)
    assert np.isnan(result[1]).all()
    assert np.isinf(result[3]).all()
    assert np.isfinite(result[[0, 2, 4]]).all()


def test_the_rows_of_a_call_do_not_see_each_other(emulated):
    x = np.random.default_rng(0).standard_normal((7, 48))
    assert (product(emulated, x)[3] == product(emulated, x[3:4])[0]).all()
