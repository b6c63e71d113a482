"""Observes the matmuls with a parameter while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True)
class ObservedMatmul:
    """One matmul of an input with (part of) a parameter.

    input       (..., in_features) as the model passed it
    row_offset  elements into the parameter where the matrix starts; identifies the expert of a fused parameter
    transposed  the matrix is stored as (in, out)
    """

    parameter: str
    input: Tensor
    elements: int
    row_offset: int
    transposed: bool


class ObservedMatmuls(TorchFunctionMode):
    """Reports every matmul with a watched parameter while it is active, inside and outside of modules.

    It sees nn.Linear, Conv1D and one expert of a fused parameter in the same way, because it observes the matmul and
    not the module. `watched` maps parameter names to parameters. `on_call` may raise `Stop` to end the run before the
    matmul.
    """

    def __init__(self, watched: Mapping[str, Tensor], on_call: Callable[[ObservedMatmul], None]) -> None:
        super().__init__()
        self._names = {parameter.untyped_storage()._cdata: name for name, parameter in watched.items()}
        self._keep = list(watched.values())  # storages stay alive, so that their addresses stay unique
        self._on_call = on_call

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            self._report(args[0] if args else kwargs["input"], args[1] if len(args) > 1 else kwargs["weight"], False)
        elif func in _ADDMM:
            self._report(args[1], args[2], True)
        elif func in _MATMUL:
            self._report(args[0], args[1], True)
        return func(*args, **kwargs)

    def _report(self, x: Tensor, weight: Any, right_multiplied: bool) -> None:
        if not isinstance(weight, Tensor) or weight.dim() != 2:
            return
        name = self._names.get(weight.untyped_storage()._cdata)
        if name is None:
            return
        lies_transposed = weight.stride(0) == 1 and weight.stride(1) != 1
        transposed = right_multiplied != lies_transposed
        self.visit(ObservedMatmul(name, x, weight.numel(), int(weight.storage_offset()), transposed))

    def visit(self, call: ObservedMatmul) -> None:
        """Called before each matmul with a watched parameter."""
        self._on_call(call)


_ADDMM = (torch.addmm, Tensor.addmm)
_MATMUL = (torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)
