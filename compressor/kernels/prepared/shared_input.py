"""Runs layers that read the same input, such as q, k and v, in one call of a kernel.

At one row, the matmul of a small layer takes as long as its call. The first of these layers that is called multiplies
by the weights of all of them. The others then return their stored outputs, if their input is the very same tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from threading import get_ident
from typing import Any

from torch import Tensor

from compressor.kernels.prepared.fused_layer import FusedLayer
from compressor.kernels.prepared.linear_call import LinearCall


@dataclass
class Waiting:
    """Outputs of one call that their layers have not returned yet, by the layers' numbers, and the input."""

    x: Tensor
    version: int
    outputs: dict[int, Tensor]


class SharedInput:
    """layers  in the order of their numbers

    If one of them receives another tensor, the shared call is disabled: each multiplies by itself from then on.
    """

    def __init__(self, layers: Sequence[FusedLayer]) -> None:
        self.call = LinearCall(layers)
        self.together = True
        self.waiting: dict[int, Waiting] = {}  # by thread

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"waiting": {}}

    @property
    def layers(self) -> Sequence[FusedLayer]:
        return self.call.layers

    def product(self, number: int, x: Tensor) -> Tensor | None:
        """x (..., in) -> (..., out) of the layer of this number; None if it must multiply by itself."""
        if not self.together or x.is_inference():  # inference tensors don't count their changes
            return None
        thread = get_ident()
        found = self.waiting.get(thread)
        if found is not None and number in found.outputs:
            if found.x is x and found.version == x._version:
                y = found.outputs.pop(number)
                if not found.outputs:
                    del self.waiting[thread]
                return y
            self.together = False
            self.waiting.clear()
            return None
        outputs = dict(enumerate(self.call(x)))
        y = outputs.pop(number)
        self.waiting[thread] = Waiting(x, x._version, outputs)
        return y
