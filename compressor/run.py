"""From recipe and model to a published artifact: plan, sweep, write, verify, evaluate, gate, publish.

The output directory appears only when all of it passed. Until then everything lies in `OUTPUT.work` beside it.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from compressor import artifact, verify
from compressor.data import Samples, load_samples
from compressor.environment import environment, peak_rss_bytes
from compressor.errors import ArtifactError, GateError, PreflightError, UsageError
from compressor.evaluate import evaluate, weight_sizes
from compressor.gates import check_gates
from compressor.journal import Journal, remove_work
from compressor.plan import Plan, make_plan
from compressor.recipe import Recipe
from compressor.report import build_report, write_card, write_reports
from compressor.sweep import Sweeper, run_sweeps, save_probe

Emit = Callable[[dict[str, Any]], None]


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
    trust_remote_code: bool = False,
    emit: Emit = lambda event: None,
) -> dict[str, Any]:
    """Compress `model` by `recipe` into `output` and return the report.

    resume   continue the interrupted run that left `OUTPUT.work`
    fresh    replace an earlier result or work directory of this tool
    measure  evaluate before and after; without it no gate can hold, so a recipe with gates is refused
    raises   CompressError; its class says which kind (docs/exit-codes.md)
    """
    began, started = time.perf_counter(), time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    work = output.with_name(output.name + ".work")
    if recipe.eval.gates and not measure:
        raise UsageError("the recipe has gates, which need the evaluation", where="--no-eval", hint="Drop one of them.")
    _clear_the_way(output, work, resume, fresh)
    place = find_device(device)
    torch.set_num_threads(threads or torch.get_num_threads())
    emit({"event": "stage", "name": "plan"})
    plan = make_plan(recipe, model, output=output, trust_remote_code=trust_remote_code)
    for warning in plan.warnings:
        emit({"event": "warning", **warning})
    if plan.problems:
        first = plan.problems[0]
        more = f" ({len(plan.problems) - 1} more; compress-model plan lists all)" if len(plan.problems) > 1 else ""
        raise type(first)(first.what + more, where=first.where, hint=first.hint)
    route = plan.route
    assert route is not None
    calibration, held_out = _read_data(plan, measure)
    fingerprint = _fingerprint(plan, calibration, place)
    journal = Journal.reopen(work, fingerprint) if resume else Journal.create(work, fingerprint)
    seconds: dict[str, float] = {"plan": time.perf_counter() - began}
    resumed = [{"from_unit": len(journal.lines)}] if resume else []
    try:
        with _interruptible() as is_interrupted:
            sweeper = Sweeper(plan, journal, calibration, place, recipe.seed, emit, is_interrupted)
            units, forms = timed(seconds, "sweep", lambda: run_sweeps(sweeper))
        scratch, built = work / "scratch", work / "artifact"
        scratch.mkdir(exist_ok=True)
        if built.exists():
            _remove_tree(built)
        emit({"event": "stage", "name": "write"})
        assert sweeper.probe is not None
        save_probe(scratch / "probe.safetensors", plan.structure, sweeper.probe, place)
        ordered = [forms[name] for name in sorted(forms)]
        timed(
            seconds,
            "store",
            lambda: artifact.write_artifact(
                built, plan.structure, units, ordered, route, recipe.export.shard_bytes, plan.untied, recipe.to_yaml()
            ),
        )
        source = {"name": plan.structure.checkpoint.directory.name, "sha256": fingerprint["model"]}

        def seal() -> None:
            artifact.seal(built, architecture=plan.structure.architecture, route=route, forms=ordered, source=source)

        seal()
        emit({"event": "stage", "name": "verify"})
        checked = timed(
            seconds,
            "verify",
            lambda: verify.verify_in_child(built, scratch / "probe.safetensors", scratch, sealed=True),
        )
        if checked["problems"]:
            raise ArtifactError(
                "; ".join(checked["problems"]),
                where=f"{work.name}/artifact",
                hint="Kept there for a look; not published.",
            )
        metrics: dict[str, Any] = {}
        speed: dict[str, Any] = {}
        if measure:
            assert held_out is not None
            emit({"event": "stage", "name": "evaluate"})
            metrics, speed = timed(
                seconds,
                "evaluate",
                lambda: evaluate(
                    plan.structure.checkpoint.directory,
                    built,
                    held_out,
                    recipe.eval,
                    scratch,
                    threads=torch.get_num_threads(),
                    seed=recipe.seed,
                    trust_remote_code=trust_remote_code,
                ),
            )
        sizes = weight_sizes(plan.structure.checkpoint, built, forms, plan)
        gates = check_gates(recipe.eval.gates, metrics, speed, sizes, recipe.eval.confidence)
        lines = list(journal.lines.values())
        report = build_report(
            plan=plan,
            fingerprint=fingerprint,
            lines=lines,
            sizes=sizes,
            metrics=metrics,
            gates=gates,
            verification=checked,
            calibration=calibration,
            held_out=held_out,
            run={
                "started": started,
                "seconds": time.perf_counter() - began,
                "seconds_by_stage": seconds,
                "peak_rss_bytes": peak_rss_bytes(),
                "predicted_peak_bytes": plan.peak_memory_bytes,
                "resumed": resumed,
                "speed": speed,
            },
            environment=environment(place),
        )
        write_reports(report, built, recipe.report)
        if recipe.export.card:
            write_card(report, plan.structure.checkpoint, built)
        seal()
        problems = artifact.check_files(built, artifact.read_manifest(built))
        if problems:
            raise ArtifactError("; ".join(problems), where=f"{work.name}/artifact")
    except BaseException:
        journal.close()
        raise
    journal.close()
    target = output if report["status"] == "ok" else output.with_name(output.name + ".rejected")
    if target != output and target.exists():
        artifact.remove_artifact(target)
    if target == output and output.exists():
        artifact.remove_artifact(output)
    os.replace(built, target)
    remove_work(work)
    emit({"event": "result", "status": report["status"], "output": str(target), "report": report})
    if target != output:
        failed = ", ".join(
            f"{gate['name']} {gate['value']} (bound {gate['bound']})" for gate in report["gates"] if not gate["passed"]
        )
        raise GateError(f"{failed} did not hold", where=target.name, hint=f"The result and its report are in {target}.")
    return report


def find_device(asked: str) -> torch.device:
    """auto takes CUDA when there is one. raises PreflightError for a device that isn't there"""
    if asked == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if asked.startswith("cuda") and not torch.cuda.is_available():
        raise PreflightError("no CUDA device was found", where=f"--device {asked}", hint="Use --device cpu or auto.")
    try:
        return torch.device(asked)
    except RuntimeError as error:
        raise UsageError("is not a device", where=f"--device {asked}", hint="Use auto, cpu, cuda or cuda:N.") from error


