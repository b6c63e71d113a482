"""The display of a run says what it is doing and how long the rest takes, also while nothing happens."""

import io
import json
import time

import pytest
from rich.console import Console

from compressor.cli.progress import duration, json_line, show
from compressor.cli.timeline import Timeline
from compressor.engine.events import PROGRESS_SECONDS, Progress

PREDICTED = {
    "event": "predicted",
    "stages": [
        {"name": "sweep 0", "parts": [1.0, 10.0, 10.0, 4.0]},
        {"name": "write", "parts": [5.0]},
        {"name": "verify", "parts": [10.0]},
        {"name": "evaluate", "parts": [20.0]},
    ],
}
SWEEP = {"event": "sweep", "sweep": 0, "parts": 4, "passes": ["gptq"]}


def part(number):
    return {"event": "part", "sweep": 0, "part": number, "parts": 4, "name": f"layers.{number - 1}", "seconds": 1.0}


@pytest.fixture
def run():
    """A timeline, and a function that hands it an event at a time in seconds."""
    now = [0.0]
    timeline = Timeline(lambda: now[0])

    def at(seconds, event=None):
        now[0] = seconds
        if event is not None:
            timeline.take(event)
        return timeline.seconds_left

    return timeline, at


def test_the_rest_is_predicted_before_any_work_is_done(run):
    _, at = run
    assert at(3.0, PREDICTED) is None
    assert at(3.0, SWEEP) == 60.0
    assert at(5.0) == 58.0


def test_work_that_took_twice_as_long_doubles_the_rest(run):
    timeline, at = run
    at(0.0, PREDICTED), at(0.0, SWEEP), at(2.0, part(0))
    assert at(22.0, part(1)) == 2 * 49.0
    assert timeline.activity == "sweep 1: gptq, after layers.0 (2/4)"
    assert at(32.0) == 2 * 49.0 - 10.0


def test_the_end_of_a_stage_counts_all_its_parts(run):
    timeline, at = run
    at(0.0, PREDICTED), at(0.0, SWEEP), at(11.0, part(1))
    assert at(25.0, {"event": "stage", "name": "write"}) == 35.0
    assert at(30.0, {"event": "stage", "name": "verify"}) == 30.0
    assert timeline.activity == "loading it in a fresh process"
    assert at(1000.0) == 0.0


def test_a_run_without_a_prediction_has_no_estimate(run):
    timeline, at = run
    assert at(0.0, SWEEP) is None and at(9.0, part(0)) is None
    assert timeline.activity == "sweep 1: gptq, after layers.-1 (1/4)"


def test_work_inside_a_part_is_named(run):
    timeline, at = run
    at(0.0, SWEEP)
    at(1.0, {"event": "progress", "sweep": 0, "part": 1, "what": "layers.0.up", "share": 0.25})
    assert timeline.activity == "sweep 1: gptq, layers.0.up 25%"


def until(found):
    """Wait for what another thread does; a display that stays silent fails here."""
    for _ in range(1000):
        if found():
            return
        time.sleep(0.01)
    raise AssertionError("silent")


def test_a_silent_run_says_that_it_lives(capsys):
    seen = []

    def found():
        seen.extend(json.loads(line) for line in capsys.readouterr().out.splitlines())
        return len([event for event in seen if event["event"] == "alive"]) > 1

    with show("json", Console(), silence=0.02) as emit:
        emit(PREDICTED), emit(SWEEP)
        emit({"event": "progress", "sweep": 0, "part": 1, "what": "layers.0.up", "share": None})
        until(found)
    alive = seen[-1]
    assert {event["event"] for event in seen} == {"predicted", "sweep", "alive"}
    assert seen[:2] == [PREDICTED, SWEEP]
    assert alive.keys() == {"event", "doing", "seconds", "seconds_left"}
    assert alive["doing"] == "sweep 1: gptq, layers.0.up" and 0 < alive["seconds_left"] <= 60


def test_plain_lines_say_it_too():
    console = Console(file=io.StringIO(), width=200)
    with show("auto", console, silence=0.02) as emit:
        emit({"event": "stage", "name": "evaluate"})
        until(lambda: "... measuring before and after" in console.file.getvalue())


def test_a_closed_pipe_ends_the_display_in_the_main_thread(monkeypatch):
    calls = []

    def closed(event):
        calls.append(event["event"])
        raise BrokenPipeError

    monkeypatch.setattr("compressor.cli.progress.json_line", closed)
    with pytest.raises(BrokenPipeError), show("json", Console(), silence=0.01) as emit:
        until(lambda: calls)
        emit(SWEEP)
    assert calls == ["alive", "sweep"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(40.4, "40 s"), (600, "10 min"), (3 * 3600 + 20 * 60, "3 h 20 min"), (53 * 3600, "2 d 5 h")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_progress_events_are_no_more_than_one_in_an_interval():
    now, events = [0.0], []
    progress = Progress(events.append, clock=lambda: now[0])
    for number in range(5):
        now[0] = number * PROGRESS_SECONDS / 2
        progress(0, 1, "w", number / 4)
    assert [event["share"] for event in events] == [0.0, 0.5, 1.0]


def test_numbers_that_json_does_not_have_are_null(capsys):
    json_line({"event": "result", "values": [{"difference": float("nan")}, float("-inf"), 1.5]})
    assert capsys.readouterr().out == '{"event": "result", "values": [{"difference": null}, null, 1.5]}\n'
