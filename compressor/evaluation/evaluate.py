"""Measures a model before and after, on the same tokens, loaded as a user would load it, each in a fresh process.

This module starts the processes and gathers their answers; what each measures is in `quality` and `speed`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from compressor.artifact.manifest import read_manifest
from compressor.data.samples import Samples
from compressor.evaluation.metrics import QUALITY
from compressor.evaluation.quality import measure_quality
from compressor.evaluation.saturation import uncounted
from compressor.evaluation.sections import Saturation, SpeedRow
from compressor.evaluation.speed import RATES, measure_speed
from compressor.process.child import ask
from compressor.storage.file_names import MANIFEST

HERE = "compressor.evaluation.evaluate"


@dataclass(frozen=True)
class Measured:
    """What an evaluation found.

    metrics     by name; one that can't be measured has `after: null` and a `reason`
    saturation  `layers`: name, values read and how many were outside; `reason` why layers are missing there, or null
    patches     of images, which a token pruner kept (`compressor.evaluation.kept_patches`); None without one
    kernels     what `compressor.load` multiplies stored forms by (`prepared.chosen_kernels`); None
                where speed was not measured
    """

    metrics: dict[str, Any] = field(default_factory=dict)
    speed: dict[str, SpeedRow] = field(default_factory=dict)
    saturation: Saturation = field(default_factory=lambda: uncounted("quality was not measured"))
    patches: dict[str, Any] | None = None
    kernels: list[dict[str, str]] | None = None


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
    """Quality, speed and saturation.

    before       source checkpoint; None measures `after` alone
    most_tokens  that the model takes at once, if they are less than `SPEED_TOKENS`
    raises  what `load_model` raises, and what `child.ask` does
    """
    common = {
        **_write_samples(samples, scratch),
        "threads": threads,
        "batch_size": settings.batch_size,
        "seed": seed,
        "confidence": settings.confidence,
        "most_tokens": most_tokens,
        "trust_remote_code": trust_remote_code,
    }
    wanted = [name for name in settings.metrics if name in QUALITY]
    request = {"kind": "quality", "before": str(before) if before else None, "after": str(after), "metrics": wanted}
    quality = ask(HERE, {**common, **request}, "measures quality") if wanted else {}
    speed: dict[str, SpeedRow] = {}
    if {"speed", "memory"} & set(settings.metrics):
        speed = _speed_rows(common, before, after)
    kernels = None
    if "speed" in settings.metrics and (after / MANIFEST).is_file() and read_manifest(after)["weights"]:
        kernels, rows = _kernel_speed_rows(common, after, speed)
        speed |= rows
    return Measured(speed=speed, kernels=kernels, **quality)


def _write_samples(samples: Samples, scratch: Path) -> dict[str, str | None]:
    """The files that a measuring process reads, as keys of its request."""
    tokens, labels = scratch / "eval-samples.safetensors", scratch / "eval-labels.safetensors"
    save_file({f"{number:06d}": sample.contiguous() for number, sample in enumerate(samples.inputs)}, tokens)
    if samples.labels is not None:
        save_file({"labels": samples.labels}, labels)
    return {"tokens": str(tokens), "labels": str(labels) if samples.labels is not None else None}


def _speed_rows(common: dict[str, Any], before: Path | None, after: Path) -> dict[str, SpeedRow]:
    """Each model in a process of its own, so that neither counts in the other's memory."""
    answers = {
        side: ask(HERE, {**common, "kind": "speed", "model": str(path)}, f"measures the speed {side}")
        for side, path in (("before", before), ("after", after))
        if path is not None
    }
    return {name: _speed_row(answers["after"][name], answers.get("before"), name) for name in answers["after"]}


def _kernel_speed_rows(
    common: dict[str, Any], after: Path, speed: dict[str, SpeedRow]
) -> tuple[list[dict[str, str]], dict[str, SpeedRow]]:
    """The chosen kernels, and their rates beside those of the dense model."""
    request = {**common, "kind": "speed", "model": str(after), "kernels": True}
    found = ask(HERE, request, "measures the speed of the kernels")
    dense = {name: row["before"] for name, row in speed.items() if "before" in row}
    rows = {f"kernels_{name}": _speed_row(found[name], dense or None, name) for name in RATES if name in found}
    return found["kernels"], rows


def _speed_row(after: float | None, before: dict[str, Any] | None, name: str) -> SpeedRow:
    """before  what was measured of the other model, by name; None: there is no other"""
    return {"after": after} if before is None else {"before": before[name], "after": after}


def main(request: dict[str, Any]) -> dict[str, Any]:
    """Answer `evaluate`, in a fresh process."""
    torch.set_num_threads(request["threads"])
    torch.manual_seed(request["seed"])
    return measure_quality(request) if request["kind"] == "quality" else measure_speed(request)
