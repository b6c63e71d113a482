"""Layers that read the same input, such as q, k and v, in one call of a kernel.

At one row a small layer's product takes as long as calling it. The first of such layers that is called multiplies by
the weights of all of them; the others find their outputs there, as long as they come with the very same tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from threading import get_ident
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from compressor.kernels.prepare.linear_call import LinearCall

if TYPE_CHECKING:
    from compressor.kernels.prepare.prepared import PreparedLinear

# names that a module's children have in transformers where all of them are given the same tensor
TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("query", "key", "value"), ("w1", "w3"))


@dataclass
class Waiting:
    """Outputs of one call that their layers haven't asked for, by the layers' numbers; of which input they are."""

    x: Tensor
    version: int
    outputs: dict[int, Tensor]


class SharedInput:
    """layers  in the order of their numbers

    If one of them turns out to be given another tensor, each multiplies by itself from then on.
    """

    def __init__(self, layers: list[PreparedLinear]) -> None:
        self.call = LinearCall(layers)
        self.together = True
        self.waiting: dict[int, Waiting] = {}  # by thread

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"waiting": {}}

    @property
    def layers(self) -> list[PreparedLinear]:
        return self.call.layers

    def product(self, number: int, x: Tensor) -> Tensor | None:
        """x (..., in) -> (..., out) of the layer of this number; None where it has to multiply by itself."""
        if not self.together or x.is_inference():  # such tensors don't count their changes
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


def share_inputs(model: nn.Module, is_prepared: type[PreparedLinear]) -> None:
    """Let prepared layers side by side under the names of TOGETHER share calls, where their formats agree."""
    for module in model.modules():
        children = dict(module.named_children())
        for names in TOGETHER:
            layers = [child for name in names if isinstance(child := children.get(name), is_prepared)]
            if len(layers) > 1 and len(layers) == len(names) and len({_format(layer) for layer in layers}) == 1:
                shared = SharedInput(layers)
                for number, layer in enumerate(layers):
                    layer.shared = (shared, number)


def _format(layer: PreparedLinear) -> tuple[Any, ...]:
    if layer.call is None or layer.ordered:
        return (id(layer),)
    return layer.choice, layer.in_features, layer.bits, layer.group_size
