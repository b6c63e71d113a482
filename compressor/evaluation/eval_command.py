"""Implements `compress-model eval`: measures any model or artifact as a run does, with or without a baseline."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from compressor._version import __version__
from compressor.artifact.manifest import model_class, read_manifest
from compressor.artifact.speed_runs import SPEED_TOKENS
from compressor.artifact.stock_formats import check_loader
from compressor.data.samples import Samples
from compressor.engine.job import Clock
from compressor.engine.request import check_summary
from compressor.engine.run_samples import check_length, read_evaluation_data
from compressor.errors import KernelError, ModelError, Notice, UsageError, WarningRow, values_of
from compressor.evaluation.environment import environment
from compressor.evaluation.evaluate import Measured, evaluate
from compressor.evaluation.report import (
    append_summary,
    data_facts,
    unmeasured_warnings,
    validate_report,
    write_reports,
)
from compressor.evaluation.sections import EvaluationReport, KernelRow, Sizes, Subject
from compressor.kernels.prepared.dispatch import FALLBACKS
from compressor.model.checkpoint import Checkpoint, open_checkpoint
from compressor.model.model_class import class_of, config_of
from compressor.model.model_names import model_label, resolve_model
from compressor.model.quantized_source import open_source
from compressor.model.reshaped_class import class_for
from compressor.model.token_limit import Limit, token_limit
from compressor.process.child import started_early
from compressor.process.json_values import finite
from compressor.recipe.gates import check_gates, compares_models, read_gates
from compressor.recipe.recipe import Option, Recipe, parse_recipe, read_recipe
from compressor.recipe.schema import ReportSettings
from compressor.storage.file_names import MANIFEST

EVALUATION_VERSION = 1
BARE = b"version: 1\nname: eval\nsteps: [{pass: rtn}]\n"  # no step runs; only the `eval` section is used
FILES = {"report.json", "report.md", "junit.xml"}


def measure_model(
    model: str,
    *,
    recipe: str | None = None,
    data: str | None = None,
    metrics: str | None = None,
    baseline: str | None = None,
    gates: list[str] | None = None,
    overrides: list[str] | None = None,
    threads: int | None = None,
    trust_remote_code: bool = False,
    output: Path | None = None,
    strict_kernels: bool = False,
) -> EvaluationReport:
    """The evaluation report (`evaluation` in report.schema.json), also if a gate fails.

    metrics  comma-separated names, which replace the recipe's
    gates    NAME=BOUND, in addition to the recipe's
    output   directory for report.json, report.md and junit.xml; it is created, or overwritten if it is from this tool
    strict_kernels  it is an error if a layer of the artifact falls back to torch or the reference kernels
    raises   UsageError for a gate that compares two models without a baseline, KernelError with strict_kernels
    """
    clock = Clock()
    asked = _settings(recipe, data, metrics, read_gates(gates or [], "--gate"), overrides or [])
    _check_baseline(asked, baseline)
    check_summary(asked.report)
    with _kept_if_written(output), started_early():
        subjects = _open_subjects(model, baseline, trust_remote_code)
        limit = _token_limit(subjects.after, trust_remote_code)
        asked = asked.fit_lengths(limit)
        samples = _samples(asked, subjects.directory, limit, trust_remote_code)
        torch.set_num_threads(threads or torch.get_num_threads())
        found = _measured(asked, subjects, samples, limit(SPEED_TOKENS), trust_remote_code)
        if strict_kernels:
            check_kernels(found.kernels)
        report = _evaluation_report(asked, subjects, samples, found, clock)
        _publish(report, output, asked.report)
    return report


def _measured(
    asked: Recipe, subjects: Subjects, samples: Samples, most_tokens: int | None, trust_remote_code: bool
) -> Measured:
    """Measure the model, and the baseline if there is one. Nothing of it stays on the disk."""
    with tempfile.TemporaryDirectory() as scratch:
        return evaluate(
            subjects.before.directory if subjects.before else None,
            subjects.directory,
            samples,
            asked.eval,
            Path(scratch),
            threads=torch.get_num_threads(),
            seed=asked.seed,
            most_tokens=most_tokens,
            memory=asked.limits.memory,
            trust_remote_code=trust_remote_code,
        )


def _publish(report: EvaluationReport, output: Path | None, settings: ReportSettings) -> None:
    """Check the report against its schema, and write it to the output directory and the job summary, if there are."""
    validate_report(report)
    if output is not None:
        write_reports(report, output, settings)
    else:
        append_summary(report, settings)


@dataclass(frozen=True)
class Subjects:
    """The model and the baseline, if one was given, each with the name that the user gave it.

    directory  resolved directory of the model
    """

    name: str
    directory: Path
    after: Checkpoint
    baseline: str | None
    before: Checkpoint | None


def _open_subjects(model: str, baseline: str | None, trust_remote_code: bool) -> Subjects:
    """Open both models. raises ModelError; DependencyError for an artifact whose loader needs a missing package"""
    directory = resolve_model(model)
    after = open_checkpoint(directory, trust_remote_code=trust_remote_code)
    before = _open_baseline(resolve_model(baseline), trust_remote_code) if baseline else None
    for place in (after.directory, before.directory if before else None):
        if place is not None and (place / MANIFEST).is_file():
            check_loader(read_manifest(place)["route"])
    return Subjects(model, directory, after, baseline, before)


def _open_baseline(directory: Path, trust_remote_code: bool) -> Checkpoint:
    """The baseline as it is measured: an artifact as it is, another quantized checkpoint dequantized."""
    opened = open_checkpoint if (directory / MANIFEST).is_file() else open_source
    return opened(directory, trust_remote_code=trust_remote_code)


def _baseline_warnings(before: Checkpoint | None) -> list[WarningRow]:
    if before is None or before.quantized is None:
        return []
    notice = before.quantized.notice
    return [Notice("quantized-source", before.directory.name, notice, values_of(notice)).to_json()]


def _check_baseline(asked: Recipe, baseline: str | None) -> None:
    """raises UsageError for gates that compare two models if there is only one"""
    if baseline is None and (lacking := [name for name in asked.eval.gates if compares_models(name)]):
        raise UsageError(
            f"these gates compare two models: {', '.join(lacking)}",
            where="eval",
            hint="Pass --baseline with the uncompressed model, or leave these gates out.",
            data={"reason": "no-baseline", "gates": lacking},
        )


def _evaluation_report(
    asked: Recipe, subjects: Subjects, samples: Samples, found: Measured, clock: Clock
) -> EvaluationReport:
    sizes = _sizes(subjects.before, subjects.after)
    gates = check_gates(asked.eval.gates, found.metrics, found.speed, sizes, asked.eval.confidence)
    baseline = _subject(subjects.baseline, subjects.before) if subjects.baseline and subjects.before else None
    report: EvaluationReport = {
        "evaluation_version": EVALUATION_VERSION,
        "tool": {"name": "compress-model", "version": __version__},
        "status": "ok" if all(gate["passed"] for gate in gates) else "gate_failed",
        "name": asked.name,
        "settings": asked.pinned(None, samples.sha256).resolved()["eval"],
        "seed": asked.seed,
        "model": _subject(subjects.name, subjects.after),
        "baseline": baseline,
        "data": {"eval": data_facts(samples)},
        "sizes": sizes,
        "metrics": found.metrics,
        "saturation": found.saturation,
        "gates": gates,
        "warnings": [*_baseline_warnings(subjects.before), *unmeasured_warnings(found.metrics)],
        "run": {
            "started": clock.started,
            "seconds": time.perf_counter() - clock.began,
            "speed": found.speed,
            "quality": found.quality,
        },
        "environment": environment(torch.device("cpu")),
    }
    if found.kernels is not None:
        report["kernels"] = found.kernels
    return finite(report, sort=True)


def check_kernels(kernels: list[KernelRow] | None) -> None:
    """raises UsageError if no kernels were chosen, KernelError naming fallbacks to torch or the reference kernels"""
    if kernels is None:
        hint = "Evaluate an artifact with speed among eval.metrics, or leave --strict-kernels out."
        raise UsageError(
            "--strict-kernels was given, but no kernels were chosen",
            where="eval",
            hint=hint,
            data={"reason": "no-kernels"},
        )
    rows = [row for row in kernels if row["chosen"].startswith(FALLBACKS)]
    slow = [f"{row['op']}: {row['why']}" for row in rows]
    if slow:
        raise KernelError(
            "; ".join(slow),
            where="eval",
            hint="Leave --strict-kernels out, or run compress-model doctor to see what is missing.",
            data={"fallbacks": rows},
        )


def _samples(asked: Recipe, directory: Path, limit: Limit, trust_remote_code: bool) -> Samples:
    """Read the samples. raises PreflightError for samples that are longer than the model can read"""
    vocabulary = getattr(config_of(directory, trust_remote_code).get_text_config(), "vocab_size", None)
    samples = read_evaluation_data(asked, directory, vocabulary, trust_remote_code=trust_remote_code)
    if samples.is_text:
        check_length(max(len(sample) for sample in samples.inputs), limit, "eval.data")
    return samples


def _token_limit(model: Checkpoint, trust_remote_code: bool) -> Limit:
    """The largest number of tokens that a model or artifact reads. Its own blocks decide this, as in `plan`."""
    config = config_of(model.directory, trust_remote_code)
    if (model.directory / MANIFEST).is_file():
        cls = class_for(model_class(read_manifest(model.directory)["architecture"], MANIFEST), config)
    else:
        cls = class_of(model, trust_remote_code)

    def limit(length: int) -> int | None:
        try:
            return token_limit(cls, config, length)
        except ModelError:  # a class without a list of blocks; it can be measured anyway
            return None

    return limit


def _settings(
    recipe: str | None, data: str | None, metrics: str | None, gates: dict[str, float], overrides: list[str]
) -> Recipe:
    options: list[Option] = []
    if data is not None:
        options.append((f"--data {data}", ("eval", "data", "source"), data))
    if metrics is not None:
        names = [name.strip() for name in metrics.split(",") if name.strip()]
        options.append((f"--metrics {metrics}", ("eval", "metrics"), names))
    options += [(f"--gate {name}={bound:g}", ("eval", "gates", name), bound) for name, bound in gates.items()]
    if recipe is None:
        return parse_recipe(BARE, "eval", overrides, options)
    return read_recipe(recipe, overrides, options)


@contextmanager
def _kept_if_written(output: Path | None) -> Iterator[None]:
    """Create the output directory before the work, so that a failure shows early. A failed run removes it again."""
    if output is None:
        yield
        return
    existed = output.exists()
    _make_output(output)
    try:
        yield
    except BaseException:
        if not existed and not any(output.iterdir()):
            output.rmdir()
        raise


def _make_output(output: Path) -> None:
    """raises UsageError unless the directory can be created, is empty, or holds only an evaluation of this tool"""
    if not output.exists() and not output.is_symlink():
        try:
            output.mkdir(parents=True)
        except OSError as error:
            raise UsageError(
                f"can't be created ({error.strerror})",
                where=str(output),
                hint="Pass --output with a new or empty directory that you may write to.",
                data={"reason": "not-made", "cause": error.strerror},
            ) from error
        return
    if not output.is_dir():
        raise UsageError(
            "is not a directory",
            where=str(output),
            hint="Pass --output with a new or empty directory that you may write to.",
            data={"reason": "no-directory"},
        )
    present = {path.name for path in output.iterdir()}
    if present and not (present <= FILES and _is_ours(output / "report.json")):
        names = sorted(present - FILES)
        foreign = names or ["a report of another kind"]
        raise UsageError(
            f"contains files that no evaluation wrote ({', '.join(foreign[:3])})",
            where=str(output),
            hint="Pass --output with a new or empty directory that you may write to.",
            data={"reason": "foreign-files" if names else "other-report", "names": names[:3]},
        )


def _is_ours(file: Path) -> bool:
    try:
        report = json.loads(file.read_text())
        return report["evaluation_version"] == EVALUATION_VERSION
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _subject(name: str, checkpoint: Checkpoint) -> Subject:
    return {
        "source": model_label(name),
        "sha256": checkpoint.content_sha256,
        "architecture": checkpoint.architecture,
    }


def _sizes(before: Checkpoint | None, after: Checkpoint) -> Sizes:
    after_bytes = after.weight_file_bytes
    if before is None:
        return {"before_bytes": None, "after_bytes": after_bytes, "ratio": None}
    before_bytes = before.weight_file_bytes
    return {"before_bytes": before_bytes, "after_bytes": after_bytes, "ratio": after_bytes / before_bytes}
