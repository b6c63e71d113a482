"""Multiplies an input that is quantized to 8 bits in blocks by a weight in the blocks of block_linear.

Further tensors beside those of block_linear, only with static activations:
    input_exponent  int8 (ceil(in / C),): the scale of each block of C inputs is 2**exponent, found on calibration data

A block of the input has C values, the width of the weight's blocks: x = c * 2**e with c in -127 .. 127. Dynamic: e is
the smallest exponent that covers the block of this token. Static: e is stored, and larger values saturate. With shifts
on both sides the matmul is one of integers: y[t, r] = sum over blocks b of 2**(e_x[t, b] + e_w[r, b]) * sum over the
block of c_x * c_w. The forward pass multiplies the dequantized values, which is the same except for the order of float
sums.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from compressor.kernels.ops.blocks import power_of_two, round_to_shift
from compressor.layers.block_linear import BlockLinear


class BlockActivationLinear(BlockLinear):
    """Replaces nn.Linear. Quantizes its input block by block, then multiplies by the dequantized weight."""

    format_name = "block_activation_linear"
    weight_only = False
    helpers = ("compressor.kernels.ops.blocks", "compressor.layers.block_linear")
    input_exponent: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        block: tuple[int, int],
        scale: str,
        activations: str,
        dtype: torch.dtype,
        bias: bool = False,
        odd: bool = False,
        biased: bool = False,
    ) -> None:
        super().__init__(in_features, out_features, bits, block, scale, dtype, bias, biased=biased)
        self.activations = activations
        if activations == "static":
            blocks = -(-in_features // block[1])
            self.register_buffer("input_exponent", torch.zeros(blocks, dtype=torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        exponent = self.input_exponent if self.activations == "static" else None
        return F.linear(round_to_shift(x, self.block[1], exponent), self.matrix(x.dtype), self.shift(x.dtype))

    def outside(self, x: Tensor) -> Tensor | None:
        """Number of values beyond the codes of their block, which saturate; None if each token has its own scale."""
        if self.activations != "static":
            return None
        limit = 127 * power_of_two(self.input_exponent, torch.float32).repeat_interleave(self.block[1])
        return (x.abs() > limit[: self.in_features]).sum()

    def format_params(self) -> dict[str, Any]:
        return {**super().format_params(), "activations": self.activations}

    def tensors(self) -> dict[str, Tensor]:
        found = super().tensors()
        return {**found, "input_exponent": self.input_exponent} if self.activations == "static" else found
