"""The model's own module with other numbers in its attributes, as one of fewer heads needs them.

Modules that hold their count of heads, or the width of all heads, as a number of their own compute with it. Which
attributes these are, `compressor.analysis.prunable_units` found by making the model twice. No tensors.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from compressor.errors import ModelError
from compressor.layers.base import Layer

EPS_ATTRIBUTES = ("eps", "variance_epsilon", "epsilon")  # what norms call theirs


class Resized(Layer):
    """Never stands in a model itself: it sets what the spec says, and the module stays what it is.

    attributes  name -> number, of attributes that the module has
    eps         of a norm, under whatever name; optional
    """

    form = "resized"
    stands_for = "settings"
    weight_only = False

    @staticmethod
    def wrap(module: nn.Module, shape: tuple[int, ...], spec: dict[str, Any]) -> None:
        """raises ModelError for an attribute that the module doesn't have"""
        found = dict(spec["attributes"])
        if "eps" in spec:
            found |= {name: spec["eps"] for name in EPS_ATTRIBUTES if hasattr(module, name)} or {"eps": spec["eps"]}
        for name, value in found.items():
            if not hasattr(module, name):
                raise ModelError(
                    f"{type(module).__name__} has no {name}",
                    where="resized",
                    data={"module": type(module).__name__, "name": name},
                )
            setattr(module, name, value)
