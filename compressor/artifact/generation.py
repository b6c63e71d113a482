"""Checks whether a loaded model can still generate tokens."""

from __future__ import annotations

from typing import Any

import torch

from compressor.process.resources import ran_out

GENERATED_TOKENS = 8
FEWEST_TOKENS = 2  # of a model that is read from disk for each token: the second needs the cache of the first
PROMPT_TOKENS = 8


def generate_tokens(
    model: Any, inputs: dict[str, Any], tokens: int = GENERATED_TOKENS
) -> tuple[int | None, str | None]:
    """The number of new tokens that `generate` makes of a prompt, and why it isn't the expected number, or None."""
    prompt = inputs["input_ids"][:1, :PROMPT_TOKENS]
    try:
        made = model.generate(
            prompt,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            attention_mask=torch.ones_like(prompt),
        )
    except Exception as error:  # any: a class may fail with a cache, or with few blocks, in its own way
        if (lack := ran_out(error)) is not None:
            raise lack from error
        return None, f"{type(error).__name__}: {str(error)[:300]}"
    count = int(made.shape[1] - prompt.shape[1])
    return count, None if count == tokens else f"it makes {count} of {tokens} tokens"
