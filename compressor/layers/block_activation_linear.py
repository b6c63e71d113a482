"""A weight in blocks, as block_linear stores it, whose input is rounded to 8 bits in blocks before it is multiplied.

Tensors beside those of block_linear, with static activations only:
    input_exponent  int8 (ceil(in / C),): the scale of each block of C inputs is 2**exponent, found on calibration data

Input block of C, as the weight's blocks are wide: x = c * 2**e with c in -127 .. 127. Dynamic: e is the smallest that
holds the block of this token. Static: e is stored, and larger values saturate. With shifts on both sides the product is
one of integers: y[t, r] = sum over blocks b of 2**(e_x[t, b] + e_w[r, b]) * sum over the block of c_x * c_w. The
forward pass multiplies what the codes stand for, which is the same but for the order of the float sums.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from compressor.kernels.ops.blocks import power_of_two, round_to_shift
from compressor.layers.block_linear import BlockLinear


class BlockActivationLinear(BlockLinear):
    """Drop-in for nn.Linear that rounds its input block by block, then multiplies by the dequantized weight."""

    form = "block_activation_linear"
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
        """Values beyond 127 codes of their block, which saturate; none where each token finds its own scale."""
        if self.activations != "static":
            return None
        limit = 127 * power_of_two(self.input_exponent, torch.float32).repeat_interleave(self.block[1])
        return (x.abs() > limit[: self.in_features]).sum()

    def spec(self) -> dict[str, Any]:
        return {**super().spec(), "activations": self.activations}

    def tensors(self) -> dict[str, Tensor]:
        found = super().tensors()
        return {**found, "input_exponent": self.input_exponent} if self.activations == "static" else found
