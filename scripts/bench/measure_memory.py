"""Measures the peak memory of a streamed sweep at several depths, each in a child process; JSON on standard output.

    python scripts/bench/measure_memory.py --depths 12 48
    python scripts/bench/measure_memory.py --steps "[{pass: fuse_norms}, {pass: slicegpt, sparsity: 0.25}]"

The model has random weights, so many that they dominate: at depth 48 they are several times the size of the
interpreter. Only the sweep is measured; verification and evaluation load the whole model, as any user would.
"""

from __future__ import annotations

import compressor  # noqa: F401 isort: skip (before torch, whose threads then sleep while they wait)

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HIDDEN, INTERMEDIATE = 256, 4096  # many bytes for little work
STEPS = "[{pass: rtn, group_size: 128, scale_search: minmax}]"
# glibc gives a freed array back at once, so that the peak is of arrays that live: with the limit that it adapts by
# itself, the peak of one and the same model varied by 6 %, and with this one by 3 %.
ENVIRONMENT = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
CHILD = """
import sys, torch
from pathlib import Path
from compressor.process.memory import peak_rss_bytes
from compressor.storage.journal import Journal
from compressor.engine.plan import make_plan
from compressor.recipe.recipe import parse_recipe
from compressor.data.samples import load_samples
from compressor.engine.sweep import Sweeper, run_sweeps
torch.set_num_threads(2)
data = "data: {source: random, samples: 32, length: 64}\\n"
recipe = parse_recipe(f"version: 1\\n{data}steps: {sys.argv[3]}\\n".encode())
plan = make_plan(recipe, sys.argv[1])
assert not plan.problems, plan.problems
samples = load_samples(recipe.data, Path(sys.argv[1]), seed=0, vocabulary=256) if recipe.reads_data else None
journal = Journal.create(Path(sys.argv[2]), {})
run_sweeps(Sweeper(plan, journal, samples, torch.device("cpu"), 0, lambda event: None, lambda: False))
print(peak_rss_bytes())
"""


def write_model(depth: int, path: Path) -> int:
    """A random Llama in float32; returns its bytes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[12, 48])
    parser.add_argument("--steps", default=STEPS, help="of the recipe, as YAML in one line")
    parser.add_argument("--scratch", type=Path, help="where the models are written; left out: a temporary folder")
    settings = parser.parse_args()
    peaks, sizes = {}, {}
    with tempfile.TemporaryDirectory(dir=settings.scratch) as scratch:
        for depth in settings.depths:
            model = Path(scratch) / f"model-{depth}"
            sizes[str(depth)] = write_model(depth, model)
            command = [sys.executable, "-c", CHILD, str(model), str(Path(scratch) / f"work-{depth}"), settings.steps]
            done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(done.stderr)
            peaks[str(depth)] = int(done.stdout.split()[-1])
    print(json.dumps({"model_bytes": sizes, "peak_rss_bytes": peaks}))


if __name__ == "__main__":
    main()
