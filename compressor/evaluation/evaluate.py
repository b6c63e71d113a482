"""Measures a model before and after compression on the same tokens, loaded as a user would load it.

Each measurement runs in a new process. This module starts the processes and collects their answers; `quality` and
`speed` do the measuring.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file

from compressor.artifact.manifest import read_manifest
from compressor.artifact.memory_needs import gibibytes, limit_bytes
from compressor.data.samples import Samples
from compressor.evaluation import child_messages
from compressor.evaluation.child_messages import QualityAnswer, QualityRequest, Request, SpeedAnswer, SpeedRequest
from compressor.evaluation.memory import model_speed_bytes
from compressor.evaluation.metrics import QUALITY
from compressor.evaluation.quality import measure_quality
from compressor.evaluation.saturation import uncounted
from compressor.evaluation.sections import KernelRow, MetricRow, Patches, Saturation, SpeedRow
from compressor.evaluation.speed import RATES, measure_speed
from compressor.process.child import ask
from compressor.storage.file_names import MANIFEST

HERE = "compressor.evaluation.evaluate"
SPEEDS = ("load_seconds", *RATES[:2], "peak_rss_bytes")  # rows of a model whose speed can't be measured


@dataclass(frozen=True)
class Measured:
    """Results of an evaluation.

    metrics     by name; a metric that can't be measured has `after: null` and a `reason`
    saturation  `layers`: name, values read, and how many were outside; `reason`: why layers are missing, or null
    patches     patches of images that a token pruner kept (`compressor.evaluation.kept_patches`); None without one
    kernels     kernels that `compressor.load` chose for stored weights (`prepared.chosen_kernels`); None if speed
                was not measured
    quality     how both models ran while quality was measured: whole | parts; None if it was not measured
    """

    metrics: dict[str, MetricRow] = field(default_factory=dict)
    speed: dict[str, SpeedRow] = field(default_factory=dict)
    saturation: Saturation = field(default_factory=lambda: uncounted("quality was not measured"))
    patches: Patches | None = None
    kernels: list[KernelRow] | None = None
    quality: str | None = None


def evaluate(
    before: Path | None,
    after: Path,
    samples: Samples,
    settings: Any,
    scratch: Path,
    *,
    threads: int,
    seed: int,
    most_tokens: int | None = None,
    memory: int | None = None,
    trust_remote_code: bool = False,
) -> Measured:
    """Measure quality, speed and saturation.

    before       source checkpoint; None: only `after` is measured
    most_tokens  largest number of tokens that the model reads at once, if it is below `SPEED_TOKENS`
    memory       bytes that a process may use; None: most of what is free. Quality of models that don't fit is measured
                 part by part. Their speed is not measured
    raises  what `load_model` raises, and what `child.ask` raises
    """
    common: Request = {
        **_write_samples(samples, scratch),
        "threads": threads,
        "batch_size": settings.batch_size,
        "seed": seed,
        "confidence": settings.confidence,
        "most_tokens": most_tokens,
        "memory": memory,
        "trust_remote_code": trust_remote_code,
    }
    wanted = [name for name in settings.metrics if name in QUALITY]
    quality = _measure_quality(common, before, after, wanted) if wanted else Measured()
    speed: dict[str, SpeedRow] = {}
    if {"speed", "memory"} & set(settings.metrics):
        speed = _speed_rows(common, before, after)
    kernels = None
    if "speed" in settings.metrics and (after / MANIFEST).is_file() and read_manifest(after)["weights"]:
        kernels, rows = _kernel_speed_rows(common, after, speed)
        speed |= rows
    return replace(quality, speed=speed, kernels=kernels)


def _write_samples(samples: Samples, scratch: Path) -> child_messages.Samples:
    """Write the samples for a measuring process. Returns the files as keys of its request."""
    tokens, labels = scratch / "eval-samples.safetensors", scratch / "eval-labels.safetensors"
    save_file({f"{number:06d}": sample.contiguous() for number, sample in enumerate(samples.inputs)}, tokens)
    if samples.labels is not None:
        save_file({"labels": samples.labels}, labels)
    return {"tokens": str(tokens), "labels": str(labels) if samples.labels is not None else None}


def _measure_quality(common: Request, before: Path | None, after: Path, metrics: list[str]) -> Measured:
    request: QualityRequest = {
        **common,
        "kind": "quality",
        "before": str(before) if before else None,
        "after": str(after),
        "metrics": metrics,
    }
    answer: QualityAnswer = ask(HERE, request, "measures quality")
    return Measured(
        metrics=answer["metrics"],
        saturation=answer["saturation"],
        patches=answer["patches"],
        quality=answer["measured"],
    )


def _measure_speed(
    common: Request, model: Path, doing: str, *, is_baseline: bool = False, kernels: bool = False
) -> SpeedAnswer:
    request: SpeedRequest = {
        **common,
        "kind": "speed",
        "model": str(model),
        "is_baseline": is_baseline,
        "kernels": kernels,
    }
    answer: SpeedAnswer = ask(HERE, request, doing)
    return answer


def _speed_rows(common: Request, before: Path | None, after: Path) -> dict[str, SpeedRow]:
    """Measure each model in a separate process, so that neither counts in the other's memory."""
    sides = {side: path for side, path in (("before", before), ("after", after)) if path is not None}
    unfit = {side: reason for side, path in sides.items() if (reason := _does_not_fit(common, path, kernels=False))}
    found = {
        side: _measure_speed(common, path, f"measures the speed {side}", is_baseline=side == "before")["values"]
        for side, path in sides.items()
        if side not in unfit
    }
    names = dict.fromkeys(name for values in found.values() for name in values) or dict.fromkeys(SPEEDS)
    nothing: dict[str, float | None] = dict.fromkeys(names)
    return {name: _speed_row({side: found.get(side, nothing)[name] for side in sides}, unfit) for name in names}


