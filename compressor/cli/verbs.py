"""Defines the commands of the command line and their arguments. The work of each is in the module that it calls."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from compressor._version import __version__
from compressor.cli.options import (
    DeviceOpt,
    DirArg,
    FormatOpt,
    FreshOpt,
    JsonOpt,
    LongOpt,
    ModelOpt,
    NoEvalOpt,
    QuietOpt,
    RecipeArg,
    ResumeOpt,
    SetOpt,
    ThreadsOpt,
    TrustOpt,
)
from compressor.cli.progress import Mode, json_line, show
from compressor.cli.render import (
    Format,
    PageFormat,
    TextFormat,
    err,
    markdown_table,
    print_json,
    render_comparison_as,
    show_evaluation,
    show_facts,
    show_lines,
    show_plan,
    show_rows,
    show_run,
    show_structure,
    show_verification,
    warn,
    write_text,
)
from compressor.engine.events import Event, ResultEvent
from compressor.errors import ArtifactError, GateError, Interrupted, Notice, UsageError, data_of


class Raised(Exception):
    """Carries an exception of a command past typer, which handles some exceptions itself."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


class Verbs(TyperGroup):
    """The commands. typer would treat an EOFError of a library as an abort, and a broken pipe as exit code 1."""

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


def _look_for(*models: str) -> None:
    """Answer a wrong name before torch is imported, which takes seconds. raises ModelError"""
    from compressor.model.model_names import resolve_model

    for model in models:
        resolve_model(model)


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
    """Compress a Hugging Face checkpoint by a recipe, and report what it cost."""
    try:
        os.getcwd()
    except OSError as error:  # importing torch's libraries would end the process without an error message
        raise UsageError(
            "the working directory is gone",
            hint="Run cd to a directory that exists, then the command again.",
            data={"reason": "no-working-directory"},
        ) from error


