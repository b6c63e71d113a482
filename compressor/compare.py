"""Artifacts, reports and plain checkpoints side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from compressor.checkpoint import open_checkpoint
from compressor.errors import UsageError


def read_subject(path: Path) -> dict[str, Any]:
    """A report from report.json, an artifact directory, or (sizes alone) a checkpoint directory."""
    file = path / "report.json" if path.is_dir() else path
    if file.is_file():
        try:
            report = json.loads(file.read_text())
            if report["report_version"] != 1:
                raise UsageError(f"report version {report['report_version']} is unknown", where=str(file))
            return report
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"is not a report ({error})", where=str(file)) from error
    checkpoint = open_checkpoint(path)
    size = sum(f.stat().st_size for f in {info.file for info in checkpoint.tensors.values()})
    return {
        "model": {"source": path.name},
        "recipe": {"name": "-"},
        "metrics": {},
        "weights": [],
        "sizes": {"after_bytes": size},
        "run": {"speed": {}},
    }


def compare(paths: list[Path]) -> dict[str, Any]:
    """{"subjects": names, "rows": [{"name", "values"}], "weights": [{"name", "values"}]}; missing values are null."""
    subjects = [read_subject(path) for path in paths]
    names = [f"{path.name} ({subject['recipe']['name']})" for path, subject in zip(paths, subjects, strict=True)]
    rows = [{"name": "weight file bytes", "values": [subject["sizes"]["after_bytes"] for subject in subjects]}]
    for metric in dict.fromkeys(name for subject in subjects for name in subject["metrics"]):
        values = [subject["metrics"].get(metric, {}).get("after") for subject in subjects]
        rows.append({"name": metric, "values": values})
    for speed in dict.fromkeys(name for subject in subjects for name in subject["run"]["speed"]):
        values = [subject["run"]["speed"].get(speed, {}).get("after") for subject in subjects]
        rows.append({"name": speed, "values": values})
    tables = [
        {weight["name"]: weight.get("output_error", weight.get("weight_error")) for weight in subject["weights"]}
        for subject in subjects
    ]
    weights = dict.fromkeys(name for table in tables for name in table)
    return {
        "subjects": names,
        "rows": rows,
        "weights": [{"name": name, "values": [table.get(name) for table in tables]} for name in weights],
    }
