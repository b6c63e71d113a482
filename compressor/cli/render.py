"""Prints the output of the command line: tables, Markdown, JSON, warnings and errors."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from compressor.cli.progress import duration, json_line
from compressor.errors import CompressError, Notice, UsageError

if TYPE_CHECKING:
    from compressor.artifact.findings import Findings
    from compressor.engine.events import PredictedStage, ResultEvent
    from compressor.engine.plan_records import PlanRow, ReshapeRow
    from compressor.engine.request import PlannedRun
    from compressor.evaluation.sections import (
        AnyReport,
        ComparedRow,
        Comparison,
        EvaluationReport,
        MetricRow,
        Report,
        SpeedRow,
    )
    from compressor.model.ledger import Ledger
    from compressor.model.overview import Overview
    from compressor.recipe.gates import GateRow

WIDE_TABLE = 110  # columns of a terminal that has room for shapes and roles of weights
out, err = Console(), Console(stderr=True)


class Format(str, Enum):
    table = "table"
    json = "json"


class TextFormat(str, Enum):
    table = "table"
    json = "json"
    markdown = "markdown"


class PageFormat(str, Enum):
    table = "table"
    json = "json"
    markdown = "markdown"
    html = "html"


def complain(error: CompressError, as_json: bool) -> None:
    if as_json:
        with contextlib.suppress(OSError):  # the line on standard error has it too
            json_line(error.event())
    with contextlib.suppress(OSError):  # a closed terminal: there is no reader
        err.print(f"error[{error.code_name}]: {error}", markup=False, highlight=False, soft_wrap=True)


def show_plan(planned: PlannedRun, verbose: bool) -> None:
    """Print the weights, the changes of the model, the predicted sizes and times, the warnings, and all problems but
    the first.

    verbose  a row for each weight, not for each kind of weight
    """
    from compressor.evaluation.render import human_bytes

    plan = planned.plan
    if plan.rows:
        _show_weights(plan.rows, verbose)
    for reshape in plan.reshapes:
        _show_reshape(reshape.to_json())
    show_ledger(plan.ledger, verbose)
    if plan.export_format is not None:
        out.print(f"export format {plan.export_format.name}: {plan.export_format.reason}", highlight=False)
    out.print(
        f"weights {human_bytes(plan.source_bytes)} -> {human_bytes(plan.weight_bytes)}; artifact "
        f"{human_bytes(plan.artifact_bytes)}; memory about {human_bytes(plan.peak_memory_bytes)}; disk "
        f"{human_bytes(plan.disk_bytes)}",
        highlight=False,
    )
    if planned.stages is not None:
        out.print(f"time on this machine: {_times_line(planned.stages)}", highlight=False)
    elif not planned.problems:
        out.print("time on this machine: about a minute at most", highlight=False)
    warn(plan.warnings)
    for problem in planned.problems[1:]:
        complain(problem, False)


def _times_line(times: Sequence[PredictedStage]) -> str:
    """The sum, and each stage. A sweep whose work isn't counted is named."""
    known = [stage for stage in times if stage["known"]]
    stages = ", ".join(
        f"{stage['name']} {duration(sum(stage['parts']))}" if stage["known"] else f"{stage['name']} unknown"
        for stage in times
    )
    total = duration(sum(sum(stage["parts"]) for stage in known))
    return f"about {total} ({stages})" if len(known) == len(times) else f"more than {total} ({stages})"


def _show_weights(rows: Sequence[PlanRow], verbose: bool) -> None:
    """A narrow terminal gets fewer columns. Names are folded, never cut."""
    from compressor.cli.plan_table import one_by_one, rows_by_kind
    from compressor.evaluation.render import human_bytes

    is_wide = out.width >= WIDE_TABLE
    table = Table()
    table.add_column("weight", overflow="fold")
    for header in ("number", "shape", "role") if is_wide else ("number",):
        table.add_column(header, no_wrap=True, justify="right" if header == "number" else "left")
    for header in ("pass", "becomes"):
        table.add_column(header, overflow="fold")
    for header in ("before", "after") if is_wide else ("after",):
        table.add_column(header, no_wrap=True, justify="right")
    for kind in one_by_one(rows) if verbose else rows_by_kind(rows):
        row = kind.first
        middle = [f"x{kind.count:,}" if kind.count > 1 else ""]
        sizes = [human_bytes(kind.bytes_after)]
        if is_wide:
            middle += ["x".join(map(str, row.shape)), row.role]
            sizes.insert(0, human_bytes(kind.bytes_before))
        table.add_row(escape(kind.name), *middle, row.pass_name, row.format_after, *sizes)
    out.print(table)


