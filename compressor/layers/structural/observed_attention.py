"""Observes the queries and keys of an attention module in transformers' attention interface. Outputs don't change."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from compressor.errors import ModelError

WATCHED = "watched_attention"  # an implementation of attention that calls the model's own


def register_watching() -> None:
    """Register the implementation that `watching` needs."""
    AttentionInterface.register(WATCHED, attend_watched)


class _Watched:
    """The config of an observed attention module. All its other attributes are those of the original config."""

    _attn_implementation = WATCHED

    def __init__(self, config: Any, seen: list[tuple[Tensor, Tensor, float]]) -> None:
        self.watched, self.seen = config, seen

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["watched"], name)


@contextmanager
def watching(attention: nn.Module, seen: list[tuple[Tensor, Tensor, float]]) -> Iterator[None]:
    """Record (query, key, scaling) of each call of transformers' attention interface by a module."""
    config = attention.config
    attention.config = _Watched(config, seen)  # type: ignore[assignment]
    try:
        yield
    finally:
        attention.config = config


def last_seen(seen: list[tuple[Tensor, Tensor, float]], where: str) -> tuple[Tensor, Tensor, float]:
    """Remove and return the latest record. raises ModelError if there is none"""
    if not seen:
        raise ModelError(
            "its attention didn't use transformers' attention interface, so the token gate could not read the keys",
            where=where,
            hint="Load the model with attn_implementation='sdpa' or 'eager'.",
            data={"reason": "attention-not-seen"},
        )
    return seen.pop()


def attend_watched(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **kwargs: Any
) -> Any:
    """Record the arguments, then call the model's own attention."""
    config: Any = module.config
    own = sys.modules[type(module).__module__]
    eager: Any = getattr(own, "eager_attention_forward", None)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(config.watched._attn_implementation, eager)
    scaling = kwargs.get("scaling")
    config.seen.append((query, key, query.shape[-1] ** -0.5 if scaling is None else scaling))
    return attend(module, query, key, value, attention_mask, *args, **kwargs)
