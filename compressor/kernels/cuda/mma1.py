"""Packs 2-, 3-, 4- and 8-bit weights into layout "mma1": codes, scales and zero points in one tensor, for tensor cores.

    packed = [ceil(N/64)][ceil(K/64)] tiles of 512 * bits bytes | scales (groups, N) | zero points (groups, N) uint8, if
             any | zeros, up to a multiple of 8 | 8 * ((N - 1) % 64 + (K - 1) % 64 + groups) + variant more
    variant = 0 float16, 1 bfloat16, 2 float32 scales; 3 more with zero points

A call does not read device memory to identify a weight, so the size identifies it: modulo 8 it is the variant, and it
grows with each of N, K, the number of groups and the bits. So two weights that differ in one of them differ in size.
(A further tile has at most 8 * 63 bytes less of filling, and 1024 or more of codes.) docs/kernels-cuda.md shows the
tiles. The functions here also place the sections of layout "mma8a1", which has other tiles. Plain torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.errors import ShapeError
from compressor.kernels.cuda.interface import DTYPES

LAYOUT = "mma1"
TILE = 64  # outputs and columns
TORCH = {kind: dtype for dtype, kind in DTYPES.items()}


@dataclass(frozen=True)
class Plane:
    """Words of a tile with some bits of each code.

    low    the first of these bits
    width  the number of bits
    order  the position of a code, slowest axis first, by the axes of _view; 8 / width neighbours share a byte
    """

    low: int
    width: int
    order: tuple[int, ...]


ROW_TILE, PIECE, N_HALF, ROW, COLUMN_TILE, STEP_PAIR, STEP, K_HALF, PAIR, UPPER = range(10)
_LANE = (PIECE, ROW, PAIR)  # warp, l / 4, l % 4 of lane l: the word of a plane
_TILE = (ROW_TILE, COLUMN_TILE)
# cuda_ext/codes.h: register i of an mma is N_HALF + 2 K_HALF
_LOW_TWO = Plane(0, 2, (*_TILE, STEP_PAIR, *_LANE, UPPER, STEP, K_HALF, N_HALF))
PLANES = {
    2: (_LOW_TWO,),
    3: (_LOW_TWO, Plane(2, 1, (*_TILE, *_LANE, UPPER, STEP_PAIR, STEP, K_HALF, N_HALF))),
    4: (Plane(0, 4, (*_TILE, STEP_PAIR, STEP, *_LANE, UPPER, K_HALF, N_HALF)),),
    8: (Plane(0, 8, (*_TILE, STEP_PAIR, STEP, K_HALF, *_LANE, UPPER, N_HALF)),),
}


@dataclass(frozen=True)
class Sections:
    """The beginnings of the sections of a packed tensor, in bytes; zero_at is None without zero points."""

    scale_at: int
    zero_at: int | None
    groups: int
    scale_type: int


def groups_of(columns: int, group_size: int) -> int:
    return 1 if group_size == -1 else -(-columns // group_size)


def _content(out: int, columns: int, group_size: int, scale_bytes: int, has_zeros: bool, bits: int) -> tuple[int, int]:
    """Bytes of the tiles, and of everything before the filling."""
    tiles = (-(-out // TILE)) * (-(-columns // TILE)) * (TILE * TILE * bits // 8)
    return tiles, tiles + groups_of(columns, group_size) * out * (scale_bytes + has_zeros)


def packed_bytes(out: int, columns: int, group_size: int, scale_dtype: torch.dtype, has_zeros: bool, bits: int) -> int:
    """The size of a packed tensor. Only arithmetic, so that sizes may be symbols."""
    _, content = _content(out, columns, group_size, scale_dtype.itemsize, has_zeros, bits)
    filling = (out - 1) % TILE + (columns - 1) % TILE + groups_of(columns, group_size)
    return 8 * (-(-content // 8) + filling) + DTYPES[scale_dtype] + 3 * has_zeros


def sections(size: int, out: int, columns: int, group_size: int, bits: int) -> Sections | None:
    """The sections of a packed tensor of `size` bytes; None if no weight of this shape has this size."""
    has_zeros, kind = divmod(size % 8, 3)
    if has_zeros > 1 or size != packed_bytes(out, columns, group_size, TORCH[kind], bool(has_zeros), bits):
        return None
    scale_bytes = TORCH[kind].itemsize
    tiles, _ = _content(out, columns, group_size, scale_bytes, bool(has_zeros), bits)
    groups = groups_of(columns, group_size)
    return Sections(tiles, tiles + groups * out * scale_bytes if has_zeros else None, groups, kind)


def refusal(bits: int, group_size: int) -> str | None:
    """The reason why the layout can't store such a weight; None if it can."""
    if bits not in PLANES:
        *others, last = PLANES
        return f"layout {LAYOUT} holds {', '.join(map(str, others))} or {last} bits, these are {bits}"
    if group_size != -1 and (group_size < TILE or group_size % TILE):
        return f"groups of {group_size} columns, a multiple of {TILE} is wanted"
    return None


