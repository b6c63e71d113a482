"""Small facts about files that storage shares; no torch here, so that a journal opens at once."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from compressor.errors import PassError


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def disk_full(path: Path, needed_bytes: int | None) -> PassError:
    """The error for a write that found no room. needed_bytes is None where it isn't known"""
    free = shutil.disk_usage(path.parent).free
    needed = "" if needed_bytes is None else f"{needed_bytes:,} bytes to write, "
    return PassError(
        f"the disk is full: {needed}{free:,} free",
        where=path.name,
        hint="Free some space, then run again with --resume; what is done is kept.",
        data={"reason": "disk-full", "needed": needed_bytes, "free": free},
    )
