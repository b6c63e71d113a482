"""Follows the events of a run: what it is doing now, and how long the rest will take.

The rest is estimated from the plan's predicted times (`PredictedEvent`), scaled by how long the finished work took
compared with its prediction. Without a prediction (a run that is over within a minute) there is no estimate.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from compressor.engine.events import Event, PredictedStage, StageName

STAGES: dict[StageName, str] = {
    "plan": "planning",
    "write": "writing the artifact",
    "verify": "loading it in a fresh process",
    "evaluate": "measuring before and after",
}
ENOUGH = 0.02  # share of the predicted time after which the finished work scales the prediction


@dataclass
class Timeline:
    """The state of a run after the events that it has taken.

    stages  predicted stages in order, seconds for each of their parts
    at      number of the current stage in `stages`
    part    number of finished parts of the current stage
    """

    clock: Callable[[], float] = time.monotonic
    stages: list[PredictedStage] = field(default_factory=list)
    at: int = -1
    part: int = 0
    doing: str = STAGES["plan"]
    where: str = ""
    began: float = 0.0
    done: float = 0.0  # predicted seconds of the finished parts
    counted: float = 0.0  # seconds since `began`, up to the end of the last finished part

    def take(self, event: Event) -> None:
        """Follow one event."""
        if event["event"] == "predicted":
            self.stages = event["stages"]
            self.began = self.clock()
        elif event["event"] == "sweep":
            self._enter(f"sweep {event['sweep']}")
            self.doing, self.where = f"sweep {event['sweep'] + 1}: " + ", ".join(event["passes"]), ""
        elif event["event"] == "decide":
            self.where = f"{event['pass']} looks at the whole model"
        elif event["event"] == "progress":
            share = "" if event["share"] is None else f" {event['share']:.0%}"
            self.where = f"{event['what']}{share}"
        elif event["event"] == "part":
            self.where = f"after {event['name']} ({event['part'] + 1}/{event['parts']})"
            self._finish(event["part"] + 1)
        elif event["event"] == "stage":
            self._enter(event["name"])
            self.doing, self.where = STAGES[event["name"]], ""

    @property
    def activity(self) -> str:
        """What the run is doing, as a phrase."""
        return f"{self.doing}, {self.where}" if self.where else self.doing

    @property
    def seconds_left(self) -> float | None:
        """Estimated seconds until the end of the run; None without a prediction."""
        total = sum(sum(stage["parts"]) for stage in self.stages)
        if self.at < 0 or not total:
            return None
        scale = self.counted / self.done if self.done > ENOUGH * total else 1.0
        since = self.clock() - self.began - self.counted  # in the part that is under way
        return max(0.0, scale * (total - self.done) - since)

    def _enter(self, name: str) -> None:
        """A stage begins, so those before it have ended."""
        at = next((number for number, stage in enumerate(self.stages) if stage["name"] == name), None)
        if at is None:
            return
        for number in range(max(self.at, 0), at):
            self.done += sum(self.stages[number]["parts"][self.part if number == self.at else 0 :])
        self.at, self.part, self.counted = at, 0, self.clock() - self.began

    def _finish(self, part: int) -> None:
        if self.at < 0:
            return
        self.done += sum(self.stages[self.at]["parts"][self.part : part])
        self.part, self.counted = part, self.clock() - self.began
