"""Turns exceptions about exhausted memory or disk into errors that a user can act on. Imports no torch."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from compressor.errors import PassError
from compressor.process.streams import LostStream

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_MEMORY = ("can't allocate memory", "out of memory", "Cannot allocate memory")  # texts of torch's RuntimeErrors


def ran_out(error: BaseException, folder: Path | None = None) -> PassError | None:
    """The error for an exception about exhausted memory or disk; None for any other exception.

    folder  the folder of the work, if the exception names no file
    """
    if isinstance(error, LostStream):
        hint = "Free space on that disk, or redirect the output to another one, then continue with --resume."
        return PassError(
            f"can't be written ({error.strerror})",
            where=error.filename,
            hint=hint,
            data={"reason": "lost-stream", "cause": error.strerror},
        )
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        named = Path(error.filename) if isinstance(error.filename, str) else folder
        return disk_full(named or folder or Path.cwd(), None)
    if type(error).__name__ == "SafetensorError":  # it has the system's error only as text
        if any(f"os error {number}" in str(error) for number in NO_ROOM):
            return disk_full(folder or Path.cwd(), None)
        return None
    is_memory = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    if is_memory or (isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)):
        asked = f" ({str(error).splitlines()[0][:200]})" if str(error) else ""
        return PassError(
            f"memory ran out{asked}",
            where=folder.name if folder is not None else None,
            hint="Free memory, then run the command again (for a run: with --resume), or set a smaller data.samples.",
            data={"reason": "out-of-memory", "cause": str(error)[:200]},
        )
    return None


@contextmanager
def room(folder: Path) -> Iterator[None]:
    """raises PassError in place of the library's exception if memory or disk run out"""
    try:
        yield
    except Exception as error:
        if (refusal := ran_out(error, folder)) is not None:
            raise refusal from error
        raise


def disk_full(path: Path, needed_bytes: int | None) -> PassError:
    """The error for a write on a full disk. needed_bytes is None if it is unknown."""
    free = shutil.disk_usage(path.parent).free
    needed = "" if needed_bytes is None else f"{needed_bytes:,} bytes to write, "
    return PassError(
        f"the disk is full: {needed}{free:,} free",
        where=path.name,
        hint="Free space on that disk, then continue with --resume; finished parts are kept.",
        data={"reason": "disk-full", "needed": needed_bytes, "free": free},
    )
