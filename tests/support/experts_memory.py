"""Prints how much memory the sweep, the verification and the evaluation of a model take beside the libraries.

    python experts_memory.py CASES

CASES is JSON: name -> [folder, step of a recipe]. The folder has a model `m` with experts, which lie in mapped files
here. The output is JSON: name -> stage -> bytes above what was resident before.
"""

from __future__ import annotations

import compressor  # noqa: F401 isort: skip (before torch)

import json
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file

import compressor.run as running
from compressor.artifact.findings import Findings
from compressor.artifact.verify import verify
from compressor.engine.plan import make_plan
from compressor.evaluation.metrics import QUALITY
from compressor.evaluation.quality import measure_quality
from compressor.process.memory import peak_rss_bytes, return_freed_memory
from compressor.recipe.recipe import parse_recipe

RECIPE = {"version": 1, "data": {"source": "random", "samples": 8, "length": 32}, "report": {"html": False}}
SWEEP = running._sweep


@contextmanager
def measured(found, stage):
    return_freed_memory()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins at what is resident now
    before = peak_rss_bytes()
    yield
    found[stage] = peak_rss_bytes() - before


def mapped_plan(*arguments, **options):
    plan = make_plan(*arguments, **options)
    return replace(plan, sizes=replace(plan.sizes, maps_experts=True))


def measure(work: Path, step: dict[str, object]) -> dict[str, int]:
    found: dict[str, int] = {}
    model, artifact = work / "m", work / "artifact"

    def measured_sweep(job, stop):
        with measured(found, "sweep"):
            return SWEEP(job, stop)

    running.make_plan, running._sweep, running._verify = mapped_plan, measured_sweep, lambda job: Findings()
    recipe = parse_recipe(yaml.safe_dump({**RECIPE, "steps": [step]}).encode())
    running.compress(recipe, str(model), artifact, measure=False)
    with measured(found, "verify"):
        checked = verify(artifact, None, sealed=False, deep=True, source=model, memory=1)
    assert checked.problems == [] and checked.loaded == "parts", checked
    save_file({"000000": torch.arange(16)}, work / "tokens.safetensors")
    request = {
        "kind": "quality",
        "tokens": str(work / "tokens.safetensors"),
        "labels": None,
        "threads": 1,
        "batch_size": 1,
        "seed": 0,
        "confidence": 0.95,
        "most_tokens": None,
        "memory": 1,
        "trust_remote_code": False,
        "before": str(model),
        "after": str(artifact),
        "metrics": list(QUALITY),
    }
    with measured(found, "evaluate"):
        answer = measure_quality(request)
    assert answer["measured"] == "parts", answer
    return found


if __name__ == "__main__":
    print(json.dumps({name: measure(Path(work), step) for name, (work, step) in json.loads(sys.argv[1]).items()}))
