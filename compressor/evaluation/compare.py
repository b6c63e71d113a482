"""Compares artifacts, reports and plain checkpoints side by side."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from compressor.errors import Notice, UsageError
from compressor.evaluation.render import is_evaluation
from compressor.evaluation.report import validate_report
from compressor.evaluation.sections import AnyReport, ComparedRow, Comparison, MetricRow, Report, SpeedRow, WeightRow
from compressor.evaluation.weight_rows import error_of
from compressor.model.checkpoint import open_checkpoint
from compressor.model.model_names import resolve_model
from compressor.process.utf8 import parse_json
from compressor.recipe.gates import CHANGE, GateRow, SampledPair, check_gates, split_gate

if TYPE_CHECKING:
    from typing_extensions import TypeIs

BAD_REPORT = "Copy the report again from where it was written, or measure again with `compress-model eval`."
VERSIONS = {"report_version": 1, "evaluation_version": 1}  # key for the kind of a report -> version read here


class BareSizes(TypedDict):
    after_bytes: int


class BareRun(TypedDict):
    speed: dict[str, SpeedRow]


class Bare(TypedDict):
    """The sizes of a checkpoint, under the keys of a report that are compared."""

    metrics: dict[str, MetricRow]
    sizes: BareSizes
    run: BareRun


def read_subject(path: Path) -> AnyReport | Bare:
    """A report (of a run or an evaluation) from its file or directory, or the sizes of a checkpoint.

    raises UsageError for a file that is no report, ModelError for a directory that is no checkpoint
    """
    file = path / "report.json" if path.is_dir() else path
    if file.is_file():
        return _read_report(file)
    checkpoint = open_checkpoint(resolve_model(str(path)))
    return {"metrics": {}, "sizes": {"after_bytes": checkpoint.weight_file_bytes}, "run": {"speed": {}}}


def is_report(subject: AnyReport | Bare) -> TypeIs[AnyReport]:
    """Whether the subject was read from a report.json, and not from the headers of a checkpoint."""
    return any(key in subject for key in VERSIONS)


def compare(paths: list[Path], gates: dict[str, float] | None = None) -> Comparison:
    """Compare subjects in the order of their paths. Missing values are None.

    raises UsageError for a gate on a change between subjects that were measured on different samples
    """
    subjects = [read_subject(path) for path in paths]
    rows: list[ComparedRow] = [
        {"name": "weight file bytes", "values": [subject["sizes"]["after_bytes"] for subject in subjects]}
    ]
    for metric in dict.fromkeys(name for subject in subjects for name in subject["metrics"]):
        rows.append({"name": metric, "values": [_after(subject["metrics"], metric) for subject in subjects]})
    for speed in dict.fromkeys(name for subject in subjects for name in subject["run"]["speed"]):
        rows.append({"name": speed, "values": [_after(subject["run"]["speed"], speed) for subject in subjects]})
    tables = [{weight["name"]: error_of(weight) for weight in _weights(subject)} for subject in subjects]
    weights = dict.fromkeys(name for table in tables for name in table)
    differ = _other_samples(subjects)
    message = "they were measured on different samples, so their metrics can't be compared"
    names = [_name(path, subject) for path, subject in zip(paths, subjects, strict=True)]
    notice = Notice("other-samples", ", ".join(names), message, {"subjects": names})
    if differ and (changes := [name for name in gates or {} if split_gate(name)[1] in CHANGE]):
        raise UsageError(
            message,
            where=", ".join(names),
            hint=f"Measure both with the same data (compress-model eval), or leave out {', '.join(changes)}.",
            data={"reason": "other-samples", "gates": changes},
        )
    return {
        "subjects": names,
        "rows": rows,
        "weights": [{"name": name, "values": [table.get(name) for table in tables]} for name in weights],
        "warnings": [notice.to_json()] if differ else [],
        "gates": _judge(gates or {}, subjects[0], subjects[-1]),
    }


def _read_report(file: Path) -> AnyReport:
    import jsonschema

    try:
        report = parse_json(file.read_text("utf-8"))
        kind = next((key for key in VERSIONS if key in report), None)
        if kind is None:
            raise UsageError(
                "is not a report of compress-model", where=str(file), hint=BAD_REPORT, data={"reason": "no-report"}
            )
        if report[kind] != VERSIONS[kind]:
            raise UsageError(
                f"{kind} {str(report[kind])[:40]} is unknown; this release reads version {VERSIONS[kind]}",
                where=str(file),
                hint="Run pip install -U compress-model, or measure again with this release.",
                data={"reason": "version", "key": kind, "version": str(report[kind])[:40], "known": VERSIONS[kind]},
            )
        _take_older_names(report)
        validate_report(report)
        return report
    except jsonschema.ValidationError as error:
        raise UsageError(
            f"{error.json_path}: {error.message[:160]}",
            where=str(file),
            hint=BAD_REPORT,
            data={"reason": "schema", "key": error.json_path, "problem": error.message[:160]},
        ) from error
    except OSError as error:
        raise UsageError(
            f"can't be read ({error.strerror})",
            where=str(file),
            hint="Give yourself read permission for it (chmod +r).",
            data={"reason": "not-read", "cause": error.strerror},
        ) from error
    except (ValueError, TypeError, RecursionError) as error:
        raise UsageError(
            f"is not a report ({str(error)[:160]})",
            where=str(file),
            hint=BAD_REPORT,
            data={"reason": "no-report", "cause": str(error)[:160]},
        ) from error


def _take_older_names(report: dict[str, Any]) -> None:
    """Rename what has another name in a report of release 0.1.0: the `part` of a weight was its `unit`."""
    weights = report.get("weights")
    for weight in weights if isinstance(weights, list) else ():
        if isinstance(weight, dict) and "unit" in weight and "part" not in weight:
            weight["part"] = weight.pop("unit")


def _is_of_run(subject: AnyReport | Bare) -> TypeIs[Report]:
    return is_report(subject) and not is_evaluation(subject)


def _weights(subject: AnyReport | Bare) -> list[WeightRow]:
    return subject["weights"] if _is_of_run(subject) else []


def _name(path: Path, subject: AnyReport | Bare) -> str:
    name = path.resolve().parent.name if path.name == "report.json" else path.resolve().name
    recipe = subject["recipe"]["name"] if _is_of_run(subject) else None
    return f"{name} ({recipe})" if recipe else name


def _after(table: Mapping[str, MetricRow | SpeedRow], name: str) -> float | None:
    return table[name]["after"] if name in table else None


def _other_samples(subjects: list[AnyReport | Bare]) -> bool:
    """Whether two subjects have metrics of different evaluation samples."""
    reports = [subject for subject in subjects if is_report(subject) and subject["metrics"]]
    samples = [report["data"]["eval"] for report in reports]
    return len({facts["digest"] for facts in samples if facts is not None}) > 1


def _judge(gates: dict[str, float], first: AnyReport | Bare, last: AnyReport | Bare) -> list[GateRow]:
    def beside(
        before: Mapping[str, MetricRow | SpeedRow], after: Mapping[str, MetricRow | SpeedRow]
    ) -> dict[str, SampledPair]:
        return {name: {"before": _after(before, name), "after": _after(after, name)} for name in after}

    ratio = last["sizes"]["after_bytes"] / first["sizes"]["after_bytes"]
    speed = beside(first["run"]["speed"], last["run"]["speed"])
    return check_gates(gates, beside(first["metrics"], last["metrics"]), speed, {"ratio": ratio})
