"""Records the module calls that a block makes itself while it runs, and compares the identity of their tensors."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from compressor.model.block_runner import own_calls

BY_POSITION = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


@dataclass
class ModuleCall:
    """One call of a module, made by the block itself and not by another module of it.

    nth  number of this call among the calls of the same module, from 0
    """

    name: str
    module: nn.Module
    nth: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any = None

    @property
    def values(self) -> list[Any]:
        """All arguments of the call."""
        return [*self.args, *self.kwargs.values()]

    def positional(self) -> Iterator[tuple[str, Any]]:
        """The positional arguments with their names in the module's forward; "" for those in *args."""
        parameters = inspect.signature(self.module.forward).parameters.values()
        names = [p.name for p in parameters if p.kind in BY_POSITION]
        return zip((*names, *("",) * len(self.args)), self.args)


def recorded_calls(block: nn.Module) -> AbstractContextManager[list[ModuleCall]]:
    """Record the calls that a block makes itself (not those of its modules), in the order in which they begin.

    Their tensors stay alive, so that addresses identify them.
    """
    count: dict[str, int] = {}

    def note(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ModuleCall:
        nth = count.get(name, 0)
        count[name] = nth + 1
        return ModuleCall(name, module, nth, args, kwargs)

    return own_calls(block, note)


def is_one_tensor(a: Any, b: Any) -> bool:
    """Whether two values are the same tensor, or views of the whole of the same tensor."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return False
    return (a.data_ptr(), a.numel(), a.dtype) == (b.data_ptr(), b.numel(), b.dtype)
