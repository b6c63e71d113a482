"""Measures the peak memory of a streamed sweep at several depths; JSON on standard output.

    python scripts/bench/measure_memory.py --depths 12 48
    python scripts/bench/measure_memory.py --steps "[{pass: fuse_norms}, {pass: slicegpt, sparsity: 0.25}]"

The model has random weights, so many that they dominate: at depth 48 they are several times the size of the
interpreter. Only the sweep is measured; verification and evaluation load the whole model, as any user would. Each
measurement has a process of its own, forked from this one, which has only imported what they need.
"""

from __future__ import annotations

import compressor  # noqa: F401 isort: skip (before torch, whose threads then sleep while they wait)

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from compressor.data.samples import load_samples
from compressor.engine.plan import make_plan
from compressor.engine.sweep import Sweeper, run_sweeps
from compressor.process.memory import peak_rss_bytes
from compressor.recipe.recipe import parse_recipe
from compressor.storage.journal import Journal

HIDDEN, INTERMEDIATE = 256, 4096  # many bytes for little work
STEPS = "[{pass: rtn, group_size: 128, scale_search: minmax}]"
# glibc gives a freed array back at once, so that the peak is of arrays that live: with the limit that it adapts by
# itself, the peak of one and the same model varied by 6 %, and with this one by 3 %.
LIMIT = "MALLOC_MMAP_THRESHOLD_"


def write_model(depth: int, path: Path) -> int:
    """A random Llama in float32; returns its bytes."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=depth,
        num_attention_heads=8,
        vocab_size=256,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


def peak_of_sweep(model: Path, work: Path, steps: str) -> int:
    """The peak of resident memory of this process after a sweep, in bytes."""
    torch.set_num_threads(2)
    recipe = parse_recipe(f"version: 1\ndata: {{source: random, samples: 32, length: 64}}\nsteps: {steps}\n".encode())
    plan = make_plan(recipe, str(model))
    assert not plan.problems, plan.problems
    samples = load_samples(recipe.data, model, seed=0, vocabulary=256) if recipe.reads_data else None
    journal = Journal.create(work, {})
    run_sweeps(Sweeper(plan, journal, samples, torch.device("cpu"), 0, lambda event: None, lambda: False))
    return peak_rss_bytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[12, 48])
    parser.add_argument("--steps", action="append", help="of a recipe, as YAML in one line; more than once for more")
    parser.add_argument("--scratch", type=Path, help="where the models are written; left out: a temporary folder")
    settings = parser.parse_args()
    recipes = settings.steps or [STEPS]
    peaks: dict[str, dict[str, int]] = {steps: {} for steps in recipes}
    sizes = {}
    processes = multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1)
    with tempfile.TemporaryDirectory(dir=settings.scratch) as scratch, processes:
        for depth in settings.depths:
            model = Path(scratch) / f"model-{depth}"
            sizes[depth] = processes.apply(write_model, (depth, model))
            for number, steps in enumerate(recipes):
                work = Path(scratch) / f"work-{depth}-{number}"
                peaks[steps][str(depth)] = processes.apply(peak_of_sweep, (model, work, steps))
    print(json.dumps({"model_bytes": sizes, "peak_rss_bytes": peaks}))


if __name__ == "__main__":
    if LIMIT not in os.environ:
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, LIMIT: "131072"})
    main()
