"""Standard streams that can be written to, whatever a shell made of them.

`>&-` leaves no standard output at all: the next file to be opened would get its number, and what libraries print would
go into it. PYTHONIOENCODING and the locale may name an encoding that lacks a sign of a text.
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
    """A standard stream that can't be written, other than because its reader went away; `filename` says which."""


class Stream(io.TextIOWrapper):
    """A standard stream that says so when it is the one that fails, and writes every text in any encoding."""

    def __init__(self, old: Any, told_as: str) -> None:
        self.told_as = told_as
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
            raise LostStream(error.errno, error.strerror, self.told_as) from error


def mend_streams() -> None:
    """Give this process the streams that it lacks, as /dev/null, and let no sign of a text fail to be written.

    For the start of a process of our own alone, before it opens any file.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it gets the lowest number that is free
    # one that was closed as Python started is None
    sys.stdin = sys.stdin or open(0, closefd=False)  # noqa: SIM115
    sys.stdout = Stream(sys.stdout or open(1, "w", closefd=False), "standard output")  # noqa: SIM115
    sys.stderr = Stream(sys.stderr or open(2, "w", closefd=False), "standard error")  # noqa: SIM115


def let_go_of_lost() -> None:
    """Put /dev/null in the place of a stream that can't be written: Python writes what it still holds as it ends, and
    would end with a message and a code of its own."""
    for name in ("stdout", "stderr"):
        try:
            getattr(sys, name).flush()
        except OSError:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
