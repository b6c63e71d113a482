"""Hadamard matrices by Sylvester's and Paley's constructions."""

from __future__ import annotations

import pytest
import torch

from compressor.kernels.ops.hadamard_matrix import BASES, base_matrix, base_of, sylvester


@pytest.mark.parametrize("m", BASES)
def test_a_base_is_a_hadamard_matrix(m):
    base = base_matrix(m)
    assert (base.abs() == 1).all() and torch.equal(base @ base.t(), m * torch.eye(m, dtype=torch.float64))


def test_sylvester_counts_common_ones():
    expected = [[(-1.0) ** (i & j).bit_count() for j in range(16)] for i in range(16)]
    assert sylvester(16).tolist() == expected


def test_a_base_is_found_for_powers_of_two_times_a_base_and_nothing_else():
    expected = {m * 2**p: m for m in BASES for p in range(12)}
    assert {n: base_of(n) for n in range(1, 1000) if base_of(n)} == {n: m for n, m in expected.items() if n < 1000}
    assert base_of(0) is None and base_of(-4) is None


def test_a_base_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="44"):
        base_matrix(44)
