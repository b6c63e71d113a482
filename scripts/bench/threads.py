"""Measures the speed of threads with default settings, alone and beside a process that keeps every core busy.

    python scripts/bench/threads.py [--output FILE] [--rounds 5] [--model llama:2048,4] [--before PYTHON]

Ends with 1 if a goal is missed.

Decoding: steps of a Llama with MLPs of four times its width, 4 bits in groups of 128, activations="int8", bfloat16, by
processes that differ in settings alone: default ones; passive waiting asked for by name, which should be the same;
one thread; torch imported before compressor, so that its threads spin; the dense model; and with --before the version
installed for another interpreter. All processes take a few steps in turn, in another order each round, alone and beside
the neighbour, and each ratio is the median over rounds of ratios within a round.

gptq: the sweep of one block of that width, alone and beside the neighbour in turn; half the speed is the fair share.

The neighbour multiplies matrices with torch, as many threads as there are cores, which wait as torch's default is.
"""

from __future__ import annotations

import compressor  # noqa: F401 isort: skip (before torch, whose threads then sleep while they wait)

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import result_file
import yaml
from rich.console import Console
from rich.table import Table
from workers import Candidate, Worker, plain_environment, ratio

from compressor.evaluation.environment import cpu_name

SEQUENCES = (1, 4, 16)
STEPS, LONGEST = 6, 1.0  # in a row: so many, or what begins within so many seconds
NEIGHBOUR = """
import select, sys, torch
a = torch.randn(1024, 1024)
for line in sys.stdin:  # "go" or "stop"
    print(flush=True)
    while line == "go\\n" and not select.select([sys.stdin], [], [], 0)[0]:
        a @ a
"""
SAME = 0.95  # ratios from here on count as equal: two processes with the same settings differ by as much
FAIR_SHARE = 0.45
GPTQ_SAMPLES, GPTQ_LENGTH, GPTQ_ROUNDS = 16, 256, 2


CANDIDATES = (
    Candidate("default"),
    Candidate("passive", environment=(("OMP_WAIT_POLICY", "passive"),)),
    Candidate("one thread", environment=(("OMP_NUM_THREADS", "1"),)),
    Candidate("torch first", first="torch"),
    Candidate("dense bf16", kind="dense"),
)


