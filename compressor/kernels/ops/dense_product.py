"""Multiplies few rows by a dense weight with the compiled library, for the layers that a compressed model keeps dense.

Importing this module registers torch.ops.compressor.linear_dense. torch's own matmul is made for many rows. A decoding
step has one row for each sequence and reads a language model's whole output head for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.kernels.ops.checks import check_call, refuse
from compressor.kernels.ops.linear import DTYPES, cpu_library, threads_for
from compressor.kernels.ops.registry import register

# Rows up to which it is faster than torch 2.13, measured on Zen 4 at 8192 x 768 and 4096 x 4096 (docs/benchmarks.md)
MOST_ROWS = {torch.float32: 32, torch.bfloat16: 8, torch.float16: 64}


def linear_dense(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y = x @ weight.T + bias, sums in float32.

    With u = 2^-24, to first order and before y is rounded: |y - exact| <= (ceil(in / 16) + 5) u · sum |x| |w|.

    x        (..., in) float32, bfloat16 or float16
    weight   (out, in) of x's dtype
    bias     (out,) of any of these dtypes, added in float32
    returns  (..., out) in the dtype of x; results don't depend on instructions, threads or the other rows
    raises   ShapeError for other shapes or dtypes
    """
    check_call("linear_dense", x=x, weight=weight, bias=bias)
    fits = (
        x.dtype in DTYPES
        and weight.dtype == x.dtype
        and x.dim() >= 1
        and weight.dim() == 2
        and x.shape[-1] == weight.shape[1]
        and (bias is None or (bias.shape == weight.shape[:1] and bias.dtype in DTYPES))
    )
    if not fits:
        raise refuse("linear_dense", "floats (..., in), (out, in) of one dtype, (out,)", x=x, weight=weight, bias=bias)
    out, columns = weight.shape
    x, weight = x.contiguous(), weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    y = x.new_empty((*x.shape[:-1], out))
    found = cpu_library()
    error = found.functions.linear_dense(
        found.level, threads_for(weight.numel() * weight.element_size()), x.data_ptr(), weight.data_ptr(),
        DTYPES[x.dtype], 0 if bias is None else bias.data_ptr(), 0 if bias is None else DTYPES[bias.dtype],
        y.data_ptr(), x.shape[:-1].numel(), out, columns,
    )  # fmt: skip
    if error:
        raise refuse("linear_dense", f"shapes that fit (code {error})", x=x, weight=weight, bias=bias)
    return y


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


register("linear_dense", "(Tensor x, Tensor weight, Tensor? bias) -> Tensor", linear_dense, _fake)
