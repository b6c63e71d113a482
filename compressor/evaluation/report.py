"""Builds, checks and writes report.json. Its schema is report.schema.json, and docs/report.md explains it.

There are two kinds of reports: of a run, and of an evaluation alone (`compress-model eval --output`).

All other forms are rendered from report.json alone and can be rendered again at any time. Times, memory and speed
belong to one run, so they lie under `run`. Everything else is the same for every run of a recipe.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import yaml

from compressor._version import __version__
from compressor.artifact.findings import Findings
from compressor.artifact.stock_formats import FAMILIES
from compressor.engine.line_facts import LineFacts, StepRecord
from compressor.engine.plan_records import Plan, export_format_row
from compressor.engine.request import summary_file
from compressor.errors import Notice, WarningRow
from compressor.evaluation.render import fill_template, is_evaluation, render_html, render_junit, render_markdown
from compressor.evaluation.sections import (
    AnyReport,
    DataFacts,
    Environment,
    KernelRow,
    MetricRow,
    ModelFacts,
    Report,
    Run,
    RunSizes,
    Seeds,
    StepRow,
    WeightRow,
)
from compressor.process.json_values import finite
from compressor.recipe.gates import GateRow
from compressor.recipe.schema import ReportSettings, bare_source

if TYPE_CHECKING:
    from compressor.data.samples import Samples
    from compressor.engine.job import Fingerprint
    from compressor.engine.sweep import Outcome
    from compressor.evaluation.evaluate import Measured
    from compressor.model.structure import Structure
    from compressor.recipe.recipe import Recipe

REPORT_VERSION = 1
SCHEMA = Path(__file__).parent / "report.schema.json"


def build_report(
    *,
    source: str,
    recipe: Recipe,
    outcome: Outcome,
    fingerprint: Fingerprint,
    facts: Sequence[LineFacts],
    sizes: RunSizes,
    measured: Measured,
    gates: list[GateRow],
    verification: Findings,
    calibration: Samples | None,
    held_out: Samples | None,
    run: Run,
    environment: Environment,
) -> Report:
    """The whole report as JSON values: sorted keys, non-finite numbers as null.

    source  name of the model
    recipe  with the hashes of the data
    facts   of the journal's lines
    """
    plan = outcome.plan
    records = [record for line in facts for record in line.records]
    notices = [*plan.warnings, *(notice for line in facts for notice in line.warnings)]
    report: Report = {
        "report_version": REPORT_VERSION,
        "tool": {"name": "compress-model", "version": __version__},
        "status": _status(verification, gates),
        "recipe": {"name": recipe.name, "sha256": recipe.sha256, "resolved": recipe.resolved()},
        "model": _model_facts(source, fingerprint["model"], sizes["parameters"], outcome.structure),
        "route": export_format_row(outcome.export_format),
        "seeds": _seeds(recipe),
        "data": {
            "calibration": None if calibration is None else data_facts(calibration),
            "eval": None if held_out is None else data_facts(held_out),
        },
        "sizes": sizes,
        "metrics": measured.metrics,
        "saturation": measured.saturation,
        "patches": measured.patches,
        "gates": gates,
        "reshapes": [reshape.to_json() for reshape in plan.reshapes],
        "steps": _step_rows(plan),
        "weights": _weight_rows(plan, records),
        "skipped": list(plan.skipped),
        "ledger": outcome.ledger,
        "warnings": [*(notice.to_json() for notice in notices), *unmeasured_warnings(measured.metrics)],
        "verification": verification.to_json(),
        "kernels": _reference_kernels(records) if measured.kernels is None else measured.kernels,
        "run": {**run, "seconds_by_weight": {record.weight.name: record.weight.seconds for record in records}},
        "environment": environment,
    }
    return finite(report, sort=True)


def _status(verification: Findings, gates: list[GateRow]) -> str:
    if verification.problems:
        return "verification_failed"
    return "ok" if all(gate["passed"] for gate in gates) else "gate_failed"


def _model_facts(source: str, sha256: str, parameters: int, structure: Structure) -> ModelFacts:
    return {
        "source": source,
        "sha256": sha256,
        "architecture": structure.architecture,
        "parameters": parameters,
        "blocks": structure.block_count,
        "dtype": str(structure.dtype).removeprefix("torch."),
        "license": structure.checkpoint.license,
        "side_files": structure.checkpoint.side_files.to_json(),
    }


def _seeds(recipe: Recipe) -> Seeds:
    return {
        "run": recipe.seed,
        "data": recipe.seed if recipe.data.seed is None else recipe.data.seed,
        "eval": recipe.seed if recipe.eval.data.seed is None else recipe.eval.data.seed,
    }


def _step_rows(plan: Plan) -> list[StepRow]:
    return [
        {
            "index": number,
            "pass": step.name,
            "path": ".".join(map(str, step.path)),
            "matched": len(plan.selected[step.path]),
            "settings": step.settings.model_dump(mode="json", by_alias=True),
        }
        for number, step in enumerate(plan.recipe.steps)
    ]


def _weight_rows(plan: Plan, records: Sequence[StepRecord]) -> list[WeightRow]:
    """The rows that passes recorded for each weight, with its sizes. A pass may add its own values."""
    predicted = {row.name: row for row in plan.rows}
    rows = []
    for record in records:
        weight = record.weight
        after = weight.bytes_after  # stored bytes; a pass that decides may store less than plan's upper bound
        row: WeightRow = {
            "step": record.step,
            "pass": record.pass_name,
            "name": weight.name,
            "part": weight.part,
            "form": weight.format_name,
            "spec": dict(weight.format_params),
            "shape": list(weight.shape),
            "role": weight.role,
            "fallback": weight.own.get("fallback"),
            "bytes_before": predicted[weight.name].bytes_before,
            "bytes_after": after,
            # functions have none
            "bits_per_parameter": 8 * after / math.prod(weight.shape) if len(weight.shape) == 2 else None,
        }
        rows.append(cast("WeightRow", {**weight.own, **row}))
    return rows


def _reference_kernels(records: Sequence[StepRecord]) -> list[KernelRow]:
    """The `kernels` of a run whose speed was not measured."""
    why = "speed was not measured; quality was measured with stock transformers"
    formats = sorted({record.weight.format_name for record in records} - {"dense"})
    return [{"op": format_name, "chosen": "reference", "why": why} for format_name in formats]


def unmeasured_warnings(metrics: dict[str, MetricRow]) -> list[WarningRow]:
    """A warning for each metric that was asked for and has no value."""
    return [
        Notice("not-measured", name, row.get("reason", "not a finite number")).to_json()
        for name, row in metrics.items()
        if row["after"] is None
    ]


def validate_report(report: AnyReport) -> None:
    """raises jsonschema.ValidationError if the report doesn't match its schema"""
    import jsonschema

    schema = json.loads(SCHEMA.read_text())
    kind = "evaluation" if is_evaluation(report) else "run_report"  # chosen here, so that an error names the wrong key
    # the tests check the schema itself, since that takes longer than building the report
    checker = jsonschema.Draft202012Validator({"$ref": f"#/$defs/{kind}", "$defs": schema["$defs"]})
    if (wrong := jsonschema.exceptions.best_match(checker.iter_errors(report))) is not None:
        raise wrong


