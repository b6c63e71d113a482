"""Computes attention between its projections: scores, softmax from a lookup table, and the sum of values.

Tensors: table  float32 (entries,): exp(-(entries - 1 - k) * step), the last at 0

With `bits`, the intermediate results (queries, keys, values and the softmax's output) are quantized before they are
multiplied: to 8-bit codes in blocks of `block` along their last dimension, each with the smallest shift that covers it.

transformers lets a model name its attention implementation (AttentionInterface). `table_softmax` is the plain one (all
scores, float32 softmax). If an attention module has a child `products`, it calls this child. The child is a layer of
this format, so it is stored, loaded and replaced like any other.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from compressor.kernels.ops.blocks import round_to_shift
from compressor.kernels.ops.table_functions import softmax
from compressor.layers.base import Layer

IMPLEMENTATION = "table_softmax"
PRODUCTS = "products"  # name of the child of an attention module that is a BlockAttention


class BlockAttention(Layer):
    """The child `products` of an attention module.

    entries, step, lookup  of the lookup table of exp
    bits, block            8 and the length of a block, or None: intermediate results are not quantized
    """

    format_name = "block_attention"
    stands_for = "attention"
    weight_only = False
    helpers = ("compressor.kernels.ops.blocks", "compressor.kernels.ops.table_functions")
    table: Tensor

    def __init__(self, entries: int, step: float, lookup: str, bits: int | None, block: int | None) -> None:
        super().__init__()
        self.step, self.lookup, self.bits, self.block = step, lookup, bits, block
        self.register_buffer("table", torch.zeros(entries, dtype=torch.float32))

    @classmethod
    def prepare(cls, model: nn.Module) -> None:
        AttentionInterface.register(IMPLEMENTATION, attend)
        AttentionMaskInterface.register(IMPLEMENTATION, eager_mask)
        model.set_attn_implementation(IMPLEMENTATION)  # type: ignore[operator]

    @classmethod
    def empty(cls, shape: tuple[int, ...], format_params: dict[str, Any], dtype: torch.dtype, bias: bool) -> Self:
        return cls(**format_params)

    def round(self, x: Tensor) -> Tensor:
        """x, quantized to 8 bits in blocks along its last dimension if `bits` is set."""
        return x if self.block is None else round_to_shift(x, self.block)

    def forward(self, scores: Tensor) -> Tensor:
        """Scores (..., keys) -> the weights of the values, float32."""
        return self.round(softmax(scores, self.table, self.step, self.lookup == "linear"))

    def format_params(self) -> dict[str, Any]:
        settings = {"entries": len(self.table), "step": self.step, "lookup": self.lookup}
        return {**settings, "bits": self.bits, "block": self.block}

    def tensors(self) -> dict[str, Tensor]:
        return {"table": self.table}

    @classmethod
    def from_tensors(
        cls, format_params: dict[str, Any], tensors: dict[str, Tensor], bias: Tensor | None = None
    ) -> Self:
        with torch.device("meta"):
            layer = cls(**format_params)
        layer.fill(tensors)
        return layer


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor]:
    """Attention with transformers' interface: query (batch, heads, tokens, width), key and value (batch, groups, ...).

    returns  (batch, tokens, heads, width) and the weights (batch, heads, tokens, keys)
    """
    products = getattr(module, PRODUCTS, None)
    if products is not None:
        query, key, value = products.round(query), products.round(key), products.round(value)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = torch.matmul(query, key.transpose(2, 3)) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = products(scores) if products is not None else torch.softmax(scores, -1, dtype=torch.float32)
    weights = nn.functional.dropout(weights.to(query.dtype), dropout, module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights
