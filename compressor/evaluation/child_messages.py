"""Defines the JSON messages of a measuring process: `evaluate` asks, `quality` and `speed` answer."""

from __future__ import annotations

from typing import Literal, TypedDict

from compressor.evaluation.sections import KernelRow, MetricRow, Patches, Saturation


class Samples(TypedDict):
    """Files of samples, and of their labels if there are any."""

    tokens: str
    labels: str | None


class Request(Samples):
    """The keys of both kinds of requests.

    confidence   level of the intervals that decide gates; None: no intervals are needed
    most_tokens  largest number of tokens that the model reads at once, if it is below `SPEED_TOKENS`
    memory       bytes that the process may use; None: most of what is free
    """

    threads: int
    batch_size: int
    seed: int
    confidence: float | None
    most_tokens: int | None
    memory: int | None
    trust_remote_code: bool


class QualityRequest(Request):
    """A request for quality. before: source checkpoint; None: only `after` is measured"""

    kind: Literal["quality"]
    before: str | None
    after: str
    metrics: list[str]


class SpeedRequest(Request):
    """A request for speed. is_baseline: as in `load_model`; kernels: load the model as `compressor.load` does"""

    kind: Literal["speed"]
    model: str
    is_baseline: bool
    kernels: bool


class QualityAnswer(TypedDict):
    """Measured quality. measured: whole | parts, how the models ran; None if they did not"""

    metrics: dict[str, MetricRow]
    saturation: Saturation
    patches: Patches | None
    measured: str | None


class SpeedAnswer(TypedDict):
    """Measured speed. values: rates, memory and load time by name, as in the report; kernels: None if not asked for"""

    values: dict[str, float | None]
    kernels: list[KernelRow] | None
