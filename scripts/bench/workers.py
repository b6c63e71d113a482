"""Starts the processes that benchmarks of whole models ask in turn, and asks them; see model_worker.py."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from compressor.process.idle_threads import VARIABLES

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@dataclass(frozen=True)
class Candidate:
    """kind   of model_worker.py
    first  the first import of the process, which decides how torch's threads wait
    """

    name: str
    kind: str = "prepared"
    first: str = "compressor"
    environment: tuple[tuple[str, str], ...] = ()
    python: str = sys.executable

    def command(self, model: str) -> list[str]:
        code = f"import {self.first}, compressor, model_worker; model_worker.main()"
        return [self.python, "-c", code, self.kind, model]


def plain_environment() -> dict[str, str]:
    """The environment without variables for threads."""
    said = {*VARIABLES, "OMP_NUM_THREADS", "MKL_NUM_THREADS"}
    kept = {name: value for name, value in os.environ.items() if name not in said}
    paths = os.pathsep.join([str(ROOT), str(HERE)])
    return kept | {"PYTHONPATH": paths, "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"}


class Worker:
    """A process that answers lines. threads: how many it works with"""

    def __init__(self, name: str, command: Sequence[str], environment: dict[str, str]) -> None:
        self.name = name
        self.child = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.threads = int(self._answer())

    @classmethod
    def of(cls, candidate: Candidate, model: str) -> Worker:
        return cls(candidate.name, candidate.command(model), plain_environment() | dict(candidate.environment))

    def _answer(self) -> str:
        assert self.child.stdout is not None
        line = self.child.stdout.readline()
        if not line:
            sys.exit(f"the process of {self.name!r} ended with {self.child.wait()}")
        return line

    def _ask(self, *words: object) -> list:
        assert self.child.stdin is not None
        self.child.stdin.write(" ".join(map(str, words)) + "\n")
        self.child.stdin.flush()
        return json.loads(self._answer())

    def seconds(self, task: str, amount: int, repeats: int, longest: float) -> tuple[float, float]:
        """Seconds of a task, the median of a few (fewer if slow), and its seconds of all processors together."""
        spent, worked = self._ask(task, amount, repeats, longest)
        return statistics.median(spent), worked

    def logits(self, tokens: Sequence[int]) -> list[float]:
        """The logits of the last of these tokens."""
        return self._ask("logits", *tokens)

    def end(self) -> None:
        self.child.kill()
        self.child.wait()


def ratio(found: dict[str, list[float]], ours: str, other: str) -> float:
    """How many times as fast `ours` is as `other`: the median over rounds."""
    return statistics.median(theirs / mine for mine, theirs in zip(found[ours], found[other], strict=True))
