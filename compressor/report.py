"""report.json, and its Markdown, HTML and JUnit forms. Schema: report.schema.json, explained in docs/report.md.

report.json is the truth; every other form is rendered from it alone and can be rendered again at any time.
Times, memory and speed are facts about one run and live under `run`; the rest is the same for every run of a recipe.
"""

from __future__ import annotations

import io
import json
import math
import os
from pathlib import Path
from typing import Any

import jinja2
import junitparser
import yaml

from compressor.export import VERSION

REPORT_VERSION = 1
HERE = Path(__file__).parent
WORST = 5


def build_report(
    *,
    plan: Any,
    fingerprint: dict[str, Any],
    lines: list[dict[str, Any]],
    sizes: dict[str, Any],
    metrics: dict[str, Any],
    gates: list[dict[str, Any]],
    verification: dict[str, Any],
    calibration: Any,
    held_out: Any,
    run: dict[str, Any],
    environment: dict[str, Any],
) -> dict[str, Any]:
    """The whole report as JSON values: sorted keys, non-finite numbers as null."""
    structure, recipe = plan.structure, plan.recipe
    predicted = {row["name"]: row for row in plan.rows}
    weights = []
    for line in lines:
        for record in line["records"]:
            row = predicted[record["name"]]
            bits = 8 * row["bytes_after"] / math.prod(record["shape"])
            size = {"bytes_before": row["bytes_before"], "bytes_after": row["bytes_after"], "bits_per_parameter": bits}
            weights.append({"fallback": None, **{k: v for k, v in record.items() if k != "seconds"}, **size})
    seconds = {record["name"]: record["seconds"] for line in lines for record in line["records"]}
    warnings = plan.warnings + [warning for line in lines for warning in line["warnings"]]
    for name, row in metrics.items():
        if row["after"] is None:
            message = row.get("reason", "not a finite number")
            warnings = [*warnings, {"code": "not-measured", "where": name, "message": message}]
    report = {
        "report_version": REPORT_VERSION,
        "tool": {"name": "compress-model", "version": VERSION},
        "status": "ok" if all(gate["passed"] for gate in gates) else "gate_failed",
        "recipe": {"name": recipe.name, "sha256": recipe.sha256, "resolved": _without_folders(recipe.resolved())},
        "model": {
            "source": structure.checkpoint.directory.name,
            "sha256": fingerprint["model"],
            "architecture": structure.architecture,
            "parameters": sizes["parameters"],
            "blocks": structure.block_count,
            "dtype": str(structure.dtype).removeprefix("torch."),
            "license": structure.checkpoint.license,
        },
        "route": {"name": plan.route.name, "reason": plan.route.reason},
        "seeds": {"run": recipe.seed},
        "data": {"calibration": _data_facts(calibration), "eval": _data_facts(held_out)},
        "sizes": sizes,
        "metrics": metrics,
        "gates": gates,
        "steps": [
            {
                "index": number,
                "pass": step.name,
                "path": ".".join(map(str, step.path)),
                "matched": len(plan.selected[step.path]),
                "settings": step.settings.model_dump(mode="json", by_alias=True),
            }
            for number, step in enumerate(recipe.steps)
        ],
        "weights": weights,
        "skipped": plan.skipped,
        "warnings": warnings,
        "verification": verification,
        "kernels": [
            {"op": form, "chosen": "reference", "why": "no other kernel is built yet"}
            for form in sorted({row["to"] for row in plan.rows})
        ],
        "run": {**run, "seconds_by_weight": seconds},
        "environment": environment,
    }
    return finite(report)


def finite(value: Any) -> Any:
    """The same tree with NaN and Inf as null, and keys sorted."""
    if isinstance(value, dict):
        return {key: finite(value[key]) for key in sorted(value)}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def validate_report(report: dict[str, Any]) -> None:
    """raises jsonschema.ValidationError if the report isn't as its schema says"""
    import jsonschema

    jsonschema.validate(report, json.loads((HERE / "report.schema.json").read_text()))


