"""Computes the output of a bitsandbytes 8-bit layer independently, as the reference for verification.

It follows bitsandbytes 0.50.2 (`MatMul8bitLt` and its portable operators), and was compared with it. It differs from
`compressor.kernels.ops.int8_split` in four ways: activations are cast to float16 before they are rounded; a token's
largest magnitude leaves out only outlier values, not whole columns (for a single token this is the same); 1/127² is the
constant 6.200124e-05, 1.8e-5 too large; the result is rounded to the model's dtype before and after the outlier part is
added.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compressor.kernels.ops.int8_split import dequantize_rows, int8_matmul, round_rows

CONSTANT = 2.0**-15  # bounds the relative error of their 1/127² and of a few float32 operations


def bitsandbytes_forward(layer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Their result for a layer of the format int8_split_linear with dynamic outliers, without their final roundings.

    x        (..., in) of the model's dtype
    returns  (expected, allowed), both (..., out) float32: theirs is within `allowed` of `expected`. With a, o and b the
             int8 part, the outlier part and the bias, and v = eps / 2 of the model's dtype: they round a + b, o and
             a + o + b (3v) and the constant adds 2⁻¹⁵, all relative to |a| + |o| + |b|, and 3 % more for products of
             these; sums of o in another order add k·2⁻²⁴ of its terms' magnitudes. Beside it the type's smallest step,
             and one step of one code, for a value half-way between two that may go the other way (127 / absmax is
             formed differently elsewhere).
    """
    x_rows = x.reshape(-1, layer.in_features)
    half = x_rows.to(torch.float16).float()
    is_outlier = half.abs() >= layer.threshold if layer.threshold else torch.zeros_like(half, dtype=torch.bool)
    columns = is_outlier.any(0)
    codes, absmax = round_rows(half.masked_fill(is_outlier, 0))
    codes[:, columns] = 0
    part = int8_matmul(codes, layer.weight).float() * (absmax / 127).unsqueeze(1) * (layer.SCB / 127)
    outliers = x_rows[:, columns].float()
    weight = dequantize_rows(layer.weight[:, columns], layer.SCB).to(x.dtype).float()
    apart = outliers @ weight.t()
    bias = torch.zeros(layer.out_features) if layer.bias is None else layer.bias.float()
    kind = torch.finfo(x.dtype)
    allowed = 1.03 * (1.5 * kind.eps + CONSTANT) * (part.abs() + apart.abs() + bias.abs())
    allowed += int(columns.sum()) * 2.0**-24 * (outliers.abs() @ weight.abs().t())
    allowed += kind.smallest_normal * kind.eps + absmax.unsqueeze(1) * layer.SCB / 127
    shape = (*x.shape[:-1], layer.out_features)
    return (part + apart + bias).view(shape), allowed.view(shape)
