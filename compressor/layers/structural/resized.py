"""Sets attributes of the model's own module, such as the number of heads after pruning.

Some modules keep their number of heads, or the width of all heads, in an attribute and compute with it.
`compressor.analysis.prunable_units` finds these attributes by making the model twice. No tensors.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from compressor.errors import ModelError
from compressor.layers.base import DAMAGED_HINT, Layer

EPS_ATTRIBUTES = ("eps", "variance_epsilon", "epsilon")  # the names of eps in norms


class Resized(Layer):
    """Sets the attributes in the spec on a module. It is never part of a model itself.

    attributes  name -> number, for attributes that the module has
    eps         of a norm, for any name of the attribute; optional
    """

    format_name = "resized"
    stands_for = "settings"
    weight_only = False

    @staticmethod
    def wrap(module: nn.Module, shape: tuple[int, ...], format_params: dict[str, Any]) -> None:
        """raises ModelError for an attribute that the module doesn't have"""
        found = dict(format_params["attributes"])
        if "eps" in format_params:
            found |= {name: format_params["eps"] for name in EPS_ATTRIBUTES if hasattr(module, name)} or {
                "eps": format_params["eps"]
            }
        for name, value in found.items():
            if not hasattr(module, name):
                raise ModelError(
                    f"{type(module).__name__} has no {name}",
                    where="resized",
                    hint=DAMAGED_HINT,
                    data={"module": type(module).__name__, "name": name},
                )
            setattr(module, name, value)
