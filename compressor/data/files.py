"""Reads data files as bytes: finds them by name, checks their kind and size, and decompresses them.

A file's kind follows from its suffix, in any case, without a suffix of compression (`train.jsonl.gz`). A suffix that
names no data format (.md, .py, none) is plain text, one document. Suffixes of other formats are refused. Only regular
files are opened: a FIFO, device or socket would block forever.
"""

from __future__ import annotations

import bz2
import gzip
import importlib
import io
import lzma
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from compressor.errors import CompressError, DependencyError, RecipeError

JSON_LINES, CSV, ARROW = (".jsonl", ".ndjson"), {".csv": ",", ".tsv": "\t"}, (".arrow", ".feather", ".ipc")
PARQUET = (".parquet", ".pq")
UNPACKERS: dict[str, Callable[[Any], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
CODECS = {".zst": "zstd", ".lz4": "lz4"}  # those of pyarrow
COMPRESSED = (*UNPACKERS, *CODECS)
KNOWN = (
    "text, .jsonl, .ndjson, .json, .csv, .tsv, .parquet, .arrow, .feather, .npz; also with .gz, .bz2, .xz, .zst, .lz4"
)
# formats without plain text or data, so that they are refused by name and not as bad UTF-8
# fmt: off
OTHER_FORMATS = {
    ".7z", ".avi", ".avro", ".bin", ".bmp", ".db", ".doc", ".docx", ".egg", ".exe", ".gguf", ".gif", ".h5", ".hdf5",
    ".ico", ".jar", ".jpeg", ".jpg", ".lzma", ".mat", ".mdb", ".mov", ".mp3", ".mp4", ".msgpack", ".npy", ".o", ".odt",
    ".onnx", ".orc", ".pdf", ".pickle", ".pkl", ".png", ".ppt", ".pptx", ".pt", ".pth", ".pyc", ".rar", ".rtf",
    ".safetensors", ".snappy", ".so", ".sqlite", ".sqlite3", ".tar", ".tfrecord", ".tgz", ".tiff", ".wav", ".webp",
    ".whl", ".xls", ".xlsx", ".z", ".zip",
}
# fmt: on


def find_file(source: str) -> Path:
    """The regular file that a source names. raises RecipeError"""
    path, mode = look_up(source)
    if mode is None:
        raise RecipeError(
            "is a link to a file that doesn't exist" if path.is_symlink() else "no such data file",
            where=source,
            hint="Check the path, or use a built-in source (stdlib, random) or dataset:NAME.",
            data={"reason": "broken-link" if path.is_symlink() else "no-such-file"},
        )
    check_regular(mode, source)
    return path


def kind_of(path: Path) -> tuple[str, str]:
    """(suffix of the kind, or "" for plain text; suffix of the compression or ""). raises RecipeError"""
    endings = [ending.lower() for ending in path.suffixes]
    packed = endings.pop() if endings and endings[-1] in COMPRESSED else ""
    kind = endings[-1] if endings else ""
    if kind in OTHER_FORMATS or kind in COMPRESSED or (kind == ".npz" and packed):
        raise RecipeError(
            f"files that end in {kind} are not read",
            where=path.name,
            hint=f"Convert it to one of: {KNOWN}; or name a folder.",
            data={"reason": "other-format", "ending": kind},
        )
    known = kind in (*JSON_LINES, ".json", *CSV, *PARQUET, *ARROW)
    return (kind if known else ""), packed


def read_regular(path: Path, most: int | None = None) -> bytes:
    """A file's bytes. raises RecipeError if it is not regular, can't be read, or is too large for the memory"""
    try:
        found = path.stat()
        check_regular(found.st_mode, path.name)
        check_size(found.st_size if most is None else min(most, found.st_size), path.name)
        with path.open("rb") as file:
            return file.read() if most is None else file.read(most)
    except OSError as error:
        raise RecipeError(
            f"can't be read ({error.strerror})",
            where=path.name,
            hint="Give yourself read permission for it (chmod +r).",
            data={"reason": "not-read", "cause": error.strerror},
        ) from error


def check_size(size: int, name: str) -> None:
    """raises RecipeError for data that is too large for the memory"""
    most = memory_share()
    if size > most:
        raise RecipeError(
            f"contains {size:,} bytes of data, and {most:,} fit into memory here",
            where=name,
            hint="Use a file with a part of it: a few thousand documents are enough.",
            data={"size": size, "limit": most},
        )


def memory_share() -> int:
    """Number of bytes of data that may be read: as text and as tokens they need several times as much."""
    return psutil.virtual_memory().available // 4


def look_up(source: str) -> tuple[Path, int | None]:
    """The path of a source and the mode of the file there, through links; None if there is none."""
    path = Path(os.path.expanduser(source))
    try:
        return path, path.stat().st_mode
    except FileNotFoundError:
        return path, None
    except (OSError, ValueError) as error:  # no permission, circular links, a long name, a null character
        why = getattr(error, "strerror", None) or str(error)
        raise RecipeError(
            f"can't be accessed ({why})",
            where=source[:200],
            hint="Name another path, or check the permissions of its folders.",
            data={"reason": "not-looked-up", "cause": why},
        ) from error


def folder_of(source: str) -> Path | None:
    path, mode = look_up(source.removeprefix("dataset:"))
    return path if mode is not None and stat.S_ISDIR(mode) else None


def check_regular(mode: int, where: str) -> None:
    if stat.S_ISREG(mode):
        return
    kinds = ((stat.S_ISDIR, "folder"), (stat.S_ISFIFO, "FIFO"), (stat.S_ISSOCK, "socket"))
    kind = next((name for is_kind, name in kinds if is_kind(mode)), "device")
    raise RecipeError(
        f"is a {kind}, not a file",
        where=where,
        hint="Write the data to a regular file and name that one.",
        data={"reason": "no-regular-file", "kind": kind},
    )


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Turn any exception of a library for a damaged file into a RecipeError. raises RecipeError, DependencyError"""
    try:
        yield
    except CompressError:
        raise
    except ImportError as error:
        raise DependencyError(
            f"needs a package that is not installed ({error})",
            where=name,
            hint="Install the package that the message names with pip.",
            data={"reason": "no-package", "package": error.name},
        ) from error
    except Exception as error:  # readers of many formats, each with its own exceptions, such as EOFError
        message = " ".join(str(error).split())[:200]
        raise RecipeError(
            f"can't be read ({type(error).__name__}{': ' if message else ''}{message})",
            where=name,
            hint="Copy the file again if it is incomplete, or correct its suffix if it has another format.",
            data={"reason": "not-read", "error": type(error).__name__, "cause": message},
        ) from error


def load_package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise DependencyError(
            f"needs the package {package}",
            where="data",
            hint="Run pip install datasets.",
            data={"reason": "no-package", "package": package},
        ) from error


def decompressed(path: Path, ending: str, content: bytes, most: int | None) -> bytes:
    """The content of a compressed file, or its first `most` bytes."""
    limit = memory_share() if most is None else most
    with reading(path.name):
        packed = io.BytesIO(content)
        file: Any
        if ending in UNPACKERS:
            file = UNPACKERS[ending](packed)
        else:
            file = load_package("pyarrow").CompressedInputStream(packed, CODECS[ending])
        parts, size = [], 0
        while part := file.read(min(1 << 20, limit + 1 - size)):
            parts.append(part)
            size += len(part)
            if most is not None and size >= most:
                break
            check_size(size, path.name)
    return b"".join(parts)[:most]
