"""Compares GPTQ with llm-compressor: same model, tokens, samples and threads, each in a process of its own.

    python scripts/bench/gptq.py --model demo

The peer gets an environment of its own, .venv-llm-compressor, made once from scripts/bench/peers/requirements-*.txt;
--peer-python names another. Measured per side: wall time of the whole process, wall time of the core
(their `oneshot`, our sweep; no imports, loading, saving or verifying), peak resident bytes, and perplexity of the dense
model and both results under one evaluator, loaded through plain transformers. Our process also verifies its result in
a fresh process and writes its report; that time is in the whole. Both run with their defaults except for bits and group
size; --peer-observer repeats the peer with a searched range.

`share_of_floor` is the time that the unavoidable arithmetic would take (see `floor`) over the time our sweep took.
"""

from __future__ import annotations

import compressor  # noqa: F401 isort: skip (before torch, whose threads then sleep while they wait)

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import result_file
import torch
import yaml
from random_models import is_random, random_llama
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from compressor.data.samples import load_samples
from compressor.evaluation.environment import cpu_name
from compressor.model.model_files import demo_path
from compressor.model.model_names import resolve_model
from compressor.model.structure import read_structure
from compressor.process.idle_threads import environment_of_user

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", type=Path, help="left out: made in .venv-llm-compressor")
    parser.add_argument(
        "--model",
        default="demo",
        help="demo, a checkpoint directory, or llama:HIDDEN,BLOCKS,INTERMEDIATE (random; INTERMEDIATE may be left out)",
    )
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peer-observer", help="for instance memoryless_mse")
    parser.add_argument(
        "--no-perplexity", action="store_true", help="time and memory alone, for models of random weights"
    )
    result_file.add_output(parser, "gptq")
    settings = parser.parse_args()
    settings.peer_python = settings.peer_python or peer_environment()
    with tempfile.TemporaryDirectory() as scratch:
        result = bench(settings, Path(scratch))
    result_file.write(result, settings.output)


def peer_environment() -> Path:
    """The interpreter of the peer's environment, made on first use: torch as pinned for this package, then the peer."""
    home = ROOT / ".venv-llm-compressor"
    python = home / "bin" / "python"
    installed = home / ".installed"
    if not installed.exists():
        requirements = HERE / "peers" / "requirements-llm-compressor.txt"
        torch_pin = next(line for line in requirements.read_text().splitlines() if line.startswith("torch=="))
        subprocess.run([sys.executable, "-m", "venv", home], check=True)
        for wanted in ([torch_pin], ["-r", requirements]):
            subprocess.run([python, "-m", "pip", "install", "--quiet", *wanted], check=True)
        installed.touch()
    return python


def bench(settings: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    torch.set_num_threads(settings.threads)
    model = model_directory(settings.model, scratch)
    tokenizer_home = model if (model / "tokenizer.json").exists() else demo_path()
    calibration = draw(tokenizer_home, "train", settings.samples, settings.length)
    save_file({"input_ids": calibration}, scratch / "tokens.safetensors")
    held_out = None if settings.no_perplexity else draw(tokenizer_home, "heldout", 64, settings.length)
    result: dict[str, Any] = {
        "model": settings.model,
        "cpu": cpu_name(),
        "threads": settings.threads,
        "samples": settings.samples,
        "length": settings.length,
        "group_size": settings.group_size,
        "perplexity_dense": perplexity(model, held_out),
        "floor": floor(model, settings),
        "bits": {},
    }
    for bits in settings.bits:
        runs: dict[str, list[dict[str, Any]]] = {"ours": [], "peer": []}
        for number in range(settings.repeats):
            runs["ours"].append(run_ours(settings, model, bits, scratch / f"ours-{bits}-{number}"))
            runs["peer"].append(run_peer(settings, model, bits, scratch / f"peer-{bits}-{number}", scratch))
        row: dict[str, Any] = {}
        for side, found in runs.items():
            row[side] = {
                "wall_seconds": statistics.median(run["wall_seconds"] for run in found),
                "core_seconds": statistics.median(run["core_seconds"] for run in found),
                "peak_rss_bytes": max(run["peak_rss_bytes"] for run in found),
                "runs": found,
                "perplexity": perplexity(scratch / f"{side}-{bits}-0", held_out),
            }
        row["ratios"] = {
            key: row["ours"][key] / row["peer"][key]
            for key in ("wall_seconds", "core_seconds", "peak_rss_bytes", "perplexity")
        }
        row["share_of_floor"] = result["floor"]["seconds"] / row["ours"]["core_seconds"]
        result["bits"][str(bits)] = row
        print(bits, row["ratios"], {s: row[s]["core_seconds"] for s in runs}, file=sys.stderr)
    return result


def run_ours(settings: argparse.Namespace, model: Path, bits: int, output: Path) -> dict[str, Any]:
    recipe = {
        "version": 1,
        "data": {"source": "stdlib", "samples": settings.samples, "length": settings.length},
        "steps": [{"pass": "gptq", "bits": bits, "group_size": settings.group_size}],
        "report": {"html": False},
    }
    file = output.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "compressor", "run", str(file), "--model", str(model), "--output", str(output)]
    found = measured([*command, "--no-eval", "--quiet", "--threads", str(settings.threads)])
    run = json.loads((output / "report.json").read_text())["run"]
    return {
        **found,
        "core_seconds": run["seconds_by_stage"]["sweep"],
        "peak_rss_bytes": run["peak_rss_bytes_by_stage"]["sweep"],
        "peak_rss_with_children_bytes": found["peak_rss_bytes"],
        "stages": run["seconds_by_stage"],
    }


