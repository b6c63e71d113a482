"""What a measuring process is asked and answers, as JSON values. `evaluate` asks, `quality` and `speed` answer."""

from __future__ import annotations

from typing import Literal, TypedDict

from compressor.evaluation.sections import KernelRow, MetricRow, Patches, Saturation


class Samples(TypedDict):
    """Files of samples, and of their labels if there are any."""

    tokens: str
    labels: str | None


class Request(Samples):
    """What both kinds of requests hold.

    confidence   level of the intervals that gates are judged by; None: they are not wanted
    most_tokens  that the model takes at once, if they are less than `SPEED_TOKENS`
    """

    threads: int
    batch_size: int
    seed: int
    confidence: float | None
    most_tokens: int | None
    trust_remote_code: bool


class QualityRequest(Request):
    """before: source checkpoint; None: `after` alone is measured"""

    kind: Literal["quality"]
    before: str | None
    after: str
    metrics: list[str]


class SpeedRequest(Request):
    """kernels: load the model as `compressor.load` does"""

    kind: Literal["speed"]
    model: str
    kernels: bool


class QualityAnswer(TypedDict):
    metrics: dict[str, MetricRow]
    saturation: Saturation
    patches: Patches | None


class SpeedAnswer(TypedDict):
    """values: rates, memory and load time by name, as in the report; kernels: None unless they were asked for"""

    values: dict[str, float | None]
    kernels: list[KernelRow] | None
