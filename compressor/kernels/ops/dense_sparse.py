"""Multiplies by weights that are sparse combinations of dense atoms, with the compiled library.

Importing this module registers torch.ops.compressor.linear_dense_sparse. The same in plain torch:
`sparse_factors.sparse_product`. The operands are those of `sparse_factor_linear` after loading: its stored factors with
their scales, and its `index()` as uint16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.errors import ShapeError
from compressor.kernels.ops.checks import check_call, refuse
from compressor.kernels.ops.linear import DTYPES, cpu_library, threads_for
from compressor.kernels.ops.registry import register

BAD_INDEX = -5  # common.h


def linear_dense_sparse(
    x: Tensor,
    dense: Tensor,
    index: Tensor,
    value: Tensor,
    bias: Tensor | None,
    dense_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
) -> Tensor:
    """y[n] = sum over b, t of (x_b · D_b[index[n, b, t]]) · value[n, b, t] + bias[n].

    Sums are float32, in an order that depends only on the shape of the weight. With u = 2^-24, to first order and
    before y is rounded: |y - exact| <= (ceil(width / 16) + blocks · k + 4) u · sum |value| |D| |x| + u |exact|.

    x            (..., blocks · width) float32, bfloat16 or float16
    dense        (blocks, atoms, width), D, and value (out, blocks, k): each of these dtypes, or int8 with a scale;
                 atoms at most 65,536
    index        (out, blocks, k) uint16, the atom of each value; on CUDA what `cuda.ds1.pack` makes of index and value,
                 all of one 16-bit type and without scales
    bias         (out,) of these dtypes, added in float32
    dense_scale  (blocks, atoms) float32, of int8 atoms: their codes times it, rounded to float32
    value_scale  (out,) float32, of int8 values
    returns      (..., out) in the dtype of x
    raises       ShapeError for other shapes or dtypes, or an index that names no atom
    """
    operands = {"x": x, "dense": dense, "index": index, "value": value, "bias": bias}
    operands |= {"dense_scale": dense_scale, "value_scale": value_scale}
    check_call("linear_dense_sparse", **operands)
    fits = (
        x.dtype in DTYPES
        and index.dtype == torch.uint16
        and x.dim() >= 1
        and dense.dim() == 3
        and value.dim() == 3
        and index.shape == value.shape
        and value.shape[1] == dense.shape[0]
        and x.shape[-1] == dense.shape[0] * dense.shape[2]
        and 0 < dense.shape[1] <= 65536
        and _is_scaled(dense, dense_scale, dense.shape[:2])
        and _is_scaled(value, value_scale, value.shape[:1])
        and x.shape[-1] > 0
        and (bias is None or (bias.dim() == 1 and len(bias) == len(value) and bias.dtype in DTYPES))
    )
    if not fits:
        expected = (
            "floats (..., blocks * width), (blocks, atoms, width), uint16 and floats (out, blocks, k), (out,); "
            "int8 factors with float32 scales (blocks, atoms), (out,)"
        )
        raise refuse("linear_dense_sparse", expected, **operands)
    blocks, atoms, width = dense.shape
    out, _, k = value.shape
    x, dense, index, value = x.contiguous(), dense.contiguous(), index.contiguous(), value.contiguous()
    bias, dense_scale, value_scale = (
        None if tensor is None else tensor.contiguous() for tensor in (bias, dense_scale, value_scale)
    )
    y = x.new_empty((*x.shape[:-1], out))
    found = cpu_library()
    size = dense.numel() * dense.element_size() + value.numel() * (2 + value.element_size())
    bias_at, dense_scale_at, value_scale_at = (
        0 if tensor is None else tensor.data_ptr() for tensor in (bias, dense_scale, value_scale)
    )
    error = found.functions.linear_dense_sparse(
        found.level, threads_for(size), x.data_ptr(), DTYPES[x.dtype], dense.data_ptr(), DTYPES.get(dense.dtype, 0),
        index.data_ptr(), value.data_ptr(), DTYPES.get(value.dtype, 0), bias_at,
        0 if bias is None else DTYPES[bias.dtype], y.data_ptr(), x.numel() // x.shape[-1], out, blocks, atoms, width, k,
        dense_scale_at, value_scale_at,
    )  # fmt: skip
    if error == BAD_INDEX:
        largest = int(index.to(torch.int32).max())
        raise ShapeError(
            f"linear_dense_sparse: index {tuple(index.shape)} names atom {largest} of {atoms} (0 to {atoms - 1})",
            data={"op": "linear_dense_sparse", "index": list(index.shape), "largest": largest, "atoms": atoms},
        )
    if error:
        raise refuse("linear_dense_sparse", f"shapes that fit (code {error})", **operands)
    return y


def _is_scaled(factor: Tensor, scale: Tensor | None, shape: torch.Size) -> bool:
    """Whether a factor is floating point without a scale, or int8 with one of this shape."""
    if scale is None:
        return factor.dtype in DTYPES
    return factor.dtype == torch.int8 and scale.dtype == torch.float32 and scale.shape == shape


def _fake(
    x: Tensor,
    dense: Tensor,
    index: Tensor,
    value: Tensor,
    bias: Tensor | None,
    dense_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], value.shape[0]))


register(
    "linear_dense_sparse",
    "(Tensor x, Tensor dense, Tensor index, Tensor value, Tensor? bias, Tensor? dense_scale=None, "
    "Tensor? value_scale=None) -> Tensor",
    linear_dense_sparse,
    _fake,
)
