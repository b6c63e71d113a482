"""`compress-model eval`: the measurements of a run for any model or artifact."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from compressor.checkpoint import resolve_model
from compressor.data import load_samples
from compressor.errors import UsageError
from compressor.evaluate import evaluate
from compressor.gates import check_gates
from compressor.recipe import parse_recipe, read_recipe
from compressor.structure import config_of

BARE = b"version: 1\nsteps: [{pass: rtn}]\n"  # no step runs; the recipe carries `eval` alone


def measure_model(
    model: str,
    *,
    recipe: str | None,
    data: str | None,
    metrics: str | None,
    baseline: str | None,
    gates: list[str],
    overrides: list[str],
    threads: int | None,
    trust_remote_code: bool,
) -> dict[str, Any]:
    """{"metrics", "speed", "gates"}; gates are NAME=BOUND."""
    changes = list(overrides)
    if data is not None:
        changes += [f"eval.data.source={data}"]
    if metrics is not None:
        changes += [f"eval.metrics=[{metrics}]"]
    for gate in gates:
        name, equals, bound = gate.partition("=")
        if not equals:
            raise UsageError(f"{gate!r} is not NAME=BOUND", where="--gate")
        changes.append(f"eval.gates.{name}={bound}")
    parsed = read_recipe(recipe, changes) if recipe else parse_recipe(BARE, "eval", changes)
    directory = resolve_model(model)
    config = config_of(directory, trust_remote_code).get_text_config()
    vocabulary = getattr(config, "vocab_size", None)
    settings = parsed.eval
    seed = parsed.seed if settings.data.seed is None else settings.data.seed
    samples = load_samples(settings.data, directory, seed=seed, vocabulary=vocabulary)
    with tempfile.TemporaryDirectory() as scratch:
        measured, speed = evaluate(
            resolve_model(baseline) if baseline else None,
            directory,
            samples,
            settings,
            Path(scratch),
            threads=threads or torch.get_num_threads(),
            seed=parsed.seed,
            trust_remote_code=trust_remote_code,
        )
    rows = check_gates(settings.gates, measured, speed, {"ratio": None}, settings.confidence)
    return {"metrics": measured, "speed": speed, "gates": rows}
