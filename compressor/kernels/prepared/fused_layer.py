"""Defines the attributes of a layer that the fused call of the CPU library reads."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from compressor.kernels.prepared.dispatch import Choice


class FusedLayer(Protocol):
    """A layer whose packed weight has layout cpu2."""

    choice: Choice
    packed: Tensor
    bias: nn.Parameter | None
    in_features: int
    out_features: int
    bits: int
    group_size: int