def _kernel_speed_rows(
    common: Request, after: Path, speed: dict[str, SpeedRow]
) -> tuple[list[KernelRow] | None, dict[str, SpeedRow]]:
    """The chosen kernels, and their speed compared with that of the dense model."""
    kernels: list[KernelRow] | None = None
    values: dict[str, float | None] = dict.fromkeys(RATES[:2])
    unfit = {
        side: message
        for row in speed.values()
        for side, message in row.get("unmeasured", {}).items()
        if side == "before"
    }
    if reason := _does_not_fit(common, after, kernels=True):
        unfit["after"] = reason
    else:
        found = _measure_speed(common, after, "measures the speed of the kernels", kernels=True)
        values, kernels = found["values"], found["kernels"]
    rows = {}
    for name in (name for name in RATES if name in values):
        dense = speed.get(name, {"after": None})
        sides = {"before": dense["before"]} if "before" in dense else {}
        rows[f"kernels_{name}"] = _speed_row({**sides, "after": values[name]}, unfit)
    return kernels, rows


def _does_not_fit(common: Request, model: Path, *, kernels: bool) -> str | None:
    """Why the speed of a model is not measured; None if the model fits into memory."""
    needed, limit = model_speed_bytes(model, kernels=kernels), limit_bytes(common["memory"])
    return f"needs {gibibytes(needed)}, {gibibytes(limit)} may be used" if needed > limit else None


def _speed_row(values: dict[str, float | None], unfit: dict[str, str]) -> SpeedRow:
    """A row of the report's speed: the values of both sides, or of `after` alone, and why a side was not measured."""
    row = cast("SpeedRow", dict(values))
    return {**row, "unmeasured": unfit} if unfit else row


def main(request: QualityRequest | SpeedRequest) -> QualityAnswer | SpeedAnswer:
    """Answer `evaluate`, in the new process."""
    torch.set_num_threads(request["threads"])
    torch.manual_seed(request["seed"])
    return measure_quality(request) if request["kind"] == "quality" else measure_speed(request)
