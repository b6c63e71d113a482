"""Records of what a line of the journal committed. `Line.facts` holds their JSON form.

Every line has the `LineFacts`. A line of a decision also has the decision, a line of a saved choice also what was
saved.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from compressor.errors import Notice, PassError
from compressor.model.facts import Decision
from compressor.model.stored_weight import StoredWeight
from compressor.protocol.views import Recorded
from compressor.storage.journal import Line

# Columns of a weight's row in reports and in the journal that are not the pass's own.
SET_BY_ENGINE = {"step", "pass", "name", "part", "form", "spec", "shape", "role", "seconds"}
SET_BY_ENGINE |= {"bytes_before", "bytes_after", "bits_per_parameter"}
NEAR = 0.85  # likeness (difflib) from which a name is taken for a misspelt one


@dataclass(frozen=True)
class WeightRecord:
    """What a pass has done with one weight.

    own  values of the pass itself, by name
    """

    name: str
    part: int
    format_name: str
    format_params: Mapping[str, Any]
    shape: tuple[int, ...]
    role: str
    bytes_after: int
    seconds: float
    own: Mapping[str, Any]


def check_names(own: Mapping[str, Any], weight: str) -> None:
    """raises PassError if a pass records a value under a name that is nearly one that reports show, or is taken"""
    for name in own.keys() - Recorded.__annotations__.keys():
        if name in SET_BY_ENGINE:
            raise PassError(
                f"the pass records {name!r} of {weight}, which the engine records itself",
                where=weight,
                hint="Record it under another name.",
                data={"reason": "taken-name", "name": name},
            )
        if near := difflib.get_close_matches(name, Recorded.__annotations__, 1, NEAR):
            raise PassError(
                f"the pass records {name!r} of {weight}, and reports know {near[0]!r}",
                where=weight,
                hint=f"Write {near[0]}, or choose a name that can't be taken for it.",
                data={"reason": "near-name", "name": name, "known": near[0]},
            )


@dataclass(frozen=True)
class StepRecord:
    """What a step of the recipe has done with one weight. step: its number"""

    step: int
    pass_name: str
    weight: WeightRecord

    def to_json(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "pass": self.pass_name,
            "name": self.weight.name,
            "part": self.weight.part,
            "form": self.weight.format_name,
            "spec": self.weight.format_params,
            "shape": list(self.weight.shape),
            "role": self.weight.role,
            "bytes_after": self.weight.bytes_after,
            "seconds": self.weight.seconds,
            **self.weight.own,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> StepRecord:
        own = dict(values)
        step, pass_name = own.pop("step"), own.pop("pass")
        weight = WeightRecord(
            name=own.pop("name"),
            part=own.pop("part"),
            format_name=own.pop("form"),
            format_params=own.pop("spec"),
            shape=tuple(own.pop("shape")),
            role=own.pop("role"),
            bytes_after=own.pop("bytes_after"),
            seconds=own.pop("seconds"),
            own=own,
        )
        return cls(step, pass_name, weight)


@dataclass(frozen=True)
class LineFacts:
    """What every line has.

    formats          weight name -> its format, for one part
    records          the weights that steps have put or kept
    relative_errors  relative error of each stored weight after it is dequantized; None if the line doesn't belong to a
                     part of a sweep that stores weights
    written          relative errors of dense parameters that have new values
    rewritten        tensors with new values, of a part of a step that rewrites the model
    """

    formats: Mapping[str, StoredWeight] = field(default_factory=dict)
    records: tuple[StepRecord, ...] = ()
    warnings: tuple[Notice, ...] = ()
    relative_errors: Mapping[str, float | None] | None = None
    written: Mapping[str, float] = field(default_factory=dict)
    rewritten: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        values: dict[str, Any] = {
            "forms": {name: stored.to_dict() for name, stored in self.formats.items()},
            "records": [record.to_json() for record in self.records],
            "warnings": [notice.to_json() for notice in self.warnings],
        }
        if self.rewritten:
            values["rewritten"] = list(self.rewritten)
        if self.relative_errors is None:
            return values
        return {**values, "relative_errors": dict(self.relative_errors), "written": dict(self.written)}

    @classmethod
    def of(cls, line: Line) -> LineFacts:
        values = line.facts
        return cls(
            {name: StoredWeight.from_dict(entry) for name, entry in values["forms"].items()},
            tuple(map(StepRecord.from_json, values["records"])),
            tuple(map(Notice.from_json, values["warnings"])),
            values.get("relative_errors"),
            values.get("written", {}),
            tuple(values.get("rewritten", ())),
        )


@dataclass(frozen=True)
class DecisionFacts:
    """What a step has decided over the whole model, and its warnings."""

    decision: Decision | None
    warnings: tuple[Notice, ...]

    def to_json(self) -> dict[str, Any]:
        return {**LineFacts(warnings=self.warnings).to_json(), "decision": self.decision}

    @classmethod
    def of(cls, line: Line) -> DecisionFacts:
        return cls(line.facts["decision"], LineFacts.of(line).warnings)


@dataclass(frozen=True)
class SavedFacts:
    """What a step has saved during its choice. step: progress; slot: which of two files holds it"""

    step: int
    slot: int

    def to_json(self) -> dict[str, Any]:
        return {**LineFacts().to_json(), "step": self.step, "slot": self.slot}

    @classmethod
    def of(cls, line: Line) -> SavedFacts:
        return cls(line.facts["step"], line.facts["slot"])
