"""Checks a request: the output directory, the device and the options before a model is read, and the whole of it for
`compress-model plan`.

A refused request leaves the file system as it was.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from compressor.artifact.files import owned_files
from compressor.engine.events import PredictedStage
from compressor.engine.plan import make_plan
from compressor.engine.plan_records import Plan, PlanJson
from compressor.engine.run_samples import data_problems
from compressor.engine.stage_times import predict_stages, too_long
from compressor.errors import CompressError, PreflightError, UsageError
from compressor.process.utf8 import check_utf8
from compressor.recipe.recipe import Recipe
from compressor.recipe.schema import ReportSettings
from compressor.storage.journal import has_begun, remove_work

REFUSALS = (2, 5, 6)  # exit codes of a request, model or machine with which the run is impossible
LONGEST_NAME = 255  # bytes of a file name on the usual file systems


def find_device(asked: str) -> torch.device:
    """The device that was asked for; auto is CUDA if there is one. raises PreflightError for a missing device"""
    if asked == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(asked)
    except RuntimeError as error:
        raise UsageError(
            "is not a device",
            where=f"--device {asked}",
            hint="Pass --device auto, cpu, cuda or cuda:N.",
            data={"reason": "no-device"},
        ) from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(
            "is not supported",
            where=f"--device {asked}",
            hint="Pass --device auto, cpu, cuda or cuda:N.",
            data={"reason": "unsupported-device"},
        )
    count = torch.cuda.device_count() if device.type == "cuda" and torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        raise PreflightError(
            f"{count or 'no'} CUDA devices were found",
            where=f"--device {asked}",
            hint="Pass --device cpu or auto; compress-model doctor reports why no CUDA device is found.",
            data={"reason": "no-such-card", "found": count},
        )
    return device


def named_output(output: Path) -> Path:
    """The output with a directory name, so that OUTPUT.work can lie beside it. raises UsageError"""
    check_utf8(output.absolute(), "Pass --output with a name in UTF-8.")
    named = Path(os.path.abspath(output)) if output.name in ("", "..") else output
    if not named.name or "\0" in str(named):
        raise UsageError(
            "can't be an output",
            where=repr(str(output)),
            hint="Pass --output with the name of a new directory.",
            data={"reason": "no-output-name"},
        )
    size, most = len(os.fsencode(named.name)), LONGEST_NAME - len(".rejected")
    if size > most:
        raise UsageError(
            f"the name takes {size} bytes",
            where=f"{named.name[:40]}...",
            hint=f"Pass --output with a name of at most {most} bytes.",
            data={"reason": "name-too-long"},
        )
    return named


def check_request(recipe: Recipe, output: Path, *, resume: bool, fresh: bool, measure: bool) -> None:
    """Check the options and the output directory before a model is read. Changes nothing.

    raises UsageError
    """
    work, rejected = (output.with_name(output.name + ending) for ending in (".work", ".rejected"))
    if recipe.eval.gates and not measure:
        raise UsageError(
            "the recipe has gates, which need the evaluation",
            where="--no-eval",
            hint="Leave --no-eval out, or remove eval.gates from the recipe.",
            data={"reason": "gates-unmeasured"},
        )
    if resume and fresh:
        raise UsageError(
            "--resume and --fresh exclude each other",
            where="run",
            hint="Pass --resume to continue the interrupted run, or --fresh to begin again.",
            data={"reason": "resume-and-fresh"},
        )
    check_summary(recipe.report)
    above = next(folder for folder in output.absolute().parents if folder.exists())
    if not os.access(above, os.W_OK):
        raise UsageError(
            "is not writable", where=str(above), hint="Pass --output in a directory that you may write to."
        )
    if output.is_symlink():
        raise UsageError(
            "is a symbolic link",
            where=str(output),
            hint="Pass the path that the link leads to, or another --output.",
            data={"reason": "output-is-link"},
        )
    if output.exists() and not fresh:
        kind = "directory" if output.is_dir() else "file"
        raise UsageError(
            f"already exists (a {kind})",
            where=str(output),
            hint="Choose another --output, or --fresh to replace it.",
            data={"reason": "output-exists", "kind": kind},
        )
    for earlier in (output, *([rejected] if recipe.eval.gates else [])):
        if earlier.exists() or earlier.is_symlink():
            owned_files(earlier)  # it is removed only when its successor is complete
    if work.exists() and has_begun(work) and not (resume or fresh):
        raise UsageError(
            "an interrupted run lies there",
            where=str(work),
            hint="Continue it with --resume, or delete it and begin again with --fresh.",
            data={"reason": "interrupted-run"},
        )


def check_summary(settings: ReportSettings) -> None:
    """raises UsageError, before any work, if the job summary can't be written"""
    if (summary := summary_file(settings)) is not None:
        try:
            summary.open("a").close()
        except OSError as error:
            raise UsageError(
                f"can't be written ({error.strerror})",
                where="$GITHUB_STEP_SUMMARY",
                hint="Unset it, or set report.github_summary to never.",
                data={"reason": "not-writable", "cause": error.strerror},
            ) from error


