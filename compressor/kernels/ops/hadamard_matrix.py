"""Makes Hadamard matrices: n x n of +1 and -1 with H Hᵀ = n I.

Sylvester's (1867) for powers of two, Paley's (1933, "On orthogonal matrices") for the odd factors 3, 5, 7 and 9:

    12 = 11 + 1, 20 = 19 + 1   first construction, q = 3 mod 4
    28 = 2 (13 + 1), 36 = 2 (17 + 1)   second construction, q = 1 mod 4
    40 = 2 · 20, 24 = 2 · 12 and so on   by Sylvester's doubling
"""

from __future__ import annotations

from compressor.lazy import torch

BASES = (1, 12, 20, 28, 36)


def base_of(n: int) -> int | None:
    """The m of BASES with n = 2^p · m, if there is one."""
    return next((m for m in BASES if n >= m and n % m == 0 and (n // m).bit_count() == 1), None)


def sylvester(n: int) -> torch.Tensor:
    """(n, n) float64, n a power of two: entry (i, j) is -1 to the number of ones in i & j."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    while len(matrix) < n:
        matrix = torch.kron(pair, matrix)
    return matrix


def base_matrix(m: int) -> torch.Tensor:
    """(m, m) float64 of +1 and -1, m in BASES."""
    if m == 1:
        return sylvester(1)
    if m in (12, 20):
        return _paley_first(m - 1)
    if m in (28, 36):
        return _paley_second(m // 2 - 1)
    raise ValueError(f"no Hadamard matrix of {m} here, only of {BASES}")


def _residues(q: int) -> torch.Tensor:
    """Jacobsthal's matrix (q, q) of a prime q: entry (i, j) is 0, 1 or -1 as j - i is 0, a square or none mod q."""
    squares = {i * i % q for i in range(1, q)}
    character = torch.tensor([0.0] + [1.0 if i in squares else -1.0 for i in range(1, q)], dtype=torch.float64)
    index = torch.arange(q)
    return character[(index[None] - index[:, None]) % q]


def _paley_first(q: int) -> torch.Tensor:
    """I + S, S skew: a first row of ones, a first column of minus ones, Jacobsthal's matrix."""
    matrix = torch.ones(q + 1, q + 1, dtype=torch.float64)
    matrix[1:, 0] = -1
    matrix[1:, 1:] = _residues(q) + torch.eye(q, dtype=torch.float64)
    return matrix


def _paley_second(q: int) -> torch.Tensor:
    """S ⊗ [[1, 1], [1, -1]] + I ⊗ [[1, -1], [-1, -1]], S symmetric with Jacobsthal's matrix inside a border of ones."""
    inner = torch.ones(q + 1, q + 1, dtype=torch.float64)
    inner[0, 0] = 0
    inner[1:, 1:] = _residues(q)
    diagonal = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(inner, sylvester(2)) + torch.kron(torch.eye(q + 1, dtype=torch.float64), diagonal)
