"""Layout "mma1" of 4-bit weights: codes, scales and zero points in one tensor, for tensor cores. Plain torch.

    packed = [ceil(N/64)][ceil(K/64)] tiles of 2048 bytes | scales (groups, N) | zero points (groups, N) uint8, if any |
             zeros, up to a multiple of 8 | 8 * (N % 64 + K % 64) + variant more
    variant = 0 float16, 1 bfloat16, 2 float32 scales; 3 more with zero points

A call reads no memory of the device to find out what it was given, so the size has to tell: modulo 8 it is the variant,
and two weights that differ in N alone, in K alone or in the number of groups alone differ in size. Tiles are drawn in
docs/kernels-cuda.md: 512 words of 32 bits, each with eight codes of a 16 x 16 piece. The parts of layout "mma8a1" are
laid out by the functions here, too; its tiles are another matter, and of `bits` bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.errors import ShapeError
from compressor.kernels.cuda.interface import DTYPES

LAYOUT = "mma1"
BITS = 4
TILE = 64  # outputs and columns
TORCH = {kind: dtype for dtype, kind in DTYPES.items()}


@dataclass(frozen=True)
class Sections:
    """Where the parts of a packed tensor begin, in bytes; zero_at is None without zero points."""

    scale_at: int
    zero_at: int | None
    groups: int
    scale_type: int


def groups_of(columns: int, group_size: int) -> int:
    return 1 if group_size == -1 else -(-columns // group_size)


def _content(out: int, columns: int, group_size: int, scale_bytes: int, has_zeros: bool, bits: int) -> tuple[int, int]:
    """Bytes of the tiles, and of all that is before the filling."""
    tiles = (-(-out // TILE)) * (-(-columns // TILE)) * (TILE * TILE * bits // 8)
    return tiles, tiles + groups_of(columns, group_size) * out * (scale_bytes + has_zeros)


def packed_bytes(
    out: int, columns: int, group_size: int, scale_dtype: torch.dtype, has_zeros: bool, bits: int = BITS
) -> int:
    """The size of a packed tensor. Arithmetic alone, so that sizes may be symbols."""
    _, content = _content(out, columns, group_size, scale_dtype.itemsize, has_zeros, bits)
    return 8 * (-(-content // 8) + out % TILE + columns % TILE) + DTYPES[scale_dtype] + 3 * has_zeros


def sections(size: int, out: int, columns: int, group_size: int, bits: int = BITS) -> Sections | None:
    """The parts of a packed tensor of `size` bytes; None if no weight of this shape has this size."""
    has_zeros, kind = divmod(size % 8, 3)
    if has_zeros > 1 or size != packed_bytes(out, columns, group_size, TORCH[kind], bool(has_zeros), bits):
        return None
    scale_bytes = TORCH[kind].itemsize
    tiles, _ = _content(out, columns, group_size, scale_bytes, bool(has_zeros), bits)
    groups = groups_of(columns, group_size)
    return Sections(tiles, tiles + groups * out * scale_bytes if has_zeros else None, groups, kind)


def refusal(bits: int, group_size: int) -> str | None:
    """Why the layout doesn't hold such a weight."""
    if bits != BITS:
        return f"layout {LAYOUT} holds {BITS} bits, these are {bits}"
    if group_size != -1 and (group_size < TILE or group_size % TILE):
        return f"groups of {group_size} columns, a multiple of {TILE} is wanted"
    return None


def pack(codes: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, group_size: int) -> Tensor:
    """codes (out, in) uint8 below 16, scale (out, groups), zero_point (out, groups) uint8 -> uint8 (bytes,)

    raises ShapeError for other bits or groups; shapes and dtypes are checked by ops.pack_weight
    """
    if (reason := refusal(bits, group_size)) is not None:
        raise ShapeError(reason)
    return join(pack_codes(codes), codes.shape[1], scale, zero_point, bits, group_size)


def join(tiles: Tensor, columns: int, scale: Tensor, zero_point: Tensor | None, bits: int, group_size: int) -> Tensor:
    """The packed tensor (bytes,) of the bytes of its tiles, scale (out, groups) and zero_point (out, groups)."""
    out = len(scale)
    size = packed_bytes(out, columns, group_size, scale.dtype, zero_point is not None, bits)
    found = sections(size, out, columns, group_size, bits)
    assert found is not None
    packed = torch.zeros(size, dtype=torch.uint8, device=tiles.device)
    packed[: found.scale_at] = tiles
    end = found.scale_at + scale.numel() * scale.element_size()
    packed[found.scale_at : end] = scale.t().contiguous().view(-1).view(torch.uint8)
    if zero_point is not None:
        packed[end : end + zero_point.numel()] = zero_point.t().reshape(-1)
    return packed


def pack_codes(codes: Tensor) -> Tensor:
    """(out, in) uint8 -> the bytes of the tiles; the last ones are filled up with code 8."""
    out, columns = codes.shape
    rows, across = -(-out // TILE), -(-columns // TILE)
    padded = torch.full((rows * TILE, across * TILE), 8, dtype=torch.uint8, device=codes.device)
    padded[:out, :columns] = codes
    # output: 64 tile + 16 piece + 8 further + row; column: 64 tile + 16 step + 8 further + 2 pair + upper. The lane is
    # 4 row + pair, the nibble of its word further of the output + 2 further of the column + 4 upper
    parts = padded.view(rows, 4, 2, 8, across, 4, 2, 4, 2).permute(0, 4, 5, 1, 3, 7, 8, 6, 2).reshape(-1, 2)
    return parts[:, 0] | parts[:, 1] << 4


def unpack_codes(tiles: Tensor, out: int, columns: int) -> Tensor:
    """The inverse of pack_codes."""
    rows, across = -(-out // TILE), -(-columns // TILE)
    nibbles = torch.stack((tiles & 15, tiles >> 4), 1).view(rows, across, 4, 4, 8, 4, 2, 2, 2)
    # back to tile, piece, further, row of the output; tile, step, further, pair, upper of the column
    padded = nibbles.permute(0, 3, 8, 4, 1, 2, 7, 5, 6).reshape(rows * TILE, across * TILE)
    return padded[:out, :columns].contiguous()


def unpack(packed: Tensor, out: int, columns: int, bits: int, group_size: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """codes (out, in) uint8, scale (out, groups) float32, zero_point (out, groups) uint8; None as `sections`"""
    parts = None if bits != BITS else split(packed, out, columns, bits, group_size)
    return None if parts is None else (unpack_codes(parts[0], out, columns), *parts[1:])


def split(packed: Tensor, out: int, columns: int, bits: int, group_size: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """The bytes of the tiles, scale (out, groups) float32, zero_point (out, groups) uint8; None as `sections`"""
    found = sections(packed.numel(), out, columns, group_size, bits)
    if found is None or packed.dtype != torch.uint8:
        return None
    dtype, entries = TORCH[found.scale_type], found.groups * out
    stored = packed[found.scale_at : found.scale_at + entries * dtype.itemsize].view(dtype)
    scale = stored.view(found.groups, out).t().float().contiguous()
    if found.zero_at is None:
        zeros = torch.full_like(scale, 2 ** (bits - 1), dtype=torch.uint8)
    else:
        zeros = packed[found.zero_at : found.zero_at + entries].view(found.groups, out).t().contiguous()
    return packed[: found.scale_at], scale, zeros
