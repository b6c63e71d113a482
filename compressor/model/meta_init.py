"""Initializing a tensor on the meta device takes time and changes nothing: it is done once for each kind of tensor."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import initialization

Init = Callable[..., Any]

PLAIN: dict[str, Any] = {**initialization.TORCH_INIT_FUNCTIONS}
_lock = threading.Lock()
_users = 0  # of what `quick_on_meta` puts in the place of those


@contextmanager
def quick_on_meta() -> Iterator[None]:
    """While models are made: functions of `torch.nn.init` pass over a meta tensor if they took one like it before.

    What they refuse they refuse as ever, so that wrong values of a config show.
    """
    global _users
    with _lock:
        _users += 1
        if _users == 1:
            known: set[tuple[Any, ...]] = set()
            _put({name: _quick(name, function, known) for name, function in PLAIN.items()})
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                _put(PLAIN)


def _put(functions: dict[str, Init]) -> None:
    """These are what torch's modules and the models of transformers call."""
    initialization.TORCH_INIT_FUNCTIONS.update(functions)
    vars(torch.nn.init).update(functions)


def _quick(name: str, function: Init, known: set[tuple[Any, ...]]) -> Init:
    @functools.wraps(function)
    def wrapped(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not tensor.is_meta:
            return function(tensor, *args, **kwargs)
        kind = (name, tensor.dim(), tensor.numel() == 0, tensor.dtype, repr(args), repr(kwargs))
        if kind not in known:
            function(tensor, *args, **kwargs)
            known.add(kind)
        return tensor

    return wrapped