@app.command()
def run(
    ctx: typer.Context,
    recipe: RecipeArg,
    model: ModelOpt,
    output: Annotated[
        Path, typer.Option(help="Write the artifact to this directory. With --fresh it may exist.", show_default=False)
    ],
    set_: SetOpt = None,
    device: DeviceOpt = "auto",
    threads: ThreadsOpt = None,
    resume: ResumeOpt = False,
    fresh: FreshOpt = False,
    no_eval: NoEvalOpt = False,
    long: LongOpt = False,
    trust_remote_code: TrustOpt = False,
    quiet: QuietOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Compress a model by a recipe, verify and measure the artifact, check its gates, and publish it."""
    from compressor.recipe.recipe import read_recipe

    mode: Mode = "json" if as_json else "quiet" if quiet else "auto"
    parsed = read_recipe(recipe, set_ or [])
    _look_for(model)
    ended: list[ResultEvent] = []
    try:
        with show(mode, err) as emit:
            from compressor.run import compress

            def keep(event: Event) -> None:
                if event["event"] == "result":
                    ended.append(event)
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
                long=long,
                trust_remote_code=trust_remote_code,
                emit=keep,
                stop=ctx.obj,
            )
    except BrokenPipeError as error:
        hint = "Continue with --resume, and redirect the output to a file or a program that reads all of it."
        raise Interrupted("the program that read the standard output has closed it", where="run", hint=hint) from error
    finally:
        if ended and mode == "auto":  # a failed gate has a result too
            show_run(ended[0])


@app.command()
def plan(
    recipe: RecipeArg,
    model: ModelOpt,
    output: Annotated[Path | None, typer.Option(help="Directory for the artifact. Its disk space is checked.")] = None,
    set_: SetOpt = None,
    device: DeviceOpt = "auto",
    resume: ResumeOpt = False,
    fresh: FreshOpt = False,
    no_eval: NoEvalOpt = False,
    long: LongOpt = False,
    trust_remote_code: TrustOpt = False,
    strict: Annotated[bool, typer.Option("--strict", help="Treat warnings as errors.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Show a row for each weight, not for each kind of weight.")
    ] = False,
    format_: FormatOpt = Format.table,
    as_json: JsonOpt = False,
) -> None:
    """Dry run: show what happens to each weight, the predicted sizes, memory, disk space and time, and every problem.

    Writes nothing.
    """
    from compressor.recipe.recipe import read_recipe

    parsed = read_recipe(recipe, set_ or [])
    _look_for(model)
    from compressor.engine.request import plan_run

    planned = plan_run(
        parsed,
        model,
        output,
        device=device,
        resume=resume,
        fresh=fresh,
        measure=not no_eval,
        long=long,
        trust_remote_code=trust_remote_code,
    )
    if as_json:
        json_line({"event": "result", **planned.to_json()})
    elif format_ is Format.json:
        print_json(planned.to_json())
    else:
        show_plan(planned, verbose)
    if planned.problems:
        raise planned.problems[0]
    if strict and planned.plan.warnings:
        raise UsageError(
            f"--strict allows no warning, and the plan has {len(planned.plan.warnings)}",
            where="plan",
            hint="Change the recipe as the warnings above say, or leave --strict out.",
            data={"reason": "warnings", "warnings": len(planned.plan.warnings)},
        )


@app.command(name="eval")
def eval_(
    model: Annotated[str, typer.Argument(help="Checkpoint or artifact directory, or demo.", show_default=False)],
    recipe: Annotated[str | None, typer.Option(help="Use the section `eval` of this recipe.")] = None,
    data: Annotated[str | None, typer.Option(help="Measure on this data: stdlib, a path or dataset:NAME.")] = None,
    metrics: Annotated[str | None, typer.Option(help="Measure these metrics (separated by commas).")] = None,
    baseline: Annotated[
        str | None, typer.Option(help="Compare with this model. KL divergence, agreement, ratios and changes need it.")
    ] = None,
    gate: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=BOUND", help="Require this bound. If it does not hold, the exit code is 3."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Write report.json, report.md and junit.xml to this directory.", show_default=False),
    ] = None,
    strict_kernels: Annotated[
        bool, typer.Option("--strict-kernels", help="End with an error if a layer has no kernel.")
    ] = False,
    set_: SetOpt = None,
    threads: ThreadsOpt = None,
    trust_remote_code: TrustOpt = False,
    quiet: QuietOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Measure a model or an artifact, and check its gates."""
    _look_for(model, *([baseline] if baseline is not None else []))
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
        warn(map(Notice.from_json, found["warnings"]))
        if not quiet:
            show_evaluation(found)
    if failed := failed_gates(found["gates"]):
        hint = (
            f"{f'Read the report in {output}. ' if output else ''}Change the model's recipe or the bounds of the gates."
        )
        raise GateError(
            f"{failed} did not hold",
            where=found["model"]["source"],
            hint=hint,
            data={"gates": [gate["name"] for gate in found["gates"] if gate["passed"] is False]},
        )


@app.command()
def compare(
    paths: Annotated[
        list[Path], typer.Argument(help="Two or more artifacts, reports or checkpoints to compare.", show_default=False)
    ],
    format_: Annotated[
        PageFormat | None,
        typer.Option("--format", help="Choose the output format. Default: by the suffix of --output, else a table."),
    ] = None,
    weights: Annotated[bool, typer.Option("--weights", help="Show the error of every weight too.")] = False,
    fail_on: Annotated[
        list[str] | None,
        typer.Option(
            "--fail-on",
            metavar="NAME=BOUND",
            help="Require this bound of the last model against the first. If it fails, the exit code is 3.",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Write to this file instead of printing.", show_default=False)
    ] = None,
) -> None:
    """Compare the bytes, metrics and errors of several artifacts."""
    if len(paths) < 2:
        raise UsageError(
            f"a comparison needs at least two paths, and {len(paths)} was given",
            where="compare",
            hint="Add the path of another artifact, report or checkpoint.",
            data={"reason": "too-few", "paths": len(paths)},
        )
    _look_for(*map(str, paths))
    from compressor.evaluation.compare import compare as side_by_side
    from compressor.recipe.gates import failed_gates, read_gates

    found = side_by_side(paths, read_gates(fail_on or [], "--fail-on"))
    suffixes = {".json": PageFormat.json, ".md": PageFormat.markdown, ".html": PageFormat.html}
    chosen = format_ or suffixes.get(output.suffix if output else "", PageFormat.table)
    text = render_comparison_as(found, found["rows"] + (found["weights"] if weights else []), chosen)
    warn(map(Notice.from_json, found["warnings"]))
    if output is None:
        sys.stdout.write(text)
    else:
        write_text(output, text)
    if failed := failed_gates(found["gates"]):
        raise GateError(
            f"{failed} did not hold",
            where=f"{found['subjects'][-1]} against {found['subjects'][0]}",
            hint="Compare the values in the table, then change the recipe or the bounds of --fail-on.",
            data={"gates": [gate["name"] for gate in found["gates"] if gate["passed"] is False]},
        )


@app.command()
def inspect(
    path: Annotated[str, typer.Argument(help="Checkpoint or artifact directory, or demo.", show_default=False)],
    weights: Annotated[bool, typer.Option("--weights", help="List every weight.")] = False,
    trust_remote_code: TrustOpt = False,
    format_: FormatOpt = Format.table,
) -> None:
    """Show the embeddings, blocks, output head, weight groups, quantization formats and bytes. Reads headers only."""
    _look_for(path)
    from compressor.artifact.inspection import inspect_path

    found = inspect_path(path, trust_remote_code)
    if format_ is Format.json:
        print_json(found.to_json())
        return
    show_structure(found, weights)


@app.command()
def verify(
    directory: DirArg,
    source: Annotated[
        str | None,
        typer.Option("--source", help="Compare with the checkpoint that it was made from.", show_default=False),
    ] = None,
    trust_remote_code: TrustOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Check an artifact in a fresh process: hashes, keys, dtypes, finite values, and the outputs of both loaders."""
    from compressor.model.model_names import resolve_model

    original = None if source is None else resolve_model(source).absolute()
    from compressor.artifact.verify import verify_in_child

    found = verify_in_child(
        directory.absolute(), None, sealed=True, source=original, trust_remote_code=trust_remote_code
    )
    if as_json:
        json_line({"event": "result", **found.to_json()})
    if found.problems:
        raise ArtifactError(
            "; ".join(found.problems),
            where=str(directory),
            hint="Copy the artifact again from where it was written, or build it again.",
            data=data_of(found.problems),
        )
    if not as_json:
        show_verification(found, directory, has_source=original is not None)


@app.command()
def passes(
    name: Annotated[
        str | None, typer.Argument(help="Name of one pass, to show its settings.", show_default=False)
    ] = None,
    format_: Annotated[TextFormat, typer.Option("--format", help="Choose the output format.")] = TextFormat.table,
) -> None:
    """List the passes. With NAME, list the settings of that pass with their types, defaults and meaning."""
    from compressor.recipe.reference_docs import pass_rows, setting_rows

    rows = setting_rows(name) if name else pass_rows()
    if format_ is TextFormat.json:
        print_json(rows)
        return
    if format_ is TextFormat.markdown:
        sys.stdout.write(markdown_table(list(rows[0]), [list(map(str, row.values())) for row in rows]))
        return
    show_rows(rows)


@app.command()
def schema() -> None:
    """Print the JSON Schema of recipes, for editors."""
    from compressor.recipe.json_schema import recipe_json_schema

    print_json(recipe_json_schema())


@app.command()
def report(
    path: Annotated[Path, typer.Argument(help="Artifact directory or report.json.", show_default=False)],
    html: Annotated[Path | None, typer.Option(help="Write the report as HTML to this file.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the report as Markdown to this file.")] = None,
    junit: Annotated[Path | None, typer.Option(help="Write the gates as JUnit XML to this file.")] = None,
) -> None:
    """Render a report again. Without options, print it as Markdown."""
    from compressor.evaluation.compare import is_report, read_subject
    from compressor.evaluation.render import is_evaluation, render_html, render_junit, render_markdown

    found = read_subject(path)
    if not is_report(found):
        raise UsageError(
            "contains no report.json",
            where=str(path),
            hint="Pass an artifact directory, or the directory that compress-model eval --output wrote.",
        )
    if html is not None:
        if is_evaluation(found):
            raise UsageError("an evaluation has no HTML form", where="--html", hint="Use --markdown FILE.")
        write_text(html, render_html(found))
    for target, render in ((markdown, render_markdown), (junit, render_junit)):
        if target is not None:
            write_text(target, render(found))
    if html is None and markdown is None and junit is None:
        print(render_markdown(found))


@app.command()
def doctor(
    verbose: Annotated[bool, typer.Option("--verbose", help="Show every fact, with each self-test.")] = False,
    as_json: JsonOpt = False,
) -> None:
    """Check this machine: versions, processor, kernels, GPU, memory, disk and optional packages."""
    from compressor.cli.doctor import examine, summary

    found = examine()
    if as_json:
        json_line({"event": "result", **found})
        return
    show_lines(summary(found))
    if verbose:
        show_facts(found)