def timed(table: dict[str, float], name: str, work: Callable[[], Any]) -> Any:
    began = time.perf_counter()
    result = work()
    table[name] = time.perf_counter() - began
    return result


def _clear_the_way(output: Path, work: Path, resume: bool, fresh: bool) -> None:
    if resume and fresh:
        raise UsageError("--resume and --fresh exclude each other", where="run")
    parent = output.absolute().parent
    if not parent.is_dir():
        try:
            parent.mkdir(parents=True)
        except OSError as error:
            raise UsageError(
                f"can't be made ({error.strerror})", where=str(parent), hint="Choose another --output."
            ) from error
    if not os.access(parent, os.W_OK):
        raise UsageError("is not writable", where=str(parent), hint="Choose another --output.")
    if output.exists() and not fresh:
        raise UsageError("exists already", where=str(output), hint="Choose another --output, or --fresh to replace it.")
    if output.exists():
        artifact.owned_files(output)  # it is removed only when its successor is complete
    if work.exists() and fresh:
        remove_work(work)
    if work.exists() and not resume:
        raise UsageError(
            "an interrupted run lies there", where=str(work), hint="Continue it with --resume, or drop it with --fresh."
        )


def _read_data(plan: Plan, measure: bool) -> tuple[Samples | None, Samples | None]:
    recipe, directory = plan.recipe, plan.structure.checkpoint.directory
    config = plan.structure.model.config.get_text_config()
    vocabulary = config.vocab_size if plan.structure.model.main_input_name == "input_ids" else None
    calibration = held_out = None
    if any(step.settings.traits.reads != "weights" for step in recipe.steps):
        seed = recipe.seed if recipe.data.seed is None else recipe.data.seed
        calibration = load_samples(recipe.data, directory, seed=seed, vocabulary=vocabulary)
    if measure:
        seed = recipe.seed if recipe.eval.data.seed is None else recipe.eval.data.seed
        held_out = load_samples(recipe.eval.data, directory, seed=seed, vocabulary=vocabulary)
    for samples, key in ((calibration, "data"), (held_out, "eval.data")):
        if samples is not None and samples.is_text and vocabulary is not None:
            largest = max(int(sample.max()) for sample in samples.inputs)
            longest = max(len(sample) for sample in samples.inputs)
            limit = getattr(config, "max_position_embeddings", None)
            if largest >= vocabulary:
                raise PreflightError(
                    f"the tokenizer made token {largest}, the model knows {vocabulary}",
                    where=key,
                    hint="Tokenizer and model are not of one family.",
                )
            if limit and longest > limit:
                raise PreflightError(
                    f"samples of {longest} tokens, the model takes {limit}",
                    where=f"{key}.length",
                    hint=f"Set it to {limit}.",
                )
    return calibration, held_out


def _fingerprint(plan: Plan, calibration: Samples | None, device: torch.device) -> dict[str, Any]:
    """What a resumed run has to share with the interrupted one."""
    import transformers

    from compressor.export import VERSION

    return {
        "recipe": plan.recipe.sha256,
        "model": plan.structure.checkpoint.content_sha256,
        "data": calibration.digest if calibration else None,
        "compress_model": VERSION,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": device.type,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C or SIGTERM asks to stop at the next unit, the second stops at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return

    def ask(number: int, frame: Any) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    old = {sign: signal.signal(sign, ask) for sign in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked.is_set
    finally:
        for sign, handler in old.items():
            signal.signal(sign, handler)


def _remove_tree(directory: Path) -> None:
    """A half-written artifact of an earlier try, inside our own work directory."""
    for path in sorted(directory.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    directory.rmdir()
