"""Lets a step of few tokens use torch's team of threads for the products of this library alone.

A decoding step has dozens of small operations of torch. Some of them, such as attention, wake all threads for
microseconds of work and end when the last one has come: milliseconds later, if other processes have the cores. With
one thread such an operation takes some microseconds more, and has the same bits. So a prepared model reserves the team
while it runs few tokens (`reserve_for_few`): torch's operations have one thread, the compiled library has all.

The number of threads is a setting of OpenMP for the thread that calls, and is restored when the model returns.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from compressor.kernels.cpu import Library, library

# Tokens of a step, and tokens in its cache, all sequences together, divided by the number of threads. Beyond them
# torch's operations have so much work that more threads take less time on a quiet machine.
FEW_TOKENS, FEW_CACHED = 32, 2048


class _Calls(threading.local):
    """Of this thread: for each running call of a prepared model the size of the team that it reserved, or 0."""

    def __init__(self) -> None:
        self.sizes: list[int] = []


_calls = _Calls()


def reserved_threads() -> int:
    """The size of the team that is reserved for this library in this thread; 0 if torch's operations share it."""
    return next((size for size in reversed(_calls.sizes) if size), 0)


@contextmanager
def shared_by_torch() -> Iterator[None]:
    """Inside this context torch's operations have all threads, for one that is as large as the library's."""
    found, size = library(), reserved_threads()
    if not size or isinstance(found, str):
        yield
        return
    _set(found, 0, size)
    try:
        yield
    finally:
        _set(found, size, 1)


def reserve_for_few(model: nn.Module) -> None:
    """Reserve the team in each call of this model with few tokens. Does nothing twice, or without the library.

    model  whose large products are all of the library, or in `shared_by_torch`
    """
    found = library()
    if isinstance(found, str) or any(hook is _reserve for hook in model._forward_pre_hooks.values()):
        return
    model.register_forward_pre_hook(_reserve, with_kwargs=True)
    model.register_forward_hook(_restore, always_call=True)


def _tokens(arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[int, int]:
    """Tokens of a call, and of its cache, all sequences together; 0 tokens if they are unknown."""
    ids, vectors = named.get("input_ids"), named.get("inputs_embeds")
    given = ids if ids is not None else vectors if vectors is not None else next(iter(arguments), None)
    if not isinstance(given, Tensor) or not given.is_cpu or given.dim() not in (2, 3):
        return 0, 0
    cache: Any = named.get("past_key_values", named.get("cache"))
    length = cache.get_seq_length() if hasattr(cache, "get_seq_length") else 0
    return given.shape[0] * given.shape[1], given.shape[0] * (length + given.shape[1])


def _reserve(model: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
    if torch.compiler.is_compiling():
        return
    tokens, cached = _tokens(arguments, named)
    threads = torch.get_num_threads()
    wanted = threads > 1 and 0 < tokens * threads <= FEW_TOKENS and cached * threads <= FEW_CACHED
    found = library()
    _calls.sizes.append(threads if wanted and isinstance(found, Library) and _set(found, threads, 1) else 0)


def _restore(model: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
    if torch.compiler.is_compiling() or not _calls.sizes:
        return
    found = library()
    if (threads := _calls.sizes.pop()) and isinstance(found, Library):
        _set(found, 0, threads)


def _set(found: Library, threads: int, of_torch: int) -> bool:
    return found.functions.reserve_threads(threads, of_torch) == 0  # an error: torch has no such OpenMP
