"""Quantizes a matrix block by block: codes, and for each block the scale with the smallest error."""

from __future__ import annotations

from compressor.lazy import torch

SHIFTS_TRIED = (
    4  # at 4 bits, Gaussian blocks of 4,096 values have the smallest error if clipped at half their largest value
)
SCALES_TRIED = 33  # float16: from the largest value down to 0.36 of it, in steps of 0.02
SLAB_ELEMENTS = 1 << 22  # elements of a matrix that are searched at once
FLOAT16_TINY, FLOAT16_MAX = 2.0**-24, 65504.0


def quantize_blocks(
    matrix: torch.Tensor,
    bits: int,
    block: tuple[int, int],
    scale: str = "shift",
    search: bool = True,
    importance: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes int8 (out, in), one scale per block (exponents int8, or float16), and the dequantized matrix.

    search      try smaller scales too, and keep the one with the least squared error of its block
    importance  (in,) weight of each column's squared error
    """
    rows, columns = matrix.shape
    height, width = block
    across = -(-columns // width)
    weights = torch.ones(columns, device=matrix.device) if importance is None else importance.to(torch.float32)
    weights = torch.nn.functional.pad(weights, (0, across * width - columns)).view(across, width)
    step = height * max(1, SLAB_ELEMENTS // (height * across * width))
    parts = []
    for start in range(0, rows, step):
        slab = matrix[start : start + step].to(torch.float32)
        down = -(-len(slab) // height)
        padded = torch.nn.functional.pad(slab, (0, across * width - columns, 0, down * height - len(slab)))
        codes, scales, rounded = _best_scales(padded.view(down, height, across, width), bits, scale, search, weights)
        kept = (codes.reshape(down * height, -1)[: len(slab), :columns], scales)
        parts.append((*kept, rounded.reshape(down * height, -1)[: len(slab), :columns]))
    codes, scales, rounded = (torch.cat(column) for column in zip(*parts, strict=True))
    return codes.contiguous(), scales, rounded.contiguous()


def _best_scales(
    blocks: torch.Tensor, bits: int, scale: str, search: bool, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same for blocks (down, height, across, width); weights (across, width)."""
    limit = 2 ** (bits - 1) - 1
    largest = blocks.abs().amax((1, 3))
    least = torch.full_like(largest, float("inf"))
    best: list[torch.Tensor] = []
    for stored, value in _candidates(largest, limit, scale, search):
        spread = value[:, None, :, None]
        codes = torch.round(blocks / spread).clamp(-limit, limit)
        rounded = codes * spread
        error = ((rounded - blocks).square() * weights[None, None]).sum((1, 3))
        better = error < least
        least = torch.where(better, error, least)
        found = [codes.to(torch.int8), stored, rounded]
        choice = (better[:, None, :, None], better, better[:, None, :, None])
        best = [torch.where(c, new, old) for c, new, old in zip(choice, found, best or found, strict=True)]
    return best[0], best[1], best[2]


def _candidates(largest: torch.Tensor, limit: int, scale: str, search: bool) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(as stored, as float32) for each scale to try, descending from the one that covers the largest value."""
    from compressor.kernels.ops.blocks import LOWEST_EXPONENT, power_of_two, shift_exponent

    if scale == "shift":
        first = shift_exponent(largest, limit)
        tried = [(first - n).clamp(min=LOWEST_EXPONENT) for n in range(SHIFTS_TRIED if search else 1)]
        return [(exponent.to(torch.int8), power_of_two(exponent, torch.float32)) for exponent in tried]
    first = torch.where(largest > 0, largest / limit, torch.ones_like(largest))
    factors = [1 - 0.02 * n for n in range(SCALES_TRIED if search else 1)]
    halves = [(first * factor).clamp(FLOAT16_TINY, FLOAT16_MAX).to(torch.float16) for factor in factors]
    return [(half, half.to(torch.float32)) for half in halves]
