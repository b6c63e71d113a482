"""A child process answers or fails as if its work were done here, and never outlives the process that asked."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from raising import raises

from compressor.errors import CompressError, DependencyError, ModelError, PassError
from compressor.process import child, fork_server
from compressor.process.child import ChildBug, ask

TESTS = Path(__file__).parents[1] / "support"
DOING = "the process that answers for a test"
HINTS = {
    "lack a package": "pip install x",
    "fail in a class of its own": "Download it again.",
}  # of tests/support/answers.py


@pytest.fixture(scope="module")
def server():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(TESTS))
        patch.setattr(child, "_server", None)
        with child.started_early():
            yield child._server


@pytest.fixture(autouse=True, params=["started", "forked"])
def way(request, monkeypatch, server):
    """Both ways to a fresh process, which finds `answers`."""
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    monkeypatch.setattr(child, "_server", server if request.param == "forked" else None)
    return request.param


def answer(kind, folder="", **more):
    return ask("answers", {"kind": kind, "folder": str(folder), "here": os.getpid(), **more}, "answers for a test")


@pytest.mark.parametrize(
    ("kind", "error", "code", "where", "data"),
    [
        ("lack a package", DependencyError, 6, "export", {"package": "x"}),
        ("fail in a class of its own", ModelError, 5, "config.json", {"line": 3}),
        ("run out of memory", PassError, 7, None, {"reason": "out-of-memory"}),
        ("fill the disk", PassError, 7, "file", {"reason": "disk-full", "needed": None}),
        ("be killed", PassError, 7, DOING, {"signal": "SIGKILL"}),
        ("crash", PassError, 7, DOING, {"signal": "SIGSEGV"}),
        ("be asked to end", PassError, 7, DOING, {"signal": "SIGTERM"}),
    ],
)
def test_an_error_of_a_child_keeps_its_class_place_and_hint(kind, error, code, where, data, tmp_path):
    with raises(error, where=where, **data) as failure:
        answer(kind, tmp_path)
    assert type(failure.value) is error and failure.value.exit_code == code
    assert failure.value.hint == HINTS.get(kind, failure.value.hint)


@pytest.mark.parametrize(
    ("kind", "told", "note"),
    [
        ("divide by zero", "ZeroDivisionError: ", "1 // 0"),
        ("end without a word", " 3 ", ""),  # the status that it ended with
        ("answer what is no JSON", " 1 ", "not JSON serializable"),  # in Python's words
    ],
)
def test_what_nobody_foresaw_in_a_child_is_a_bug_with_its_traceback(kind, told, note):
    with pytest.raises(ChildBug) as failure:
        answer(kind)
    assert not isinstance(failure.value, CompressError)
    assert told in str(failure.value) and note in "".join(failure.value.__notes__)


def test_a_library_that_prints_or_asks_reaches_neither_the_answer_nor_the_user(capfd):
    found = answer("talk", padding="y" * 300_000)  # more than a pipe holds, both ways
    assert found["answered"] is None and len(found["long"]) == 300_000
    assert capfd.readouterr() == ("", "")


PLANTED = ("json", "torch", "safetensors", "transformers", "compressor", "typing", "importlib", "signal")


@pytest.mark.parametrize("more", ["", ".", os.pathsep, f"{os.pathsep}.", "./"])
def test_nothing_in_the_working_directory_is_imported(more, tmp_path, monkeypatch):
    for name in PLANTED:
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write({name!r})")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{TESTS}{os.pathsep}{more}")
    found = answer("tell its search path")
    assert found["json"] == json.__file__
    assert str(tmp_path) not in found["path"] and "" not in found["path"] and str(TESTS) in found["path"]
    assert str(TESTS.parents[1]) not in found["path"]  # the package is found by its own path, its folder isn't searched
    grandchild = child.command("import json, subprocess, sys; subprocess.run([sys.executable, '-c', 'import json'])")
    subprocess.run(grandchild, env=child.environment(), check=True)
    assert not (tmp_path / "ran").exists()


def wait_for_pids(folder):
    deadline = time.monotonic() + 60
    while not (folder / "pids").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    return [int(number) for number in (folder / "pids").read_text().split()]


def all_end(pids):
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        alive = [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]
        if not alive:
            return True
        time.sleep(0.05)
    return False


def test_an_interrupted_wait_ends_the_child_and_what_it_started(tmp_path):
    def interrupt(number, frame):
        if (tmp_path / "pids").exists():
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)
    try:
        with pytest.raises(KeyboardInterrupt):
            answer("hang", tmp_path)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert all_end(wait_for_pids(tmp_path))


def test_a_child_ends_when_the_process_that_asked_is_killed(tmp_path):
    request = {"kind": "hang", "folder": str(tmp_path)}
    code = f"from compressor.process.child import ask; ask('answers', {request}, 'hangs')"
    path = os.pathsep.join([str(TESTS), str(TESTS.parents[1])])
    parent = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path})
    pids = wait_for_pids(tmp_path)
    parent.kill()
    parent.wait()
    assert all_end(pids)


def test_a_forked_process_is_fresh_and_is_what_was_asked_for(way, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = [answer("tell what it is") for _ in range(2)]
    assert found[0]["pid"] != found[1]["pid"] and {told["folder"] for told in found} == {str(tmp_path)}
    assert {told["parent is here"] for told in found} == {way == "started"}
    for told in found:
        assert told["torch"] == (way == "forked") and not told["was used before"]
        assert told["group"] == told["pid"] and told["files"] <= 7  # streams, and what the request came through


def test_a_second_process_at_the_same_time_or_after_the_server_ended_is_started(way, monkeypatch):
    if way == "started":
        return
    request, sends = os.pipe()
    first, *pipes = child.start("import sys; sys.stdin.read()", [], request)
    assert isinstance(first, fork_server.Forked) and not answer("tell what it is")["torch"]
    os.close(sends)
    assert child.read_both(*pipes) == (b"", b"") and first.wait() == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(child, "_server", None)
        with child.started_early():
            child._server.close()
            assert not answer("tell what it is")["torch"]


@pytest.mark.parametrize(("name", "is_forked"), [("TORCHINDUCTOR_CACHE_DIR", True), ("TORCH_HOME", False)])
def test_only_a_variable_that_torch_sets_itself_may_be_new(name, is_forked, way, monkeypatch):
    monkeypatch.setenv(name, "/tmp/x")
    assert answer("tell what it is")["torch"] == (way == "forked" and is_forked)


def test_a_forked_process_forks_another_that_is_as_fresh(way, tmp_path, monkeypatch):
    """One that was started has nothing to fork from: its own are started too."""
    monkeypatch.chdir(tmp_path)
    told = answer("ask another")
    assert told["torch"] == (way == "forked") and not told["was used before"]
    assert told["parent is here"] == (way == "started") and told["pid"] != told["asked by"]
    assert told["group"] == told["pid"] and told["folder"] == str(tmp_path) and told["files"] <= 7
