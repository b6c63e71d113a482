"""Replaces a model's attention by plain attention, and records and optionally changes it while the model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

from compressor.layers.block_attention import attend

IMPLEMENTATION = "observed_plain_attention"


@dataclass(frozen=True)
class AttentionCall:
    """One call of transformers' attention interface.

    module              the module that called it
    heads, groups       of queries, and of keys and values
    value_width         of one head
    """

    module: nn.Module
    heads: int
    groups: int
    value_width: int


@dataclass
class ObservedAttention:
    """calls   in their order
    change  a function that is applied to the output of attention (samples, tokens, heads, head_dim)
    """

    calls: list[AttentionCall]
    change: Callable[[Tensor], Tensor] | None = None


@contextmanager
def observed_plain_attention(model: PreTrainedModel) -> Iterator[ObservedAttention]:
    """Inside this context the model's attention is `attend`, and each call of it is recorded."""
    observed, before = ObservedAttention([]), model.config._attn_implementation

    def observe(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        observed.calls.append(AttentionCall(module, query.shape[1], key.shape[1], value.shape[-1]))
        output, weights = attend(module, query, key, value, *args, **kwargs)
        return (observed.change(output) if observed.change else output), weights

    AttentionInterface.register(IMPLEMENTATION, observe)
    AttentionMaskInterface.register(IMPLEMENTATION, eager_mask)
    model.set_attn_implementation(IMPLEMENTATION)
    try:
        yield observed
    finally:
        model.set_attn_implementation("eager" if before == IMPLEMENTATION else before)
