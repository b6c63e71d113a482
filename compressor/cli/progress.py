"""Shows the events of a run: as a live display on a terminal, as plain lines elsewhere, or as JSON lines.

In each of them something appears at least every SILENCE seconds, with the estimated time to the end.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from compressor.cli.timeline import Timeline
from compressor.engine.events import AliveEvent, Emit, Event
from compressor.errors import Notice
from compressor.process.json_values import finite

Mode = Literal["auto", "quiet", "json"]
SILENCE = 5.0  # seconds


@contextmanager
def show(mode: Mode, console: Console, silence: float = SILENCE) -> Iterator[Emit]:
    """Yield the function that shows events."""
    if mode == "quiet":
        yield lambda event: _warning(console, event)
    elif mode == "json":
        with _speaking(lambda event, _: json_line(event), silence) as emit:
            yield emit
    elif console.is_terminal:
        with _live(console) as emit:
            yield emit
    else:
        with _speaking(_plain(console), silence) as emit:
            yield emit


def json_line(event: Mapping[str, object]) -> None:
    """Print one event as one line on standard output."""
    sys.stdout.write(json.dumps(finite(dict(event)), allow_nan=False) + "\n")
    sys.stdout.flush()


@contextmanager
def _speaking(say: Callable[[Event, Timeline], None], silence: float) -> Iterator[Emit]:
    """Yield a function that hands events to `say`, which also gets an `AliveEvent` after each silence.

    A `ProgressEvent` is only noted: the next `AliveEvent` has it.
    """
    timeline, lock, ended = Timeline(), threading.Lock(), threading.Event()
    began = spoke = time.monotonic()

    def emit(event: Event) -> None:
        nonlocal spoke
        with lock:
            timeline.take(event)
            if event["event"] != "progress":
                say(event, timeline)
                spoke = time.monotonic()

    def beat() -> None:
        while not ended.wait(max(0.01, spoke + silence - time.monotonic())):
            if time.monotonic() - spoke < silence:
                continue
            try:
                emit(_alive(timeline, time.monotonic() - began))
            except OSError:  # a closed pipe: the next event of the run raises it in the main thread
                return

    thread = threading.Thread(target=beat, name="progress", daemon=True)
    thread.start()
    try:
        yield emit
    finally:
        ended.set()
        thread.join()


def _alive(timeline: Timeline, seconds: float) -> AliveEvent:
    left = timeline.seconds_left
    return {
        "event": "alive",
        "doing": timeline.activity,
        "seconds": round(seconds, 1),
        "seconds_left": None if left is None else round(left, 1),
    }


@contextmanager
def _live(console: Console) -> Iterator[Emit]:
    timeline = Timeline()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[memory]}"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(timeline.activity, total=None, memory="")

        def emit(event: Event) -> None:
            timeline.take(event)
            if event["event"] == "sweep":
                progress.reset(task, total=event["parts"])
            elif event["event"] == "part":
                progress.update(task, completed=event["part"] + 1)
            elif event["event"] == "stage":
                progress.reset(task, total=None)
            progress.update(task, description=f"{timeline.activity}{_rest(timeline)}", memory=_memory())
            _warning(console, event)

        yield emit


def _plain(console: Console) -> Callable[[Event, Timeline], None]:
    began = time.monotonic()

    def say(event: Event, timeline: Timeline) -> None:
        at = f"{time.monotonic() - began:7.1f} s"
        rest = _rest(timeline)
        if event["event"] in ("sweep", "stage", "decide"):
            console.print(f"{at}  {timeline.activity}{rest}", highlight=False, markup=False)
        elif event["event"] == "part":
            done = f"{event['name']} ({event['part'] + 1}/{event['parts']}) {_memory()}{rest}"
            console.print(f"{at}  {done}", highlight=False, markup=False)
        elif event["event"] == "alive":
            console.print(f"{at}  ... {event['doing']}{rest}", highlight=False, markup=False)
        _warning(console, event)

    return say


def _warning(console: Console, event: Event) -> None:
    if event["event"] == "warning":
        notice = Notice.from_json(event)
        console.print(str(notice), highlight=False, markup=False)


def _rest(timeline: Timeline) -> str:
    """The estimated time to the end, to stand behind what the run is doing; empty without an estimate."""
    left = timeline.seconds_left
    return "" if left is None else f", {duration(left)} left"


def duration(seconds: float) -> str:
    """A length of time in one or two units: 40 s, 12 min, 3 h 20 min, 2 d 5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    if minutes < 36 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"


def _memory() -> str:
    import psutil

    return f"{psutil.Process().memory_info().rss / 2**20:.0f} MiB"
