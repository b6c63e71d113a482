"""Shows the events of a run: as a live display on a terminal, as plain lines elsewhere, or as JSON lines."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from compressor.engine.events import Emit, Event, ProgressEvent, StageName
from compressor.errors import Notice

Mode = Literal["auto", "quiet", "json"]
SILENT_SECONDS = 3.0  # lines show the progress inside a part if nothing else was shown for so long
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
        yield _plain(console)


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


def _plain(console: Console) -> Emit:
    began = last = time.monotonic()

    def emit(event: Event) -> None:
        nonlocal last
        now = time.monotonic()
        at = f"{now - began:7.1f} s"
        if event["event"] == "progress":
            if now - last < SILENT_SECONDS:
                return
            console.print(f"{at}    {_work(event, 100)}", highlight=False)
        last = now
        if event["event"] == "sweep":
            console.print(f"{at}  sweep {event['sweep'] + 1}: {', '.join(event['passes'])}", highlight=False)
        elif event["event"] == "unit":
            console.print(f"{at}  {event['name']} ({event['unit'] + 1}/{event['units']}) {_memory()}", highlight=False)
        elif event["event"] == "stage":
            console.print(f"{at}  {STAGES[event['name']]}", highlight=False)
        _warning(console, event)

    return emit


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
