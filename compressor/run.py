"""Runs a recipe on a model up to the published artifact: plan, sweep, write, verify, evaluate, gate, publish.

The output directory is created only after all stages have passed. Until then all files are in `OUTPUT.work` beside it.
"""

from __future__ import annotations

import os
import shutil
import time
from contextlib import closing, nullcontext
from pathlib import Path

import torch

from compressor.artifact import verify
from compressor.artifact.files import check_files, remove_artifact
from compressor.artifact.findings import Findings
from compressor.artifact.manifest import Source, read_manifest
from compressor.artifact.speed_runs import SPEED_TOKENS
from compressor.artifact.writer import carried, seal, write_artifact
from compressor.data.samples import Samples
from compressor.engine.events import Emit, PredictedStage, warning_event
from compressor.engine.interrupt import Stop, interruptible, signals
from compressor.engine.job import Clock, Job, fingerprint
from compressor.engine.line_facts import LineFacts
from compressor.engine.plan import make_plan
from compressor.engine.plan_records import Plan
from compressor.engine.request import check_request, find_device, folders_above, left_as_found, named_output
from compressor.engine.run_samples import read_samples
from compressor.engine.stage_times import check_time, predict_stages
from compressor.engine.sweep import Outcome, Sweeper, run_sweeps, save_verification_batch
from compressor.errors import ArtifactError, GateError, data_of
from compressor.evaluation.environment import environment
from compressor.evaluation.evaluate import Measured, evaluate
from compressor.evaluation.metrics import unmeasured
from compressor.evaluation.report import build_report, write_card, write_reports
from compressor.evaluation.saturation import uncounted
from compressor.evaluation.sections import Report
from compressor.evaluation.weight_sizes import weight_sizes
from compressor.model.model_names import model_label
from compressor.model.token_limit import limit_of
from compressor.process.child import started_early
from compressor.process.resources import room
from compressor.protocol import RewritePass, WeightPass
from compressor.recipe.gates import check_gates, failed_gates
from compressor.recipe.recipe import Recipe
from compressor.storage.journal import Journal, has_begun, remove_work


def compress(
    recipe: Recipe,
    model: str,
    output: Path,
    *,
    device: str = "auto",
    threads: int | None = None,
    resume: bool = False,
    fresh: bool = False,
    measure: bool = True,
    long: bool = False,
    trust_remote_code: bool = False,
    emit: Emit = lambda event: None,
    stop: Stop | None = None,
) -> Report:
    """Compress `model` by `recipe` into `output` and return the report.

    resume   continue the interrupted run that left `OUTPUT.work`
    fresh    replace an earlier result or work directory of this tool
    measure  evaluate before and after; without it no gate can hold, so a recipe with gates is refused
    long     allow a run that is predicted to take more than a day
    stop     of a caller that handles signals; without it the run handles Ctrl-C, SIGTERM and SIGHUP, if this is the
             main thread
    raises   CompressError; its class gives the kind (docs/exit-codes.md)
    """
    output = named_output(output)
    work = output.with_name(output.name + ".work")
    check_request(recipe, output, resume=resume, fresh=fresh, measure=measure)
    place = find_device(device)
    with signals(Stop()) if stop is None else nullcontext(stop) as stop, interruptible(stop), folders_above(output):
        stop.work = work
        clock = Clock()
        if work.exists() and (fresh or not has_begun(work)):
            remove_work(work)
        torch.set_num_threads(threads or torch.get_num_threads())
        emit({"event": "stage", "name": "plan"})
        with clock.time("plan"):
            plan = _plan(recipe, model, output, trust_remote_code, emit)
            calibration, held_out = read_samples(plan, measure=measure, trust_remote_code=trust_remote_code)
            stages = predict_stages(plan, measure, place)
            check_time(stages, long)
        shared = fingerprint(plan, calibration, place)
        journal = Journal.reopen(work, shared) if resume else Journal.create(work, shared)
        with left_as_found(work, resume), closing(journal):
            job = Job(
                source=model_label(model),
                plan=plan,
                journal=journal,
                calibration=calibration,
                held_out=held_out,
                fingerprint=shared,
                place=place,
                trust_remote_code=trust_remote_code,
                resumed=len(journal.lines) if resume else None,
                clock=clock,
                emit=emit,
            )
            if stages is not None:
                emit({"event": "predicted", "stages": _left(stages, journal)})
            with room(work), started_early():
                report = _carry_out(job, stop)
        stop.close()
        target = _publish(job, report, output)
    emit({"event": "result", "status": report["status"], "output": str(target), "report": report})
    _check_status(report, target)
    return report


