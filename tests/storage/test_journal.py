"""Nothing durable is lost: a real SIGKILL at every fsync, rename and write, and the same bytes afterwards."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
from raising import raises

from compressor.errors import PassError, ResumeError, UsageError
from compressor.storage.journal import LINES, LOCK, PARTS, RUN, Journal, has_begun, remove_work

FINGERPRINT = {"recipe": "abc", "threads": 2}
WORKER = """
import os, signal, sys
from pathlib import Path
from compressor.storage.journal import Journal
left = [int(sys.argv[2])]
def deadly(call):
    def wrapped(*args, **kwargs):
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **kwargs)
    return wrapped
os.fsync, os.replace, os.open, Path.open = map(deadly, (os.fsync, os.replace, os.open, Path.open))
work = Path(sys.argv[1])
fingerprint = {"recipe": "abc", "threads": 2}
journal = Journal.reopen(work, fingerprint) if (work / "run.json").exists() else Journal.create(work, fingerprint)
for number in range(3):
    if journal.done(f"0/{number}") is None:
        content = bytes([number]) * 5000
        journal.commit(f"0/{number}", f"u{number}.bin", lambda path: path.write_bytes(content), {"fact": number})
print("finished")
"""


def work_on(work, kill_at):
    return subprocess.run(
        [sys.executable, "-c", WORKER, str(work), str(kill_at)], capture_output=True, text=True, check=False
    )


def contents(work):
    return {path.relative_to(work).as_posix(): path.read_bytes() for path in work.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_kill_at_every_durable_step_leaves_a_journal_that_finishes_to_the_same_bytes(tmp_path):
    assert work_on(tmp_path / "whole", 10_000).stdout == "finished\n"
    expected = contents(tmp_path / "whole")
    steps = 0
    for kill_at in range(200):
        work = tmp_path / str(kill_at)
        done = work_on(work, kill_at)
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        steps += 1
        if work.exists() and not (work / RUN).exists():  # killed before the run had begun
            for path in sorted(work.rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
            work.rmdir()
        again = work_on(work, 10_000)
        assert again.stdout == "finished\n", again.stderr
        assert contents(work) == expected
    assert steps >= 15


def test_a_torn_last_line_is_ignored_and_cut_off(tmp_path):
    journal = Journal.create(tmp_path / "w", FINGERPRINT)
    journal.commit("0/0", "a.bin", lambda path: path.write_bytes(b"x"), {})
    journal.close()
    with (tmp_path / "w" / LINES).open("ab") as file:
        file.write(b'{"key": "0/1", "fil')
    again = Journal.reopen(tmp_path / "w", FINGERPRINT)
    assert again.done("0/0") is not None and again.done("0/1") is None
    again.commit("0/1", "b.bin", lambda path: path.write_bytes(b"y"), {})
    again.close()
    assert [json.loads(line)["key"] for line in (tmp_path / "w" / LINES).read_text().splitlines()] == ["0/0", "0/1"]


def test_a_damaged_line_in_the_middle_is_refused(tmp_path):
    Journal.create(tmp_path / "w", FINGERPRINT).close()
    (tmp_path / "w" / LINES).write_bytes(b"nonsense\n{}\n")
    with raises(ResumeError, where=LINES, reason="damaged", line=1):
        Journal.reopen(tmp_path / "w", FINGERPRINT)


EDITS = {
    "a fact removed": lambda line: line.pop("forms"),
    "a fact of another kind": lambda line: line.update(formats=5),
    "a fact that is null": lambda line: line.update(relative_errors=None),
    "an item of another kind": lambda line: line.update(warnings=[5]),
    "a value deep inside": lambda line: line["records"][0].pop("name"),
    "a fact added": lambda line: line.update(checked=True),
    "no hash of the file": lambda line: line.pop("sha256"),
    "no hash of the line": lambda line: line.pop("line_sha256"),
    "another file": lambda line: line.update(file="../run.json"),
    "another key": lambda line: line.update(key=[]),
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_line_that_was_edited_is_refused(edit, tmp_path):
    facts = {"forms": {}, "records": [{"name": "x"}], "warnings": [], "relative_errors": {"x": 1e-3}}
    journal = Journal.create(tmp_path / "w", FINGERPRINT)
    for key in ("0/0", "0/1"):
        journal.commit(key, f"{key[-1]}.bin", lambda path: path.write_bytes(b"x"), facts)
    journal.close()
    first, second = (tmp_path / "w" / LINES).read_text().splitlines()
    line = json.loads(first)
    EDITS[edit](line)
    (tmp_path / "w" / LINES).write_text(f"{json.dumps(line)}\n{second}\n")
    with raises(ResumeError, where=LINES, reason="damaged", line=1):
        Journal.reopen(tmp_path / "w", FINGERPRINT)


def test_facts_of_any_kind_are_read_again(tmp_path):
    facts = {"numbers": {10: (1.5, None), 9: float("inf")}, "text": "ä\u2028"}
    journal = Journal.create(tmp_path / "w", FINGERPRINT)
    journal.commit("0/0", "a.bin", lambda path: path.write_bytes(b"x"), facts)
    journal.close()
    again = Journal.reopen(tmp_path / "w", FINGERPRINT)
    assert again.done("0/0").facts["numbers"] == {"10": [1.5, None], "9": float("inf")}


@pytest.mark.parametrize("text", ["3", "null", "[1]", '"a"', "{", "[" * 100_000])
@pytest.mark.parametrize("name", [RUN, LINES])
def test_what_is_no_object_is_damaged(name, text, tmp_path):
    Journal.create(tmp_path / "w", FINGERPRINT).close()
    (tmp_path / "w" / name).write_text(f"{text}\n")
    with raises(ResumeError, where=name, reason="damaged"):
        Journal.reopen(tmp_path / "w", FINGERPRINT)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
@pytest.mark.parametrize("name", [RUN, LINES, LOCK])
def test_only_a_regular_file_is_opened(name, make, tmp_path):
    Journal.create(tmp_path / "w", FINGERPRINT).close()
    (tmp_path / "w" / name).unlink(missing_ok=True)
    make(tmp_path / "w" / name)
    lock = {"where": f"w/{LOCK}", "reason": "not-opened"}
    if make is os.mkfifo:
        refusal, told = ResumeError, {"where": "w", "reason": "link", "name": name}
    elif name == LOCK:
        refusal, told = UsageError, lock
    else:
        refusal, told = ResumeError, {"where": name, "reason": "not-read" if name == RUN else "not-opened"}
    with raises(refusal, **told):
        Journal.reopen(tmp_path / "w", FINGERPRINT)
    if make is os.mkfifo:
        with raises(UsageError, where=tmp_path / "w", reason="foreign-files", names=[name]):
            remove_work(tmp_path / "w")
    elif name == LOCK:
        with raises(UsageError, **lock):
            remove_work(tmp_path / "w")
    else:
        remove_work(tmp_path / "w")


def test_every_difference_is_named_on_resume(tmp_path):
    Journal.create(tmp_path / "w", FINGERPRINT).close()
    with raises(
        ResumeError,
        where="w",
        reason="differs",
        was={"recipe": "abc", "threads": 2},
        **{"is": {"recipe": "xyz", "threads": 1}},
    ) as failure:
        Journal.reopen(tmp_path / "w", {"recipe": "xyz", "threads": 1})
    assert failure.value.exit_code == 2


def test_a_changed_unit_file_is_refused(tmp_path):
    journal = Journal.create(tmp_path / "w", FINGERPRINT)
    path = journal.commit("0/0", "a.bin", lambda p: p.write_bytes(b"x"), {})
    journal.close()
    path.write_bytes(b"y")
    with raises(ResumeError, where="a.bin", reason="part-changed"):
        Journal.reopen(tmp_path / "w", FINGERPRINT).done("0/0")


def test_two_runs_cannot_share_a_work_directory(tmp_path):
    journal = Journal.create(tmp_path / "w", FINGERPRINT)
    with raises(UsageError, where="w", reason="in-use"):
        Journal.reopen(tmp_path / "w", FINGERPRINT)
    journal.close()
    Journal.reopen(tmp_path / "w", FINGERPRINT).close()


def test_a_work_directory_in_use_is_not_removed(tmp_path):
    journal = Journal.create(tmp_path / "w", FINGERPRINT)
    with raises(UsageError, where="w", reason="in-use"):
        remove_work(tmp_path / "w")
    journal.close()
    remove_work(tmp_path / "w")
    assert not (tmp_path / "w").exists()


def test_a_run_killed_before_it_began_leaves_nothing_to_resume_and_can_be_removed(tmp_path):
    (tmp_path / "w" / PARTS).mkdir(parents=True)
    (tmp_path / "w" / "run.tmp").write_text("{")
    assert not has_begun(tmp_path / "w")
    remove_work(tmp_path / "w")
    assert not (tmp_path / "w").exists()


def test_a_disk_that_fills_up_keeps_what_was_committed(tmp_path):
    import errno

    journal = Journal.create(tmp_path / "w", FINGERPRINT)
    journal.commit("0/0", "a.bin", lambda path: path.write_bytes(b"x"), {})

    def full(path):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with raises(PassError, where="b.bin", reason="disk-full"):
        journal.commit("0/1", "b.bin", full, {})
    journal.close()
    assert sorted(path.name for path in (tmp_path / "w" / PARTS).iterdir()) == ["a.bin"]
    assert Journal.reopen(tmp_path / "w", FINGERPRINT).done("0/0") is not None


def test_only_our_own_work_directory_is_removed(tmp_path):
    Journal.create(tmp_path / "w", FINGERPRINT).close()
    (tmp_path / "w" / "thesis.txt").write_text("precious")
    with raises(UsageError, where=tmp_path / "w", reason="foreign-files", names=["thesis.txt"]):
        remove_work(tmp_path / "w")
    (tmp_path / "w" / "thesis.txt").unlink()
    remove_work(tmp_path / "w")
    assert not (tmp_path / "w").exists()
