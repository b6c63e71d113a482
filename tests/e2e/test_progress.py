"""What the display shows of the work inside a part."""

from __future__ import annotations

import io

from rich.console import Console

from compressor.cli.progress import SILENT_SECONDS, Lines
from compressor.engine.events import PROGRESS_SECONDS, Progress


def test_lines_say_what_a_silent_run_is_doing():
    now, text = [0.0], io.StringIO()
    lines = Lines(Console(file=text, width=200), clock=lambda: now[0])

    def at(seconds, *events):
        now[0] = seconds
        for event in events:
            lines.emit(event)
        lines.remind()

    def work(share):
        return {"event": "progress", "sweep": 0, "unit": 1, "what": "block.q", "share": share}

    at(1, {"event": "stage", "name": "plan"})
    at(1 + SILENT_SECONDS)
    at(2 + SILENT_SECONDS, work(0.25))
    at(1 + 2 * SILENT_SECONDS, work(0.5))
    at(2 + 2 * SILENT_SECONDS, {"event": "unit", "name": "block 0", "unit": 1, "units": 4, "sweep": 0, "seconds": 1.0})
    at(2 + 3 * SILENT_SECONDS, work(None))
    shown = [line.split(" s ", 1)[1].strip() for line in text.getvalue().splitlines()]
    assert shown[:3] == ["planning", "planning", "block.q  50%"] and shown[3].startswith("block 0 (2/4) ")
    assert shown[4:] == ["block.q"]


def test_progress_events_are_no_more_than_one_in_an_interval():
    now, events = [0.0], []
    progress = Progress(events.append, clock=lambda: now[0])
    for number in range(5):
        now[0] = number * PROGRESS_SECONDS / 2
        progress(0, 1, "w", number / 4)
    assert [event["share"] for event in events] == [0.0, 0.5, 1.0]
