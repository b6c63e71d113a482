"""Factors a symmetric matrix as H = R Rᵀ with R upper triangular, and inverts R, both in place by large products.

With J the reversal of rows and columns, J H J = L Lᵀ is the Cholesky factorization and R = J L J. U = R⁻¹ is then upper
too, its diagonal is positive, and Uᵀ U = R⁻ᵀ R⁻¹ = H⁻¹: U is the upper Cholesky factor of H⁻¹, which is unique. So H⁻¹
is never formed. Both steps divide the matrix in halves, n³/3 operations each, nearly all of them in products of large
matrices. Triangular systems end at blocks of LEAF columns, which are multiplied by their inverse: BLAS solves such
systems at a fifth of the speed of a product.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from compressor.lazy import torch

LEAF = 128  # columns that LAPACK factors and inverts


def inverse_root_(matrix: torch.Tensor) -> bool:
    """Replace the upper triangle of a symmetric matrix (n, n) by U, upper triangular with Uᵀ U = matrix⁻¹.

    Only the upper triangle is read; below it, the result is undefined.

    returns  whether the matrix is positive definite; if not, its contents are undefined
    """
    triangle = _Triangle(matrix)
    if not triangle.factor(0, len(matrix)):
        return False
    triangle.invert(0, len(matrix))
    return True


@dataclass(frozen=True)
class _Triangle:
    """A matrix that becomes R and then R⁻¹. Ranges begin at multiples of LEAF.

    inverses  first column of each block of LEAF -> its inverse
    """

    matrix: torch.Tensor
    inverses: dict[int, torch.Tensor] = field(default_factory=dict)

    def factor(self, start: int, stop: int) -> bool:
        """Replace a block on the diagonal by R. Returns whether it is positive definite."""
        block = self.matrix[start:stop, start:stop]
        if stop - start <= LEAF:
            lower, info = torch.linalg.cholesky_ex(block.flip(0, 1))
            if int(info):
                return False
            root = lower.flip(0, 1)
            block.copy_(root)
            unit = torch.eye(len(root), dtype=root.dtype, device=root.device)
            self.inverses[start] = torch.linalg.solve_triangular(root, unit, upper=True)
            return True
        from compressor.kernels.ops.hessian_add import hessian_add_  # imports torch, which loading settings must not

        middle = _middle(start, stop)
        if not self.factor(middle, stop):
            return False
        right = self.matrix[start:middle, middle:stop]
        self.solve(middle, stop, right.t())  # right ← right R₂₂⁻ᵀ
        hessian_add_(self.matrix[start:middle, start:middle], right.t(), 1.0, -1.0)  # first ← first - right rightᵀ
        return self.factor(start, middle)

    def invert(self, start: int, stop: int) -> None:
        """Replace a block on the diagonal by its inverse, once it is R."""
        if stop - start <= LEAF:
            self.matrix[start:stop, start:stop] = self.inverses[start]
            return
        middle = _middle(start, stop)
        right = self.matrix[start:middle, middle:stop]
        self.solve(start, middle, right)
        self.solve_transposed(middle, stop, right.t())
        right.neg_()
        self.invert(start, middle)
        self.invert(middle, stop)

    def solve(self, start: int, stop: int, b: torch.Tensor) -> None:
        """b ← R⁻¹ b for a block of R on the diagonal."""
        if stop - start <= LEAF:
            b.copy_(self.inverses[start] @ b)
            return
        middle = _middle(start, stop)
        first, last = b[: middle - start], b[middle - start :]
        self.solve(middle, stop, last)
        first.addmm_(self.matrix[start:middle, middle:stop], last, alpha=-1)
        self.solve(start, middle, first)

    def solve_transposed(self, start: int, stop: int, b: torch.Tensor) -> None:
        """b ← R⁻ᵀ b for a block of R on the diagonal."""
        if stop - start <= LEAF:
            b.copy_(self.inverses[start].t() @ b)
            return
        middle = _middle(start, stop)
        first, last = b[: middle - start], b[middle - start :]
        self.solve_transposed(start, middle, first)
        last.addmm_(self.matrix[start:middle, middle:stop].t(), first, alpha=-1)
        self.solve_transposed(middle, stop, last)


def _middle(start: int, stop: int) -> int:
    return start + -(-(stop - start) // (2 * LEAF)) * LEAF
