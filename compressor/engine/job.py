"""What the stages of one run share: the request, its inputs, and its wall time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

import torch
import transformers

from compressor._version import __version__
from compressor.data.samples import Samples
from compressor.engine.events import Emit, StageName
from compressor.engine.plan_records import Plan
from compressor.process.child import peaks_of_processes
from compressor.process.memory import peak_rss_bytes
from compressor.recipe.recipe import Recipe
from compressor.storage.journal import Journal


class Fingerprint(TypedDict):
    """What a resumed run must share with the interrupted run; run.json holds it. recipe, model, data: hashes"""

    recipe: str
    model: str
    data: str | None
    compress_model: str
    torch: str
    transformers: str
    device: str
    threads: int
    cpu_capability: str


@dataclass
class Clock:
    """Wall time of a run and of its stages, and peak memory of the stages.

    peak_rss_bytes  largest resident size of the processes that a stage started, or of this one if it started none
    """

    began: float = field(default_factory=time.perf_counter)
    started: str = field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
    seconds: dict[str, float] = field(default_factory=dict)
    peak_rss_bytes: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        with peaks_of_processes() as peaks:
            yield
        self.seconds[name] = time.perf_counter() - began
        self.peak_rss_bytes[name] = max(peaks, default=0) or peak_rss_bytes()


@dataclass(frozen=True)
class Job:
    """What the stages of one run share.

    plan     the plan before any pass has chosen
    source   name of the model
    resumed  number of parts that an earlier, interrupted run committed; None if there was none
    """

    source: str
    plan: Plan
    journal: Journal
    calibration: Samples | None
    held_out: Samples | None
    fingerprint: Fingerprint
    place: torch.device
    trust_remote_code: bool
    resumed: int | None
    clock: Clock
    emit: Emit

    @property
    def recipe(self) -> Recipe:
        """The recipe of the plan with the hashes of the data that were read, as it is written and reported."""
        read = (self.calibration, self.held_out)
        return self.plan.recipe.pinned(*(samples.sha256 if samples else None for samples in read))

    @property
    def built(self) -> Path:
        return self.journal.work / "artifact"

    @property
    def scratch(self) -> Path:
        return self.journal.work / "scratch"

    @contextmanager
    def stage(self, name: StageName) -> Iterator[None]:
        self.emit({"event": "stage", "name": name})
        with self.clock.time(name):
            yield


def fingerprint(plan: Plan, calibration: Samples | None, device: torch.device) -> Fingerprint:
    """What a resumed run must share with the interrupted run."""
    return {
        "recipe": plan.recipe.pinned(None, None).sha256,
        "model": plan.source.checkpoint.content_sha256,
        "data": calibration.digest if calibration else None,
        "compress_model": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": device.type,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
