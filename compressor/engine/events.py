"""Events of a run: what `emit` is given while the run works, each a JSON object as --json prints it.

Only this file names their keys. Progress displays and programs read the same values.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

from compressor.errors import Notice

StageName = Literal["plan", "write", "verify", "evaluate"]
_OfPass = TypedDict("_OfPass", {"pass": str})


class StageEvent(TypedDict):
    """A stage of the run begins. Sweeps have their own events."""

    event: Literal["stage"]
    name: StageName


class PredictedStage(TypedDict):
    """A stage or a sweep ("sweep 0"), and the predicted seconds of its parts: one part each for other stages.

    known  false if a pass of the sweep doesn't count its work, so that it takes longer than predicted
    """

    name: str
    parts: list[float]
    known: bool


class PredictedEvent(TypedDict):
    """The predicted times of a run that takes longer than a minute, after its plan is made."""

    event: Literal["predicted"]
    stages: list[PredictedStage]


class AliveEvent(TypedDict):
    """Nothing else has happened for five seconds. doing: a phrase; seconds_left: None where it can't be estimated"""

    event: Literal["alive"]
    doing: str
    seconds: float
    seconds_left: float | None


class SweepEvent(TypedDict):
    """A sweep begins. parts: number of parts; passes: names of its steps"""

    event: Literal["sweep"]
    sweep: int
    parts: int
    passes: list[str]


class PartEvent(TypedDict):
    """A sweep has finished a part of the model. part: its number; parts: number of all parts"""

    event: Literal["part"]
    sweep: int
    part: int
    parts: int
    name: str
    seconds: float


class WeightEvent(_OfPass):
    """A weight is finished, and its part is committed."""

    event: Literal["weight"]
    name: str
    seconds: float


class DecideEvent(_OfPass):
    """A pass begins a choice over the whole model."""

    event: Literal["decide"]
    sweep: int


class ProgressEvent(TypedDict):
    """A pass is at work inside a part, or on a choice over the whole model.

    part   number of the part
    what   a weight, or a step of a choice
    share  how much of it is done, from 0 to 1; None if that is unknown
    """

    event: Literal["progress"]
    sweep: int
    part: int
    what: str
    share: float | None


class WarningEvent(TypedDict):
    event: Literal["warning"]
    code: str
    where: str
    message: str
    data: dict[str, Any]


class ResultEvent(TypedDict):
    """The run has ended, maybe with a gate that failed. output: path of the artifact"""

    event: Literal["result"]
    status: str
    output: str
    report: Mapping[str, Any]


Event = (
    StageEvent
    | PredictedEvent
    | AliveEvent
    | SweepEvent
    | PartEvent
    | WeightEvent
    | DecideEvent
    | ProgressEvent
    | WarningEvent
    | ResultEvent
)
Emit = Callable[[Event], None]
PROGRESS_SECONDS = 1.0  # least time between two progress events


@dataclass
class Progress:
    """Emits progress events, and leaves out those that follow another one too soon."""

    emit: Emit
    clock: Callable[[], float] = time.monotonic
    reported: float = float("-inf")

    def __call__(self, sweep: int, part: int, what: str, share: float | None = None) -> None:
        now = self.clock()
        if now - self.reported >= PROGRESS_SECONDS:
            self.reported = now
            self.emit({"event": "progress", "sweep": sweep, "part": part, "what": what, "share": share})


def warning_event(notice: Notice) -> WarningEvent:
    return {"event": "warning", **notice.to_json()}