def write_reports(report: AnyReport, directory: Path, settings: ReportSettings) -> list[Path]:
    """Write report.json always; Markdown, HTML, JUnit and the GitHub summary as set in the recipe's `report` section.

    An evaluation has no HTML page.
    """
    validate_report(report)
    written = {"report.json": json.dumps(report, indent=1, ensure_ascii=False) + "\n"}
    if settings.markdown:
        written["report.md"] = render_markdown(report)
    if settings.html and not is_evaluation(report):
        written["report.html"] = render_html(report)
    if settings.junit:
        written["junit.xml"] = render_junit(report)
    for name, text in written.items():
        (directory / name).write_text(text, encoding="utf-8")
    append_summary(report, settings)
    return [directory / name for name in written]


def append_summary(report: AnyReport, settings: ReportSettings) -> None:
    """Append the Markdown report to the file that $GITHUB_STEP_SUMMARY names, if it names one."""
    if (summary := summary_file(settings)) is not None:
        with summary.open("a", encoding="utf-8") as file:
            file.write(render_markdown(report) + "\n")


def write_card(report: Report, checkpoint: Any, directory: Path) -> None:
    """Write the model card README.md: front matter for the hub, what was done, what was measured, and known limits."""
    front = {
        **checkpoint.licence.front_matter(),
        "base_model": report["model"]["source"],
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "tags": [
            "compress-model",
            *([report["route"]["name"]] if report["route"]["name"] in FAMILIES else []),
        ],
    }
    text = fill_template("card.md.j2", r=report, front=yaml.safe_dump(front, sort_keys=False))
    (directory / "README.md").write_text(text, encoding="utf-8")


def data_facts(samples: Samples) -> DataFacts:
    """The report's facts about the samples that were used."""
    source = bare_source(samples.source)
    return {
        "source": source if source.startswith("dataset:") else Path(source).name,
        "sha256": samples.sha256,
        "samples": len(samples.inputs),
        "tokens": samples.tokens,
        "distinct_tokens": samples.distinct_tokens,
        "digest": samples.digest,
        "part": samples.part,
    }