def write_reports(report: dict[str, Any], directory: Path, settings: Any) -> list[Path]:
    """report.json always; Markdown, HTML, JUnit and the GitHub summary as the recipe's `report` section says."""
    validate_report(report)
    written = {"report.json": json.dumps(report, indent=1, ensure_ascii=False) + "\n"}
    if settings.markdown:
        written["report.md"] = render_markdown(report)
    if settings.html:
        written["report.html"] = render_html(report)
    if settings.junit:
        written["junit.xml"] = render_junit(report)
    for name, text in written.items():
        (directory / name).write_text(text)
    summary = os.environ.get("GITHUB_STEP_SUMMARY")
    if settings.github_summary == "auto" and summary:
        with Path(summary).open("a") as file:
            file.write(render_markdown(report))
    return [directory / name for name in written]


def render_markdown(report: dict[str, Any]) -> str:
    return _template("report.md.j2", report)


def render_html(report: dict[str, Any]) -> str:
    """One self-contained page: inline SVG plots, no scripts, no requests."""
    return _template("report.html.j2", report, plots=_plots(report))


def render_junit(report: dict[str, Any]) -> str:
    """One suite per artifact: a case per gate, and one for the verification."""
    suite = junitparser.TestSuite(f"compress-model {report['recipe']['name']} {report['model']['source']}")
    case = junitparser.TestCase("verification", report["model"]["source"])
    if report["verification"]["problems"]:
        case.result = [junitparser.Error("; ".join(report["verification"]["problems"]))]
    suite.add_testcase(case)
    for gate in report["gates"]:
        case = junitparser.TestCase(gate["name"], report["model"]["source"])
        if not gate["passed"]:
            text = f"value {gate['value']}, bound {gate['bound']}, interval {gate['interval']}"
            case.result = [junitparser.Failure(text)]
        suite.add_testcase(case)
    xml = junitparser.JUnitXml()
    xml.add_testsuite(suite)
    return xml.tostring().decode()


def write_card(report: dict[str, Any], checkpoint: Any, directory: Path) -> None:
    """The model card, README.md: front matter for the hub, and what was done, measured and should be known."""
    front = {
        "license": report["model"]["license"] or "other",
        "base_model": report["model"]["source"],
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "tags": [
            "compress-model",
            *(["compressed-tensors"] if report["route"]["name"] == "compressed-tensors" else []),
        ],
    }
    text = _template("card.md.j2", report, front=yaml.safe_dump(front, sort_keys=False))
    (directory / "README.md").write_text(text)


def human_bytes(value: float | None) -> str:
    if value is None:
        return "n/a"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024 or unit == "TiB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.2f} {unit}"
        value /= 1024
    raise AssertionError


def human(value: Any, digits: int = 4) -> str:
    if value is None:
        return "n/a"
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)


