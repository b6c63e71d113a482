"""Runs recipes on checkpoints of random weights with the exact shapes of published models, and measures what they take.

    python scripts/bench/real_sizes.py write llama-8b DIR --blocks 2   # a checkpoint; --sparse: zeros, no disk space
    python scripts/bench/real_sizes.py plan llama-70b                  # plan of every bundled recipe, all blocks
    python scripts/bench/real_sizes.py predict llama-8b gptq-w4a16     # time of each stage, here and elsewhere
    python scripts/bench/real_sizes.py run llama-8b gptq-w4a16 --blocks 2 --set data.samples=8

`run` measures the time of each stage, beside the predicted one, and the peak memory of each process. With --kill SHARE
the run is also killed when this share of its parts is stored, resumed, and compared byte by byte with the uninterrupted
run. `predict` multiplies the counted work by the rates of this machine, by eight times these (16 cores if this machine
has 2), and by those of an H200 as its data sheet gives them, of which it is assumed to reach GPU_SHARE. Calibration and
evaluation use random tokens, since random weights need no tokenizer. Shapes: the config.json files of the models.
"""

from __future__ import annotations

import compressor  # noqa: F401 isort: skip (before torch, whose threads then sleep while they wait)

import argparse
import hashlib
import json
import math
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import result_file
import torch
from torch import Tensor

from compressor.engine.machine_rates import measure_rates, seconds
from compressor.engine.plan import make_plan
from compressor.engine.stage_times import stage_works
from compressor.protocol import Work
from compressor.recipe.recipe import read_recipe, recipe_folders
from compressor.storage.safetensors_file import Entry, write_file

SHARD_BYTES = 5 * 10**9
POOL = 1 << 26  # random values that all weights are cut from
STANDARD_DEVIATION = 0.02
COMMAND = [sys.executable, "-m", "compressor"]
# NVIDIA's data sheet: 989e12 in bfloat16, 67e12 in float32 and float64, 4.8e12 bytes of memory a second, of which
# GPU_SHARE is reached. Eigenvalues, diagonal blocks of factorizations and files are as on a processor.
GPU_SHARE = 0.4
H200 = Work(
    products=GPU_SHARE * 989e12,
    exact=GPU_SHARE * 67e12,
    double=GPU_SHARE * 67e12,
    factors=2e4,
    spectra=4e9,
    searched=GPU_SHARE * 4.8e12 / 400,
    values=GPU_SHARE * 4.8e12 / 8,
    stored=1e9,
    hashed=1e9,
    seconds=1.0,
)
RANDOM_DATA = ["--set", "data.source=random", "--set", "eval.data.source=random", "--set", "eval.gates={}"]


def _llama(
    hidden: int, intermediate: int, blocks: int, heads: int, factor: float, tied: bool, vocabulary: int = 128256
) -> dict[str, Any]:
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": factor}
    rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": hidden // heads,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": rope,
        "tie_word_embeddings": tied,
        "dtype": "bfloat16",
    }


