"""The arithmetic of LLM.int8(), in plain torch: rows rounded to int8, an exact integer product, columns set apart.

These functions are copied by source into the modeling file of a custom artifact, so they use torch alone.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

EXACT_INPUTS = 1024  # 127² · 1024 < 2²⁴: float32 adds up so many products of codes exactly, in any order
MOST_INPUTS = 2**31 // 127**2  # beyond it an int32 sum of products of codes can overflow
SMALLEST_ABSMAX = 2.0**-120  # 127 / absmax would overflow float32 not far below it


def round_rows(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row to 255 steps of its own largest magnitude: codes = round(matrix · (127 / absmax)), half to even.

    matrix   (rows, columns) float32
    returns  codes (rows, columns) int8 in [-127, 127] and absmax (rows,) float32. A row of zeros, or of values below
             SMALLEST_ABSMAX, has zeros and absmax 0; a row that holds NaN or Inf has zeros and absmax NaN
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
    """first @ second.T, exact. torch's integer product where it is exact, else float32_matmul; both give the same.

    first    (rows, in) int8 in [-127, 127]
    second   (out, in) int8 in [-127, 127]
    returns  (rows, out) int32; exact while in <= MOST_INPUTS
    """
    usable = first.device.type == "cpu" and len(first) and first.shape[1] > 1  # torch 2.13 gives garbage for one column
    if usable and int_mm_is_exact():
        return torch._int_mm(first, second.t())
    return float32_matmul(first, second)


def float32_matmul(first: Tensor, second: Tensor) -> Tensor:
    """int8_matmul by float32 products of EXACT_INPUTS columns at a time, added as integers.

    Also where float32 products are set to use TF32 or bfloat16: both hold a code exactly, and sums stay in float32.
    """
    total = torch.zeros(first.shape[0], second.shape[0], dtype=torch.int32, device=first.device)
    for a, b in zip(first.split(EXACT_INPUTS, 1), second.split(EXACT_INPUTS, 1), strict=True):
        total += (a.float() @ b.float().t()).to(torch.int32)
    return total


@cache
def int_mm_is_exact() -> bool:
    """Whether pairs of the largest products survive: some processors add them up in 16 bits, and saturate."""
    if not hasattr(torch, "_int_mm"):
        return False
    largest = torch.full((32, 256), 127, dtype=torch.int8)
    expected = 127**2 * 256
    return all(bool((torch._int_mm(largest, sign * largest.t()) == sign * expected).all()) for sign in (1, -1))


def find_outliers(x: Tensor, threshold: float) -> Tensor:
    """Columns (k,) int64, ascending, in which any of the tokens x (tokens, in) has |x| >= threshold."""
    return (x.abs().float() >= threshold).any(0).nonzero().squeeze(1)


def rounded_product(x: Tensor, codes: Tensor, absmax: Tensor, without: Tensor | None) -> Tensor:
    """What the int8 part adds to x @ W.T: rows of x rounded, an integer product, scaled by both scales over 127².

    x        (tokens, in), any floating type
    codes    (out, in) int8 of W, and its absmax (out,) float32
    without  (k,) columns that the int8 part leaves out, also when it finds the largest magnitude of a row
    returns  (tokens, out) float32; NaN in the row of a token that holds NaN or Inf
    """
    rows = x.float()
    broken = ~rows.isfinite().all(1)
    if without is not None and len(without):
        rows = rows.index_fill(1, without, 0)
    row_codes, row_absmax = round_rows(rows)
    row_absmax = row_absmax.masked_fill(broken, torch.nan)
    return int8_matmul(row_codes, codes).float() * (row_absmax / 127).unsqueeze(1) * (absmax / 127)


def columns_product(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T with the columns added one after the other, so that a token's sum doesn't depend on its neighbours.

    A matrix product adds up in an order that depends on the number of tokens. Products and sums are separate operations
    here, each rounded as IEEE 754 says, however it is vectorized.

    x        (tokens, k)
    weight   (out, k)
    returns  (tokens, out) float32
    """
    by_column, weights = x.float().t().contiguous(), weight.float().t().contiguous()
    total = torch.zeros(x.shape[0], weight.shape[0], device=x.device)
    product = torch.empty_like(total)  # one buffer: fresh memory for each column would cost ten times the arithmetic
    for column, row in zip(by_column, weights, strict=True):
        torch.mul(column.unsqueeze(1), row, out=product)
        total += product
    return total
