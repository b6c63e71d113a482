"""What a plan holds: the plan as it is made from a recipe and a model, and as the choices of a run have decided it.

All of it is frozen. A choice that a pass makes in the run gives a plan of its own type, `DecidedPlan`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypedDict

from compressor.analysis.input_producers import Producers
from compressor.artifact.export_format import Route
from compressor.errors import CompressError, ErrorEvent, Notice, WarningRow
from compressor.model.facts import ModelFacts, Redefinition
from compressor.model.functions import Functions
from compressor.model.side_files import SideFilesRow
from compressor.model.stored_weight import StoredWeight
from compressor.model.structure import Structure
from compressor.model.weights import Weight
from compressor.recipe.recipe import Recipe, Step
from compressor.recipe.yaml_source import dotted

PlannedRow = TypedDict(  # a `PlanRow` as JSON values
    "PlannedRow",
    {
        "name": str,
        "shape": list[int],
        "role": str,
        "step": int,
        "pass": str,
        "from": str,
        "to": str,
        "bytes_before": int,
        "bytes_after": int,
    },
)
_OfPass = TypedDict("_OfPass", {"pass": str})


class ReshapeRow(_OfPass):
    """A `Reshape` as JSON values. widths: of the residual stream, before and after; tokens: what token gates leave"""

    path: str
    parameters_before: int
    parameters_after: int
    widths: list[int]
    notes: list[str]
    decision: dict[str, Any] | None
    tokens: dict[str, Any] | None


class SkippedRow(TypedDict):
    """A weight that no step works on."""

    name: str
    reason: str


class UnusedRow(TypedDict):
    """A tensor of the source that fills nothing in the model. carried: into the artifact, as it is"""

    name: str
    bytes: int
    reason: str
    carried: bool


class RouteRow(TypedDict):
    """An export format, and why it was chosen."""

    name: str
    reason: str


class PlanJson(TypedDict):
    """A `Plan` as `plan --format json` prints it."""

    recipe: str
    architecture: str
    sweeps: list[list[str]]
    reshapes: list[ReshapeRow]
    weights: list[PlannedRow]
    skipped: list[SkippedRow]
    problems: list[ErrorEvent]
    warnings: list[WarningRow]
    route: RouteRow | None
    untied_head: bool
    side_files: SideFilesRow
    unused_tensors: list[UnusedRow]
    source_bytes: int
    predicted_weight_bytes: int
    predicted_artifact_bytes: int
    peak_memory_bytes: int
    disk_bytes: int


StepPath = tuple[str | int, ...]
Selected = Mapping[StepPath, tuple[Weight, ...]]  # step path -> the weights that the step works on


@dataclass
class Findings:
    """What is noticed while a plan is made, in the order in which it is reported; it is only added to.

    problems  each of them refuses the run
    """

    problems: list[CompressError] = field(default_factory=list)
    warnings: list[Notice] = field(default_factory=list)

    def warn(self, code: str, where: str, message: str) -> None:
        self.warnings.append(Notice(code, where, message))


@dataclass(frozen=True)
class Reshape:
    """A step that changes the model itself: what it starts from, what it makes of it."""

    step: Step
    before: Structure
    facts: ModelFacts
    redefinition: Redefinition
    after: Structure

    def to_json(self) -> ReshapeRow:
        return {
            "pass": self.step.name,
            "path": dotted(self.step.path),
            "parameters_before": parameter_count(self.before),
            "parameters_after": parameter_count(self.after),
            "widths": list(self.redefinition.widths),
            "notes": list(self.redefinition.notes),
            "decision": self.redefinition.decision,
            "tokens": self.redefinition.tokens,
        }


@dataclass(frozen=True)
class PlanRow:
    """What one step does to one weight.

    step           number of the step in the recipe
    format_before  of the weight as the step finds it
    format_after   of the weight as it leaves it
    """

    name: str
    shape: tuple[int, ...]
    role: str
    step: int
    pass_name: str
    format_before: str
    format_after: str
    bytes_before: int
    bytes_after: int

    def to_json(self) -> PlannedRow:
        return {
            "name": self.name,
            "shape": list(self.shape),
            "role": self.role,
            "step": self.step,
            "pass": self.pass_name,
            "from": self.format_before,
            "to": self.format_after,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
        }


@dataclass(frozen=True)
class Formats:
    """What the storing steps leave, all of them together.

    forms          weight name -> the format it will have (only those that change)
    counted_dense  of these the ones that may stay dense (`WeightPass.alternatives`) and would be larger for it
    """

    rows: tuple[PlanRow, ...]
    forms: Mapping[str, StoredWeight]
    counted_dense: frozenset[str]


@dataclass(frozen=True)
class Sizes:
    """All in bytes; artifact_bytes counts what loading needs, not reports."""

    weight_bytes: int = 0
    artifact_bytes: int = 0
    peak_memory_bytes: int = 0
    disk_bytes: int = 0


@dataclass(frozen=True)
class Plan:
    """What a run will do, before it has read a weight.

    source         the model as it was given
    structure      the model that steps which store weights work on: the source, or what `reshapes` make of it
    selected       step path -> the weights it touches
    forms          weight name -> the format it will have (only those that change)
    counted_dense  of these the ones that may stay dense (`WeightPass.alternatives`) and would be larger for it
    functions      activations, norms and softmax, if any step selects such
    unused         tensors of the source that fill nothing in the model: name, bytes, reason, whether they are carried
    producers      of the inputs of weights, by kind of block, where a step asks for them (`Traits.rescales`)
    sizes          zero where no export format fits
    tries_loaders  whether the export format is tried on a small probe model of this class
    """

    recipe: Recipe
    source: Structure
    structure: Structure
    reshapes: tuple[Reshape, ...]
    selected: Selected
    functions: Functions
    forms: Mapping[str, StoredWeight]
    counted_dense: frozenset[str]
    rows: tuple[PlanRow, ...]
    skipped: tuple[SkippedRow, ...]
    unused: tuple[UnusedRow, ...]
    route: Route | None
    untied: bool
    producers: Producers
    sizes: Sizes
    problems: tuple[CompressError, ...]
    warnings: tuple[Notice, ...]
    tries_loaders: bool

    @property
    def source_bytes(self) -> int:
        return self.source.checkpoint.nbytes

    @property
    def weight_bytes(self) -> int:
        return self.sizes.weight_bytes

    @property
    def artifact_bytes(self) -> int:
        return self.sizes.artifact_bytes

    @property
    def peak_memory_bytes(self) -> int:
        return self.sizes.peak_memory_bytes

    @property
    def disk_bytes(self) -> int:
        return self.sizes.disk_bytes

    def functions_of(self, step: Step, part: int) -> tuple[Weight, ...]:
        """The functions of a part that a step selects."""
        chosen = {weight.name for weight in self.selected[step.path]}
        return tuple(function for function in self.functions.by_part.get(part, []) if function.name in chosen)

    def reshape_of(self, step: Step) -> Reshape:
        """What a reshaping step makes of the model."""
        return next(reshape for reshape in self.reshapes if reshape.step == step)

    def to_json(self) -> PlanJson:
        return {
            "recipe": self.recipe.name,
            "architecture": self.structure.architecture,
            "sweeps": [[step.name for step in sweep] for sweep in self.recipe.sweeps],
            "reshapes": [reshape.to_json() for reshape in self.reshapes],
            "weights": [row.to_json() for row in self.rows],
            "skipped": list(self.skipped),
            "problems": [problem.event() for problem in self.problems],
            "warnings": [notice.to_json() for notice in self.warnings],
            "route": None if self.route is None else route_row(self.route),
            "untied_head": self.untied,
            "side_files": self.source.checkpoint.side_files.to_json(),
            "unused_tensors": list(self.unused),
            "source_bytes": self.source_bytes,
            "predicted_weight_bytes": self.weight_bytes,
            "predicted_artifact_bytes": self.artifact_bytes,
            "peak_memory_bytes": self.peak_memory_bytes,
            "disk_bytes": self.disk_bytes,
        }


@dataclass(frozen=True)
class DecidedPlan(Plan):
    """A plan in which the run has decided what no plan can know: the shapes that passes chose, and all that follows.

    structure  before the sweeps as it follows from the choices; after them (`engine.plan.as_built`) as it was written
    """


def route_row(route: Route) -> RouteRow:
    return {"name": route.name, "reason": route.reason}


def parameter_count(structure: Structure) -> int:
    """Parameters of the checkpoint; what is tied counts once."""
    held = {source.tensor for name, _ in structure.model.named_parameters() for source in structure.sources_of(name)}
    return sum(math.prod(structure.checkpoint.tensors[tensor].shape) for tensor in held)


def sharer(weight: Weight, tied: Mapping[str, str]) -> str | None:
    """Another parameter that shares this one's storage."""
    return tied.get(weight.parameter) or next((t for t, s in tied.items() if s == weight.parameter), None)
