"""Finds the matmuls of a block that choose experts, by following their outputs.

A router is recognized by what it computes: it has as many outputs as there are experts, and integers (the chosen
experts, or their order) are computed from its output. Names differ between families (`gate`, `router`,
`router.layer`), and a `gate_proj` is not a router.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from compressor.errors import Because
from compressor.model.observed_matmul import ObservedMatmul, ObservedMatmuls


class ChoiceTrace(ObservedMatmuls):
    """Records every matmul with a watched parameter, and what its output chooses, while it is active.

    calls          the matmuls with one matrix, in order
    chosen_by      parameters from whose output integers were computed, value for value: without another matmul or an
                   operation that returns more or fewer values in between
    whole          parameters with several matrices that aren't multiplied one matrix at a time -> how they are used
    expert_counts  the numbers of matrices of parameters that have several
    """

    def __init__(self, watched: Mapping[str, Tensor]) -> None:
        super().__init__(watched, self._note)
        self.calls: list[ObservedMatmul] = []
        self.chosen_by: set[str] = set()
        self.whole: dict[str, Because] = {}
        self.expert_counts: set[int] = set()
        self._watched = dict(watched)
        self._made_by: dict[int, tuple[Tensor, frozenset[str]]] = {}  # the tensor is kept, so that its id stays unique
        self._current: str | None = None

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        self._current = None
        before = len(self.calls)
        result = super().__torch_function__(func, types, args, kwargs)
        given = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)]
        if func in _BATCHED:
            self._note_batched(given, {call.parameter for call in self.calls[before:]})
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if self._current is not None:
            self._remember(made, frozenset({self._current}))
            return result
        known = [self._made_by[id(tensor)] for tensor in given if id(tensor) in self._made_by]
        if known and torch.is_tensor(made[0] if made else None):
            names = frozenset().union(*(names for _, names in known))
            self.chosen_by |= names if any(_is_whole(tensor) for tensor in made) else frozenset()
            self._remember([tensor for tensor in made if tensor.numel() == known[0][0].numel()], names)
        return result

    def _remember(self, made: list[Tensor], names: frozenset[str]) -> None:
        for tensor in made:
            if tensor.is_floating_point():
                self._made_by[id(tensor)] = (tensor, names)

    def _note(self, call: ObservedMatmul) -> None:
        self._current = call.parameter
        parameter = self._watched[call.parameter]
        matrices = parameter.numel() // call.elements
        if parameter.dim() == 3 and matrices == parameter.shape[0] and call.row_offset % call.elements == 0:
            self.expert_counts.add(parameter.shape[0])
        elif matrices > 1:
            self.expert_counts.add(matrices)
            message = "it contains several matrices, and a matmul reads one of them"
            self.whole[call.parameter] = Because(message, reason="several-matrices")
        self.calls.append(call)

    def _note_batched(self, given: list[Tensor], reported: set[str]) -> None:
        """Note parameters of which all matrices are multiplied, unless they were reported one by one."""
        for tensor in given:
            name = self._names.get(tensor.untyped_storage()._cdata)
            if name is None or name in reported or tensor.dim() != 3:
                continue
            if tensor.numel() == self._watched[name].numel():
                self.expert_counts.add(tensor.shape[0])
                message = "all experts are multiplied in one batched product"
                self.whole[name] = Because(message, reason="batched-product")


def _is_whole(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


_BATCHED = tuple(
    func
    for func in (
        torch.bmm,
        Tensor.bmm,
        torch.baddbmm,
        Tensor.baddbmm,
        torch.matmul,
        Tensor.matmul,
        Tensor.__matmul__,
        torch.einsum,
        getattr(torch, "_grouped_mm", None),
        getattr(torch.nn.functional, "grouped_mm", None),
    )
    if func is not None
)
