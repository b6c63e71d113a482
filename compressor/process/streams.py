"""Repairs the standard streams, so that every text can be written to them.

After `>&-` there is no standard output: the next file that is opened would get its number, and the output of libraries
would be written into it. PYTHONIOENCODING and the locale may name an encoding that lacks a character of a text.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class LostStream(OSError):
    """A standard stream that can't be written for another reason than a closed pipe. `filename` is its name."""


class Stream(io.TextIOWrapper):
    """A standard stream that names itself if it fails, and writes every text in any encoding."""

    def __init__(self, old: Any, target: str) -> None:
        self.target = target
        encoding, lines = old.encoding, old.line_buffering
        super().__init__(old.detach(), encoding=encoding, errors="backslashreplace", line_buffering=lines)

    def write(self, text: str) -> int:
        with self._naming():
            return super().write(text)

    def flush(self) -> None:
        with self._naming():
            super().flush()

    @contextmanager
    def _naming(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise
            raise LostStream(error.errno, error.strerror, self.target) from error


def mend_streams() -> None:
    """Open missing streams of this process as /dev/null, and make every character of a text writable.

    Call it only at the start of a process, before it opens any file.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it gets the lowest free number
    # a stream that was closed when Python started is None
    sys.stdin = sys.stdin or open(0, closefd=False)  # noqa: SIM115
    sys.stdout = Stream(sys.stdout or open(1, "w", closefd=False), "standard output")  # noqa: SIM115
    sys.stderr = Stream(sys.stderr or open(2, "w", closefd=False), "standard error")  # noqa: SIM115


def let_go_of_lost() -> None:
    """Replace a stream that can't be written by /dev/null. Otherwise Python would write its buffer at the end, and end
    with its own message and exit code."""
    for name in ("stdout", "stderr"):
        try:
            getattr(sys, name).flush()
        except OSError:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
