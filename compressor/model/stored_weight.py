"""Describes how one weight is stored: its quantization format and the format's parameters."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict, cast

from compressor.layers import find_layer
from compressor.lazy import torch
from compressor.model.weights import Weight, part_of

if TYPE_CHECKING:
    from compressor.model.checkpoint import Checkpoint


class StoredEntry(TypedDict):
    """A `StoredWeight` as JSON values: its format and parameters, and what a reader needs of its `Weight`."""

    form: str
    spec: dict[str, Any]
    name: str
    tensor: str
    parameter: str
    shape: list[int]
    role: str
    transposed: NotRequired[bool]
    expert: NotRequired[int | None]
    rows: NotRequired[list[int] | None]
    bias: NotRequired[str | None]
    facts: NotRequired[dict[str, Any]]


@dataclass(frozen=True)
class StoredWeight:
    """How one weight is stored. It is JSON in the journal and the manifest."""

    format_name: str
    format_params: dict[str, Any]
    weight: Weight

    def to_dict(self) -> StoredEntry:
        entry = asdict(self.weight)
        if not entry["facts"]:
            del entry["facts"]
        values = {"form": self.format_name, "spec": self.format_params, **entry, "shape": list(entry["shape"])}
        return cast("StoredEntry", values)

    @property
    def described(self) -> str:
        """The format in a few words."""
        return (
            f"{self.format_name} {self.format_params['bits']} bits"
            if "bits" in self.format_params
            else self.format_name
        )

    @property
    def bias(self) -> str | None:
        """Name of the dense bias, if this format stores the bias too."""
        if self.weight.bias is None or not find_layer(self.format_name).holds_bias(self.format_params):
            return None
        return self.weight.bias

    @classmethod
    def from_dict(cls, entry: StoredEntry) -> StoredWeight:
        values: dict[str, Any] = {key: value for key, value in entry.items() if key not in ("form", "spec")}
        values["shape"] = tuple(values["shape"])
        values["rows"] = tuple(values["rows"]) if values.get("rows") else None
        return cls(entry["form"], entry["spec"], Weight(**values))


def has_experts(formats: Iterable[StoredWeight]) -> bool:
    return any(stored.weight.expert is not None for stored in formats)


def replaced_tensors(formats: Iterable[StoredWeight], checkpoint: Checkpoint) -> set[str]:
    """The dense tensors that these stored weights replace. One of all experts is replaced only when all are stored."""
    replaced: set[str] = set()
    stored: Counter[str] = Counter()  # tensor of all experts -> its elements that are stored
    for stored_weight in formats:
        if stored_weight.weight.is_slice:
            stored[stored_weight.weight.tensor] += math.prod(stored_weight.weight.shape)
        else:
            replaced |= {name for name in (stored_weight.weight.tensor, stored_weight.bias) if name is not None}
    whole = {name for name, count in stored.items() if count == math.prod(checkpoint.tensors[name].shape)}
    return replaced | whole


def joined_experts(
    raw: Iterator[torch.Tensor] | None,
    stored: Iterable[StoredWeight],
    shape: Sequence[int],
    dtype: torch.dtype,
    matrix_of: Callable[[StoredWeight], torch.Tensor],
) -> Iterator[torch.Tensor]:
    """The matrices (rows, columns) of a parameter of all experts, one after the other.

    raw        those of its dense tensor, which may lie otherwise there; None: every row is stored
    stored     the stored weights in it
    shape      (experts, rows, columns) of the parameter
    dtype      of the matrices if there is no dense tensor
    matrix_of  gives the dequantized matrix (out_features, in_features) of a stored weight
    """
    members: dict[int | None, list[StoredWeight]] = {}
    for stored_weight in stored:
        members.setdefault(stored_weight.weight.expert, []).append(stored_weight)
    dense = (torch.empty(*shape[1:], dtype=dtype) for _ in range(shape[0])) if raw is None else raw
    for number, value in enumerate(as_in_parameter(dense, shape)):
        for stored_weight in members.get(number, ()):
            part_of(value, replace(stored_weight.weight, expert=None)).copy_(matrix_of(stored_weight))
        yield value


def as_in_parameter(matrices: Iterable[torch.Tensor], shape: Sequence[int]) -> Iterator[torch.Tensor]:
    """Matrices of experts as they lie in a parameter (experts, rows, columns): transposed if their shape is another."""
    return (matrix if matrix.shape == tuple(shape[1:]) else matrix.mT for matrix in matrices)


DISTANCE_ELEMENTS = 1 << 20  # compared at a time: they stay in a cache, and no second copy of a matrix is needed


def relative_distance(found: torch.Tensor, meant: torch.Tensor) -> float:
    """Frobenius norm of the difference divided by that of `meant`; 0 if both are zero, Inf if only `meant` is.

    found, meant  of the same shape and any floating dtype; differences and sums of a row are float32, the sum of the
                  rows float64
    """
    rows = max(1, DISTANCE_ELEMENTS // max(1, meant[:1].numel())) if meant.dim() > 1 else DISTANCE_ELEMENTS
    difference = size = 0.0
    for first, second in zip(found.split(rows), meant.split(rows), strict=True):
        second = second.to(torch.float32)
        difference += float((first.to(second) - second).square_().sum(-1).sum(dtype=torch.float64))
        size += float(second.square().sum(-1).sum(dtype=torch.float64))
    if size == 0:
        return 0.0 if difference == 0 else float("inf")
    return (difference / size) ** 0.5