def worst_weights(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The weights with the largest relative output (or weight) error."""
    return sorted(report["weights"], key=lambda w: -(error_of(w) or 0))[:WORST]


def error_of(weight: dict[str, Any]) -> float | None:
    return weight.get("output_error", weight.get("weight_error"))


def _without_folders(resolved: dict[str, Any]) -> dict[str, Any]:
    """The recipe with data files by their bare names: folders tell of the machine and its users."""
    held_out = resolved["eval"]["data"]
    return {
        **resolved,
        "data": {**resolved["data"], "source": _bare(resolved["data"]["source"])},
        "eval": {**resolved["eval"], "data": {**held_out, "source": _bare(held_out["source"])}},
    }


def _bare(source: str) -> str:
    kind, colon, name = source.rpartition(":") if source.startswith("dataset:") else ("", "", source)
    path = Path(name).expanduser()
    return f"{kind}{colon}{path.name}" if path.is_absolute() else source


def _data_facts(samples: Any) -> dict[str, Any] | None:
    if samples is None:
        return None
    name = Path(samples.source).name
    return {
        "source": name,
        "sha256": samples.sha256,
        "samples": len(samples.inputs),
        "tokens": samples.tokens,
        "distinct_tokens": samples.distinct_tokens,
        "digest": samples.digest,
    }


def _template(name: str, report: dict[str, Any], **more: Any) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE / "templates"),
        autoescape=name.endswith("html.j2"),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters.update(bytes=human_bytes, number=human)
    return environment.get_template(name).render(r=report, worst=worst_weights(report), error_of=error_of, **more)


def _plots(report: dict[str, Any]) -> dict[str, str]:
    """Title -> SVG source. A plot without data is left out."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    style: Any = {
        "svg.hashsalt": "compress-model",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "axes.edgecolor": "#8a8f98",
        "text.color": "#8a8f98",
        "axes.labelcolor": "#8a8f98",
        "xtick.color": "#8a8f98",
        "ytick.color": "#8a8f98",
    }
    plots: dict[str, str] = {}
    with plt.rc_context(style):
        measured = [w for w in report["weights"] if error_of(w) is not None]
        if measured:
            figure, axes = plt.subplots(figsize=(10, 3.2))
            _draw_errors(axes, measured)
            plots["Relative output error of each weight"] = _svg(figure)
        figure, axes = plt.subplots(figsize=(5, 2.6))
        _draw_bytes(axes, report["sizes"])
        plots["Bytes before and after"] = _svg(figure)
        if (row := report["metrics"].get("perplexity")) and row["before"] and row["after"]:
            figure, axes = plt.subplots(figsize=(5, 2.6))
            sizes = report["sizes"]
            for side, colour in (("before", "#8a8f98"), ("after", "#2f6feb")):
                axes.scatter([sizes[f"{side}_bytes"] / 2**20], [row[side]], s=60, color=colour)
                axes.annotate(
                    side, (sizes[f"{side}_bytes"] / 2**20, row[side]), xytext=(8, -3), textcoords="offset points"
                )
            axes.set(xlabel="weight files, MiB", ylabel="perplexity", xlim=(0, sizes["before_bytes"] / 2**20 * 1.2))
            axes.margins(y=0.4)
            plots["Quality against size"] = _svg(figure)
    return plots


def _draw_errors(axes: Any, weights: list[dict[str, Any]]) -> None:
    import matplotlib

    kinds = list(dict.fromkeys(weight["name"].rpartition(".")[2] for weight in weights))
    colours = matplotlib.colormaps["tab10"]
    for number, kind in enumerate(kinds):
        chosen = [weight for weight in weights if weight["name"].rpartition(".")[2] == kind]
        x = [weight["unit"] - 1 for weight in chosen]
        axes.plot(
            x, [error_of(weight) for weight in chosen], "o-", ms=4, lw=1.2, label=kind, color=colours(number % 10)
        )
        if all("output_error_rtn" in weight for weight in chosen):
            rounded = [weight["output_error_rtn"] for weight in chosen]
            axes.plot(x, rounded, ":", lw=1, color=colours(number % 10))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="block (dotted: round to nearest on the same grid)", ylabel="relative error", ylim=(0, None))
    axes.legend(ncol=1, frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


def _draw_bytes(axes: Any, sizes: dict[str, Any]) -> None:
    axes.barh(["before"], [sizes["before_bytes"] / 2**20], color="#8a8f98", height=0.5)
    left = 0.0
    import matplotlib

    colours = matplotlib.colormaps["tab10"]
    for number, (name, size) in enumerate((n, s) for n, s in sizes["by_class"].items() if s):
        axes.barh(["after"], [size / 2**20], left=left, color=colours(number % 10), height=0.5, label=name)
        left += size / 2**20
    axes.invert_yaxis()
    axes.set(xlabel="MiB")
    axes.legend(ncol=4, frameon=False, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.25))


def _svg(figure: Any) -> str:
    import matplotlib.pyplot as plt

    buffer = io.StringIO()
    figure.savefig(
        buffer, format="svg", bbox_inches="tight", transparent=True, metadata={"Date": None, "Creator": None}
    )
    plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]
