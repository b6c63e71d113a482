"""Shows the events of a run: as a live display on a terminal, as plain lines elsewhere, or as JSON lines."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from compressor.engine.events import Emit, Event, ProgressEvent, StageName
from compressor.errors import Notice

Mode = Literal["auto", "quiet", "json"]
SILENT_SECONDS = 4.0  # then a line says what the run is doing
STAGES: dict[StageName, str] = {
    "plan": "planning",
    "write": "writing the artifact",
    "verify": "loading it in a fresh process",
    "evaluate": "measuring before and after",
}


@contextmanager
def show(mode: Mode, console: Console) -> Iterator[Emit]:
    """Yield the function that shows events."""
    if mode == "json":
        yield json_line
    elif mode == "quiet":
        yield lambda event: _warning(console, event)
    elif console.is_terminal:
        with _live(console) as emit:
            yield emit
    else:
        with _plain(console) as emit:
            yield emit


def json_line(event: Mapping[str, object]) -> None:
    """Print one event as one line on standard output."""
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()


@contextmanager
def _live(console: Console) -> Iterator[Emit]:
    columns = (
        TextColumn("{task.description:32}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[memory]}"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("planning", total=None, memory="")

        def emit(event: Event) -> None:
            if event["event"] == "sweep":
                progress.reset(
                    task,
                    total=event["units"],
                    description=f"sweep {event['sweep'] + 1}: " + ", ".join(event["passes"]),
                    memory="",
                )
            elif event["event"] == "unit":
                progress.update(task, completed=event["unit"] + 1, memory=_memory())
            elif event["event"] == "weight":
                progress.update(task, description=f"{event['pass']} {event['name'][-26:]}")
            elif event["event"] == "progress":
                progress.update(task, description=_work(event, 32))
            elif event["event"] == "stage":
                progress.reset(task, total=None, description=STAGES[event["name"]], memory=_memory())
            _warning(console, event)

        yield emit


@contextmanager
def _plain(console: Console) -> Iterator[Emit]:
    lines, ended = Lines(console), threading.Event()

    def repeat() -> None:
        while not ended.wait(1.0):
            lines.remind()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield lines.emit
    finally:
        ended.set()
        thread.join()


@dataclass
class Lines:
    """Shows events as lines, and what the run is doing if nothing was shown for SILENT_SECONDS."""

    console: Console
    clock: Callable[[], float] = time.monotonic
    doing: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.began = self.shown = self.clock()

    def emit(self, event: Event) -> None:
        with self.lock:
            if event["event"] == "progress":
                self.doing = _work(event, 100)
            elif (line := _line(event)) is not None:
                self.doing = line
                memory = f" {_memory()}" if event["event"] == "unit" else ""
                self._print(f"  {line}{memory}")
            _warning(self.console, event)

    def remind(self) -> None:
        """Show what the run is doing, if it is time to."""
        with self.lock:
            if self.doing and self.clock() - self.shown >= SILENT_SECONDS:
                self._print(f"    {self.doing}")

    def _print(self, text: str) -> None:
        self.shown = self.clock()
        self.console.print(f"{self.shown - self.began:7.1f} s{text}", highlight=False, markup=False)


def _line(event: Event) -> str | None:
    """The line of an event that begins or ends something."""
    if event["event"] == "sweep":
        return f"sweep {event['sweep'] + 1}: {', '.join(event['passes'])}"
    if event["event"] == "unit":
        return f"{event['name']} ({event['unit'] + 1}/{event['units']})"
    if event["event"] == "decide":
        return f"{event['pass']} chooses"
    return STAGES[event["name"]] if event["event"] == "stage" else None


def _work(event: ProgressEvent, width: int) -> str:
    """What a pass is working on, in at most this many characters."""
    done = "" if event["share"] is None else f" {event['share']:4.0%}"
    return event["what"][-(width - len(done)) :] + done


def _warning(console: Console, event: Event) -> None:
    if event["event"] == "warning":
        notice = Notice(event["code"], event["where"], event["message"])
        console.print(str(notice), highlight=False, markup=False)


def _memory() -> str:
    import psutil

    return f"{psutil.Process().memory_info().rss / 2**20:.0f} MiB"
