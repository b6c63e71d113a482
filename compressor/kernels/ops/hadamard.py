"""Multiplies rows by a Hadamard matrix with the compiled library, in n log n sums.

Importing this module registers torch.ops.compressor.hadamard. The matrices: `compressor.kernels.ops.hadamard_matrix`.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from compressor.errors import ShapeError
from compressor.kernels.cuda import ops as cuda_ops
from compressor.kernels.ops.checks import check_call, refuse
from compressor.kernels.ops.hadamard_matrix import base_matrix, base_of
from compressor.kernels.ops.linear import DTYPES, cpu_library, threads_for
from compressor.kernels.ops.registry import register, register_cuda


@cache
def _base(m: int) -> Tensor:
    with torch.inference_mode(False), torch.device("cpu"):
        return base_matrix(m).float().contiguous()


def hadamard(x: Tensor, scale: float) -> Tensor:
    """x (H_{2^p} ⊗ H_m) · scale for each row of x, n = 2^p · m with m of 1, 12, 20, 28 or 36; not padded.

    With m = 1 it is Sylvester's matrix in its natural order, and with scale 1 / sqrt(n) it is its own inverse. With u =
    2^-24, to first order and before the rounding to x's dtype: |y - exact| <= (p + m + 1) u · |scale| · sum |x|.

    x        (..., n) float32, bfloat16 or float16
    returns  (..., n) in the dtype of x; results don't depend on instructions, threads or the other rows
    raises   ShapeError for any other n, or another dtype
    """
    check_call("hadamard", x=x)
    kind = DTYPES.get(x.dtype)
    if kind is None or not x.dim():
        raise refuse("hadamard", "x of float32, bfloat16 or float16, with a last dimension", x=x)
    n = x.shape[-1]
    m = base_of(n)
    if m is None:
        raise ShapeError(
            f"hadamard: no matrix of {n} for x {tuple(x.shape)}; n is 2^p times 1, 12, 20, 28 or 36",
            data={"op": "hadamard", "reason": "no-matrix", "n": n, "shape": list(x.shape)},
        )
    x = x.contiguous()
    y = torch.empty_like(x)
    found = cpu_library()
    error = found.functions.hadamard(
        found.level, threads_for(x.numel() * 4), x.data_ptr(), kind, _base(m).data_ptr(), y.data_ptr(),
        x.numel() // n, n, m, float(scale),
    )  # fmt: skip
    if error:
        raise refuse("hadamard", f"a shape that fits (code {error})", x=x)
    return y


def _fake(x: Tensor, scale: float) -> Tensor:
    return x.new_empty(x.shape)


register("hadamard", "(Tensor x, float scale) -> Tensor", hadamard, _fake)
register_cuda("hadamard", cuda_ops.hadamard)
