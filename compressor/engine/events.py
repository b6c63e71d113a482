"""What a run tells while it goes on: the events that `emit` is given, each a JSON object as --json prints it.

This is the one place that names their keys. Progress displays and programs read the same values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, TypedDict

from compressor.errors import Notice

StageName = Literal["plan", "write", "verify", "evaluate"]
_OfPass = TypedDict("_OfPass", {"pass": str})


class StageEvent(TypedDict):
    """A stage of the run begins; sweeps have events of their own."""

    event: Literal["stage"]
    name: StageName


class SweepEvent(TypedDict):
    """A sweep begins. units: how many parts it goes through; passes: of its steps, by name"""

    event: Literal["sweep"]
    sweep: int
    units: int
    passes: list[str]


class PartEvent(TypedDict):
    """A sweep is done with a part of the model. unit: number of the part; units: how many there are"""

    event: Literal["unit"]
    sweep: int
    unit: int
    units: int
    name: str
    seconds: float


class WeightEvent(_OfPass):
    """A weight is done, and its part committed."""

    event: Literal["weight"]
    name: str
    seconds: float


class DecideEvent(_OfPass):
    """A pass begins to choose over the whole model."""

    event: Literal["decide"]
    sweep: int


class WarningEvent(TypedDict):
    event: Literal["warning"]
    code: str
    where: str
    message: str


class ResultEvent(TypedDict):
    """The run has ended, perhaps with a gate that does not hold. output: where the artifact lies"""

    event: Literal["result"]
    status: str
    output: str
    report: Mapping[str, Any]


Event = StageEvent | SweepEvent | PartEvent | WeightEvent | DecideEvent | WarningEvent | ResultEvent
Emit = Callable[[Event], None]


def warning_event(notice: Notice) -> WarningEvent:
    return {"event": "warning", **notice.to_json()}
