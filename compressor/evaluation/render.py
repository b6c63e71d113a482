"""Renders report.json for readers as Markdown, HTML and JUnit. Each is made from report.json alone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import junitparser

from compressor.evaluation.ledger_rows import rows_of_accounts, rows_of_kinds
from compressor.evaluation.plots import draw_plots
from compressor.evaluation.sections import AnyReport, ComparedRow, Comparison, EvaluationReport, Report
from compressor.evaluation.weight_rows import error_of, outlier_inputs, tabulated, worst_weights

if TYPE_CHECKING:
    from typing_extensions import TypeIs

TEMPLATES = Path(__file__).parent / "templates"


def unmeasured_speed(report: AnyReport) -> list[tuple[str, str]]:
    """(side, why) of each model whose speed was not measured."""
    found = [
        (("before", "after", "of the kernels").index(side), side, message)
        for name, row in report["run"]["speed"].items()
        for at, message in row.get("unmeasured", {}).items()
        for side in ["of the kernels" if name.startswith("kernels_") and at == "after" else at]
    ]
    return [(side, message) for _, side, message in sorted(set(found))]


def is_evaluation(report: AnyReport) -> TypeIs[EvaluationReport]:
    return "evaluation_version" in report


def render_markdown(report: AnyReport) -> str:
    if is_evaluation(report):
        return fill_template("evaluation.md.j2", r=report, unmeasured=unmeasured_speed(report))
    worst, shown = worst_weights(report), _shown(report)
    return fill_template("report.md.j2", r=report, worst=worst, **shown)


def render_html(report: Report) -> str:
    """One self-contained page: inline SVG plots, no scripts, no requests."""
    return fill_template("report.html.j2", r=report, plots=draw_plots(report), **_shown(report))


def _shown(report: Report) -> dict[str, Any]:
    """What both forms show besides the report's own sections."""
    outliers, tables = outlier_inputs(report), tabulated(report)
    ledger = report.get("ledger")  # reports of 0.1 have none
    return {
        "error_of": error_of,
        "outliers": outliers,
        "tables": tables,
        "unmeasured": unmeasured_speed(report),
        "accounts": [] if ledger is None else list(rows_of_accounts(ledger)),
        "kinds": [] if ledger is None else list(rows_of_kinds(ledger)),
    }


def render_comparison(found: Comparison, rows: Sequence[ComparedRow]) -> str:
    """The result of `compare` as one self-contained page."""
    return fill_template("compare.html.j2", c=found, rows=rows)


def render_junit(report: AnyReport) -> str:
    """One suite per artifact, with a case for each gate and, for a run, a case for the verification."""
    name = report["name"] if is_evaluation(report) else report["recipe"]["name"]
    suite = junitparser.TestSuite(f"compress-model {name} {report['model']['source']}")
    if not is_evaluation(report):
        case = junitparser.TestCase("verification", report["model"]["source"])
        if report["verification"]["problems"]:
            case.result = [junitparser.Error("; ".join(report["verification"]["problems"]))]
        suite.add_testcase(case)
    for gate in report["gates"]:
        case = junitparser.TestCase(gate["name"], report["model"]["source"])
        if not gate["passed"]:
            value = "not measured" if gate["value"] is None else f"value {gate['value']}"
            case.result = [junitparser.Failure(f"{value}, bound {gate['bound']}, interval {gate['interval']}")]
        suite.add_testcase(case)
    xml = junitparser.JUnitXml()
    xml.add_testsuite(suite)
    return xml.tostring().decode()


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


def fill_template(name: str, **values: Any) -> str:
    return _template(name).render(**values)


@cache
def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=name.endswith("html.j2"),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters.update(bytes=human_bytes, number=human)
    return environment.get_template(name)
