"""Defines the weights of a model by the names of its checkpoint, and the groups that read the same input."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

FUNCTION_ROLES = ("activation", "norm", "softmax")
ROLES = ("attention", "mlp", "experts", "head", "embedding", "router", "shortcut", *FUNCTION_ROLES)


@dataclass(frozen=True)
class Weight:
    """One matrix of the checkpoint, with the checkpoint's name (without `.weight`), or one function of the model.

    parameter   its module parameter, e.g. `model.layers.0.mlp.experts.gate_up_proj`; of a function the path of its
                module
    shape       (out_features, in_features); of a norm (width,) of its gain, of other functions ()
    transposed  stored as (in, out), as GPT-2's Conv1D does
    expert      index along the first dimension of a fused (experts, ...) parameter, else None
    rows        (start, stop) of the parameter's output rows that this matrix fills
    bias        checkpoint name of the bias, if there is one
    role        attention | mlp | experts | router | head | embedding | shortcut (on the residual path of a sliced
                block), or of a function activation | norm | softmax
    facts       what a function computes, found by running it: {"function": "gelu"}, {"kind": "rms", "eps": ...}
    """

    name: str
    tensor: str  # checkpoint key, usually name + ".weight"; empty for a function without a weight
    parameter: str
    shape: tuple[int, ...]
    role: str
    transposed: bool = False
    expert: int | None = None
    rows: tuple[int, int] | None = None
    bias: str | None = None
    facts: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def is_function(self) -> bool:
        return self.role in FUNCTION_ROLES

    @property
    def out_features(self) -> int:
        return self.shape[0]

    @property
    def in_features(self) -> int:
        return self.shape[1]


@dataclass(frozen=True)
class Group:
    """Weights that read the same input, in forward order."""

    weights: tuple[Weight, ...]

    @property
    def in_features(self) -> int:
        return self.weights[0].in_features

    @property
    def expert(self) -> int | None:
        return self.weights[0].expert

    @property
    def name(self) -> str:
        return self.weights[0].name

    def __iter__(self) -> Iterator[Weight]:
        return iter(self.weights)


Stage = tuple[Group, ...]  # groups whose inputs one run of the block gives
