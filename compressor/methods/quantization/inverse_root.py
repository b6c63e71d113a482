"""Factors a symmetric matrix as H = R Rᵀ with R upper triangular, and inverts R, both in place by large products.

With J the reversal of rows and columns, J H J = L Lᵀ is the Cholesky factorization and R = J L J. U = R⁻¹ is then upper
too, its diagonal is positive, and Uᵀ U = R⁻ᵀ R⁻¹ = H⁻¹: U is the upper Cholesky factor of H⁻¹, which is unique. So H⁻¹
is never formed. Each function divides its matrix in halves, n³/3 operations in all, nearly all of them in products of
large matrices. Only the upper triangle is read and written; below it stays what was there.
"""

from __future__ import annotations

from compressor.lazy import torch

LEAF = 256  # columns that LAPACK and BLAS process at once; the best of 128, 256 and 512 for 2048 and 8192 columns


def upper_root_(a: torch.Tensor) -> bool:
    """Replace the upper triangle of a symmetric matrix (n, n) by R with a = R Rᵀ.

    returns  whether the matrix is positive definite; if not, its contents are undefined
    """
    if len(a) <= LEAF:
        lower, info = torch.linalg.cholesky_ex(a.flip(0, 1))
        a.copy_(lower.flip(0, 1))
        return int(info) == 0
    from compressor.kernels.ops.hessian import hessian_add_  # imports torch, which loading settings must not

    half = _half(a)
    first, right, last = a[:half, :half], a[:half, half:], a[half:, half:]
    if not upper_root_(last):
        return False
    solve_upper_(last, right.t())  # right ← right R₂₂⁻ᵀ
    hessian_add_(first, right.t(), 1.0, -1.0)  # first ← first - right rightᵀ
    return upper_root_(first)


def invert_upper_(a: torch.Tensor) -> None:
    """Replace an upper triangular matrix (n, n) by its inverse."""
    if len(a) <= LEAF:
        a.copy_(torch.linalg.solve_triangular(a, torch.eye(len(a)).to(a), upper=True))
        return
    half = _half(a)
    first, right, last = a[:half, :half], a[:half, half:], a[half:, half:]
    solve_upper_(first, right)
    solve_lower_(last.t(), right.t())
    right.neg_()
    invert_upper_(first)
    invert_upper_(last)


def solve_upper_(a: torch.Tensor, b: torch.Tensor) -> None:
    """Replace b (n, m) by a⁻¹ b, a (n, n) upper triangular."""
    if len(a) <= LEAF:
        b.copy_(torch.linalg.solve_triangular(a, b, upper=True))
        return
    half = _half(a)
    solve_upper_(a[half:, half:], b[half:])
    b[:half].addmm_(a[:half, half:], b[half:], alpha=-1)
    solve_upper_(a[:half, :half], b[:half])


def solve_lower_(a: torch.Tensor, b: torch.Tensor) -> None:
    """Replace b (n, m) by a⁻¹ b, a (n, n) lower triangular."""
    if len(a) <= LEAF:
        b.copy_(torch.linalg.solve_triangular(a, b, upper=False))
        return
    half = _half(a)
    solve_lower_(a[:half, :half], b[:half])
    b[half:].addmm_(a[half:, :half], b[:half], alpha=-1)
    solve_lower_(a[half:, half:], b[half:])


def _half(a: torch.Tensor) -> int:
    return -(-len(a) // (2 * LEAF)) * LEAF
