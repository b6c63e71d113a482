"""Records what modules are given, and what they return, while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

from torch import nn

Key = TypeVar("Key")
Kept = TypeVar("Kept")


@contextmanager
def recorded_inputs(
    modules: Mapping[Key, nn.Module], keep: Callable[[tuple[Any, ...], dict[str, Any]], Kept]
) -> Iterator[list[tuple[Key, Kept]]]:
    """Yields (key of the module, what `keep` returns for its arguments) for each call of a module, in order."""
    seen: list[tuple[Key, Kept]] = []
    with ExitStack() as stack:
        for key, module in modules.items():

            def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], key: Key = key) -> None:
                seen.append((key, keep(args, kwargs)))

            stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield seen


@contextmanager
def recorded_outputs(modules: Mapping[Key, nn.Module], keep: Callable[[Any], Kept]) -> Iterator[list[tuple[Key, Kept]]]:
    """Yields (key of the module, what `keep` returns for its output) for each call of a module, in the order of their
    ends.
    """
    seen: list[tuple[Key, Kept]] = []
    with ExitStack() as stack:
        for key, module in modules.items():

            def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any, key: Key = key) -> None:
                seen.append((key, keep(output)))

            stack.callback(module.register_forward_hook(hook).remove)
        yield seen


def first_argument(args: tuple[Any, ...], _kwargs: dict[str, Any]) -> Any:
    return args[0]
