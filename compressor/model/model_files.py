"""Checks which files of a model's directory may be opened.

A model's directory comes from anywhere. Opening a FIFO or a device in it can block forever, and a link can lead to
somebody else's file. So a file is opened only if it is a regular file inside the directory. The one exception is the
Hugging Face cache, whose snapshots are links into `blobs/` of the same model's folder.

transformers opens more files than this package names. So the whole directory is checked before transformers reads it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from compressor.errors import ModelError
from compressor.process.utf8 import check_utf8

MAX_ENTRIES = 10_000  # files and folders of one directory; a model's directory has a few dozen
MAX_DEPTH = 8  # folders below the directory
KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a directory",
}


def is_hidden(relative: Path) -> bool:
    """Whether a part of the path starts with a dot, as .git and .cache/huggingface do. Loaders open no such files."""
    return any(part.startswith(".") for part in relative.parts)


def regular_file(directory: Path, path: Path) -> Path:
    """`path`, if it may be opened. raises ModelError if it is missing, leads out, or is not a regular file"""
    name = _name(directory, path)
    try:
        found = os.stat(path)
    except FileNotFoundError as error:
        if path.is_symlink():
            raise _refusal(name, "is a link to a file that isn't there", "broken-link") from error
        raise ModelError(
            "file is missing",
            where=name,
            hint=f"Check that {directory.name} is a checkpoint directory, or download the model again.",
            data={"reason": "missing", "directory": directory.name},
        ) from error
    except (OSError, ValueError) as error:  # a circular link, a long name, no permission; a name with a NUL
        message = getattr(error, "strerror", None) or error
        raise ModelError(
            f"can't be read ({message})",
            where=name,
            hint="Check the permissions of the file, or download the model again.",
            data={"reason": "unreadable", "cause": str(message)},
        ) from error
    if not stat.S_ISREG(found.st_mode):
        kind = KINDS.get(stat.S_IFMT(found.st_mode), "no regular file")
        raise ModelError(
            f"is {kind}, a regular file is needed",
            where=name,
            hint="Remove it from the directory, or put a regular file in its place.",
            data={"reason": "no-regular-file", "kind": kind},
        )
    if not _leads_inside(directory, path):
        raise _refusal(name, "is a link that leads out of the model's directory", "link-out")
    return path


def check_directory(directory: Path) -> None:
    """Check that the directory's name is UTF-8, and that every entry (except hidden ones) is a folder or may be opened.

    raises  UsageError for the name, ModelError naming the first entry that may not be opened, or for a directory that
            is too large or too deep for a model
    """
    check_utf8(directory.absolute(), "Rename the directory, or the folder that contains it.")
    for path in entries(directory):
        if path.is_symlink() or not path.is_dir():
            regular_file(directory, path)


def entries(directory: Path) -> Iterator[Path]:
    """Every entry below a directory, folders first, except hidden ones. Links to folders are not followed.

    raises  ModelError for more than MAX_ENTRIES entries or MAX_DEPTH levels, and for a folder that can't be read
    """
    count, waiting = 0, [(directory, 0)]
    while waiting:
        folder, depth = waiting.pop()
        try:
            found = sorted(folder.iterdir())
        except OSError as error:
            raise ModelError(
                f"can't be read ({error.strerror})",
                where=_name(directory, folder),
                hint="Give yourself permission to list it (chmod u+rx), or move it out of the model.",
                data={"reason": "not-read", "cause": error.strerror},
            ) from error
        for path in found:
            if path.name.startswith("."):
                continue
            count += 1
            if count > MAX_ENTRIES:
                raise ModelError(
                    f"contains more than {MAX_ENTRIES:,} files; it isn't the directory of a model",
                    where=str(directory),
                    hint="Pass the directory that contains only the model's files.",
                    data={"reason": "too-many-files", "limit": MAX_ENTRIES},
                )
            yield path
            if path.is_dir() and not path.is_symlink():
                if depth == MAX_DEPTH:
                    raise ModelError(
                        f"is more than {MAX_DEPTH} folders deep",
                        where=_name(directory, path),
                        hint="Move it out of the model's directory.",
                        data={"reason": "too-deep", "limit": MAX_DEPTH},
                    )
                waiting.append((path, depth + 1))


def _leads_inside(directory: Path, path: Path) -> bool:
    root, target = directory.resolve(), path.resolve()
    cache = root.parent.parent if root.parent.name == "snapshots" else root
    return target.is_relative_to(root) or target.is_relative_to(cache / "blobs")


def _name(directory: Path, path: Path) -> str:
    return path.relative_to(directory).as_posix() if path != directory else directory.name


def _refusal(name: str, what: str, reason: str) -> ModelError:
    hint = "Replace the link by the file itself if it belongs to the model, else remove the link."
    return ModelError(what, where=name, hint=hint, data={"reason": reason})


def demo_path() -> Path:
    """The directory of the bundled demo model."""
    return Path(__file__).parent.parent / "demo"