def summary_file(settings: ReportSettings) -> Path | None:
    """The file that $GITHUB_STEP_SUMMARY names; None if there is none, or the recipe asks for no summary."""
    named = os.environ.get("GITHUB_STEP_SUMMARY")
    return Path(named) if named and settings.github_summary == "auto" else None


class PlannedRunRow(PlanJson):
    """A `PlannedRun` as `plan --format json` prints it."""

    predicted_stages: list[PredictedStage] | None


@dataclass(frozen=True)
class PlannedRun:
    """What a run would do, and everything that would stop it.

    problems  of the plan, the data, the request and the predicted time; a run raises the first of them
    stages    predicted time of each stage; None if there is a problem, or if the run is over soon
    """

    plan: Plan
    problems: tuple[CompressError, ...]
    stages: list[PredictedStage] | None

    def to_json(self) -> PlannedRunRow:
        problems = [problem.event() for problem in self.problems]
        return {**self.plan.to_json(), "problems": problems, "predicted_stages": self.stages}


def plan_run(
    recipe: Recipe,
    model: str,
    output: Path | None,
    *,
    device: str,
    resume: bool,
    fresh: bool,
    measure: bool,
    long: bool,
    trust_remote_code: bool,
) -> PlannedRun:
    """The plan of a run with this request, which is not begun. The arguments are those of `run.compress`.

    output  None: not chosen yet, so neither it nor its disk is checked
    raises  ModelError if the model can't be read; all other problems are in the result
    """
    plan = make_plan(recipe, model, output=output, trust_remote_code=trust_remote_code)
    problems = [
        *plan.problems,
        *data_problems(plan.recipe, plan.source, measure=measure, trust_remote_code=trust_remote_code),
    ]
    place, stages = None, None
    try:
        place = find_device(device)
        if output is not None:
            check_request(recipe, named_output(output), resume=resume, fresh=fresh, measure=measure)
    except CompressError as problem:
        problems.append(problem)
    if place is not None and not problems:
        stages = predict_stages(plan, measure, place)
        problems += too_long(stages, long)
    return PlannedRun(plan, tuple(problems), stages)


@contextmanager
def left_as_found(work: Path, resumed: bool) -> Iterator[None]:
    """Remove the work directory after a refusal (docs/exit-codes.md), except the results of an interrupted run."""
    try:
        yield
    except CompressError as error:
        if error.exit_code in REFUSALS and not resumed:
            with suppress(UsageError):  # someone put other files there: they stay, and the refusal is reported
                remove_work(work)
        raise


@contextmanager
def folders_above(output: Path) -> Iterator[None]:
    """Make the parent directories of the output, and remove them again if they stay empty."""
    parent = output.absolute().parent
    missing = [folder for folder in (parent, *parent.parents) if not folder.exists()]
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"can't be created ({error.strerror})",
            where=str(parent),
            hint="Pass --output in a directory that you may write to.",
            data={"reason": "not-made", "cause": error.strerror},
        ) from error
    try:
        yield
    finally:
        for folder in missing:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
