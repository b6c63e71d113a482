"""Quantizes a matrix block by block and packs its codes, in plain torch.

A block of `rows` x `columns` neighbours shares one scale: the power of two 2**e ("shift"), stored as its exponent, or a
float16 number. Codes are symmetric, -q .. q with q = 2**(bits - 1) - 1. Blocks at the right and lower edge may be
smaller. The source of these functions is copied into the modeling file of a custom artifact, so they use only torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

LOWEST_EXPONENT, HIGHEST_EXPONENT = -126, 127  # 2**e is a normal float32


def block_counts(shape: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    """Numbers of blocks of a matrix, vertically and horizontally."""
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def expand_blocks(values: Tensor, block: tuple[int, int], shape: tuple[int, int]) -> Tensor:
    """One value per block -> one value per element: (vertical blocks, horizontal blocks) -> shape."""
    wide = values.repeat_interleave(block[1], 1)[:, : shape[1]]
    return wide.repeat_interleave(block[0], 0)[: shape[0]]


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Signed codes (rows, columns) int8 -> uint8 (rows, ceil(columns * bits / 8)); each row begins with a new byte.

    Two's complement; at 4 bits two codes per byte, the low half first.
    """
    if bits == 8:
        return codes.contiguous().view(torch.uint8)
    rows, columns = codes.shape
    padded = torch.zeros(rows, columns + columns % 2, dtype=torch.uint8, device=codes.device)
    padded[:, :columns] = codes.contiguous().view(torch.uint8) & 15
    return padded[:, 0::2] | (padded[:, 1::2] << 4)


def unpack_rows(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of pack_rows: int8 (rows, columns)."""
    if bits == 8:
        return packed.contiguous().view(torch.int8)
    low = (packed & 15).to(torch.int8)
    high = (packed >> 4).to(torch.int8)
    codes = torch.stack((low, high), -1).flatten(1)[:, :columns]
    return torch.where(codes > 7, codes - 16, codes)


def power_of_two(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """2**exponent, exact."""
    return torch.ldexp(torch.ones_like(exponent, dtype=dtype), exponent.to(torch.int32))


def shift_exponent(largest: Tensor, limit: int) -> Tensor:
    """The smallest e with limit * 2**e >= largest, as int32; 0 if largest is 0. Clamped to the exponents of float32.

    Computed with frexp, in integers: largest = m * 2**p with m in [1/2, 1) and limit = n * 2**r, so e is p - r if
    m <= n, else p - r + 1. A rounded logarithm would be wrong at powers of two.
    """
    mantissa, power = torch.frexp(largest.to(torch.float32))
    parts = torch.frexp(torch.tensor(float(limit)))
    exponent = power - int(parts.exponent) + (mantissa > float(parts.mantissa)).to(torch.int32)
    exponent = exponent.clamp(LOWEST_EXPONENT, HIGHEST_EXPONENT)
    return torch.where(largest > 0, exponent, torch.zeros_like(exponent)).to(torch.int32)


def round_to_shift(x: Tensor, columns: int, exponent: Tensor | None = None) -> Tensor:
    """Each row of x in blocks of `columns` along its last dimension, rounded to 8-bit codes times a shift.

    exponent  (blocks,) int8 from calibration: larger values saturate at 127 codes; None: computed from each block
    returns   the dequantized values in the dtype of x; a block with NaN or Inf stays unchanged
    """
    length = x.shape[-1]
    blocks = -(-length // columns)
    padded = torch.nn.functional.pad(x.to(torch.float32), (0, blocks * columns - length))
    split = padded.unflatten(-1, (blocks, columns))
    if exponent is None:
        scale = power_of_two(shift_exponent(split.abs().amax(-1), 127), torch.float32)
    else:
        scale = power_of_two(exponent, torch.float32)
    scale = scale.unsqueeze(-1)
    rounded = torch.round(split / scale).clamp(-127, 127) * scale
    finite = torch.isfinite(split).all(-1, keepdim=True)
    return torch.where(finite, rounded, split).flatten(-2)[..., :length].to(x.dtype)
