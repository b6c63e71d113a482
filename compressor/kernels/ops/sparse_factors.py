"""Packs the positions of the stored entries of a sparse matrix, and multiplies by such a matrix, in plain torch.

The source of these functions is copied into the modeling file of a custom artifact, so they use only torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

TOKENS_AT_ONCE = (
    256  # the gathered values then fit into the cache: 256 to 1024 are equally fast, all at once is half as fast
)


def row_bits(atoms: int, k: int) -> int:
    """Number of bits for the positions of a row's k atoms: k numbers, or one bit per atom if that is less."""
    return min(k * number_bits(atoms), atoms)


def number_bits(atoms: int) -> int:
    """ceil(log2(atoms)), at least 1"""
    return max(1, (atoms - 1).bit_length())


def pack_index(index: Tensor, atoms: int) -> Tensor:
    """index (rows, k), ascending in each row and < atoms -> uint8 (ceil(rows * row_bits / 8),).

    One stream of bits, row after row; bit i is in byte i // 8 at i % 8 from the low end. A row has k numbers of
    `number_bits` each, low bit first, or if that takes at least as many bits as there are atoms, atom j's bit at j.
    """
    k, width = index.shape[1], number_bits(atoms)
    if k * width < atoms:
        bits = (index.unsqueeze(-1) >> torch.arange(width, device=index.device)) & 1
    else:
        bits = torch.zeros(len(index), atoms, dtype=torch.int64, device=index.device).scatter_(1, index, 1)
    flat = bits.flatten().to(torch.uint8)
    padded = torch.nn.functional.pad(flat, (0, -len(flat) % 8)).view(-1, 8)
    return (padded << torch.arange(8, dtype=torch.uint8, device=index.device)).sum(1, dtype=torch.uint8)


def unpack_index(packed: Tensor, rows: int, atoms: int, k: int) -> Tensor:
    """The inverse: int64 (rows, k). If changed bits don't name k atoms per row: (n,) of all named ones."""
    width = number_bits(atoms)
    count = rows * row_bits(atoms, k)
    bits = (packed.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
    bits = bits.flatten()[:count]
    if k * width < atoms:
        return (bits.view(rows, k, width).long() << torch.arange(width, device=packed.device)).sum(2)
    bits = bits.view(rows, atoms)
    named = bits.nonzero()[:, 1]
    return named.view(rows, k) if bool((bits.sum(1) == k).all()) else named


def sparse_product(tokens: Tensor, atoms: Tensor, values: Tensor, index: Tensor) -> Tensor:
    """tokens W'ᵀ for W' = [S_1 D_1, ..., S_n D_n]: each block's tokens times its atoms, then k of these products per
    row.

    tokens   (tokens, blocks * width)
    atoms    (blocks, m, width), D
    values   (out, blocks, k), the stored entries of S; index (out, blocks, k) int64, their positions
    returns  (tokens, out); everything is in the dtype of `tokens`
    """
    blocks, count, width = atoms.shape
    out = values.shape[0]
    places = (index + count * torch.arange(blocks, device=index.device)[:, None]).view(out, -1)
    weights = values.reshape(out, -1)
    parts = []
    for part in tokens.split(TOKENS_AT_ONCE):
        responses = atoms @ part.view(-1, blocks, width).permute(1, 2, 0)  # (blocks, m, tokens)
        table = responses.reshape(blocks * count, -1)
        parts.append(torch.nn.functional.embedding_bag(places, table, per_sample_weights=weights, mode="sum").t())
    return torch.cat(parts) if parts else tokens.new_zeros(0, out)
