"""Second moments of inputs, half of them: panels of columns times those from the panel on.

torch has no symmetric product; this does (1 + 1 / panels) / 2 of the operations by its own matrix product. Importing
this module registers torch.ops.compressor.hessian_add_, which needs no compiled library.
"""

from __future__ import annotations

from torch import Tensor

from compressor.errors import ShapeError
from compressor.kernels.registry import register

# Columns per panel. Of 64 to 1024, 128 was best at 384 and 512 inputs and within 7 % of the best at 1536 and 4096 (two
# threads, AVX-512).
PANEL = 128


def hessian_add_(hessian: Tensor, x: Tensor, keep: float, weight: float) -> None:
    """hessian = keep · hessian + weight · xᵀ x, in place, on and right of the panels on the diagonal.

    What is left of its row's panel is neither read nor written: take the upper triangle (`Gram.hessian` mirrors it).

    hessian  (in, in) float32 or float64, on any device
    x        (tokens, in), converted to the dtype of hessian: products of 16-bit inputs are exact in float32
    raises   ShapeError for other shapes or dtypes
    """
    if hessian.dim() != 2 or x.dim() != 2 or hessian.shape != (x.shape[1], x.shape[1]):
        raise ShapeError(f"hessian {tuple(hessian.shape)}, x {tuple(x.shape)}: (in, in) and (tokens, in) expected")
    if hessian.dtype.itemsize < 4 or not (hessian.is_floating_point() and x.is_floating_point()):
        raise ShapeError(f"hessian {hessian.dtype}, x {x.dtype}: float32 or float64, and a float expected")
    x = x.to(hessian.dtype)
    for start in range(0, x.shape[1], PANEL):
        stop = min(start + PANEL, x.shape[1])
        hessian[start:stop, start:].addmm_(x[:, start:stop].t(), x[:, start:], beta=keep, alpha=weight)


def _fake(hessian: Tensor, x: Tensor, keep: float, weight: float) -> None:
    return None


register("hessian_add_", "(Tensor(a!) hessian, Tensor x, float keep, float weight) -> ()", hessian_add_, _fake)