def _show_reshape(reshape: ReshapeRow) -> None:
    before, after = reshape["parameters_before"], reshape["parameters_after"]
    line = f"{reshape['pass']}: {before:,} -> {after:,} parameters ({100 * (after / before - 1):+.1f} %)"
    if widths := reshape["widths"][:2]:
        line += f", width {widths[0]} -> {widths[1]} ({100 * (widths[1] / widths[0] - 1):+.1f} %)"
    out.print(line, highlight=False)
    for note in reshape["notes"]:
        out.print(f"  {note}", highlight=False)


def show_ledger(ledger: Ledger, verbose: bool) -> None:
    """Print what becomes of the tensors of a source: a row for each account; verbose: for each kind of tensor."""
    from compressor.evaluation.ledger_rows import rows_of_accounts, rows_of_kinds, tensor_count
    from compressor.evaluation.render import human_bytes

    table = Table()
    table.add_column("tensors of the source", overflow="fold")
    table.add_column("number", no_wrap=True, justify="right")
    table.add_column("become", overflow="fold")
    table.add_column("bytes", no_wrap=True, justify="right")
    for row in (rows_of_kinds if verbose else rows_of_accounts)(ledger):
        becomes = f"{row.becomes}: {row.how}"
        table.add_row(escape(row.what), f"{row.tensors:,}", escape(becomes), human_bytes(row.bytes))
    table.add_row("all", f"{tensor_count(ledger):,}", "", human_bytes(ledger["source_bytes"]))
    out.print(table)


def show_structure(found: Overview, weights: bool) -> None:
    """Print the result of `inspect_path`. weights: show full names"""
    from compressor.evaluation.render import human_bytes

    out.print(
        f"{found.architecture}, {found.dtype}, {found.block_count} blocks in {found.blocks}",
        highlight=False,
    )
    if found.quantized is not None:
        out.print(found.quantized, highlight=False)
    table = Table("part", "tensors", "bytes", "weight groups")
    for part in found.parts:
        groups = [
            ", ".join(f"{w.name if weights else w.name.rpartition('.')[2]} @{w.role} {w.format_name}" for w in group)
            for group in part.groups
        ]
        table.add_row(part.name, str(part.tensors), human_bytes(part.bytes), "\n".join(groups))
    out.print(table)
    if found.ledger is not None:
        show_ledger(found.ledger, weights)


def show_verification(found: Findings, directory: Path, has_source: bool) -> None:
    """Print the result for an artifact without problems."""
    for note in found.notes:
        err.print(f"documentation: {note}", highlight=False, markup=False)
    out.print(f"{directory}: sound; outputs differ by at most {found.max_logit_difference:.3g}", highlight=False)
    if found.not_compared:
        how = "" if has_source else " Pass --source MODEL to compare them."
        out.print(f"not compared with its source: {found.not_compared}.{how}", highlight=False)


def show_rows(rows: list[dict[str, Any]]) -> None:
    """Print rows as a table with their keys as the header."""
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    out.print(table)


def show_lines(lines: list[tuple[str, str]]) -> None:
    """Print a label and a sentence per line."""
    for label, sentence in lines:
        out.print(f"{label:<14}{sentence}", highlight=False, markup=False, soft_wrap=True)


def show_facts(found: Mapping[str, object]) -> None:
    """A row for each fact; a fact inside a dictionary is named with the keys that lead to it."""
    table = Table("", "")
    for name, value in _facts(found):
        shown = ", ".join(map(str, value)) if isinstance(value, list) else "none" if value is None else str(value)
        table.add_row(escape(name), escape(shown))
    out.print(table)


