"""Compiled objects of the tests: what makes one anew, and that two processes build it once."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import compiled
import pytest

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
TEXT = '#include "outer.h"\nint value() { return NUMBER; }\n'


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Headers, of which one includes the other, and a cache of its own."""
    monkeypatch.setattr(compiled, "FOLDER", tmp_path / "kept")
    (tmp_path / "inner.h").write_text("#define NUMBER 1\n")
    (tmp_path / "outer.h").write_text('#include "inner.h"\n')
    return tmp_path


def test_an_object_is_made_once_until_something_that_goes_into_it_changes(folder):
    first = compiled.object_of("value", TEXT, ["-O0"], [folder])
    made = first.stat().st_ino
    assert compiled.object_of("value", TEXT, ["-O0"], [folder]) == first and first.stat().st_ino == made
    others = [
        compiled.object_of("value", TEXT + "\n", ["-O0"], [folder]),
        compiled.object_of("value", TEXT, ["-O1"], [folder]),
        compiled.object_of("value", TEXT, ["-O0"], [folder], {"outer.h": "#define NUMBER 1\n"}),
    ]
    (folder / "inner.h").write_text("#define NUMBER 2\n")
    others.append(compiled.object_of("value", TEXT, ["-O0"], [folder]))
    assert len({first, *others}) == 5


def test_a_header_that_is_given_is_read_before_those_of_the_folders(folder):
    given = compiled.object_of("value", TEXT, ["-O0"], [folder], {"outer.h": "#define NUMBER missing\nint missing;\n"})
    assert "missing" in subprocess.run(["nm", given], capture_output=True, text=True, check=True).stdout


def test_what_fails_leaves_nothing(folder):
    with pytest.raises(subprocess.CalledProcessError):
        compiled.object_of("value", "no C++", ["-O0"], [folder])
    assert [path.name[:5] for path in compiled.FOLDER.iterdir()] == ["lock-"]


def test_two_processes_build_a_file_once(folder):
    """Each adds a line to a file when it builds, and takes a while for it."""
    code = f"""
import pathlib, sys, time
sys.path.insert(0, {str(Path(__file__).parents[1] / "support")!r})
import compiled
compiled.FOLDER = pathlib.Path({str(folder / "kept")!r})
def make(target):
    with open({str(folder / "built")!r}, "a") as log: log.write("once\\n")
    time.sleep(0.5)
    target.write_text("made")
assert compiled.kept("file", ["fact"], make).read_text() == "made"
"""
    started = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [process.wait(timeout=60) for process in started] == [0, 0]
    assert (folder / "built").read_text() == "once\n"
