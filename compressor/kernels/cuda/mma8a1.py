"""Packs 4- and 8-bit weights for int8 inputs into layout "mma8a1", in one tensor. Plain torch.

    packed = [ceil(N/64)][ceil(K/64)] tiles of 512 * bits bytes, then the sections that follow the tiles in `mma1`

docs/kernels-cuda.md shows the tiles: codes minus 2**(bits - 1), in two's complement, in the order of the lanes of
mma.m16n8k32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.errors import ShapeError
from compressor.kernels.cuda import mma1

LAYOUT = "mma8a1"
TILE = mma1.TILE
# bits -> what a column adds to a group's sum at most, w_a8.cu: 4-bit codes are multiplied by 16, 8-bit ones have zero
# points from 0 to 255
LARGEST = {4: 128 * 8 * 16, 8: 128 * 255}
MOST_COLUMNS = 1 << 24  # w_a8.cu, quantize_rows.cu: MAX_COLUMNS


def packed_bytes(out: int, columns: int, group_size: int, scale_dtype: torch.dtype, has_zeros: bool, bits: int) -> int:
    """The size of a packed tensor. Only arithmetic, so that sizes may be symbols."""
    return mma1.packed_bytes(out, columns, group_size, scale_dtype, has_zeros, bits)


def refusal(columns: int, bits: int, group_size: int) -> str | None:
    """Why the layout doesn't hold such a weight."""
    if bits not in LARGEST:
        return f"layout {LAYOUT} holds {' or '.join(map(str, LARGEST))} bits, these are {bits}"
    if group_size != -1 and (group_size < TILE or group_size % TILE):
        return f"groups of {group_size} columns, a multiple of {TILE} is wanted"
    if columns > MOST_COLUMNS or group_size > MOST_COLUMNS:
        return f"{columns} columns in groups of {group_size}, at most {MOST_COLUMNS}"
    padded = -(-columns // TILE) * TILE
    widest = padded if group_size == -1 else min(padded, group_size)
    if widest * LARGEST[bits] >= 2**31:
        return f"groups of {widest} columns of {bits} bits: int32 can't hold their sums"
    return None


def pack(codes: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, group_size: int) -> Tensor:
    """codes (out, in) uint8 below 2**bits, scale (out, groups), zero_point (out, groups) uint8 -> uint8 (bytes,)

    raises ShapeError for other bits or groups; shapes and dtypes are checked by ops.pack_weight
    """
    if (reason := refusal(codes.shape[1], bits, group_size)) is not None:
        raise ShapeError(reason, data={"reason": "not-packed", "bits": bits, "group_size": group_size})
    return mma1.join(pack_codes(codes, bits), codes.shape[1], scale, zero_point, bits, group_size)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """(out, in) uint8 -> the bytes of the tiles. The last tiles are filled with code 2**(bits - 1), which is 0."""
    out, columns = codes.shape
    rows, across = -(-out // TILE), -(-columns // TILE)
    middle = 2 ** (bits - 1)
    signed = torch.zeros(rows * TILE, across * TILE, dtype=torch.uint8, device=codes.device)
    signed[:out, :columns] = codes ^ middle  # two's complement in `bits` bits
    # output: 64 tile + 16 piece + 8 half + row; column: 64 tile + 32 step + 16 further + 4 place + byte. The lane is
    # 4 row + place
    parts = signed.view(rows, 4, 2, 8, across, 2, 2, 4, 4)
    if bits == 4:
        both = parts[:, :, 0] | parts[:, :, 1] << 4
        # [tile, tile, piece, row, place, step, further, byte]
        return both.permute(0, 3, 1, 2, 6, 4, 5, 7).reshape(-1)
    # [tile, tile, step, piece, row, place, further, half, byte]
    return parts.permute(0, 4, 5, 1, 3, 7, 6, 2, 8).reshape(-1)


def unpack_codes(tiles: Tensor, out: int, columns: int, bits: int) -> Tensor:
    """The inverse of pack_codes."""
    rows, across = -(-out // TILE), -(-columns // TILE)
    if bits == 4:
        nibbles = torch.stack((tiles & 15, tiles >> 4), 1).view(rows, across, 4, 8, 4, 2, 2, 4, 2)
        parts = nibbles.permute(0, 2, 8, 3, 1, 5, 6, 4, 7)
    else:
        parts = tiles.view(rows, across, 2, 4, 8, 4, 2, 2, 4).permute(0, 3, 7, 4, 1, 2, 6, 5, 8)
    return parts.reshape(rows * TILE, across * TILE)[:out, :columns] ^ 2 ** (bits - 1)


def unpack(packed: Tensor, out: int, columns: int, bits: int, group_size: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """codes (out, in) uint8, scale (out, groups) float32, zero_point (out, groups) uint8; None as `mma1.sections`"""
    parts = None if bits not in LARGEST else mma1.split(packed, out, columns, bits, group_size)
    return None if parts is None else (unpack_codes(parts[0], out, columns, bits), *parts[1:])