def _carry_out(job: Job, stop: Stop) -> Report:
    """Run all stages between plan and publication. Returns the report, which is in the built artifact.

    raises  ArtifactError if the artifact fails its verification; its report then has that status
    """
    for folder in (job.built, job.scratch):  # from an earlier attempt; the disk space may be needed
        if folder.exists():
            shutil.rmtree(folder)
    outcome = _sweep(job, stop)
    with job.stage("write"):
        _write(job, outcome)
    with job.stage("verify"):
        checked = _verify(job)
    report = _report(job, outcome, checked, _measure(job, checked))
    write_reports(report, job.built, job.recipe.report)
    if job.recipe.export.card and not checked.problems:
        write_card(report, outcome.structure.checkpoint, job.built)
    _seal(job, outcome)
    _check_built(job, checked)
    return report


def _check_built(job: Job, checked: Findings) -> None:
    """raises ArtifactError for an artifact that failed its verification, or whose files have changed since"""
    where = f"{job.journal.work.name}/artifact"
    if checked.problems:
        raise ArtifactError(
            "; ".join(checked.problems),
            where=where,
            hint=f"Read the report in {where}, and report this message with the recipe; the output was not published.",
            data=data_of(checked.problems),
        )
    if problems := check_files(job.built, read_manifest(job.built)):
        raise ArtifactError(
            "; ".join(problems),
            where=where,
            hint="Check the disk, then run the command again with --fresh.",
            data=data_of(problems),
        )


def _check_status(report: Report, target: Path) -> None:
    """raises GateError if a gate did not hold"""
    if report["status"] == "gate_failed":
        raise GateError(
            f"{failed_gates(report['gates'])} did not hold",
            where=target.name,
            hint=f"Read the report in {target}, then change the recipe or the bounds of its gates.",
            data={"gates": [gate["name"] for gate in report["gates"] if gate["passed"] is False]},
        )


def _plan(recipe: Recipe, model: str, output: Path, trust_remote_code: bool, emit: Emit) -> Plan:
    """Make the plan. raises its first problem"""
    plan = make_plan(recipe, model, output=output, trust_remote_code=trust_remote_code)
    for warning in plan.warnings:
        emit(warning_event(warning))
    if plan.problems:
        first = plan.problems[0]
        more = f" ({len(plan.problems) - 1} more; compress-model plan lists all)" if len(plan.problems) > 1 else ""
        raise type(first)(first.what + more, where=first.where, hint=first.hint, data=first.data)
    return plan


def _left(stages: list[PredictedStage], journal: Journal) -> list[PredictedStage]:
    """The predicted times without those of parts that an earlier run has stored."""
    return [
        {
            **stage,
            "parts": [
                0.0 if journal.done(f"{number}/{part}") is not None else seconds
                for part, seconds in enumerate(stage["parts"])
            ],
        }
        for number, stage in enumerate(stages)
    ]


def _sweep(job: Job, stop: Stop) -> Outcome:
    """Run the sweeps. The verification batch and its output stay in `scratch`."""
    with job.clock.time("sweep"):
        sweeper = Sweeper(job.plan, job.journal, job.calibration, job.place, job.recipe.seed, job.emit, stop.is_asked)
        outcome = run_sweeps(sweeper)
    job.scratch.mkdir()
    assert sweeper.verification_output is not None
    save_verification_batch(
        job.scratch / "verification_batch.safetensors", outcome.structure, sweeper.verification_output, job.place
    )
    return outcome


def _write(job: Job, outcome: Outcome) -> None:
    """Write the artifact and its manifest into a directory of its own, so that verification checks the hashes too."""
    write_artifact(
        job.built,
        outcome.structure,
        outcome.files,
        list(outcome.stored.values()),
        outcome.export_format,
        job.recipe.export.shard_bytes,
        outcome.plan.untied,
        job.recipe.to_yaml(),
    )
    _seal(job, outcome)


