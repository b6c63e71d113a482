"""Measures whole models with default settings: decoding, a prompt, and `generate`, against torch and llama.cpp.

    python scripts/bench/whole_model.py [--output FILE] [--model llama:2048,4] [--peers llama.cpp=ENVIRONMENT]

Ends with 1 if a goal is missed.

The model is a Llama of random weights with MLPs of four times its width, W4A8 and W4A16 with groups of 128, the rest
bfloat16. It decodes a step of 1, 4 and 16 sequences, takes a prompt of 512 tokens, and generates 64 tokens. It is
compared with the dense model in bfloat16 and float32 by torch as a user gets it, whose threads spin while they wait,
and with the same codes as Q4_0 by llama.cpp, from an environment of its own (peers/requirements-llama-cpp.txt). Their
logits are compared before they are timed.

`W4A8, not fused` has the forwards of transformers' norms, MLPs and attention in place of those of this package.
`transformers alone` is the dense model with linear layers that return zeros at once: the time of everything else.

Each candidate is a process with as many threads as torch takes. All take a task in turn, in another order each round;
each ratio is the median over rounds of ratios within a round.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import result_file
from rich.console import Console
from rich.table import Table
from workers import HERE, Candidate, Worker, plain_environment, ratio

from compressor.evaluation.environment import cpu_name
from compressor.process.idle_threads import environment_of_user

OURS, UNFUSED, WEIGHT_ONLY = "W4A8", "W4A8, not fused", "W4A16"
DENSE, DENSE32, ALONE = "dense bf16", "dense float32", "transformers alone"
LLAMA_CPP = "llama.cpp Q4_0"
CANDIDATES = (
    Candidate(OURS),
    Candidate(UNFUSED, kind="unfused"),
    Candidate(WEIGHT_ONLY, kind="weight-only"),
    Candidate(DENSE, kind="dense", first="torch"),
    Candidate(DENSE32, kind="dense32", first="torch"),
    Candidate(ALONE, kind="unmultiplied"),
)
TASKS = (("decode", 1), ("decode", 4), ("decode", 16), ("prefill", 512), ("generate", 64))
REPEATS, LONGEST = 6, 1.0  # in a row: so many, or what begins within so many seconds
GOALS = (  # task, times as fast as the other at least
    (("decode", 1), DENSE, 4.0),
    (("decode", 1), LLAMA_CPP, 1.0),
    (("decode", 16), DENSE, 2.0),
    (("decode", 16), LLAMA_CPP, 2.0),
    (("prefill", 512), DENSE, 1.6),
    (("prefill", 512), LLAMA_CPP, 2.0),
)
TOKENS = range(1, 17)
# Norm of a difference of logits to those of W4A16: int8 activations of normal inputs lose about 1 % in each layer.
TOLERANCE = {OURS: 0.1, LLAMA_CPP: 0.1}

Task = tuple[str, int]
Times = dict[Task, dict[str, list[float]]]  # candidate -> each round


def check(workers: Sequence[Worker]) -> dict[str, float]:
    """The relative differences of logits to those of W4A16. raises ArithmeticError if one is large"""
    logits = {worker.name: worker.logits(TOKENS) for worker in workers if worker.name in (WEIGHT_ONLY, *TOLERANCE)}
    wanted, found = logits[WEIGHT_ONLY], {}
    for name in logits.keys() & TOLERANCE.keys():
        found[name] = math.dist(logits[name], wanted) / math.hypot(*wanted)
        if not found[name] <= TOLERANCE[name]:
            raise ArithmeticError(f"{name}: logits differ by {found[name]:.3g}, at most {TOLERANCE[name]} expected")
    return found


def measure(workers: Sequence[Worker], rounds: int) -> Times:
    order, times = random.Random(0), Times()
    for number in range(rounds + 1):
        for task in TASKS:
            found = times.setdefault(task, {worker.name: [] for worker in workers})
            for worker in order.sample(workers, len(workers)):
                spent, _ = worker.seconds(*task, REPEATS, LONGEST)
                if number:  # the first round warms up
                    found[worker.name].append(spent)
    return times


def judged(times: Times) -> list[dict[str, Any]]:
    """The goals against candidates that were measured."""
    rows = []
    for task, other, wanted in GOALS:
        if other in times[task]:
            measured = ratio(times[task], OURS, other)
            goal = {"goal": " ".join(map(str, task)), "against": other, "wanted": wanted, "measured": measured}
            rows.append(goal | {"holds": measured >= wanted})
    return rows


def show(console: Console, times: Times, goals: list[dict[str, Any]]) -> None:
    table = Table("task", title=f"Milliseconds (so many times as long as {OURS})")
    for name in next(iter(times.values())):
        table.add_column(name, justify="right")
    for task, found in times.items():
        cells = [
            f"{statistics.median(spent) * 1e3:.1f} ({ratio(found, OURS, name):.2f})" for name, spent in found.items()
        ]
        table.add_row(" ".join(map(str, task)), *cells)
    console.print(table)
    table = Table("goal", "against", "wanted", "measured", "holds", title="Goals")
    for goal in goals:
        holds = "yes" if goal["holds"] else "no"
        table.add_row(goal["goal"], goal["against"], f">= {goal['wanted']}", f"{goal['measured']:.2f}", holds)
    console.print(table)


def llama_cpp(environment: Path, model: str, folder: Path, threads: int) -> Worker:
    write = [*Candidate("", kind="codes").command(model), str(folder)]
    subprocess.run(write, env=plain_environment(), check=True)
    driver = str(HERE / "peers" / "llama_cpp_model.py")
    command = [str(environment / "bin" / "python"), driver, str(folder), str(threads)]
    worker = Worker(LLAMA_CPP, command, environment_of_user() | {"PYTHONPATH": ""})
    (folder / "tensors.npz").unlink()
    return worker


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time whole models against torch and llama.cpp.")
    result_file.add_output(parser, "whole-model")
    parser.add_argument("--model", default="llama:2048,4", help="llama:WIDTH,BLOCKS")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", metavar="llama.cpp=ENVIRONMENT", help="an environment with llama-cpp-python")
    settings = parser.parse_args(arguments)
    if settings.rounds < 1:
        parser.error(f"--rounds {settings.rounds}: at least 1 expected")
    if settings.peers is not None:
        name, _, environment = settings.peers.partition("=")
        if name != "llama.cpp" or not (Path(environment) / "bin" / "python").exists():
            parser.error(f"--peers {settings.peers}: llama.cpp=ENVIRONMENT expected")
        settings.peers = Path(environment)
    return settings


def main(arguments: list[str] | None = None) -> int:
    settings = parse_arguments(arguments)
    console = Console()
    console.width = max(140, console.width)
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        workers = []
        for candidate in CANDIDATES:  # one after the other: each needs the most memory at its start
            workers.append(Worker.of(candidate, settings.model))
            stack.callback(workers[-1].end)
        if settings.peers is not None:
            workers.append(llama_cpp(settings.peers, settings.model, scratch, workers[0].threads))
            stack.callback(workers[-1].end)
        threads = {worker.name: worker.threads for worker in workers}
        console.print(f"{cpu_name()}, {settings.model}, threads: {threads}")
        differences = check(workers)
        console.print(f"logits differ from {WEIGHT_ONLY} by {differences}")
        times = measure(workers, settings.rounds)
    goals = judged(times)
    show(console, times, goals)
    rows = [{"task": task, "seconds": found} for task, found in times.items()]
    report = {
        "cpu": cpu_name(),
        "threads": threads,
        "model": settings.model,
        "differences": differences,
        "goals": goals,
    }
    result_file.write(report | {"rows": rows}, settings.output)
    return 0 if all(goal["holds"] for goal in goals) else 1


if __name__ == "__main__":
    sys.exit(main())