def pack(codes: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, group_size: int) -> Tensor:
    """codes (out, in) uint8 below 2**bits, scale (out, groups), zero_point (out, groups) uint8 -> uint8 (bytes,)

    raises  ShapeError for other bits or groups; ops.pack_weight checks shapes and dtypes
    """
    if (reason := refusal(bits, group_size)) is not None:
        raise ShapeError(reason, data={"reason": "not-packed", "bits": bits, "group_size": group_size})
    return join(pack_codes(codes, bits), codes.shape[1], scale, zero_point, bits, group_size)


def join(tiles: Tensor, columns: int, scale: Tensor, zero_point: Tensor | None, bits: int, group_size: int) -> Tensor:
    """The packed tensor (bytes,) from the bytes of its tiles, scale (out, groups) and zero_point (out, groups)."""
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


def _view(padded: Tensor) -> Tensor:
    """(out, in), whole tiles, with an axis for each part of a code's position: output 64 tile + 16 piece + 8 half +
    row, column 64 tile + 32 step pair + 16 step + 8 half + 2 pair + upper."""
    return padded.view(len(padded) // TILE, 4, 2, 8, padded.shape[1] // TILE, 2, 2, 2, 4, 2)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """(out, in) uint8 -> the bytes of the tiles. The last tiles are filled with code 2**(bits - 1)."""
    out, columns = codes.shape
    rows, across = -(-out // TILE), -(-columns // TILE)
    padded = torch.full((rows * TILE, across * TILE), 2 ** (bits - 1), dtype=torch.uint8, device=codes.device)
    padded[:out, :columns] = codes
    parts = []
    for plane in PLANES[bits]:
        fields = (padded >> plane.low) & 2**plane.width - 1
        fields = _view(fields).permute(plane.order).reshape(-1, 8 // plane.width)
        in_bytes = fields[:, 0]
        for place in range(1, fields.shape[1]):
            in_bytes = in_bytes | fields[:, place] << plane.width * place
        parts.append(in_bytes.view(rows * across, TILE * TILE * plane.width // 8))
    return torch.cat(parts, 1).view(-1)


def unpack_codes(tiles: Tensor, out: int, columns: int, bits: int) -> Tensor:
    """The inverse of pack_codes."""
    rows, across = -(-out // TILE), -(-columns // TILE)
    padded = torch.zeros(rows * TILE, across * TILE, dtype=torch.uint8, device=tiles.device)
    planes = PLANES[bits]
    parts = tiles.view(rows * across, -1).split([TILE * TILE * plane.width // 8 for plane in planes], 1)
    for plane, part in zip(planes, parts, strict=True):
        places = range(0, 8, plane.width)
        fields = torch.stack([(part >> place) & 2**plane.width - 1 for place in places], -1) << plane.low
        ordered = _view(padded).permute(plane.order)
        ordered |= fields.view(ordered.shape)
    return padded[:out, :columns].contiguous()


def unpack(packed: Tensor, out: int, columns: int, bits: int, group_size: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """codes (out, in) uint8, scale (out, groups) float32, zero_point (out, groups) uint8; None as `sections`"""
    parts = None if bits not in PLANES else split(packed, out, columns, bits, group_size)
    return None if parts is None else (unpack_codes(parts[0], out, columns, bits), *parts[1:])


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
