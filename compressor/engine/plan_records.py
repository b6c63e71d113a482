"""Records of a plan: as it is made from a recipe and a model, and as the choices of a run have decided it.

All of them are frozen: a plan doesn't change once it is made. When a pass has chosen shapes in the run, a second plan
of its own type, `DecidedPlan`, is made for the sweeps that follow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypedDict

from compressor.analysis.input_producers import Producers
from compressor.artifact.export_format import ExportFormat
from compressor.errors import CompressError, ErrorEvent, Notice, WarningRow
from compressor.model.facts import Decision, ModelFacts, Redefinition, TokenAccount
from compressor.model.functions import Functions
from compressor.model.ledger import Ledger
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
    """A `Reshape` as JSON values. widths: of the residual stream, before and after; tokens: left by token gates"""

    path: str
    parameters_before: int
    parameters_after: int
    widths: list[int]
    notes: list[str]
    decision: Decision | None
    tokens: TokenAccount | None


class SkippedRow(TypedDict):
    """A weight that no step changes."""

    name: str
    reason: str


class ExportFormatRow(TypedDict):
    """An export format, and the reason for it."""

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
    route: ExportFormatRow | None
    untied_head: bool
    side_files: SideFilesRow
    ledger: Ledger
    source_bytes: int
    predicted_weight_bytes: int
    predicted_artifact_bytes: int
    peak_memory_bytes: int
    disk_bytes: int


StepPath = tuple[str | int, ...]
Selected = Mapping[StepPath, tuple[Weight, ...]]  # step path -> the weights that the step changes


@dataclass
class Findings:
    """Problems and warnings found while a plan is made, in the order in which they are reported. They are only added.

    problems  each of them makes the run impossible
    """

    problems: list[CompressError] = field(default_factory=list)
    warnings: list[Notice] = field(default_factory=list)

    def warn(self, code: str, where: str, message: str, /, **data: Any) -> None:
        self.warnings.append(Notice(code, where, message, data))


@dataclass(frozen=True)
class Reshape:
    """A step that changes the model itself: the model before it and after it."""

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
    format_before  format of the weight before the step
    format_after   format of the weight after the step
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
    """The formats of all weights after all steps.

    formats        weight name -> the format it will have (only weights whose format changes)
    counted_dense  those of them that may stay dense (`WeightPass.alternatives`) and would then be larger
    """

    rows: tuple[PlanRow, ...]
    formats: Mapping[str, StoredWeight]
    counted_dense: frozenset[str]


@dataclass(frozen=True)
class Sizes:
    """All sizes are in bytes. artifact_bytes counts the files that loading needs, without the reports.

    spills        the hidden states of the calibration data don't fit into memory, so they lie in files
    maps_experts  the experts of a block don't fit into memory, so they lie in a mapped file
    """

    weight_bytes: int = 0
    artifact_bytes: int = 0
    peak_memory_bytes: int = 0
    disk_bytes: int = 0
    spills: bool = False
    maps_experts: bool = False


@dataclass(frozen=True)
class Plan:
    """What a run will do, known before it reads a weight.

    source         the model as it was given
    structure      the model for the steps that store weights: the source, or the model after `reshapes`
    selected       step path -> the weights that the step changes
    formats        weight name -> the format that its steps promise (only weights whose format changes)
    counted_dense  those of them that may stay dense (`WeightPass.alternatives`) and would then be larger
    functions      activations, norms and softmax, if any step selects them
    ledger         what becomes of every tensor of the source
    producers      producers of the weights' inputs, by kind of block, if a step needs them (`Traits.rescales`)
    sizes          zero if no export format fits
    tries_loaders  whether the export format is tried on a small probe model of this class
    """

    recipe: Recipe
    source: Structure
    structure: Structure
    reshapes: tuple[Reshape, ...]
    selected: Selected
    functions: Functions
    formats: Mapping[str, StoredWeight]
    counted_dense: frozenset[str]
    rows: tuple[PlanRow, ...]
    skipped: tuple[SkippedRow, ...]
    ledger: Ledger
    export_format: ExportFormat | None
    untied: bool
    producers: Producers
    sizes: Sizes
    problems: tuple[CompressError, ...]
    warnings: tuple[Notice, ...]
    tries_loaders: bool

    @property
    def source_bytes(self) -> int:
        return self.ledger["source_bytes"]

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
        """The planned change of a reshaping step."""
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
            "route": None if self.export_format is None else export_format_row(self.export_format),
            "untied_head": self.untied,
            "side_files": self.source.checkpoint.side_files.to_json(),
            "ledger": self.ledger,
            "source_bytes": self.source_bytes,
            "predicted_weight_bytes": self.weight_bytes,
            "predicted_artifact_bytes": self.artifact_bytes,
            "peak_memory_bytes": self.peak_memory_bytes,
            "disk_bytes": self.disk_bytes,
        }


@dataclass(frozen=True)
class DecidedPlan(Plan):
    """A plan made in the run, for the sweeps after a pass has chosen the shapes of the model.

    The model, the selected weights and the export format follow from these shapes. What a pass chooses for single
    weights while they are stored (`WeightPass.alternatives`) is in no plan: formats, rows and sizes have the format
    that the pass promises, as in the plan before the run. What was stored is in `engine.sweep.Outcome`.

    decisions  step path -> what the step chose
    """

    decisions: Mapping[StepPath, Decision]


def export_format_row(export_format: ExportFormat) -> ExportFormatRow:
    return {"name": export_format.name, "reason": export_format.reason}


def parameter_count(structure: Structure) -> int:
    """Parameters of the checkpoint. A tied parameter counts once."""
    held = {source.tensor for name, _ in structure.model.named_parameters() for source in structure.sources_of(name)}
    return sum(math.prod(structure.checkpoint.tensors[tensor].shape) for tensor in held)


def sharer(weight: Weight, tied: Mapping[str, str]) -> str | None:
    """Another parameter that shares the storage of this one."""
    return tied.get(weight.parameter) or next((t for t, s in tied.items() if s == weight.parameter), None)
