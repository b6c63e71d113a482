"""Rounds rows to int8, and multiplies int8 matrices exactly, with the compiled library.

Importing this module registers torch.ops.compressor.quantize_rows and torch.ops.compressor.int8_matmul. The arithmetic
in plain torch is in `compressor.kernels.ops.int8_split`. Results don't depend on instructions or threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.errors import ShapeError
from compressor.kernels.ops.checks import check_call, operands, refuse
from compressor.kernels.ops.linear import DTYPES, cpu_library, threads_for
from compressor.kernels.ops.registry import register

MOST_COLUMNS = 65536  # (a + 128) * b <= 255 * 128, and 255 * 128 * 65536 < 2^31


def quantize_rows(x: Tensor, threshold: float, exclude_columns: bool) -> tuple[Tensor, Tensor]:
    """Round each row to int8 by its own largest magnitude: codes = round(x · (127 / absmax)), half to even.

    x                (..., in) float32, bfloat16 or float16
    threshold        columns in which any |x| >= threshold are outliers, whose codes are 0; 0 or less: there are none
    exclude_columns  True: absmax leaves out outlier columns. False: it leaves out only values >= threshold, as
                     bitsandbytes does, so that other values of an outlier column count for their rows
    returns          codes (..., in) int8 in [-127, 127] and absmax (...) float32, as in `int8_split.round_rows`: absmax
                     below 2^-120 is 0 with codes 0; a row with NaN or Inf, also in an outlier, has codes 0 and absmax
                     NaN
    raises           ShapeError for another dtype or no dimension
    """
    check_call("quantize_rows", x=x)
    kind = DTYPES.get(x.dtype)
    if kind is None or not x.dim():
        raise refuse("quantize_rows", "x of float32, bfloat16 or float16, with a last dimension", x=x)
    columns = x.shape[-1]
    rows = x.reshape(-1, columns) if columns else x.new_empty((x.shape[:-1].numel(), 0))
    broken = outliers = None
    if threshold > 0:
        large = rows.abs().float() >= threshold
        outliers = large.any(0)
        broken = ~rows.isfinite().all(1)
        rows = rows.masked_fill(outliers if exclude_columns else large, 0)
    rows = rows.contiguous()
    codes = rows.new_empty(rows.shape, dtype=torch.int8)
    absmax = rows.new_empty(len(rows), dtype=torch.float32)
    found = cpu_library()
    error = found.functions.quantize_rows(
        found.level, rows.data_ptr(), kind, codes.data_ptr(), absmax.data_ptr(), len(rows), columns
    )
    if error:
        raise refuse("quantize_rows", f"a shape that fits (code {error})", x=x)
    if broken is not None and outliers is not None:
        codes.masked_fill_(outliers | broken.unsqueeze(1), 0)
        absmax.masked_fill_(broken, torch.nan)
    return codes.view(x.shape), absmax.view(x.shape[:-1])


def int8_matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b.T, exact.

    a        (M, K) int8, b (N, K) int8; all of [-128, 127]
    returns  (M, N) int32
    raises   ShapeError for other dtypes or shapes, and for K above 65,536, where a sum might not fit
    """
    check_call("int8_matmul", a=a, b=b)
    if a.dtype != torch.int8 or b.dtype != torch.int8 or a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1]:
        raise refuse("int8_matmul", "int8 (M, K) and int8 (N, K)", a=a, b=b)
    rows, columns = a.shape
    if columns > MOST_COLUMNS:
        raise refuse("int8_matmul", f"K of at most {MOST_COLUMNS}, whose sums fit int32", "columns", a=a, b=b)
    a, b = a.contiguous(), b.contiguous()
    product = a.new_empty(rows, len(b), dtype=torch.int32)
    found = cpu_library()
    error = found.functions.int8_matmul(
        found.level, threads_for(b.numel()), a.data_ptr(), b.data_ptr(), product.data_ptr(), rows, len(b), columns
    )
    if error:
        raise ShapeError(
            f"int8_matmul refused a {tuple(a.shape)}, b {tuple(b.shape)} (code {error})",
            data={"op": "int8_matmul", "code": error, **operands(a=a, b=b)},
        )
    return product


def _fake_quantize_rows(x: Tensor, threshold: float, exclude_columns: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:-1], dtype=torch.float32)


def _fake_int8_matmul(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[0]), dtype=torch.int32)


register(
    "quantize_rows",
    "(Tensor x, float threshold, bool exclude_columns) -> (Tensor codes, Tensor absmax)",
    quantize_rows,
    _fake_quantize_rows,
)
register("int8_matmul", "(Tensor a, Tensor b) -> Tensor", int8_matmul, _fake_int8_matmul)