def _facts(found: Mapping[str, object], path: str = "") -> Iterator[tuple[str, object]]:
    for key, value in found.items():
        name = f"{path}: {key}" if path else key
        if isinstance(value, dict):
            yield from _facts(value, name)
        else:
            yield name, value


def show_run(result: ResultEvent) -> None:
    from compressor.evaluation.render import human_bytes

    report, output = cast("Report", result["report"]), Path(result["output"])
    sizes = report["sizes"]
    table = Table("", "before", "after", title=f"{report['recipe']['name']} on {report['model']['source']}")
    table.add_row("weight files", human_bytes(sizes["before_bytes"]), human_bytes(sizes["after_bytes"]))
    rows: dict[str, MetricRow | SpeedRow] = {**report["metrics"], **report["run"]["speed"]}
    for name, row in rows.items():
        table.add_row(name, number(row.get("before")), number(row["after"]))
    _add_gates(table, report["gates"])
    out.print(table)
    _show_unmeasured(report)
    shown = next((name for name in ("report.html", "report.md") if (output / name).is_file()), "report.json")
    out.print(f"artifact: {output}\nreport:   {output / shown}", markup=False, highlight=False, soft_wrap=True)


def show_evaluation(report: EvaluationReport) -> None:
    from compressor.evaluation.render import human_bytes

    table = Table("", "before", "after", "95 % interval", title=report["model"]["source"])
    sizes = report["sizes"]
    table.add_row("weight files", human_bytes(sizes["before_bytes"]), human_bytes(sizes["after_bytes"]), "")
    for name, row in report["metrics"].items():
        low, high = row["interval"]
        interval = "" if low is None else f"{number(low)} - {number(high)}"
        table.add_row(name, number(row["before"]), number(row["after"]), interval)
    for name, speed in report["run"]["speed"].items():
        table.add_row(name, number(speed.get("before")), number(speed["after"]), "")
    _add_gates(table, report["gates"])
    out.print(table)
    _show_unmeasured(report)


def _show_unmeasured(report: AnyReport) -> None:
    from compressor.evaluation.render import unmeasured_speed

    for side, reason in unmeasured_speed(report):
        out.print(f"The speed {side} was not measured: it {reason}.", markup=False, highlight=False, soft_wrap=True)


def _add_gates(table: Table, gates: Iterable[GateRow]) -> None:
    for gate in gates:
        verdict = "passed" if gate["passed"] else "FAILED"
        table.add_row(f"gate {gate['name']}", f"bound {number(gate['bound'])}", f"{number(gate['value'])} {verdict}")


def render_comparison_as(found: Comparison, rows: list[ComparedRow], format_: PageFormat) -> str:
    if format_ is PageFormat.json:
        return json.dumps(found, indent=2) + "\n"
    if format_ is PageFormat.html:
        from compressor.evaluation.render import render_comparison

        return render_comparison(found, rows)
    cells = [[row["name"], *map(number, row["values"])] for row in rows]
    blank = [""] * (len(found["subjects"]) - 2)
    for gate in found["gates"]:
        verdict = f"{number(gate['value'])} {'passed' if gate['passed'] else 'FAILED'}"
        cells.append([f"gate {gate['name']}", f"bound {number(gate['bound'])}", *blank, verdict])
    if format_ is PageFormat.markdown:
        return markdown_table(["", *found["subjects"]], cells)
    table = Table("", *map(escape, found["subjects"]))
    for row in cells:
        table.add_row(*map(escape, row))
    console = Console(width=out.width)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def warn(notices: Iterable[Notice]) -> None:
    for notice in notices:
        err.print(str(notice), markup=False, highlight=False, soft_wrap=True)


def write_text(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(
            f"can't be written ({error.strerror})",
            where=str(path),
            hint="Choose a file in a directory that you may write to.",
            data={"reason": "not-written", "cause": error.strerror},
        ) from error


def number(value: Any) -> str:
    if value is None:
        return "n/a"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))
