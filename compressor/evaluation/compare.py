"""Artifacts, reports and plain checkpoints side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compressor.errors import UsageError
from compressor.evaluation.report import validate_report
from compressor.model.checkpoint import open_checkpoint, resolve_model
from compressor.process.utf8 import parse_json
from compressor.recipe.gates import CHANGE, GateRow, check_gates, split_gate

BAD_REPORT = "Copy the report again from where it was written, or measure again with `compress-model eval`."
VERSIONS = {"report_version": 1, "evaluation_version": 1}  # key that tells the kind of a report -> version read here


def read_subject(path: Path) -> dict[str, Any]:
    """A report (of a run or an evaluation) from its file or directory, or the sizes alone of a checkpoint.

    raises UsageError for a file that is no report, ModelError for a directory that is no checkpoint
    """
    file = path / "report.json" if path.is_dir() else path
    if file.is_file():
        return _read_report(file)
    checkpoint = open_checkpoint(resolve_model(str(path)))
    return {"metrics": {}, "weights": [], "sizes": {"after_bytes": checkpoint.weight_file_bytes}, "run": {"speed": {}}}


def is_report(subject: dict[str, Any]) -> bool:
    """Whether it was read from a report.json, and not from a checkpoint's headers."""
    return any(key in subject for key in VERSIONS)


def compare(paths: list[Path], gates: dict[str, float] | None = None) -> dict[str, Any]:
    """{"subjects": names, "rows": [{"name", "values"}], "weights": the same, "warnings", "gates"}.

    Missing values are null. Gates are judged on the last subject, with the first one as what was before.
    raises UsageError for a gate on a change between subjects that were measured on different samples
    """
    subjects = [read_subject(path) for path in paths]
    rows = [{"name": "weight file bytes", "values": [subject["sizes"]["after_bytes"] for subject in subjects]}]
    for metric in dict.fromkeys(name for subject in subjects for name in subject["metrics"]):
        rows.append({"name": metric, "values": [_after(subject["metrics"], metric) for subject in subjects]})
    for speed in dict.fromkeys(name for subject in subjects for name in subject["run"]["speed"]):
        rows.append({"name": speed, "values": [_after(subject["run"]["speed"], speed) for subject in subjects]})
    tables = [
        {
            weight["name"]: weight.get("output_error", weight.get("weight_error"))
            for weight in subject.get("weights", [])
        }
        for subject in subjects
    ]
    weights = dict.fromkeys(name for table in tables for name in table)
    differ = _other_samples(subjects)
    message = "they were measured on different samples, so their metrics can't be compared"
    names = [_name(path, subject) for path, subject in zip(paths, subjects, strict=True)]
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
        "warnings": [{"code": "other-samples", "where": ", ".join(names), "message": message}] if differ else [],
        "gates": _judge(gates or {}, subjects[0], subjects[-1]),
    }


def _read_report(file: Path) -> dict[str, Any]:
    import jsonschema

    try:
        report = parse_json(file.read_text("utf-8"))
        kind = next((key for key in VERSIONS if key in report), None)
        if kind is None:
            raise UsageError("is not a report of compress-model", where=str(file))
        if report[kind] != VERSIONS[kind]:
            raise UsageError(
                f"{kind} {str(report[kind])[:40]} is unknown; this release reads {VERSIONS[kind]}",
                where=str(file),
                hint="Run pip install -U compress-model, or measure again with this release.",
                data={"reason": "version", "key": kind, "version": str(report[kind])[:40], "known": VERSIONS[kind]},
            )
        validate_report(report)
        return report
    except jsonschema.ValidationError as error:
        raise UsageError(f"{error.json_path}: {error.message[:160]}", where=str(file), hint=BAD_REPORT) from error
    except OSError as error:
        raise UsageError(
            f"can't be read ({error.strerror})",
            where=str(file),
            hint="Give yourself read permission for it (chmod +r).",
        ) from error
    except (ValueError, TypeError, RecursionError) as error:
        raise UsageError(
            f"is not a report ({str(error)[:160]})",
            where=str(file),
            hint=BAD_REPORT,
            data={"reason": "no-report", "cause": str(error)[:160]},
        ) from error


def _name(path: Path, subject: dict[str, Any]) -> str:
    name = path.resolve().parent.name if path.name == "report.json" else path.resolve().name
    recipe = subject["recipe"]["name"] if "recipe" in subject else None
    return f"{name} ({recipe})" if recipe else name


def _after(table: dict[str, Any], name: str) -> float | None:
    return table.get(name, {}).get("after")


def _other_samples(subjects: list[dict[str, Any]]) -> bool:
    """Whether two of them have metrics of different evaluation samples."""
    measured = [subject["data"]["eval"]["digest"] for subject in subjects if subject["metrics"]]
    return len(set(measured)) > 1


def _judge(gates: dict[str, float], first: dict[str, Any], last: dict[str, Any]) -> list[GateRow]:
    def beside(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
        return {name: {"before": _after(before, name), "after": _after(after, name)} for name in after}

    ratio = last["sizes"]["after_bytes"] / first["sizes"]["after_bytes"]
    speed = beside(first["run"]["speed"], last["run"]["speed"])
    return check_gates(gates, beside(first["metrics"], last["metrics"]), speed, {"ratio": ratio})
