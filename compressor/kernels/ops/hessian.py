"""Adds second moments of inputs to one triangle of a Hessian; the other triangle mirrors it.

torch has no symmetric product. Columns are divided in halves: the moments of each half, then one product of the two
halves, so that most of the work is in large products. Importing this module registers
torch.ops.compressor.hessian_add_, which works without the compiled library.
"""

from __future__ import annotations

from torch import Tensor

from compressor.errors import ShapeError
from compressor.kernels.ops.registry import register, register_cuda

# Columns that aren't divided further. The best of 64, 128, 192 and 256, or within 5 %, for 300 to 11,008 columns
# (AVX-512).
PANEL = 128


def hessian_add_(hessian: Tensor, x: Tensor, keep: float, weight: float) -> None:
    """hessian = keep · hessian + weight · xᵀ x, in place, on and right of the panels on the diagonal.

    Entries left of their row's panel are neither read nor written: use the upper triangle (`Gram.hessian` mirrors it).

    hessian  (in, in) float32 or float64, on any device
    x        (tokens, in), converted to the dtype of hessian: products of 16-bit inputs are exact in float32
    raises   ShapeError for other shapes or dtypes
    """
    if hessian.dim() != 2 or x.dim() != 2 or hessian.shape != (x.shape[1], x.shape[1]):
        raise ShapeError(
            f"hessian {tuple(hessian.shape)}, x {tuple(x.shape)}: (in, in) and (tokens, in) expected",
            data={"op": "hessian_add_", "hessian": list(hessian.shape), "x": list(x.shape)},
        )
    if hessian.dtype.itemsize < 4 or not (hessian.is_floating_point() and x.is_floating_point()):
        raise ShapeError(
            f"hessian {hessian.dtype}, x {x.dtype}: float32 or float64, and a float expected",
            data={"op": "hessian_add_", "hessian": str(hessian.dtype), "x": str(x.dtype)},
        )
    _add(hessian, x.to(hessian.dtype), keep, weight)


def _add(hessian: Tensor, x: Tensor, keep: float, weight: float) -> None:
    middle = -(-x.shape[1] // (2 * PANEL)) * PANEL
    if middle >= x.shape[1]:
        hessian.addmm_(x.t(), x, beta=keep, alpha=weight)
        return
    first, second = x[:, :middle], x[:, middle:]
    _add(hessian[:middle, :middle], first, keep, weight)
    _add(hessian[middle:, middle:], second, keep, weight)
    hessian[:middle, middle:].addmm_(first.t(), second, beta=keep, alpha=weight)


def _fake(hessian: Tensor, x: Tensor, keep: float, weight: float) -> None:
    return None


register("hessian_add_", "(Tensor(a!) hessian, Tensor x, float keep, float weight) -> ()", hessian_add_, _fake)
register_cuda("hessian_add_", hessian_add_)
