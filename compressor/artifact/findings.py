"""What the verification of an artifact found, as records; `Findings.to_dict` is the report's `verification` section."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class LayerComparison:
    """Layers of a stock loader that multiply by themselves, compared with what they should compute.

    compared              number of layers
    max_logit_difference  between this loader's model and ours; reported and not judged
    """

    compared: int
    largest_share_of_allowed: float
    max_logit_difference: float


@dataclass(frozen=True)
class TensorComparison:
    """tensors                   dense ones that equal the source's
    weights                   stored ones whose error was measured again
    largest_error_difference  from what the run recorded
    """

    tensors: int
    weights: int
    largest_error_difference: float


@dataclass(frozen=True)
class SourceComparison:
    """loaded_to        memory | disk
    output_distance  relative; None for outputs of another shape
    tensors          None where a step rewrote the model, so that tensors have no counterpart
    """

    loaded_to: str
    output_distance: float | None
    tensors: TensorComparison | None = None

    def to_dict(self) -> dict[str, Any]:
        counted = asdict(self.tensors) if self.tensors is not None else {}
        return {"loaded_to": self.loaded_to, "output_distance": self.output_distance, **counted}


@dataclass
class Findings:
    """Filled step by step; a step that was not reached leaves None. All is well where `problems` stays empty.

    missing, unexpected, mismatched  tensors, as the stock loader reports them
    tolerance     that `max_logit_difference` may reach
    notes         what is reported and is no problem
    not_compared  why there was no comparison with the source
    """

    stock_load: bool | None = None
    own_load: bool | None = None
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

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "source": self.source and self.source.to_dict()}
