"""Records what the verification of an artifact found. `Findings.to_json` is the report's `verification` section."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, NotRequired, TypedDict, cast

from compressor.errors import Because, values_of


class LayersRow(TypedDict):
    """A `LayerComparison` as JSON values."""

    compared: int
    largest_share_of_allowed: float
    max_logit_difference: float


class SourceRow(TypedDict):
    """A `SourceComparison` as JSON values, with the values of its `TensorComparison` if there is one."""

    loaded_to: str
    output_distance: float | None
    tensors: NotRequired[int]
    weights: NotRequired[int]
    largest_error_difference: NotRequired[float]


class Verification(TypedDict):
    """`Findings` as JSON values, with a key for each of its fields.

    because  the values of each problem, for programs; not in reports of 0.1.0
    """

    stock_load: bool | None
    own_load: bool | None
    loaded: str | None
    missing: list[str]
    unexpected: list[str]
    mismatched: list[str]
    max_logit_difference: float | None
    tolerance: float | None
    generated_tokens: int | None
    stock_layers: LayersRow | None
    notes: list[str]
    source: SourceRow | None
    not_compared: str | None
    problems: list[str]
    because: NotRequired[list[dict[str, Any]]]


@dataclass(frozen=True)
class LayerComparison:
    """Layers of a stock loader that compute their own matmul, compared with what they should compute.

    compared              number of layers
    max_logit_difference  between this loader's model and ours; it is reported and not judged
    """

    compared: int
    largest_share_of_allowed: float
    max_logit_difference: float


@dataclass(frozen=True)
class TensorComparison:
    """The comparison of tensors with the source.

    tensors                   number of dense tensors that equal the source's
    weights                   number of stored weights whose error was measured again
    largest_error_difference  largest difference of such an error from the one that the run recorded
    """

    tensors: int
    weights: int
    largest_error_difference: float


@dataclass(frozen=True)
class SourceComparison:
    """The comparison with the source.

    loaded_to        memory | disk | parts (a block is in memory while it runs)
    output_distance  relative; None for outputs of another shape
    tensors          None if a step rewrote the model, so that tensors have no counterpart
    """

    loaded_to: str
    output_distance: float | None
    tensors: TensorComparison | None = None

    def to_json(self) -> SourceRow:
        row: SourceRow = {"loaded_to": self.loaded_to, "output_distance": self.output_distance}
        if (counted := self.tensors) is not None:
            row["tensors"], row["weights"] = counted.tensors, counted.weights
            row["largest_error_difference"] = counted.largest_error_difference
        return row

    @classmethod
    def from_json(cls, row: SourceRow) -> SourceComparison:
        tensors = None
        if "tensors" in row:
            tensors = TensorComparison(row["tensors"], row["weights"], row["largest_error_difference"])
        return cls(row["loaded_to"], row["output_distance"], tensors)


@dataclass
class Findings:
    """Results of the checks. A check that was not reached leaves None. The artifact is good if `problems` stays empty.

    loaded        whole | parts: how the artifact was in memory while it ran. In parts, each block is loaded when it
                  runs, and dequantized by the library of the stock format
    missing, unexpected, mismatched  tensors, as the stock loader reports them
    tolerance     the largest allowed `max_logit_difference`
    notes         findings that are reported and are not problems
    not_compared  why there was no comparison with the source
    problems      sentences; each `errors.Because` has its values, too
    """

    stock_load: bool | None = None
    own_load: bool | None = None
    loaded: str | None = None
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    max_logit_difference: float | None = None
    tolerance: float | None = None
    generated_tokens: int | None = None
    stock_layers: LayerComparison | None = None
    notes: list[str] = field(default_factory=list)
    source: SourceComparison | None = None
    not_compared: str | None = None
    problems: list[str] = field(default_factory=list)

    def to_json(self) -> Verification:
        source = self.source.to_json() if self.source is not None else None
        because = [values_of(problem) for problem in self.problems]
        return cast("Verification", {**asdict(self), "source": source, "because": because})

    @classmethod
    def from_json(cls, row: Verification) -> Findings:
        layers, source = row["stock_layers"], row["source"]
        none: list[dict[str, Any]] = [{} for _ in row["problems"]]
        return cls(
            stock_load=row["stock_load"],
            own_load=row["own_load"],
            loaded=row["loaded"],
            missing=row["missing"],
            unexpected=row["unexpected"],
            mismatched=row["mismatched"],
            max_logit_difference=row["max_logit_difference"],
            tolerance=row["tolerance"],
            generated_tokens=row["generated_tokens"],
            stock_layers=None if layers is None else LayerComparison(**layers),
            notes=row["notes"],
            source=None if source is None else SourceComparison.from_json(source),
            not_compared=row["not_compared"],
            problems=[
                Because(text, **values) for text, values in zip(row["problems"], row.get("because", none), strict=True)
            ],
        )
