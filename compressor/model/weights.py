"""Defines the weights of a model by the names of its checkpoint, and the groups that read the same input."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

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
    tensor: str  # checkpoint key, usually name + ".weight" (see is_slice); empty for a function without a weight
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
    def is_slice(self) -> bool:
        """Whether its tensor contains other experts, too. Its name is then its own, and not the tensor's."""
        return self.expert is not None and self.name != self.tensor.removesuffix(".weight")

    @property
    def out_features(self) -> int:
        return self.shape[0]

    @property
    def in_features(self) -> int:
        return self.shape[1]


def part_of(value: torch.Tensor, weight: Weight) -> torch.Tensor:
    """The part of a parameter that a weight is, as (out_features, in_features); writes go through."""
    if weight.expert is not None:
        value = value[weight.expert]
    if weight.transposed:
        value = value.t()
    return value if weight.rows is None else value[weight.rows[0] : weight.rows[1]]


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


@dataclass(frozen=True)
class ScaledParameter:
    """A parameter, and the axis of it along which a feature lies; of one (experts, ...) all experts alike.

    offset  the model uses offset + parameter: 1 for the gain of some norms, else 0
    """

    parameter: str
    axis: int
    offset: float = 0.0


@dataclass(frozen=True)
class Producer:
    """What produces the input of weights feature by feature: a norm, or the rows of a matrix.

    With any positive factor for each slice, the block computes the same when the makers are divided by the factors and
    the consumers multiplied: column j of a consumer by the factor of slices[j].

    name       path of the norm, or the parameter of the matrix
    makers     the norm's weight and bias, or the matrix and its bias
    consumers  everything that reads the features
    slices     for each feature, the number of the maker's slice that makes it; several features may share one, as the
               query heads of a key-value head do
    """

    name: str
    kind: Literal["norm", "matrix"]
    makers: tuple[ScaledParameter, ...]
    consumers: tuple[ScaledParameter, ...]
    slices: tuple[int, ...]


Stage = tuple[Group, ...]  # groups whose inputs one replay of the block yields
