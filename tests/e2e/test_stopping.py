"""A stop is answered at once and ends the process, whatever the main thread is at; what was done can be resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import fresh
import psutil
import pytest
import tiny

from compressor.engine.interrupt import GRACE_SECONDS, SIGNALS, Stop, signals
from compressor.passes.rtn import RTN
from compressor.recipe.recipe import parse_recipe
from compressor.run import compress
from compressor.testing import recipe_for, weight_hashes

ROOT = Path(__file__).parents[2]
BOUND_SECONDS = 10.0
# One call of native code that no signal interrupts (a mutex that is locked already), and Python code without an end.
HANG = {
    "native": (
        "import ctypes; lock = ctypes.create_string_buffer(64)\n"
        "        for _ in range(2): ctypes.CDLL(None).pthread_mutex_lock(lock)"
    ),
    "python": "import time\n        while True: time.sleep(0.01)",
    "swallowed": (
        "import time\n        while True:\n            try: time.sleep(0.01)\n            except BaseException: pass"
    ),
}
ANSWERED = """
import sys
from compressor.engine import interrupt
from compressor.engine.interrupt import Stop, answered
interrupt.GRACE_SECONDS = 2.0
def hang():
        {hang}
def say(words):
    sys.stdout.write(words + '\\n')  # in one piece: two threads say theirs at once
    sys.stdout.flush()
try:
    with answered(Stop(), lambda: say('stopping'), lambda: say('last words'), 130):
        say('ready')
        hang()
except KeyboardInterrupt:
    say('stopped')
    sys.exit(130)
"""


def start(program, *arguments, **options):
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")])
    return subprocess.Popen(
        [sys.executable, "-P", "-c", program, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path, "NO_COLOR": "1", "COLUMNS": "300"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # also where the tests run under nohup
        **options,
    )


@pytest.mark.parametrize("sign", SIGNALS)
@pytest.mark.parametrize(
    ("hang", "last"), [("native", "last words"), ("swallowed", "last words"), ("python", "stopped")]
)
def test_a_signal_is_answered_at_once_and_ends_the_process(hang, last, sign):
    process = start(ANSWERED.format(hang=HANG[hang]))
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.2)
    process.send_signal(sign)
    began = time.monotonic()
    assert process.stdout.readline() in ("stopping\n", "stopped\n") and time.monotonic() - began < 1.9  # of the grace
    assert process.wait(60) == 130
    assert last in process.stdout.read() or hang == "python"


def test_a_second_signal_ends_the_process_at_once():
    process = start(ANSWERED.format(hang=HANG["native"]).replace("= 2.0", "= 600.0"))
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "stopping\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 130


def test_last_words_that_nobody_reads_do_not_hold_up_the_end():
    program = ANSWERED.format(hang=HANG["native"]).replace("say('last words')", "__import__('time').sleep(600)")
    process = start(program)
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130


def test_a_stop_is_accepted_until_it_is_too_late_and_an_accepted_one_is_kept():
    late, early = Stop(), Stop()
    late.close()
    assert not late.accept() and not late.is_asked()
    assert early.accept() and early.accept()
    with pytest.raises(KeyboardInterrupt):
        early.close()


def test_handlers_are_put_back_and_a_hang_up_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        kept = [signal.getsignal(sign) for sign in SIGNALS]
        with signals(Stop()) as stop:
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(5)
        assert stop.is_asked() and [signal.getsignal(sign) for sign in SIGNALS] == kept
    finally:
        signal.signal(signal.SIGHUP, before)


def test_another_thread_changes_no_handler():
    seen = []

    def work():
        with signals(Stop()):
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGINT)]


# The command with one function of a stage replaced by one that hangs, or that marks a process which was started.
PROGRAM = """
import importlib, sys
module, name, note = sys.argv[1:4]
importlib.import_module("compressor.engine.interrupt").GRACE_SECONDS = {grace}
def hang(*arguments, **options):
    open(note, 'w').close()
    for _ in [0]:
        {hang}
def start(program, arguments, *rest):
    found = begin(program, arguments, *rest)
    if arguments[1] == module:
        open(note, 'w').close()
    return found
