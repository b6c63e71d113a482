"""Defines the types of report.json and its sections, so that mypy finds a misspelt key. Schema: report.schema.json.

A report is JSON values from the process that measures to the page that shows them, and it is read again later. So these
are types of dictionaries. There are two kinds of reports: of a run (`Report`), and of an evaluation alone.
"""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict

from compressor.artifact.findings import Verification
from compressor.data.parts import SourcePart
from compressor.engine.plan_records import ExportFormatRow, ReshapeRow, SkippedRow
from compressor.errors import WarningRow
from compressor.kernels.prepared.prepare import KernelRow
from compressor.model.ledger import Ledger
from compressor.model.side_files import SideFilesRow
from compressor.protocol.views import Recorded
from compressor.recipe.gates import GateRow


class MetricRow(TypedDict):
    """A quality metric. reason: why there is no value; intervals: by the kind of gate bound"""

    before: float | None
    after: float | None
    change_percent: float | None
    interval: list[float | None]
    direction: str
    unit: str
    reason: NotRequired[str]
    intervals: NotRequired[dict[str, list[float | None]]]


class Sizes(TypedDict):
    """Sizes of an evaluation. Comparisons are null without a baseline."""

    before_bytes: int | None
    after_bytes: int
    ratio: float | None


class RunSizes(TypedDict):
    """Sizes of a run. by_class: bytes after, by kind of tensor."""

    before_bytes: int
    after_bytes: int
    ratio: float
    bits_per_parameter: float
    by_class: dict[str, int]
    predicted_bytes: int
    predicted_artifact_bytes: int
    parameters: int


class SpeedRow(TypedDict):
    """A measured speed. before: absent if there was no other model; unmeasured: side -> why it was not measured."""

    before: NotRequired[float | None]
    after: float | None
    unmeasured: NotRequired[dict[str, str]]


class RangeRow(TypedDict):
    name: str
    values: int
    outside: int


class Saturation(TypedDict):
    """Values outside of ranges. reason: why layers are missing; None if none are missing."""

    reason: str | None
    layers: list[RangeRow]


class Run(TypedDict):
    """Facts of one run, which may differ in another run of the same recipe.

    quality  how both models ran while quality was measured: whole or parts; None if it was not measured
    """

    started: str
    seconds: float
    seconds_by_stage: dict[str, float]
    peak_rss_bytes: int
    peak_rss_bytes_by_stage: dict[str, int]
    predicted_peak_bytes: int
    resumed: list[dict[str, int]]
    speed: dict[str, SpeedRow]
    quality: str | None


class EvaluationRun(TypedDict):
    """quality: how both models ran while quality was measured, whole or parts; None if it was not measured"""

    started: str
    seconds: float
    speed: dict[str, SpeedRow]
    quality: str | None


class DataFacts(TypedDict):
    """The report's facts about the samples that were used."""

    source: str
    sha256: str
    samples: int
    tokens: int
    distinct_tokens: int
    digest: str
    part: SourcePart | None


class ModelFacts(TypedDict):
    """The model of a run."""

    source: str
    sha256: str
    architecture: str
    parameters: int
    blocks: int
    dtype: str
    license: str | None
    side_files: SideFilesRow


class Seeds(TypedDict):
    run: int
    data: int
    eval: int


StepRow = TypedDict("StepRow", {"index": int, "pass": str, "path": str, "matched": int, "settings": dict[str, Any]})
_OfPass = TypedDict("_OfPass", {"pass": str})


class WeightRow(_OfPass, Recorded):
    """The result for one weight. A pass may record its own values, too."""

    step: int
    name: str
    part: int
    form: str
    spec: dict[str, Any]
    shape: list[int]
    role: str
    bytes_before: int
    bytes_after: int
    bits_per_parameter: float | None


class ImagePatches(TypedDict):
    """An image and its patches. pixels: rows of 0..255; survived: rows of how many gates each patch passed"""

    pixels: list[list[int]]
    survived: list[list[int]]


class Patches(TypedDict):
    """Which patches of some images a token pruner kept. gates: number of gates"""

    gates: int
    images: list[ImagePatches]


class Tool(TypedDict):
    name: str
    version: str


class RecipeRow(TypedDict):
    """The recipe of a run. resolved: the recipe with the values of all settings"""

    name: str
    sha256: str
    resolved: dict[str, Any]


class Environment(TypedDict):
    """The machine, and the versions of the software."""

    python: str
    torch: str | None
    transformers: str | None
    compressed_tensors: str | None
    safetensors: str | None
    tokenizers: str | None
    os: str
    cpu: str
    cpu_features: list[str]
    threads: int
    device: str


class RunData(TypedDict):
    calibration: DataFacts | None
    eval: DataFacts | None


class EvaluationData(TypedDict):
    eval: DataFacts


class ReportedRun(Run):
    seconds_by_weight: dict[str, float]


class Report(TypedDict):
    """The report of a run."""

    report_version: int
    tool: Tool
    status: str
    recipe: RecipeRow
    model: ModelFacts
    route: ExportFormatRow
    seeds: Seeds
    data: RunData
    sizes: RunSizes
    metrics: dict[str, MetricRow]
    saturation: Saturation
    patches: Patches | None
    gates: list[GateRow]
    reshapes: list[ReshapeRow]
    steps: list[StepRow]
    weights: list[WeightRow]
    skipped: list[SkippedRow]
    ledger: Ledger
    warnings: list[WarningRow]
    verification: Verification
    kernels: list[KernelRow]
    run: ReportedRun
    environment: Environment


class Subject(TypedDict):
    """A model of an evaluation."""

    source: str
    sha256: str
    architecture: str | None


class EvaluationReport(TypedDict):
    """The report of an evaluation alone. baseline: None if there was no other model"""

    evaluation_version: int
    tool: Tool
    status: str
    name: str
    settings: dict[str, Any]
    seed: int
    model: Subject
    baseline: Subject | None
    data: EvaluationData
    sizes: Sizes
    metrics: dict[str, MetricRow]
    saturation: Saturation
    gates: list[GateRow]
    warnings: list[WarningRow]
    kernels: NotRequired[list[KernelRow]]
    run: EvaluationRun
    environment: Environment


AnyReport = Report | EvaluationReport


class ComparedRow(TypedDict):
    """A compared value. values: one for each subject; None if it has none"""

    name: str
    values: list[float | None]


class Comparison(TypedDict):
    """Artifacts, reports and checkpoints side by side, as `compare --format json` prints them.

    subjects  their names
    weights   errors of weights
    gates     gates of the last subject, with the first subject as the model before
    """

    subjects: list[str]
    rows: list[ComparedRow]
    weights: list[ComparedRow]
    warnings: list[WarningRow]
    gates: list[GateRow]
