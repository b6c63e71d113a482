"""Reads MXFP4 experts as gpt-oss stores them: E2M1 codes, two in a byte, and a power of two for each 32 of them.

transformers' own function dequantizes them, one expert at a time, since it makes large copies.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from compressor.model.quantized_weight import QuantizedWeight, Tensors, unsound

GROUP = 32  # codes that share a scale


def find_mxfp4(tensors: Tensors, _stated: Mapping[str, Any]) -> list[QuantizedWeight]:
    """The expert weights. raises ModelError for scales that are missing or don't fit the codes

    A weight X is stored as X_blocks (experts, out, groups, 16) and X_scales (experts, out, groups), both uint8. The
    dense tensor is (experts, in, out).
    """
    found = []
    for name in [name.removesuffix("_blocks") for name in tensors if name.endswith("_blocks")]:
        members = {"blocks": f"{name}_blocks", "scales": f"{name}_scales"}
        scales = tensors.get(members["scales"])
        blocks = tensors[members["blocks"]].shape
        if scales is None or len(blocks) != 4 or scales.shape != blocks[:-1] or 2 * blocks[-1] != GROUP:
            shown = None if scales is None else scales.shape
            raise unsound(members["blocks"], f"has shape {blocks}, and its scales have {shown}")
        shape = (blocks[0], blocks[2] * GROUP, blocks[1])
        found.append(QuantizedWeight(name, members, shape, 4, f"groups of {GROUP}", partial(_dequantize, shape=shape)))
    return found


def _dequantize(values: Mapping[str, Tensor], dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    out = torch.empty(shape, dtype=dtype)
    for expert in range(shape[0]):
        part = slice(expert, expert + 1)
        out[part] = convert_moe_packed_tensors(values["blocks"][part], values["scales"][part], dtype=dtype)
    return out
