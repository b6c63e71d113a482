"""Stores an embedding as codes with one scale per block, with the tensors of block_linear."""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.kernels.ops.blocks import expand_blocks, power_of_two, unpack_rows
from compressor.layers.block_linear import BlockLinear


class BlockEmbedding(BlockLinear):
    """Replaces nn.Embedding. Dequantizes only the rows that are looked up."""

    format_name = "block_embedding"
    stands_for = "embedding"
    helpers = ("compressor.kernels.ops.blocks", "compressor.layers.block_linear")

    def forward(self, ids: Tensor) -> Tensor:
        flat = ids.reshape(-1)
        codes = unpack_rows(self.weight_packed[flat], self.bits, self.in_features)
        stored = getattr(self, self.scale_name)[torch.div(flat, self.block[0], rounding_mode="floor")]
        scale = power_of_two(stored, torch.float32) if self.scale == "shift" else stored.to(torch.float32)
        wide = expand_blocks(scale, (1, self.block[1]), (len(flat), self.in_features))
        return (codes * wide).to(self.dtype).view(*ids.shape, self.in_features)
