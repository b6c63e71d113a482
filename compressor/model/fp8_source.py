"""Reads FP8 weights: codes of float8 times scales of blocks, of rows or of the whole tensor.

DeepSeek and Qwen store a scale of each block of 128 x 128 codes, as `weight_scale_inv`; the last block of a row or
column may be smaller. fbgemm stores a scale of each row, modelopt and others one scale, as `weight_scale`. All of these
scales are factors of the codes. transformers dequantizes only weights that whole blocks fill, so the product is
computed here; it has the bits of transformers' own where that works.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from compressor.model.quantized_weight import QuantizedWeight, Tensors, unsound
from compressor.storage.safetensors_file import TensorInfo

CODES = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
SCALES = ("F32", "BF16", "F16", "F8_E8M0", "U8")  # U8 has the exponents of powers of two, as F8_E8M0
SUFFIXES = ("_scale_inv", "_scale")  # of the weight's own name
SIBLINGS = ("scale", "qscale_weight")  # beside `weight`: DeepSeek-V4, Mistral
DEFAULT_BLOCK = 128  # DeepSeek-V3 (arXiv 2412.19437), section 3.3.2
CHUNK_ROWS = 1024  # rows that are dequantized at once, which bounds the memory for float32 products


def find_fp8(tensors: Tensors, stated: Mapping[str, Any]) -> list[QuantizedWeight]:
    """The float8 tensors that have scales. raises ModelError for scales that don't fit the codes

    stated  `quantization_config`, of which `weight_block_size` is read
    """
    found = []
    for name, info in tensors.items():
        if info.stored_as in CODES and (scale := _scale_of(name, tensors)) is not None:
            shape = _grid(scale, info, tensors[scale])
            sizes = stated.get("weight_block_size")
            block = _block(name, info.shape, shape, sizes)
            found.append(
                QuantizedWeight(
                    name,
                    {"weight": name, "scale": scale},
                    info.shape,
                    8,
                    f"{block[0]} x {block[1]} blocks" if list(block) == sizes else _layout(shape, info.shape, block),
                    partial(_dequantize, grid=shape, block=block),
                )
            )
    return found


def dequantize_blocks(codes: Tensor, scale: Tensor, block: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The product of codes with the scales of their blocks, computed in float32.

    codes   (..., rows, columns) float8
    scale   (..., ceil(rows / block[0]), ceil(columns / block[1])) float32; leading dimensions may be 1
    block   rows and columns of a block; the last blocks may be smaller
    returns (..., rows, columns) in `dtype`
    """
    rows, columns = codes.shape[-2:]
    wide = scale.repeat_interleave(block[1], -1)[..., :columns] if scale.shape[-1] > 1 else scale
    out = torch.empty(codes.shape, dtype=dtype)
    for start in range(0, rows, CHUNK_ROWS):
        stop = min(start + CHUNK_ROWS, rows)
        factors = wide[..., torch.arange(start, stop) // block[0], :]
        out[..., start:stop, :] = codes[..., start:stop, :].float() * factors
    return out


def _dequantize(
    values: Mapping[str, Tensor], dtype: torch.dtype, grid: tuple[int, ...], block: tuple[int, int]
) -> Tensor:
    scale = values["scale"]
    factors = (scale.float() - 127).exp2() if scale.dtype == torch.uint8 else scale.float()
    return dequantize_blocks(values["weight"], factors.reshape(grid), block, dtype)


def _scale_of(name: str, tensors: Tensors) -> str | None:
    """The tensor with the scales of a weight; None if there is none."""
    names = [name + suffix for suffix in SUFFIXES]
    if name.endswith(".weight"):
        names += [name.removesuffix("weight") + sibling for sibling in SIBLINGS]
    return next((scale for scale in names if scale in tensors and tensors[scale].stored_as in SCALES), None)


def _grid(name: str, codes: TensorInfo, scale: TensorInfo) -> tuple[int, ...]:
    """The shape of the scales with as many dimensions as the codes: (..., block rows, block columns)."""
    shape, of = scale.shape, codes.shape
    if len(of) >= 2:
        if all(length == 1 for length in shape):
            return (1,) * len(of)
        if len(shape) == len(of) - 1 and shape == of[:-1]:  # one for each row
            return (*shape, 1)
        if len(of) > 2 and len(shape) == len(of) - 2 and shape == of[:-2]:  # one for each expert
            return (*shape, 1, 1)
        if len(shape) == len(of) and all(one in (1, other) for one, other in zip(shape[:-2], of[:-2])):
            return shape
    raise unsound(name, f"has shape {shape}, which doesn't divide the codes of shape {of}")


def _block(name: str, shape: Sequence[int], grid: Sequence[int], stated: Any) -> tuple[int, int]:
    """Rows and columns of a block. raises ModelError if no size of blocks gives this number of them"""
    sizes = stated if isinstance(stated, list) and len(stated) == 2 else (None, None)
    rows, columns = (_length(*args) for args in zip(shape[-2:], grid[-2:], sizes))
    if rows is None or columns is None:
        raise unsound(name, f"its shape {tuple(shape)} has no whole blocks for scales of shape {tuple(grid)}")
    return rows, columns


def _length(length: int, count: int, stated: Any) -> int | None:
    """The length of a block along a dimension that has `count` of them. If none is stated, 128 is tried first."""
    usual = DEFAULT_BLOCK if count > 1 else None
    for block in (stated, usual):
        if type(block) is int and block > 0 and -(-length // block) == count:
            return block
    return length // count if count and length % count == 0 else None


def _layout(grid: Sequence[int], shape: Sequence[int], block: tuple[int, int]) -> str:
    if tuple(block) == tuple(shape[-2:]):
        return "one scale per tensor"
    if grid[-1] == 1 and block[0] == 1:
        return "one scale per row"
    return f"{block[0]} x {block[1]} blocks"
