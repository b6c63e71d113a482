"""The command line: arguments in, exit code out. What each verb does lies in the module it calls."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

from compressor import __version__
from compressor.cli.progress import Mode, json_line, show
from compressor.engine.interrupt import Stop, answered
from compressor.errors import ArtifactError, CompressError, GateError, Interrupted, PreflightError, UsageError
from compressor.process.resources import ran_out
from compressor.process.streams import LostStream, let_go_of_lost
from compressor.process.utf8 import check_utf8

INTERRUPTED = Interrupted.exit_code


class Raised(Exception):
    """Carries what a verb raised past typer, which gives some exceptions a meaning of its own."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


class Verbs(TyperGroup):
    """The verbs. typer would take an EOFError of a library for an abort, and a broken pipe for exit code 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (EOFError, KeyboardInterrupt, OSError) as error:
            raise Raised(error) from None


app = typer.Typer(
    name="compress-model",
    cls=Verbs,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
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


RecipeArg = Annotated[str, typer.Argument(help="Recipe file, or the name of one that comes along.", show_default=False)]
ModelOpt = Annotated[
    str, typer.Option("--model", help="Checkpoint directory, cached hub name, or demo.", show_default=False)
]
SetOpt = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting: steps.0.bits=3.")
]
DeviceOpt = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
ThreadsOpt = Annotated[
    int | None, typer.Option(min=1, max=4096, help="CPU threads; results depend on it.", show_default=False)
]
ResumeOpt = Annotated[bool, typer.Option("--resume", help="Continue the interrupted run of this output.")]
FreshOpt = Annotated[bool, typer.Option("--fresh", help="Replace what this tool wrote there before.")]
NoEvalOpt = Annotated[bool, typer.Option("--no-eval", help="Skip the measurements; the recipe must have no gates.")]
TrustOpt = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the checkpoint.")]
QuietOpt = Annotated[bool, typer.Option("--quiet", help="Warnings and errors only.")]
JsonOpt = Annotated[bool, typer.Option("--json", help="One JSON event a line on standard output.")]
FormatOpt = Annotated[Format, typer.Option("--format", help="How to print.")]
DirArg = Annotated[Path, typer.Argument(help="Artifact directory.", show_default=False)]


def _version(asked: bool) -> None:
    if asked:
        print(f"compress-model {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Compress a Hugging Face checkpoint by a recipe, with an honest report of what it cost."""
    try:
        os.getcwd()
    except OSError as error:  # torch's libraries would end the process as they are imported, without a word of ours
        raise UsageError(
            "the working directory is gone",
            hint="Change to a directory that exists.",
            data={"reason": "no-working-directory"},
        ) from error


