"""Makes models of random weights, for measurements that depend only on shapes."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

PREFIX = "llama:"


def is_random(name: str) -> bool:
    return name.startswith(PREFIX)


def hidden_and_blocks(name: str) -> tuple[int, int]:
    hidden, blocks, *_ = map(int, name.removeprefix(PREFIX).split(","))
    return hidden, blocks


def random_llama(name: str, **config: Any) -> LlamaForCausalLM:
    """A float32 Llama of `llama:HIDDEN,BLOCKS` or `llama:HIDDEN,BLOCKS,INTERMEDIATE`, the same each time.

    Heads are 64 wide, half as many for keys and values. Left out, INTERMEDIATE is three times HIDDEN.
    """
    hidden, blocks = hidden_and_blocks(name)
    given = name.removeprefix(PREFIX).split(",")[2:]
    torch.manual_seed(0)
    shape = {
        "hidden_size": hidden,
        "intermediate_size": int(given[0]) if given else 3 * hidden,
        "num_hidden_layers": blocks,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 128,
        "max_position_embeddings": 2048,
    }
    return LlamaForCausalLM(LlamaConfig(**{**shape, **config}))
