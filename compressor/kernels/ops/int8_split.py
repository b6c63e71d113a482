"""Implements the arithmetic of LLM.int8() in plain torch: int8 rows, an exact integer matmul, separate outlier columns.

The source of these functions is copied into the modeling file of a custom artifact, so they use only torch.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

EXACT_INPUTS = 1024  # 127² · 1024 < 2²⁴: float32 sums this many products of codes exactly, in any order
MOST_INPUTS = 2**31 // 127**2  # above it, an int32 sum of products of codes can overflow
SMALLEST_ABSMAX = 2.0**-120  # 127 / absmax would overflow float32 slightly below it


def round_rows(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row to 255 steps of its own largest magnitude: codes = round(matrix · (127 / absmax)), half to even.

    matrix   (rows, columns) float32
    returns  codes (rows, columns) int8 in [-127, 127] and absmax (rows,) float32. A row of zeros, or of values below
             SMALLEST_ABSMAX, has zeros and absmax 0; a row with NaN or Inf has zeros and absmax NaN
    """
    absmax = matrix.abs().amax(1)
    usable = absmax.isfinite() & (absmax >= SMALLEST_ABSMAX)
    codes = (matrix * (127 / absmax).unsqueeze(1)).round()
    codes = torch.where(usable.unsqueeze(1), codes, 0).to(torch.int8)
    return codes, torch.where(usable, absmax, torch.where(absmax.isfinite(), 0.0, torch.nan))


def dequantize_rows(codes: Tensor, absmax: Tensor) -> Tensor:
    """codes (out, in) int8 and absmax (out,) float32 -> (out, in) float32: codes · absmax / 127."""
    return codes.float() * absmax.unsqueeze(1) / 127


def int8_matmul(first: Tensor, second: Tensor) -> Tensor:
    """first @ second.T, exact: with torch's integer matmul if it is exact, else with float32_matmul.

    first    (rows, in) int8 in [-127, 127]
    second   (out, in) int8 in [-127, 127]
    returns  (rows, out) int32; exact for in <= MOST_INPUTS
    """
    usable = (
        first.device.type == "cpu" and len(first) and first.shape[1] > 1
    )  # torch 2.13 gives wrong results for one column
    if usable and int_mm_is_exact():
        return torch._int_mm(first, second.t())
    return float32_matmul(first, second)


def float32_matmul(first: Tensor, second: Tensor) -> Tensor:
    """int8_matmul with float32 matmuls of EXACT_INPUTS columns at a time, whose results are added as integers.

    It is also exact if float32 matmuls use TF32 or bfloat16: both represent a code exactly, and sums stay in float32.
    """
    total = torch.zeros(first.shape[0], second.shape[0], dtype=torch.int32, device=first.device)
    for a, b in zip(first.split(EXACT_INPUTS, 1), second.split(EXACT_INPUTS, 1), strict=True):
        total += (a.float() @ b.float().t()).to(torch.int32)
    return total


@cache
def int_mm_is_exact() -> bool:
    """Whether torch's integer matmul is exact: some processors add pairs of products in 16 bits, and saturate."""
    if not hasattr(torch, "_int_mm"):
        return False
    largest = torch.full((32, 256), 127, dtype=torch.int8)
    expected = 127**2 * 256
    return all(bool((torch._int_mm(largest, sign * largest.t()) == sign * expected).all()) for sign in (1, -1))


def find_outliers(x: Tensor, threshold: float) -> Tensor:
    """Columns (k,) int64, ascending, in which any of the tokens x (tokens, in) has |x| >= threshold."""
    return (x.abs().float() >= threshold).any(0).nonzero().squeeze(1)


def rounded_product(x: Tensor, codes: Tensor, absmax: Tensor, without: Tensor | None) -> Tensor:
    """The int8 part of x @ W.T: rounded rows of x, an integer matmul, scaled by both scales divided by 127².

    x        (tokens, in), any floating dtype
    codes    (out, in) int8 of W, and its absmax (out,) float32
    without  (k,) columns that the int8 part leaves out, also from the largest magnitude of a row
    returns  (tokens, out) float32; NaN in the row of a token with NaN or Inf
    """
    rows = x.float()
    broken = ~rows.isfinite().all(1)
    if without is not None and len(without):
        rows = rows.index_fill(1, without, 0)
    row_codes, row_absmax = round_rows(rows)
    row_absmax = row_absmax.masked_fill(broken, torch.nan)
    return int8_matmul(row_codes, codes).float() * (row_absmax / 127).unsqueeze(1) * (absmax / 127)


def columns_product(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T with the columns added one after the other, so that a token's sum doesn't depend on other tokens.

    A matmul sums in an order that depends on the number of tokens. Here products and sums are separate operations,
    each rounded by IEEE 754, for any vectorization.

    x        (tokens, k)
    weight   (out, k)
    returns  (tokens, out) float32
    """
    by_column, weights = x.float().t().contiguous(), weight.float().t().contiguous()
    total = torch.zeros(x.shape[0], weight.shape[0], device=x.device)
    product = torch.empty_like(total)  # one buffer: new memory for each column would cost ten times the arithmetic
    for column, row in zip(by_column, weights, strict=True):
        torch.mul(column.unsqueeze(1), row, out=product)
        total += product
    return total
