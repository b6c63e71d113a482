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
    not the module. A product with all experts is reported expert by expert. `watched` maps parameter names to
    parameters. `on_call` may raise `Stop` to end the run before the matmul.
    """

    def __init__(self, watched: Mapping[str, Tensor], on_call: Callable[[ObservedMatmul], None]) -> None:
        super().__init__()
        self._names = {parameter.untyped_storage()._cdata: name for name, parameter in watched.items()}
        self._keep = dict(watched)  # storages stay alive, so that their addresses stay unique
        self._on_call = on_call

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            self._report(args[0] if args else kwargs["input"], args[1] if len(args) > 1 else kwargs["weight"], False)
        elif func in _ADDMM:
            self._report(args[1], args[2], True)
        elif func in _MATMUL:
            self._report(args[0], args[1], True)
        if func in _BATCHED and len(args) > 1:
            self._report_batched(args[0], args[1])
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

    def _report_batched(self, x: Any, weights: Any) -> None:
        """Report a product with all experts of a parameter (experts, in, out) as one matmul for each of them.

        Tokens that were not sent to an expert are zero here. They are left out, except on the meta device, which has no
        values; an expert without tokens isn't reported.
        """
        if not (isinstance(weights, Tensor) and isinstance(x, Tensor) and weights.dim() == x.dim() == 3):
            return
        name = self._names.get(weights.untyped_storage()._cdata)
        if name is None or weights.numel() != self._keep[name].numel() or len(x) != len(weights):
            return
        lies_transposed = weights.stride(1) == 1 and weights.stride(2) != 1
        elements = weights[0].numel()
        for expert, rows in enumerate(x):
            tokens = rows if rows.is_meta else rows[rows.ne(0).any(-1)]
            if len(tokens):
                self.visit(ObservedMatmul(name, tokens, elements, expert * elements, not lies_transposed))

    def visit(self, call: ObservedMatmul) -> None:
        """Called before each matmul with a watched parameter."""
        self._on_call(call)


_BATCHED = (torch.bmm, Tensor.bmm, torch.matmul, Tensor.matmul, Tensor.__matmul__)
_ADDMM = (torch.addmm, Tensor.addmm)
_MATMUL = (torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)