def _seal(job: Job, outcome: Outcome) -> None:
    errors: dict[str, float | None] = {}
    written: dict[str, float] = {}
    for facts in map(LineFacts.of, job.journal.lines.values()):
        errors.update(facts.relative_errors or {})
        written.update(facts.written)
    stored = {
        stored_weight.weight.parameter
        for stored_weight in outcome.stored.values()
        if stored_weight.weight.expert is None
    }
    rewritten = {name: error for name, error in sorted(written.items()) if name not in stored}
    source: Source = {
        "name": job.source,
        "sha256": job.fingerprint["model"],
        "changes": [
            {
                "pass": step.name,
                "rewrites": isinstance(step.settings, RewritePass),
                "keeps_function": isinstance(step.settings, RewritePass) and step.settings.keeps_function,
            }
            for step in job.recipe.steps
            if not isinstance(step.settings, WeightPass)
        ],
        "relative_errors": {name: errors.get(name) for name in outcome.stored},
    }
    if rewritten:
        source["rewritten"] = rewritten
    seal(
        job.built,
        architecture=outcome.structure.architecture,
        export_format=outcome.export_format,
        formats=list(outcome.stored.values()),
        source=source,
        ledger=outcome.ledger,
        carried=carried(outcome.structure),
    )


def _verify(job: Job) -> Findings:
    """The result of verification in a fresh process. An artifact that does not load or run is a problem in it."""
    try:
        return verify.verify_in_child(
            job.built,
            job.scratch / "verification_batch.safetensors",
            sealed=True,
            source=job.plan.source.checkpoint.directory,
            memory=job.recipe.limits.memory,
            trust_remote_code=job.trust_remote_code,
        )
    except ArtifactError as error:
        return Findings(problems=[error.what])


def _measure(job: Job, checked: Findings) -> Measured:
    """What the evaluation measured; nothing if there is none, or if the artifact failed its verification."""
    if checked.problems:
        why = "the artifact failed its verification"
        metrics = unmeasured(job.recipe.eval.metrics, why) if job.held_out else {}
        return Measured(metrics, saturation=uncounted(why))
    if job.held_out is None:
        return Measured()
    with job.stage("evaluate"):
        return _evaluate(job, job.held_out)


def _evaluate(job: Job, held_out: Samples) -> Measured:
    return evaluate(
        job.plan.source.checkpoint.directory,
        job.built,
        held_out,
        job.recipe.eval,
        job.scratch,
        threads=torch.get_num_threads(),
        seed=job.recipe.seed,
        most_tokens=limit_of(job.plan.source.model)(SPEED_TOKENS),
        memory=job.recipe.limits.memory,
        trust_remote_code=job.trust_remote_code,
    )


def _report(job: Job, outcome: Outcome, checked: Findings, measured: Measured) -> Report:
    sizes = weight_sizes(job.built, outcome)
    evaluation = job.recipe.eval
    return build_report(
        source=job.source,
        recipe=job.recipe,
        outcome=outcome,
        fingerprint=job.fingerprint,
        facts=[LineFacts.of(line) for line in job.journal.lines.values()],
        sizes=sizes,
        measured=measured,
        gates=check_gates(evaluation.gates, measured.metrics, measured.speed, sizes, evaluation.confidence),
        verification=checked,
        calibration=job.calibration,
        held_out=job.held_out,
        run={
            "started": job.clock.started,
            "seconds": time.perf_counter() - job.clock.began,
            "seconds_by_stage": job.clock.seconds,
            "peak_rss_bytes": max(job.clock.peak_rss_bytes.values()),
            "peak_rss_bytes_by_stage": job.clock.peak_rss_bytes,
            "predicted_peak_bytes": outcome.plan.peak_memory_bytes,
            "resumed": [] if job.resumed is None else [{"from_part": job.resumed}],
            "speed": measured.speed,
            "quality": measured.quality,
        },
        environment=environment(job.place),
    )


def _publish(job: Job, report: Report, output: Path) -> Path:
    """Move the built artifact to its output directory, and delete the work directory."""
    target = output if report["status"] == "ok" else output.with_name(output.name + ".rejected")
    if target.exists() or target.is_symlink():
        remove_artifact(target)
    os.replace(job.built, target)
    remove_work(job.journal.work)
    return target
