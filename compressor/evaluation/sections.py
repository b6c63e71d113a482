"""Types of the sections of report.json, so that mypy finds a misspelt key. Schema: report.schema.json."""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict


class Sizes(TypedDict):
    """Of an evaluation; what is compared is null without a baseline."""

    before_bytes: int | None
    after_bytes: int
    ratio: float | None


class RunSizes(TypedDict):
    """Of a run. by_class: bytes after, by kind of tensor."""

    before_bytes: int
    after_bytes: int
    ratio: float
    bits_per_parameter: float
    by_class: dict[str, int]
    predicted_bytes: int
    predicted_artifact_bytes: int
    parameters: int


class SpeedRow(TypedDict):
    """before: missing where there was no other model."""

    before: NotRequired[float | None]
    after: float | None


class RangeRow(TypedDict):
    name: str
    values: int
    outside: int


class Saturation(TypedDict):
    """reason: why layers are missing; None if none are."""

    reason: str | None
    layers: list[RangeRow]


class Run(TypedDict):
    """Facts of one run, which another one of the same recipe does not repeat."""

    started: str
    seconds: float
    seconds_by_stage: dict[str, float]
    peak_rss_bytes: int
    predicted_peak_bytes: int
    resumed: list[dict[str, int]]
    speed: dict[str, SpeedRow]


class EvaluationRun(TypedDict):
    started: str
    seconds: float
    speed: dict[str, SpeedRow]


class DataFacts(TypedDict):
    """What a report says of the samples that were used."""

    source: str
    sha256: str
    samples: int
    tokens: int
    distinct_tokens: int
    digest: str
    part: dict[str, Any] | None


class ModelFacts(TypedDict):
    """The model of a run."""

    source: str
    sha256: str
    architecture: str
    parameters: int
    blocks: int
    dtype: str
    license: str | None
    side_files: dict[str, Any]


class Seeds(TypedDict):
    run: int
    data: int
    eval: int


StepRow = TypedDict("StepRow", {"index": int, "pass": str, "path": str, "matched": int, "settings": dict[str, Any]})


class KernelRow(TypedDict):
    """op: a stored form; chosen: what multiplies it; why: the reason for that."""

    op: str
    chosen: str
    why: str


class Subject(TypedDict):
    """A model of an evaluation."""

    source: str
    sha256: str
    architecture: str | None