SHAPES: dict[str, dict[str, Any]] = {
    # no published model: for comparing passes, most of whose time should be in the blocks
    "llama-2048": _llama(2048, 8192, 4, 32, 8.0, tied=False, vocabulary=32000),
    "llama-1b": _llama(2048, 8192, 16, 32, 32.0, tied=True),
    "llama-8b": _llama(4096, 14336, 32, 32, 8.0, tied=False),
    "llama-70b": _llama(8192, 28672, 80, 64, 8.0, tied=False),
    "qwen3-30b-a3b": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb in ("write", "plan", "predict", "run"):
        command = verbs.add_parser(verb)
        command.add_argument("shape", choices=SHAPES)
        if verb == "write":
            command.add_argument("directory", type=Path)
            command.add_argument("--sparse", action="store_true", help="zeros that take no disk space")
        else:
            command.add_argument("recipes", nargs="*", metavar="RECIPE", help="left out: all bundled recipes")
            command.add_argument("--scratch", type=Path, help="where models and artifacts are written")
            result_file.add_output(command, f"real-sizes-{verb}")
        command.add_argument("--blocks", type=int, help="left out: all")
        if verb == "run":
            command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the recipe")
            command.add_argument("--kill", type=float, metavar="SHARE", help="kill a second run there and resume it")
    settings = parser.parse_args()
    if settings.verb == "write":
        write_checkpoint(settings.shape, settings.directory, settings.blocks, settings.sparse)
        return
    names = settings.recipes or sorted(path.stem for folder in recipe_folders() for path in folder.glob("*.yaml"))
    rows = []
    with tempfile.TemporaryDirectory(dir=settings.scratch) as scratch:
        model = Path(scratch) / settings.shape
        write_checkpoint(settings.shape, model, settings.blocks, sparse=settings.verb != "run")
        for name in names:
            if settings.verb == "plan":
                row = plan(name, model)
            elif settings.verb == "predict":
                row = predict(name, model)
            else:
                row = run(name, model, Path(scratch), settings.set, settings.kill)
            rows.append({"shape": settings.shape, "blocks": settings.blocks, "recipe": name, **row})
            print(json.dumps(rows[-1]), flush=True)
    result_file.write({"rows": rows}, settings.output)


def plan(recipe: str, model: Path) -> dict[str, Any]:
    """Time, memory and outcome of one plan."""
    done = measured([*COMMAND, "plan", recipe, "--model", str(model), "--no-eval", *RANDOM_DATA, "--json"])
    events = [json.loads(line) for line in done["output"].splitlines()]
    found = {key: done[key] for key in ("exit_code", "seconds", "cpu_seconds", "peak_bytes")}
    errors = [event["message"] for event in events if event["event"] == "error"]
    planned = next((event for event in events if event["event"] == "result"), {})
    predicted = {key: planned.get(key) for key in ("peak_memory_bytes", "predicted_stages")}
    return found | {"error": errors[0] if errors else None, **predicted}


def predict(recipe: str, model: Path) -> dict[str, Any]:
    """Predicted seconds of each stage on three machines; null where a pass of the stage doesn't count its work."""
    changes = [change for change in RANDOM_DATA if change != "--set"]
    planned = make_plan(read_recipe(recipe, changes), str(model))
    here = measure_rates(planned.structure.dtype, torch.device("cpu"))
    faster = replace(here * 8, stored=here.stored, hashed=here.hashed, seconds=here.seconds)
    machines = {"here": here, "8x": faster, "H200": H200}
    works = stage_works(planned, measure=True)
    return {
        name: {work.name: round(seconds(work.whole, rates)) if work.known else None for work in works}
        for name, rates in machines.items()
    }


def run(recipe: str, model: Path, scratch: Path, changes: list[str], kill: float | None) -> dict[str, Any]:
    """Time of each stage and peak memory of each process of one run; with `kill` also whether resuming repeats it."""
    options = [*RANDOM_DATA, *(word for change in changes for word in ("--set", change)), "--json"]
    command = [*COMMAND, "run", recipe, "--model", str(model), *options, "--fresh", "--output"]
    whole = scratch / f"{recipe}-whole"
    done = measured([*command, str(whole)])
    row: dict[str, Any] = {"exit_code": done["exit_code"], "seconds": done["seconds"], "peak_bytes": done["peak_bytes"]}
    report_file = whole / "report.json"
    if not report_file.is_file():
        return row | {"error": json.loads(done["output"].splitlines()[-1]).get("message")}
    report = json.loads(report_file.read_text())
    row |= {key: report["run"][key] for key in ("seconds_by_stage", "predicted_peak_bytes")}
    events = [json.loads(line) for line in done["output"].splitlines()]
    stages = next((event["stages"] for event in events if event["event"] == "predicted"), [])
    row["predicted_seconds"] = {stage["name"]: round(sum(stage["parts"]), 1) for stage in stages if stage["known"]}
    if kill is not None:
        other = scratch / f"{recipe}-resumed"
        parts = round(kill * (json.loads((model / "config.json").read_text())["num_hidden_layers"] + 2))
        killed = measured([*command, str(other)], parts)
        resumed = measured([word for word in [*command, str(other), "--resume"] if word != "--fresh"])
        row |= {"killed_exit_code": killed["exit_code"], "resumed_exit_code": resumed["exit_code"]}
        row["resumed_seconds"] = resumed["seconds"]
        row["same_bytes"] = resumed["exit_code"] == done["exit_code"] and weights_of(whole) == weights_of(other)
    return row


def weights_of(artifact: Path) -> dict[str, str]:
    """Weight file -> its SHA-256."""
    found = {}
    for path in sorted(artifact.glob("*.safetensors")):
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def measured(command: list[str], kill_after: int | None = None) -> dict[str, Any]:
    """Run a command and measure it.

    kill_after  end it (SIGKILL) with its children when it has stored this many parts
    peak_bytes  of the process itself and of each of its children, largest first
    """
    began, used = time.perf_counter(), _cpu_seconds()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peaks: dict[int, int] = {}
    ended = threading.Event()
    watcher = threading.Thread(target=_watch, args=(process.pid, peaks, ended))
    watcher.start()
    lines, parts = [], 0
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        parts += line.startswith('{"event": "part"')
        if kill_after is not None and parts == kill_after:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.send_signal(signal.SIGKILL)
            process.kill()
            break
    process.stdout.close()
    process.wait()
    ended.set()
    watcher.join()
    return {
        "exit_code": process.returncode,
        "seconds": round(time.perf_counter() - began, 1),
        "cpu_seconds": round(_cpu_seconds() - used, 1),
        "peak_bytes": [peaks.pop(process.pid, 0), *sorted(peaks.values(), reverse=True)],
        "output": "".join(lines),
    }


def _cpu_seconds() -> float:
    """Processor time of all children that have ended, with theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _watch(pid: int, peaks: dict[int, int], ended: threading.Event) -> None:
    """Note the peak resident memory of a process and its children, as the kernel counts it."""
    while not ended.wait(0.2):
        try:
            for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
                status = Path(f"/proc/{process.pid}/status").read_text()
                (line,) = [line for line in status.splitlines() if line.startswith("VmHWM")] or ["VmHWM: 0 kB"]
                peaks[process.pid] = max(peaks.get(process.pid, 0), int(line.split()[1]) * 1024)
        except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
            continue  # a process that has just ended


def write_checkpoint(shape: str, directory: Path, blocks: int | None, sparse: bool) -> None:
    """A checkpoint of this shape in shards; with `sparse` its files are holes, which read as zeros."""
    config = dict(SHAPES[shape])
    config["num_hidden_layers"] = blocks or config["num_hidden_layers"]
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    pool = torch.empty(0) if sparse else torch.randn(POOL, generator=torch.Generator().manual_seed(0))
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    size = 0
    for name, dimensions in tensors(config):
        nbytes = 2 * math.prod(dimensions)
        if size + nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append((name, dimensions))
        size += nbytes
    files = {}
    pool = (STANDARD_DEVIATION * pool).to(torch.bfloat16)
    for number, shard in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        files |= {name: file for name, _ in shard}
        if sparse:
            _write_holes(directory / file, shard)
        else:
            write_file(directory / file, [Entry(n, torch.bfloat16, s, partial(_values, pool, n, s)) for n, s in shard])
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def tensors(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of each tensor, as the published checkpoints have them."""
    hidden, head = config["hidden_size"], config["head_dim"]
    queries, keys = head * config["num_attention_heads"], head * config["num_key_value_heads"]
    experts = config.get("num_experts", 0)
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for block in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{block}."
        yield prefix + "input_layernorm.weight", (hidden,)
        yield prefix + "post_attention_layernorm.weight", (hidden,)
        for name, rows in (("q", queries), ("k", keys), ("v", keys)):
            yield f"{prefix}self_attn.{name}_proj.weight", (rows, hidden)
        yield prefix + "self_attn.o_proj.weight", (hidden, queries)
        if experts:
            yield prefix + "self_attn.q_norm.weight", (head,)
            yield prefix + "self_attn.k_norm.weight", (head,)
            yield prefix + "mlp.gate.weight", (experts, hidden)
        width = config["moe_intermediate_size"] if experts else config["intermediate_size"]
        for mlp in [f"mlp.experts.{number}." for number in range(experts)] or ["mlp."]:
            yield f"{prefix}{mlp}gate_proj.weight", (width, hidden)
            yield f"{prefix}{mlp}up_proj.weight", (width, hidden)
            yield f"{prefix}{mlp}down_proj.weight", (hidden, width)
    yield "model.norm.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (config["vocab_size"], hidden)


def _values(pool: Tensor, name: str, shape: tuple[int, ...]) -> Tensor:
    """A tensor cut from the pool at a place that depends on its name; ones for the gain of a norm."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    count = math.prod(shape)
    start = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little") % len(pool)
    whole = torch.cat([pool[start:], *[pool] * (count // len(pool)), pool])
    return whole[:count].reshape(shape)


def _write_holes(path: Path, shard: list[tuple[str, tuple[int, ...]]]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in shard:
        end = at + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        os.truncate(file.fileno(), 8 + len(text) + at)


if __name__ == "__main__":
    main()
