"""Compiled objects of the tests, kept between runs and shared by the workers of one.

A file is named by the hash of all that goes into it: the source, the headers that it includes by quotes, the flags and
the compiler's version. Two processes that want the same one build it once: the second waits for a lock.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path

FOLDER = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "compress-model" / "tests"
KEPT_SECONDS = 14 * 24 * 3600  # without use


@cache
def compiler() -> str:
    return subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True).stdout


def included(text: str, folders: Sequence[Path], seen: dict[Path, str]) -> dict[Path, str]:
    """The text of every header that is included by quotes and found in the folders, and of those that they include."""
    for name in re.findall(r'^\s*#include "([^"]+)"', text, re.MULTILINE):
        path = next((folder / name for folder in folders if (folder / name).is_file()), None)
        if path is not None and (path := path.resolve()) not in seen:
            seen[path] = path.read_text()
            included(seen[path], [path.parent, *folders], seen)
    return seen


def kept(name: str, facts: Iterable[str], make: Callable[[Path], None]) -> Path:
    """The file that `make` writes, made once for the same name and facts."""
    digest = hashlib.sha256("\0".join([name, compiler(), *facts]).encode()).hexdigest()
    path = FOLDER / f"{digest[:32]}-{name}"
    if not path.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        with (FOLDER / f"lock-{digest[:2]}").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                forget_old()
                with tempfile.TemporaryDirectory(dir=FOLDER) as work:
                    make(Path(work) / name)
                    os.replace(Path(work) / name, path)
    os.utime(path)
    return path


def forget_old() -> None:
    """Remove files that no test has used for two weeks."""
    for path in FOLDER.glob("????????????????????????????????-*"):
        try:
            if path.stat().st_mtime < time.time() - KEPT_SECONDS:
                path.unlink()
        except FileNotFoundError:  # another process was first
            pass


def precompiled(headers: Sequence[str], first: Sequence[Path], flags: Sequence[str]) -> Path:
    """What has to be included first so that these headers are not parsed again with the same flags.

    Only the precompiled file is there, so that the compiler refuses to go on where it can't use it.
    """
    text = "".join([*(f"#include <{name}>\n" for name in headers), *(path.read_text() for path in first)])

    def make(target: Path) -> None:
        source = target.with_suffix("")
        source.write_text(text)
        subprocess.run(["g++", *flags, "-x", "c++-header", str(source), "-o", str(target)], check=True)

    return kept("system.h.gch", [text, *flags], make).with_suffix("")


def system_headers(texts: Iterable[str]) -> list[str]:
    """The headers that these texts include by angle brackets."""
    return sorted({name for text in texts for name in re.findall(r"^#include <([^>]+)>", text, re.MULTILINE)})


def object_of(
    name: str,
    text: str,
    flags: Sequence[str],
    folders: Sequence[Path],
    headers: Mapping[str, str] | None = None,
    first: Sequence[Path] = (),
    system: Sequence[str] = (),
) -> Path:
    """The object of C++ text.

    folders  where headers are that it includes by quotes
    headers  text of headers that are read before those of the folders
    first    headers that are read before the text
    system   names of headers of the compiler and its libraries that are read before these; with them, they and `first`
             are parsed only once
    """
    headers = headers or {}
    before = [precompiled(system, first, flags)] if system else first
    known = included("\n".join([text, *headers.values()]), folders, {})
    facts = [text, *headers.values(), *known.values(), *(path.read_text() for path in first), *system, *flags]

    def make(target: Path) -> None:
        for header, of_header in {**headers, f"{name}.cpp": text}.items():
            (target.parent / header).write_text(of_header)
        command = ["g++", *flags, *(f"-iquote{folder}" for folder in folders)]
        for path in before:
            command += ["-include", str(path)]
        subprocess.run([*command, "-c", str(target.parent / f"{name}.cpp"), "-o", str(target)], check=True)

    return kept(f"{name}.o", facts, make)


def linked(name: str, objects: Sequence[Path], flags: Sequence[str]) -> Path:
    """The library or program of objects of `object_of`."""
    command = ["g++", *flags, *map(str, objects), "-o"]
    return kept(name, command, lambda target: subprocess.run([*command, str(target)], check=True))