class Neighbour:
    """A process that keeps the cores busy on request. It ends with this process."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", NEIGHBOUR]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.child = subprocess.Popen(command, env=plain_environment(), text=True, **pipes)
        self._say("stop")

    def _say(self, word: str) -> None:
        assert self.child.stdin is not None and self.child.stdout is not None
        self.child.stdin.write(f"{word}\n")
        self.child.stdin.flush()
        self.child.stdout.readline()

    def end(self) -> None:
        self.child.kill()
        self.child.wait()

    @contextmanager
    def present(self, is_wanted: bool) -> Iterator[None]:
        if is_wanted:
            self._say("go")
        try:
            yield
        finally:
            self._say("stop")


Times = dict[tuple[bool, int], dict[str, list[float]]]  # beside the neighbour, sequences -> candidate -> each round


def decode(workers: list[Worker], neighbour: Neighbour, rounds: int) -> tuple[Times, Times]:
    """Seconds that steps take, and seconds that processors work for one."""
    times: Times = {}
    work: Times = {}
    order = random.Random(0)
    for number in range(rounds + 1):
        for beside in (False, True):
            for sequences in SEQUENCES:
                found = times.setdefault((beside, sequences), {worker.name: [] for worker in workers})
                worked = work.setdefault((beside, sequences), {worker.name: [] for worker in workers})
                with neighbour.present(beside):
                    for worker in order.sample(workers, len(workers)):
                        spent, cpu = worker.seconds("decode", sequences, STEPS, LONGEST)
                        if number:  # the first round warms up
                            found[worker.name].append(spent)
                            worked[worker.name].append(cpu)
    return times, work


def sweep_seconds(checkpoint: Path, output: Path) -> float:
    recipe = {
        "version": 1,
        "data": {"source": "stdlib", "samples": GPTQ_SAMPLES, "length": GPTQ_LENGTH},
        "steps": [{"pass": "gptq", "bits": 4, "group_size": 128}],
        "report": {"html": False},
    }
    file = output.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "compressor", "run", file, "--model", checkpoint, "--output", output]
    done = subprocess.run(
        [*map(str, command), "--no-eval", "--quiet"], env=plain_environment(), capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"gptq ended with {done.returncode}: {done.stderr[-2000:]}")
    return json.loads((output / "report.json").read_text())["run"]["seconds_by_stage"]["sweep"]


def gptq(model: str, neighbour: Neighbour, scratch: Path, rounds: int) -> dict[bool, list[float]]:
    """Seconds of each sweep of one block, with and without the neighbour."""
    one_block = f"{model.partition(',')[0]},1"
    code = "import compressor, model_worker; model_worker.main()"
    command = [sys.executable, "-c", code, "write", one_block, str(scratch / "model")]
    subprocess.run(command, env=plain_environment(), check=True)
    found: dict[bool, list[float]] = {False: [], True: []}
    for number in range(rounds):
        for beside, seconds in found.items():
            with neighbour.present(beside):
                seconds.append(sweep_seconds(scratch / "model", scratch / f"{beside}-{number}"))
    return found


def judged(times: Times, sweeps: dict[bool, list[float]]) -> list[dict[str, Any]]:
    goals = []
    for (beside, sequences), found in times.items():
        where = f"{sequences} sequence(s), " + ("beside a neighbour" if beside else "alone")
        for other in ("one thread", "passive"):
            measured = ratio(found, "default", other)
            row = {"goal": f"decoding, against {other}", "where": where, "wanted": SAME, "measured": measured}
            goals.append(row | {"holds": measured >= SAME})
    if sweeps[True]:
        measured = statistics.median(alone / beside for alone, beside in zip(*sweeps.values(), strict=True))
        row = {"goal": "gptq beside a neighbour, against alone", "where": "one block", "wanted": FAIR_SHARE}
        goals.append(row | {"measured": measured, "holds": measured >= FAIR_SHARE})
    return goals


def times_table(title: str, times: Times) -> Table:
    names = list(next(iter(times.values())))
    table = Table("", title=title)
    for name in names:
        table.add_column(name, justify="right")
    for (beside, sequences), found in times.items():
        cells = []
        for name in names:
            cell = f"{statistics.median(found[name]) * 1e3:.1f}"
            cells.append(cell if name == "default" else f"{cell} ({ratio(found, 'default', name):.2f})")
        table.add_row(f"{sequences} sequence(s){', neighbour' if beside else ''}", *cells)
    return table


def show(console: Console, times: Times, work: Times, goals: list[dict[str, Any]]) -> None:
    console.print(times_table("Milliseconds of a decoding step (so many times as long as the default's)", times))
    console.print(times_table("Milliseconds that processors work for a step, all threads together", work))
    table = Table(title="Goals")
    for column in ("goal", "where", "wanted", "measured", "holds"):
        table.add_column(column)
    for goal in goals:
        yes = "yes" if goal["holds"] else "no"
        table.add_row(goal["goal"], goal["where"], f">= {goal['wanted']}", f"{goal['measured']:.2f}", yes)
    console.print(table)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time decoding and gptq with default threads, with a busy neighbour.")
    result_file.add_output(parser, "threads")
    parser.add_argument("--model", default="llama:2048,4", help="llama:WIDTH,BLOCKS")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--before", metavar="PYTHON", help="an interpreter with another version of the package")
    parser.add_argument("--no-gptq", action="store_true", help="decoding alone")
    settings = parser.parse_args(arguments)
    if settings.rounds < 1:
        parser.error(f"--rounds {settings.rounds}: at least 1 expected")
    return settings


def main(arguments: list[str] | None = None) -> int:
    settings = parse_arguments(arguments)
    console = Console()
    console.width = max(120, console.width)
    candidates = list(CANDIDATES)
    if settings.before:
        candidates.append(Candidate("before", python=settings.before))
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        neighbour = Neighbour()
        stack.callback(neighbour.end)
        with ThreadPoolExecutor(2) as pool:  # not all at once: each needs the most memory at its start
            workers = list(pool.map(lambda candidate: Worker.of(candidate, settings.model), candidates))
        for worker in workers:
            stack.callback(worker.end)
        threads = {worker.name: worker.threads for worker in workers}
        console.print(f"{cpu_name()}, threads: {threads}")
        times, work = decode(workers, neighbour, settings.rounds)
        for worker in workers:
            worker.end()
        rounds = 0 if settings.no_gptq else GPTQ_ROUNDS
        sweeps = gptq(settings.model, neighbour, scratch, rounds) if rounds else {False: [], True: []}
    goals = judged(times, sweeps)
    show(console, times, work, goals)
    if rounds:
        console.print(f"seconds of gptq's sweep alone {sweeps[False]}, beside the neighbour {sweeps[True]}")
    rows = [
        {"beside": key[0], "sequences": key[1], "seconds": found, "processor_seconds": work[key]}
        for key, found in times.items()
    ]
    report = {"cpu": cpu_name(), "threads": threads, "model": settings.model, "decoding": rows, "goals": goals}
    report["gptq"] = {"alone": sweeps[False], "beside": sweeps[True]}
    result_file.write(report, settings.output)
    return 0 if all(goal["holds"] for goal in goals) else 1


if __name__ == "__main__":
    sys.exit(main())
