"""Measures a model before and after compression on the same tokens, loaded as a user would load it.

Each measurement runs in a new process. This module starts the processes and collects their answers; `quality` and
`speed` do the measuring.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from compressor.artifact.manifest import read_manifest
from compressor.data.samples import Samples
from compressor.evaluation import child_messages
from compressor.evaluation.child_messages import QualityAnswer, QualityRequest, Request, SpeedAnswer, SpeedRequest
from compressor.evaluation.metrics import QUALITY
from compressor.evaluation.quality import measure_quality
from compressor.evaluation.saturation import uncounted
from compressor.evaluation.sections import KernelRow, MetricRow, Patches, Saturation, SpeedRow
from compressor.evaluation.speed import RATES, measure_speed
from compressor.process.child import ask
from compressor.storage.file_names import MANIFEST

HERE = "compressor.evaluation.evaluate"


@dataclass(frozen=True)
class Measured:
    """Results of an evaluation.

    metrics     by name; a metric that can't be measured has `after: null` and a `reason`
    saturation  `layers`: name, values read, and how many were outside; `reason`: why layers are missing, or null
    patches     patches of images that a token pruner kept (`compressor.evaluation.kept_patches`); None without one
    kernels     kernels that `compressor.load` chose for stored weights (`prepared.chosen_kernels`); None if speed
                was not measured
    """

    metrics: dict[str, MetricRow] = field(default_factory=dict)
    speed: dict[str, SpeedRow] = field(default_factory=dict)
    saturation: Saturation = field(default_factory=lambda: uncounted("quality was not measured"))
    patches: Patches | None = None
    kernels: list[KernelRow] | None = None


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
    trust_remote_code: bool = False,
) -> Measured:
    """Measure quality, speed and saturation.

    before       source checkpoint; None: only `after` is measured
    most_tokens  largest number of tokens that the model reads at once, if it is below `SPEED_TOKENS`
    raises  what `load_model` raises, and what `child.ask` raises
    """
    common: Request = {
        **_write_samples(samples, scratch),
        "threads": threads,
        "batch_size": settings.batch_size,
        "seed": seed,
        "confidence": settings.confidence,
        "most_tokens": most_tokens,
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
    return Measured(metrics=answer["metrics"], saturation=answer["saturation"], patches=answer["patches"])


def _measure_speed(common: Request, model: Path, doing: str, *, kernels: bool = False) -> SpeedAnswer:
    request: SpeedRequest = {**common, "kind": "speed", "model": str(model), "kernels": kernels}
    answer: SpeedAnswer = ask(HERE, request, doing)
    return answer


def _speed_rows(common: Request, before: Path | None, after: Path) -> dict[str, SpeedRow]:
    """Measure each model in a separate process, so that neither counts in the other's memory."""
    answers = {
        side: _measure_speed(common, path, f"measures the speed {side}")["values"]
        for side, path in (("before", before), ("after", after))
        if path is not None
    }
    return {name: _speed_row(answers["after"][name], answers.get("before"), name) for name in answers["after"]}


def _kernel_speed_rows(
    common: Request, after: Path, speed: dict[str, SpeedRow]
) -> tuple[list[KernelRow], dict[str, SpeedRow]]:
    """The chosen kernels, and their speed compared with that of the dense model."""
    found = _measure_speed(common, after, "measures the speed of the kernels", kernels=True)
    values, kernels = found["values"], found["kernels"]
    assert kernels is not None
    dense = {name: row["before"] for name, row in speed.items() if "before" in row}
    rows = {f"kernels_{name}": _speed_row(values[name], dense or None, name) for name in RATES if name in values}
    return kernels, rows


def _speed_row(after: float | None, before: dict[str, float | None] | None, name: str) -> SpeedRow:
    """A row of the report's speed. before: values of the other model by name; None: there is no other model"""
    return {"after": after} if before is None else {"before": before[name], "after": after}


def main(request: QualityRequest | SpeedRequest) -> QualityAnswer | SpeedAnswer:
    """Answer `evaluate`, in the new process."""
    torch.set_num_threads(request["threads"])
    torch.manual_seed(request["seed"])
    return measure_quality(request) if request["kind"] == "quality" else measure_speed(request)
