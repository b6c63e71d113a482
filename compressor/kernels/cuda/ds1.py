"""Packs the sparse factor of a weight into layout "ds1": the atoms of each output and their values. Plain torch.

    packed = int32 (ceil(out / 32), blocks, k, 32), one word for each stored value: the atom's number in the lower half,
             the value's 16 bits in the upper half; outputs beyond the last have value 0 of atom 0

The 32 lanes of a warp, one output each, read a line of 128 bytes: cuda_ext/dense_sparse.cu.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.errors import ShapeError

LAYOUT = "ds1"
LANES = 32
# as in plans
MOST_ATOMS, MOST_BLOCKS, MOST_COLUMNS, MOST_OUTPUTS, MOST_ROWS = 4096, 65535, 1 << 30, 65535 * LANES, 1 << 30
DTYPES = (torch.float16, torch.bfloat16)


def packed_shape(out: int, blocks: int, k: int) -> tuple[int, int, int, int]:
    return -(-out // LANES), blocks, k, LANES


def refusal(atoms: Tensor, values: Tensor, inputs: torch.dtype | None) -> str | None:
    """The reason why no CUDA kernel multiplies by these factors; None if one does. atoms (blocks, m, width), values
    (out, blocks, k), inputs: dtype of x, None if it is unknown."""
    (blocks, count, width), (out, _, k) = atoms.shape, values.shape
    kinds = {tensor.dtype for tensor in (atoms, values)} | ({inputs} if inputs is not None else set())
    if len(kinds) > 1 or not kinds <= set(DTYPES):
        named = ", ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))
        return f"factors and inputs are {named}; all of float16, or all of bfloat16, is wanted"
    if width == 0 or width % 8:
        return f"blocks of {width} inputs, a multiple of 8 is wanted"
    if not 0 < k <= count <= MOST_ATOMS:
        return f"{k} of {count} atoms, at most {MOST_ATOMS} are wanted"
    if not 0 < blocks <= MOST_BLOCKS or max(blocks * width, blocks * k) > MOST_COLUMNS or out > MOST_OUTPUTS:
        return f"{out} x {blocks} blocks of {width} is larger than {MOST_OUTPUTS} x {MOST_BLOCKS}, or 2**30 inputs"
    return None


def pack(index: Tensor, values: Tensor, atoms: int) -> Tensor:
    """index (out, blocks, k) uint16, values (out, blocks, k) float16 or bfloat16 -> the packed words

    raises  ShapeError for other shapes or dtypes, or an index that names no atom
    """
    if index.dim() != 3 or index.shape != values.shape or index.dtype != torch.uint16 or values.dtype not in DTYPES:
        found = f"index {index.dtype} {tuple(index.shape)}, values {values.dtype} {tuple(values.shape)}"
        data = {"reason": "operands", "index": f"{index.dtype} {tuple(index.shape)}"}
        data |= {"values": f"{values.dtype} {tuple(values.shape)}"}
        raise ShapeError(f"{found}; uint16 and a 16-bit float of one shape (out, blocks, k) expected", data=data)
    out, blocks, k = index.shape
    numbers = index.to(torch.int32)
    if numbers.numel() and (largest := int(numbers.max())) >= atoms:
        text = f"index {tuple(index.shape)} names atom {largest} of {atoms} (0 to {atoms - 1})"
        raise ShapeError(text, data={"reason": "no-such-atom", "atom": largest, "atoms": atoms})
    words = numbers | values.contiguous().view(torch.int16).to(torch.int32) << 16
    tiles, *_ = packed_shape(out, blocks, k)
    padded = words.new_zeros(tiles * LANES, blocks, k)
    padded[:out] = words
    return padded.view(tiles, LANES, blocks, k).permute(0, 2, 3, 1).contiguous()
