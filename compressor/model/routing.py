"""Which products of a block choose experts, found by following what they give.

A router is known by what it computes: it has as many outputs as there are experts, and whole numbers (the chosen
experts, or their order) are computed from its output. Names differ from family to family (`gate`, `router`,
`router.layer`), and a `gate_proj` is no router.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from compressor.errors import Because
from compressor.model.observed_matmul import ObservedMatmul, ObservedMatmuls


class ChoiceTrace(ObservedMatmuls):
    """Notes every product with a watched parameter, and what is chosen by its output, while it is active.

    calls          the products by one matrix, in order
    chosen_by      parameters of whose output whole numbers were computed, value for value: no other product, and no
                   operation that gives more or fewer values, lies between
    whole          parameters that hold several matrices and aren't multiplied one matrix at a time as they lie -> how
                   they are
    expert_counts  how many matrices the parameters hold that hold several
    """

    def __init__(self, watched: Mapping[str, Tensor]) -> None:
        super().__init__(watched, self._note)
        self.calls: list[ObservedMatmul] = []
        self.chosen_by: set[str] = set()
        self.whole: dict[str, Because] = {}
        self.expert_counts: set[int] = set()
        self._watched = dict(watched)
        self._made_by: dict[int, tuple[Tensor, frozenset[str]]] = {}  # the tensor is kept, so that its id stays its own
        self._current: str | None = None

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        self._current = None
        result = super().__torch_function__(func, types, args, kwargs)
        given = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)]
        if func in _BATCHED:
            self._note_batched(func, given)
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
        if parameter.dim() == 3:
            self.expert_counts.add(parameter.shape[0])
        elif matrices > 1:
            self.expert_counts.add(matrices)
            told = "it holds several matrices, of which a product reads one"
            self.whole[call.parameter] = Because(told, reason="several-matrices")
        self.calls.append(call)

    def _note_batched(self, func: Any, given: list[Tensor]) -> None:
        for tensor in given:
            name = self._names.get(tensor.untyped_storage()._cdata)
            if name is not None and tensor.dim() == 3 and math.prod(tensor.shape) == self._watched[name].numel():
                self.expert_counts.add(tensor.shape[0])
                told = "all experts are multiplied in one batched product"
                self.whole[name] = Because(told, reason="batched-product")


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