def run_peer(settings: argparse.Namespace, model: Path, bits: int, output: Path, scratch: Path) -> dict[str, Any]:
    report = output.with_suffix(".json")
    command = [
        settings.peer_python,
        HERE / "peers" / "llm_compressor.py",
        "--model",
        model,
        "--output",
        output,
        "--tokens",
        scratch / "tokens.safetensors",
        "--report",
        report,
        "--bits",
        bits,
        "--group-size",
        settings.group_size,
        "--threads",
        settings.threads,
    ]
    if settings.peer_observer:
        command += ["--observer", settings.peer_observer]
    found = measured([str(part) for part in command])
    told = json.loads(report.read_text())
    return {
        **found,
        "core_seconds": told["seconds"]["oneshot"],
        "peak_rss_bytes": told["peak_rss_bytes"]["total"],
        "stages": told["seconds"],
        "settings": told["settings"],
        "versions": told["versions"],
    }


def measured(command: list[str]) -> dict[str, Any]:
    """Wall seconds and peak resident bytes (of the largest process of the tree) of a command that must succeed."""
    environment = {**environment_of_user(), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    began = time.perf_counter()
    with tempfile.TemporaryFile() as words:
        child = subprocess.Popen(command, env=environment, stdout=words, stderr=words)
        _, status, usage = os.wait4(child.pid, 0)
        wall = time.perf_counter() - began
        if status:
            words.seek(0)
            sys.exit(f"{command[:4]} failed: {words.read().decode()[-2000:]}")
    return {"wall_seconds": wall, "peak_rss_bytes": usage.ru_maxrss * 1024}


def model_directory(name: str, scratch: Path) -> Path:
    """A checkpoint directory. `llama:..` writes a random one, its inputs of unequal energy, for timing."""
    if not is_random(name):
        return resolve_model(name)
    network = random_llama(name, vocab_size=2048, eos_token_id=0, bos_token_id=0)
    with torch.no_grad():
        for parameter_name, parameter in network.named_parameters():
            if "norm" in parameter_name:
                parameter.mul_(torch.exp(0.5 * torch.randn_like(parameter)))
    network.to(torch.bfloat16).save_pretrained(scratch / "model")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (scratch / "model" / file).write_bytes((demo_path() / file).read_bytes())
    return scratch / "model"


def draw(tokenizer_home: Path, split: str, samples: int, length: int) -> torch.Tensor:
    """(samples, length) int64; exactly the samples that a recipe with these numbers and seed 0 draws."""
    asked: Any = SimpleNamespace(
        source="stdlib", config=None, split=split, field="text", samples=samples, length=length, pack=True, sha256=None
    )
    return torch.stack(load_samples(asked, tokenizer_home, seed=0, vocabulary=2048).inputs)


@torch.no_grad()
def perplexity(directory: Path, tokens: torch.Tensor | None) -> float:
    """Of held-out tokens; NaN without any."""
    if tokens is None:
        return math.nan
    network = AutoModelForCausalLM.from_pretrained(directory, dtype="auto").eval()
    total = 0.0
    for batch in tokens.split(8):
        logits = network(input_ids=batch).logits[:, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"))
    return math.exp(total / tokens[:, 1:].numel())


def floor(model: Path, settings: argparse.Namespace) -> dict[str, float]:
    """Seconds of the unavoidable arithmetic, at the rates of large products in torch on this machine, in this run.

    With n inputs and m outputs of a group of weights, and 2 operations per multiply-add: one forward pass in the
    model's dtype; tokens * n^2 for one triangle of the hessian, at the rate of the model's dtype too (its products are
    exact with sums in float32); 2/3 n^3 to factor and invert, and m * n^2 to solve, in float32. Attention, norms,
    activations, the scale search and the rest are not in it.
    """
    structure, tokens = read_structure(model), settings.samples * settings.length
    forward = hessian = factor = solver = 0
    for part in range(1, structure.block_count + 1):
        for stage in structure.stages(part):
            for group in stage:
                rows = sum(weight.out_features for weight in group)
                forward += 2 * tokens * rows * group.in_features
                hessian += tokens * group.in_features**2
                factor += 2 * group.in_features**3 // 3
                solver += rows * group.in_features**2
    single, own = gemm_rate(torch.float32), gemm_rate(structure.dtype)
    return {
        "gemm_flops_per_second_float32": single,
        "gemm_flops_per_second_model_dtype": own,
        "forward_flops": forward,
        "hessian_flops": hessian,
        "factor_flops": factor,
        "solver_flops": solver,
        "seconds": (forward + hessian) / own + (factor + solver) / single,
    }


def gemm_rate(dtype: torch.dtype) -> float:
    """Operations per second of a product of two 2048 x 2048 matrices, median of ten after two."""
    a = torch.randn(2048, 2048).to(dtype)
    times = []
    for _ in range(12):
        began = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - began)
    return 2 * 2048**3 / statistics.median(times[2:])


if __name__ == "__main__":
    main()