@app.command()
def run(
    ctx: typer.Context,
    recipe: RecipeArg,
    model: ModelOpt,
    output: Annotated[Path, typer.Option(help="Directory to publish; must not exist.", show_default=False)],
    set_: SetOpt = None,
    device: DeviceOpt = "auto",
    threads: ThreadsOpt = None,
    resume: ResumeOpt = False,
    fresh: FreshOpt = False,
    no_eval: NoEvalOpt = False,
    trust_remote_code: TrustOpt = False,
    quiet: QuietOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Compress, write, verify, measure, gate, publish."""
    from compressor.recipe.recipe import read_recipe

    mode: Mode = "json" if as_json else "quiet" if quiet else "auto"
    parsed = read_recipe(recipe, set_ or [])
    ended: dict[str, Any] = {}
    try:
        with show(mode, err) as emit:
            from compressor.run import compress

            def keep(event: dict[str, Any]) -> None:
                if event["event"] == "result":
                    ended.update(event)
                emit(event)

            compress(
                parsed,
                model,
                output,
                device=device,
                threads=threads,
                resume=resume,
                fresh=fresh,
                measure=not no_eval,
                trust_remote_code=trust_remote_code,
                emit=keep,
                stop=ctx.obj,
            )
    except BrokenPipeError as error:
        hint = "Continue with --resume, and read all of its standard output."
        raise Interrupted("whatever read its standard output went away", where="run", hint=hint) from error
    finally:
        if ended and mode == "auto":  # a failed gate has a result too
            _summary(ended["report"], Path(ended["output"]))


@app.command()
def plan(
    recipe: RecipeArg,
    model: ModelOpt,
    output: Annotated[Path | None, typer.Option(help="Where the result would go; its disk is checked.")] = None,
    set_: SetOpt = None,
    device: DeviceOpt = "auto",
    resume: ResumeOpt = False,
    fresh: FreshOpt = False,
    no_eval: NoEvalOpt = False,
    trust_remote_code: TrustOpt = False,
    strict: Annotated[bool, typer.Option("--strict", help="Warnings are refusals.")] = False,
    format_: FormatOpt = Format.table,
    as_json: JsonOpt = False,
) -> None:
    """Say what would be done to each weight, what it would weigh, and every problem; writes nothing."""
    from compressor.engine.plan import make_plan
    from compressor.engine.request import check_request, find_device, named_output
    from compressor.engine.run_samples import data_problems
    from compressor.evaluation.report import human_bytes
    from compressor.recipe.recipe import read_recipe

    parsed = read_recipe(recipe, set_ or [])
    found = make_plan(parsed, model, output=output, trust_remote_code=trust_remote_code)
    problems = [
        *found.problems,
        *data_problems(found.recipe, found.source, measure=not no_eval, trust_remote_code=trust_remote_code),
    ]
    try:
        find_device(device)
        if output is not None:
            check_request(parsed, named_output(output), resume=resume, fresh=fresh, measure=not no_eval)
    except CompressError as error:
        problems.append(error)
    found = replace(found, problems=tuple(problems))
    if as_json:
        json_line({"event": "result", **found.to_dict()})
    elif format_ is Format.json:
        _print_json(found.to_dict())
    else:
        table = Table("weight", "shape", "role", "pass", "becomes", "before", "after")
        for row in found.rows:
            table.add_row(
                row.name,
                "x".join(map(str, row.shape)),
                row.role,
                row.pass_name,
                row.format_after,
                human_bytes(row.bytes_before),
                human_bytes(row.bytes_after),
            )
        if found.rows:
            out.print(table)
        for reshape in (made.to_dict() for made in found.reshapes):
            before, after = reshape["parameters_before"], reshape["parameters_after"]
            line = f"{reshape['pass']}: {before:,} -> {after:,} parameters ({100 * (after / before - 1):+.1f} %)"
            if widths := reshape["widths"][:2]:
                line += f", width {widths[0]} -> {widths[1]} ({100 * (widths[1] / widths[0] - 1):+.1f} %)"
            out.print(line, highlight=False)
            for note in reshape["notes"]:
                out.print(f"  {note}", highlight=False)
        if found.route is not None:
            out.print(f"route {found.route.name}: {found.route.reason}", highlight=False)
        out.print(
            f"weights {human_bytes(found.source_bytes)} -> {human_bytes(found.weight_bytes)}; artifact "
            f"{human_bytes(found.artifact_bytes)}; memory about {human_bytes(found.peak_memory_bytes)}; disk "
            f"{human_bytes(found.disk_bytes)}",
            highlight=False,
        )
        _warn(found.warnings)
        for problem in found.problems[1:]:
            _complain(problem, False)
    if found.problems:
        raise found.problems[0]
    if strict and found.warnings:
        raise UsageError(f"{len(found.warnings)} warnings and --strict", where="plan")


@app.command(name="eval")
def eval_(
    model: Annotated[str, typer.Argument(help="Checkpoint or artifact directory, or demo.", show_default=False)],
    recipe: Annotated[str | None, typer.Option(help="Take `eval` from this recipe.")] = None,
    data: Annotated[str | None, typer.Option(help="Data source: stdlib, a path, dataset:NAME.")] = None,
    metrics: Annotated[str | None, typer.Option(help="Comma-separated metrics.")] = None,
    baseline: Annotated[
        str | None, typer.Option(help="Model to compare with: for KL, agreement, ratios and changes.")
    ] = None,
    gate: Annotated[
        list[str] | None, typer.Option(metavar="NAME=BOUND", help="A bound that must hold; exit code 3 if it doesn't.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Directory for report.json, report.md and junit.xml.", show_default=False)
    ] = None,
    strict_kernels: Annotated[
        bool, typer.Option("--strict-kernels", help="A layer for which there is no kernel is an error.")
    ] = False,
    set_: SetOpt = None,
    threads: ThreadsOpt = None,
    trust_remote_code: TrustOpt = False,
    quiet: QuietOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Measure any model or artifact; gates apply."""
    from compressor.evaluation.eval_command import measure_model
    from compressor.recipe.gates import failed_gates

    found = measure_model(
        model,
        recipe=recipe,
        data=data,
        metrics=metrics,
        baseline=baseline,
        gates=gate,
        overrides=set_,
        threads=threads,
        trust_remote_code=trust_remote_code,
        output=output,
        strict_kernels=strict_kernels,
    )
    if as_json:
        json_line({"event": "result", "status": found["status"], "output": output and str(output), "report": found})
    else:
        _warn(found["warnings"])
        if not quiet:
            _evaluation(found)
    if failed := failed_gates(found["gates"]):
        hint = f"The report is in {output}." if output else None
        raise GateError(f"{failed} did not hold", where=found["model"]["source"], hint=hint)


@app.command()
def compare(
    paths: Annotated[
        list[Path], typer.Argument(help="Two or more artifacts, reports or checkpoints.", show_default=False)
    ],
    format_: Annotated[
        PageFormat | None, typer.Option("--format", help="How to print; else by --output's suffix, or a table.")
    ] = None,
    weights: Annotated[bool, typer.Option("--weights", help="Errors of every weight too.")] = False,
    fail_on: Annotated[
        list[str] | None,
        typer.Option(
            "--fail-on", metavar="NAME=BOUND", help="A gate on the last against the first; exit code 3 if it fails."
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Write it to this file instead of printing.", show_default=False)
    ] = None,
) -> None:
    """Bytes, metrics and errors side by side."""
    from compressor.evaluation.compare import compare as side_by_side
    from compressor.recipe.gates import failed_gates, read_gates

    if len(paths) < 2:
        raise UsageError("two or more are needed", where="compare")
    found = side_by_side(paths, read_gates(fail_on or [], "--fail-on"))
    suffixes = {".json": PageFormat.json, ".md": PageFormat.markdown, ".html": PageFormat.html}
    chosen = format_ or suffixes.get(output.suffix if output else "", PageFormat.table)
    text = _side_by_side(found, found["rows"] + (found["weights"] if weights else []), chosen)
    _warn(found["warnings"])
    if output is None:
        sys.stdout.write(text)
    else:
        _write(output, text)
    if failed := failed_gates(found["gates"]):
        raise GateError(f"{failed} did not hold", where=f"{found['subjects'][-1]} against {found['subjects'][0]}")


@app.command()
def inspect(
    path: Annotated[str, typer.Argument(help="Checkpoint or artifact directory, or demo.", show_default=False)],
    weights: Annotated[bool, typer.Option("--weights", help="List every weight.")] = False,
    trust_remote_code: TrustOpt = False,
    format_: FormatOpt = Format.table,
) -> None:
    """Stem, blocks, head, weight groups, stored forms and bytes; reads headers only."""
    from compressor.artifact.inspection import inspect_path
    from compressor.evaluation.report import human_bytes

    found = inspect_path(path, trust_remote_code)
    if format_ is Format.json:
        _print_json(found)
        return
    out.print(
        f"{found['architecture']}, {found['dtype']}, {found['block_count']} blocks in {found['blocks']}",
        highlight=False,
    )
    table = Table("unit", "tensors", "bytes", "weight groups")
    for unit in found["units"]:
        groups = [
            ", ".join(
                f"{w['name'] if weights else w['name'].rpartition('.')[2]} @{w['role']} {w['form']}" for w in group
            )
            for group in unit["groups"]
        ]
        table.add_row(unit["name"], str(unit["tensors"]), human_bytes(unit["bytes"]), "\n".join(groups))
    out.print(table)


@app.command()
def verify(
    directory: DirArg,
    source: Annotated[
        str | None,
        typer.Option("--source", help="Compare with the checkpoint that it was made of.", show_default=False),
    ] = None,
    trust_remote_code: TrustOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Check hashes, keys, dtypes, finite values, and outputs through both loaders in a fresh process."""
    from compressor.artifact.verify import verify_in_child
    from compressor.model.checkpoint import resolve_model

    original = None if source is None else resolve_model(source).absolute()
    found = verify_in_child(
        directory.absolute(), None, sealed=True, source=original, trust_remote_code=trust_remote_code
    )
    if as_json:
        json_line({"event": "result", **found})
    if found["problems"]:
        raise ArtifactError("; ".join(found["problems"]), where=str(directory))
    if not as_json:
        for note in found["notes"]:
            err.print(f"documentation: {note}", highlight=False, markup=False)
        out.print(f"{directory}: sound; outputs differ by at most {found['max_logit_difference']:.3g}", highlight=False)
        if found["not_compared"]:
            how = "" if original else " Give it with --source MODEL."
            out.print(f"not compared with its source: {found['not_compared']}.{how}", highlight=False)


@app.command()
def passes(
    name: Annotated[str | None, typer.Argument(help="One pass, with its settings.", show_default=False)] = None,
    format_: Annotated[TextFormat, typer.Option("--format", help="How to print.")] = TextFormat.table,
) -> None:
    """The passes there are; with NAME its settings, their types, defaults and meaning."""
    from compressor.recipe.reference_docs import pass_rows, setting_rows

    rows = setting_rows(name) if name else pass_rows()
    if format_ is TextFormat.json:
        _print_json(rows)
        return
    if format_ is TextFormat.markdown:
        sys.stdout.write(_markdown(list(rows[0]), [list(map(str, row.values())) for row in rows]))
        return
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    out.print(table)


@app.command()
def schema() -> None:
    """JSON Schema of the recipe, for editors."""
    from compressor.recipe.recipe import recipe_json_schema

    _print_json(recipe_json_schema())


@app.command()
def report(
    path: Annotated[Path, typer.Argument(help="Artifact directory or report.json.", show_default=False)],
    html: Annotated[Path | None, typer.Option(help="Write the HTML form here.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the Markdown form here.")] = None,
    junit: Annotated[Path | None, typer.Option(help="Write the JUnit form here.")] = None,
) -> None:
    """Render a report again; without options prints its Markdown form."""
    from compressor.evaluation.compare import is_report, read_subject
    from compressor.evaluation.report import is_evaluation, render_html, render_junit, render_markdown

    found = read_subject(path)
    if not is_report(found):
        raise UsageError("holds no report.json", where=str(path), hint="Give an artifact, or what eval --output wrote.")
    if html is not None and is_evaluation(found):
        raise UsageError("an evaluation has no HTML form", where="--html", hint="Use --markdown.")
    targets = ((html, render_html), (markdown, render_markdown), (junit, render_junit))
    for target, render in targets:
        if target is not None:
            _write(target, render(found))
    if not any(target for target, _ in targets):
        print(render_markdown(found))


@app.command()
def doctor(as_json: JsonOpt = False) -> None:
    """Versions, CPU features, kernels, GPU, memory, disk, cache, missing extras."""
    from compressor.cli.doctor import examine

    found = examine()
    if as_json:
        json_line({"event": "result", **found})
        return
    table = Table("", "")
    for key, value in found.items():
        shown = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        table.add_row(key, ", ".join(map(str, shown)) if isinstance(shown, list) else str(shown))
    out.print(table)


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return the exit code that docs/exit-codes.md lists. None takes the process's arguments."""
    if arguments is None:
        arguments = sys.argv[1:]
        _quiet_libraries()
    as_json = "--json" in arguments
    stop = Stop()

    def tell() -> None:
        given_up = "the part at work is given up. " if stop.has_begun else ""
        message = f"stopping: {given_up}{stop.hint}"
        with contextlib.suppress(OSError):  # of a stream that can't be written: the stop goes on
            if as_json:
                json_line({"event": "stopping", "message": message})
        with contextlib.suppress(OSError):
            err.print(message, markup=False, highlight=False, soft_wrap=True)

    def last_words() -> None:
        if err.is_terminal:
            err.show_cursor()  # that a progress display hid
        _complain(_stopped(stop), as_json)

    with answered(stop, tell, last_words, INTERRUPTED):
        try:
            return _run_verb(arguments, stop, as_json)
        except KeyboardInterrupt:  # it came while an error was being told
            _complain(_stopped(stop), as_json)
            return INTERRUPTED
        finally:
            let_go_of_lost()


def _run_verb(arguments: list[str], stop: Stop, as_json: bool) -> int:
    try:
        for argument in arguments:
            check_utf8(argument, "Rename the file, or give the text as UTF-8.")
        code = app(arguments, standalone_mode=False, prog_name="compress-model", obj=stop) or 0
        sys.stdout.flush()
    except SystemExit as error:  # of the completion of a shell's command line
        if isinstance(error.__context__, BrokenPipeError):  # which rich ends the process for
            return INTERRUPTED
        return error.code if isinstance(error.code, int) else 1
    except BaseException as error:
        found = error.error if isinstance(error, Raised) else error
        return _tell(found, stop, as_json)
    if code == INTERRUPTED:  # typer's own way to say KeyboardInterrupt, while it reads the arguments
        _complain(_stopped(stop), as_json)
    return code


def _tell(error: BaseException, stop: Stop, as_json: bool) -> int:
    """One line for what a user can act on; anything else is our bug and keeps its traceback. Returns the exit code."""
    if isinstance(error, BrokenPipeError):  # `| head` has read what it wanted
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  flushed, in vain, as Python ends
        return INTERRUPTED
    known = _refusal(error, stop)
    if known is not None:
        _complain(known, as_json)
        return known.exit_code
    if getattr(error, "format_message", None) is not None:  # no arguments: the help was shown
        return UsageError.exit_code
    with contextlib.suppress(OSError):
        traceback.print_exception(error, file=sys.stderr)
    with contextlib.suppress(OSError):
        if as_json:
            json_line({**CompressError(f"{type(error).__name__}: {error}").event(), "name": "bug"})
    with contextlib.suppress(OSError):
        err.print("error[bug]: this should not happen; please report it with the traceback above", markup=False)
    return 1


def _refusal(error: BaseException, stop: Stop) -> CompressError | None:
    """What a user can act on in this error, or None."""
    if isinstance(error, CompressError):
        return error
    if stop.is_asked() or isinstance(error, KeyboardInterrupt):
        return _stopped(stop)
    show_message: Callable[[], str] | None = getattr(error, "format_message", None)
    if show_message is not None:  # of the parser of arguments
        message = show_message()
        return UsageError(message, hint="See compress-model --help.") if message else None
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        name = str(error.filename)
        return UsageError(
            f"a name of {len(name):,} signs is too long for a file",
            where=f"{name[:60]}...",
            data={"reason": "name-too-long", "length": len(name)},
        )
    if isinstance(error, RecursionError):
        return PreflightError(
            f"Python's limit of {sys.getrecursionlimit()} nested calls was reached",
            hint="Look for a file of the model, the recipe or the data that is nested very deeply.",
            data={"reason": "nested-too-deeply", "limit": sys.getrecursionlimit()},
        )
    if isinstance(error, LostStream):
        what = f"can't be written ({error.strerror})"
        return PreflightError(
            what,
            where=error.filename,
            hint="Free some room for it, or send it elsewhere.",
            data={"reason": "lost-stream", "cause": error.strerror},
        )
    if (lack := ran_out(error)) is not None:
        hint = "Free some room on this machine, then try again."
        return PreflightError(lack.what, where=lack.where, hint=hint, data=lack.data)
    return None


def _stopped(stop: Stop) -> Interrupted:
    return Interrupted("stopped", where="run", hint=stop.hint) if stop.work is not None else Interrupted("stopped")


def _quiet_libraries() -> None:
    """Let no warning of a library stand between a user and what this tool says, unless they asked for warnings."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


def _complain(error: CompressError, as_json: bool) -> None:
    if as_json:
        with contextlib.suppress(OSError):  # the line on standard error says it too
            json_line(error.event())
    with contextlib.suppress(OSError):  # of a terminal that was closed: nobody is there to be told
        err.print(f"error[{error.code_name}]: {error}", markup=False, highlight=False, soft_wrap=True)


def _summary(report: dict[str, Any], output: Path) -> None:
    from compressor.evaluation.report import human_bytes

    sizes = report["sizes"]
    table = Table("", "before", "after", title=f"{report['recipe']['name']} on {report['model']['source']}")
    table.add_row("weight files", human_bytes(sizes["before_bytes"]), human_bytes(sizes["after_bytes"]))
    for name, row in {**report["metrics"], **report["run"]["speed"]}.items():
        table.add_row(name, _number(row.get("before")), _number(row.get("after")))
    _add_gates(table, report["gates"])
    out.print(table)
    shown = next((name for name in ("report.html", "report.md") if (output / name).is_file()), "report.json")
    out.print(f"artifact: {output}\nreport:   {output / shown}", markup=False, highlight=False, soft_wrap=True)


def _evaluation(report: dict[str, Any]) -> None:
    from compressor.evaluation.report import human_bytes

    table = Table("", "before", "after", "95 % interval", title=report["model"]["source"])
    sizes = report["sizes"]
    table.add_row("weight files", human_bytes(sizes["before_bytes"]), human_bytes(sizes["after_bytes"]), "")
    for name, row in {**report["metrics"], **report["run"]["speed"]}.items():
        low, high = row.get("interval", (None, None))
        interval = "" if low is None else f"{_number(low)} - {_number(high)}"
        table.add_row(name, _number(row.get("before")), _number(row.get("after")), interval)
    _add_gates(table, report["gates"])
    out.print(table)


def _add_gates(table: Table, gates: list[dict[str, Any]]) -> None:
    for gate in gates:
        verdict = "passed" if gate["passed"] else "FAILED"
        table.add_row(f"gate {gate['name']}", f"bound {_number(gate['bound'])}", f"{_number(gate['value'])} {verdict}")


def _side_by_side(found: dict[str, Any], rows: list[dict[str, Any]], format_: PageFormat) -> str:
    if format_ is PageFormat.json:
        return json.dumps(found, indent=2) + "\n"
    if format_ is PageFormat.html:
        from compressor.evaluation.report import render_comparison

        return render_comparison(found, rows)
    cells = [[row["name"], *map(_number, row["values"])] for row in rows]
    blank = [""] * (len(found["subjects"]) - 2)
    for gate in found["gates"]:
        verdict = f"{_number(gate['value'])} {'passed' if gate['passed'] else 'FAILED'}"
        cells.append([f"gate {gate['name']}", f"bound {_number(gate['bound'])}", *blank, verdict])
    if format_ is PageFormat.markdown:
        return _markdown(["", *found["subjects"]], cells)
    table = Table("", *map(escape, found["subjects"]))
    for row in cells:
        table.add_row(*map(escape, row))
    console = Console(width=out.width)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def _warn(warnings: Iterable[dict[str, str]]) -> None:
    for warning in warnings:
        err.print(
            f"warning[{warning['code']}]: {warning['where']}: {warning['message']}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"can't be written ({error.strerror})", where=str(path), hint="Name another file.") from error


def _number(value: Any) -> str:
    if value is None:
        return "n/a"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))
