"""Queries and keys of an attention module, as transformers' attention interface gets them; attention stays as it is."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from compressor.errors import ModelError

WATCHED = "watched_attention"  # an implementation of attention that hands on to the model's own


def register_watching() -> None:
    """What a model needs before `watching` is used on it."""
    AttentionInterface.register(WATCHED, attend_watched)


class _Watched:
    """The config of an attention module whose queries and keys are to be seen; else it is that config."""

    _attn_implementation = WATCHED

    def __init__(self, config: Any, seen: list[tuple[Tensor, Tensor, float]]) -> None:
        self.watched, self.seen = config, seen

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["watched"], name)


@contextmanager
def watching(attention: nn.Module, seen: list[tuple[Tensor, Tensor, float]]) -> Iterator[None]:
    """Note (query, key, scaling) of each call that a module makes through transformers' attention interface."""
    config = attention.config
    attention.config = _Watched(config, seen)  # type: ignore[assignment]
    try:
        yield
    finally:
        attention.config = config


def last_seen(seen: list[tuple[Tensor, Tensor, float]], where: str) -> tuple[Tensor, Tensor, float]:
    """The latest note, taken off the list. raises ModelError if there is none"""
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
    """The attention that the model would use itself, after a note of what it got."""
    config: Any = module.config
    own = sys.modules[type(module).__module__]
    eager: Any = getattr(own, "eager_attention_forward", None)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(config.watched._attn_implementation, eager)
    scaling = kwargs.get("scaling")
    config.seen.append((query, key, query.shape[-1] ** -0.5 if scaling is None else scaling))
    return attend(module, query, key, value, attention_mask, *args, **kwargs)