if name:
    owner = importlib.import_module(module)
    *path, leaf = name.split('.')
    for part in path:
        owner = getattr(owner, part)
    setattr(owner, leaf, hang)
else:
    from compressor.process import child
    begin, child.start = child.start, start
sys.argv[1:] = sys.argv[4:]
from compressor.__main__ import main
sys.exit(main())
"""
STAGES = {
    "plan": ("compressor.model.empty_model", "skeleton", "native"),
    "data": ("compressor.data.samples", "pack", "native"),
    "sweep": ("compressor.passes.rtn", "RTN.block", "native"),
    "sweep, Python": ("compressor.passes.rtn", "RTN.block", "swallowed"),
    "write": ("compressor.artifact.writer", "write_artifact", "native"),
    "verify": ("compressor.artifact.verify", "", ""),
    "evaluate": ("compressor.evaluation.evaluate", "", ""),
}
STARTED_ANEW = ("sweep", "verify")  # as a user starts it: while it works alone, and while it waits for another process
RECIPE = """
version: 1
name: test
data: {source: stdlib, samples: 2, length: 16}
steps: [{pass: rtn, group_size: 32}]
eval: {metrics: [perplexity], data: {source: stdlib, samples: 2, length: 16}}
report: {html: false}
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Hashes of the artifact of a run that nobody stopped."""
    out = tmp_path_factory.mktemp("whole") / "out"
    compress(parse_recipe(RECIPE.encode(), "r.yaml"), "demo", out, measure=False)
    return weight_hashes(out)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_stop_in_each_stage_ends_within_ten_seconds_and_resumes_to_the_same_bytes(stage, tmp_path, whole):
    module, name, hangs = STAGES[stage]
    (tmp_path / "r.yaml").write_text(RECIPE)
    note, out = tmp_path / "reached", tmp_path / "out"
    command = ["run", tmp_path / "r.yaml", "--model", "demo", "--output", out, "--json"]
    hang = HANG.get(hangs, "pass")
    if stage in STARTED_ANEW:
        begin, program = start, PROGRAM.format(hang=hang, grace=GRACE_SECONDS)
    else:  # a process that ends by force is not waited for as long as a user waits
        begin, program = fresh.Going, fresh.PACKAGE + PROGRAM.format(hang=hang, grace=2.0)
    process = begin(program, module, name, note, *command)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and not note.exists():
        time.sleep(0.05)
    time.sleep(0.3)
    below = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    told, errors = process.communicate(timeout=120)
    took = time.monotonic() - began
    events = [json.loads(line) for line in told.splitlines()]
    assert process.returncode == 130 and took < BOUND_SECONDS, (took, errors)
    assert [event["event"] for event in events if event["event"] in ("stopping", "error")] == ["stopping", "error"]
    assert "stopping: " in errors and "Traceback" not in errors
    assert errors.strip().splitlines()[-1].startswith("error[interrupted]: run: stopped")
    psutil.wait_procs(below, timeout=20)
    assert not any(process.is_running() and process.status() != "zombie" for process in below)
    left = sorted(path.name for path in tmp_path.iterdir() if path.name not in ("r.yaml", "reached"))
    begun = (tmp_path / "out.work" / "run.json").exists()
    assert left == (["out.work"] if begun else []) and begun == (stage not in ("plan", "data"))
    compress(parse_recipe(RECIPE.encode(), "r.yaml"), "demo", out, resume=begun, measure=begun)
    assert weight_hashes(out) == whole


def test_a_run_of_another_thread_works_and_leaves_the_signals_alone(tmp_path):
    model, seen = tiny.save("llama", tmp_path / "model"), []

    def work():
        handlers = []
        chosen = recipe_for("rtn", RTN(group_size=32))
        options = {"measure": False, "emit": lambda event: handlers.append(signal.getsignal(signal.SIGTERM))}
        seen.append((compress(chosen, str(model), tmp_path / "out", **options)["status"], set(handlers)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [("ok", {signal.getsignal(signal.SIGTERM)})]
