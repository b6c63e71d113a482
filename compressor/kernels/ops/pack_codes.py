"""Packs and unpacks integer codes, in plain torch. Layout: docs/format.md, "Packed codes".

The source of these functions is copied into the modeling file of a custom artifact, so they use only torch.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack unsigned codes of each row into one little-endian bit stream.

    codes    (rows, columns) uint8, each below 2**bits
    returns  (rows, ceil(columns * bits / 32)) int32; element i takes bits i*bits .. i*bits + bits - 1 of its row
    """
    rows, columns = codes.shape
    if 8 % bits == 0:  # whole codes in each byte
        each = 8 // bits
        stream = torch.zeros(rows, 4 * -(-columns * bits // 32), dtype=torch.uint8, device=codes.device)
        for at in range(each):
            part = codes[:, at::each]
            stream[:, : part.shape[1]] |= part << (at * bits)
        return stream.view(torch.int32)
    eights = -(-columns // 8)
    padded = torch.zeros(rows, eights * 8, dtype=torch.int64, device=codes.device)
    padded[:, :columns] = codes
    shifts = torch.arange(8, device=codes.device) * bits
    words = (padded.view(rows, eights, 8) << shifts).sum(-1)  # eight codes fill `bits` bytes exactly
    stream = words.view(torch.uint8).view(rows, eights, 8)[:, :, :bits].reshape(rows, eights * bits)
    length = 4 * -(-columns * bits // 32)
    result = torch.zeros(rows, length, dtype=torch.uint8, device=codes.device)
    used = min(length, stream.shape[1])
    result[:, :used] = stream[:, :used]
    return result.view(torch.int32)


def unpack_codes(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of pack_codes.

    packed   (rows, words) int32
    returns  (rows, columns) uint8
    """
    rows = packed.shape[0]
    stream = packed.contiguous().view(torch.uint8).view(rows, -1)
    if 8 % bits == 0:
        each = 8 // bits
        codes = torch.empty(rows, stream.shape[1], each, dtype=torch.uint8, device=packed.device)
        for at in range(each):
            codes[:, :, at] = (stream >> (at * bits)) & ((1 << bits) - 1)
        return codes.view(rows, -1)[:, :columns]
    eights = -(-columns // 8)
    whole = torch.zeros(rows, eights * bits, dtype=torch.uint8, device=packed.device)
    used = min(eights * bits, stream.shape[1])
    whole[:, :used] = stream[:, :used]
    words = torch.zeros(rows, eights, 8, dtype=torch.uint8, device=packed.device)
    words[:, :, :bits] = whole.view(rows, eights, bits)
    shifts = torch.arange(8, device=packed.device) * bits
    unpacked = (words.view(torch.int64) >> shifts) & ((1 << bits) - 1)
    return unpacked.to(torch.uint8).view(rows, eights * 8)[:, :columns]


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor | None, index: Tensor | None = None) -> Tensor:
    """Rebuild weights from signed codes: (codes - zero_point) * scale, in the scale's dtype.

    codes       (out, in) int8
    scale       (out, groups), groups divides in
    zero_point  (out, groups) int8 or None, meaning 0
    index       (in,) int32 group of each input; None: the groups are consecutive
    returns     (out, in) in the scale's dtype; the same arithmetic as compressed-tensors, so the same bits
    """
    out, columns = codes.shape
    groups = scale.shape[1]
    if index is not None:  # one group per input
        scale = scale.index_select(1, index)
        zero_point = zero_point if zero_point is None else zero_point.index_select(1, index)
        groups = columns
    values = codes.to(scale.dtype).view(out, groups, columns // groups)
    if zero_point is not None:
        values = values - zero_point.to(scale.dtype).unsqueeze(-1)
    return (values * scale.unsqueeze(-1)).view(out, columns)
