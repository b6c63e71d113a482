"""What is durably done. One commit per unit: temporary file, sync, rename, one appended line.

The journal knows nothing of models. There is no moment without a valid state: a file counts once its line is
appended, a torn last line is ignored, and a file without a line is written again. A line says its own hash, so one that
anything else changed is found when the journal is reopened, whatever its facts are.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from compressor.errors import CompressError, PassError, ResumeError, UsageError
from compressor.process.resources import disk_full
from compressor.storage.files import file_sha256

RUN, LINES, LOCK, UNITS = "run.json", "journal.jsonl", "lock", "units"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
AGAIN = "Start again with --fresh."


@dataclass(frozen=True)
class Line:
    """What the journal says of a committed file.

    facts  JSON values of whoever committed it
    """

    key: str
    file: str
    sha256: str
    facts: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        return {"key": self.key, "file": self.file, "sha256": self.sha256, **self.facts}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Line:
        facts = {name: value for name, value in values.items() if name not in ("key", "file", "sha256")}
        return cls(values["key"], values["file"], values["sha256"], facts)


class Journal:
    """A work directory. Open it with `create` or `reopen`; close it to release the lock."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self._lock = _open_lock(work)
        try:
            _lock(self._lock, work)
            self.lines = self._read_lines()
            self._checked: set[str] = set()  # lines whose files are as they were committed, by key
        except (CompressError, OSError):
            self._lock.close()
            raise

    @classmethod
    def create(cls, work: Path, fingerprint: Mapping[str, object]) -> Journal:
        """A fresh journal. raises UsageError if the directory can't be written, PassError if the disk is full"""
        try:
            (work / UNITS).mkdir(parents=True)
            _write_durably(work / RUN, json.dumps(fingerprint, indent=1, sort_keys=True).encode())
            return cls(work)
        except OSError as error:
            if work.is_dir() and not has_begun(work):
                remove_work(work)
            if error.errno in FULL:
                raise disk_full(work, None) from error
            raise UsageError(
                f"the work directory can't be made ({error.strerror})", where=str(work), hint="Choose another --output."
            ) from error

    @classmethod
    def reopen(cls, work: Path, fingerprint: Mapping[str, object]) -> Journal:
        """Continue. raises ResumeError naming everything that differs from the interrupted run, or what is damaged"""
        if not has_begun(work):
            raise ResumeError(
                "there is no interrupted run here",
                where=work.name,
                hint="Start without --resume.",
                data={"reason": "no-interrupted-run"},
            )
        if links := _links(work):
            raise ResumeError(
                f"holds a link, a pipe or the like, which no run makes ({links[0]})",
                where=work.name,
                hint="Move it away first, then start again with --fresh.",
                data={"reason": "link", "name": links[0]},
            )
        stored = _read_run(work)
        names = sorted({*stored, *fingerprint})
        differing = [name for name in names if stored.get(name) != fingerprint.get(name)]
        differences = [f"{name}: was {stored.get(name)!r}, is {fingerprint.get(name)!r}" for name in differing]
        if differences:
            raise ResumeError(
                "the interrupted run differs: " + "; ".join(differences),
                where=work.name,
                hint="Restore what differs, or start again with --fresh.",
                data={
                    "reason": "differs",
                    "was": {name: stored.get(name) for name in differing},
                    "is": {name: fingerprint.get(name) for name in differing},
                },
            )
        try:
            (work / UNITS).mkdir(exist_ok=True)
            return cls(work)
        except OSError as error:  # no permission, or a folder in place of a file
            if error.errno in FULL:
                raise disk_full(work, None) from error
            named = Path(error.filename).name if isinstance(error.filename, str) else work.name
            raise ResumeError(
                f"can't be opened ({error.strerror})",
                where=named,
                hint=AGAIN,
                data={"reason": "not-opened", "cause": error.strerror},
            ) from error

    def close(self) -> None:
        self._lock.close()

    def done(self, key: str) -> Line | None:
        """The line of a committed unit. raises ResumeError if its file is not what was committed"""
        line = self.lines.get(key)
        if line is not None and key not in self._checked:
            path = self.path(line)
            if not path.is_file() or file_sha256(path) != line.sha256:
                raise ResumeError(
                    "the file is missing or changed since it was committed",
                    where=line.file,
                    hint=AGAIN,
                    data={"reason": "unit-changed"},
                )
            self._checked.add(key)
        return line

    def commit(self, key: str, file: str, write: Callable[[Path], None], facts: Mapping[str, Any]) -> Path:
        """Make one unit durable and return its path.

        write   writes the whole content to the path it gets
        facts   JSON values, kept in the unit's line
        raises  PassError when the disk is full; what was committed before stays
        """
        path = self.work / UNITS / file
        temporary = path.with_suffix(".tmp")
        try:
            write(temporary)
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
            line = Line(key, file, file_sha256(temporary), facts)
            values = line.to_json()
            os.replace(temporary, path)
            _sync_directory(path.parent)
            self._append(json.dumps({**values, "line_sha256": _line_sha256(values)}, sort_keys=True).encode() + b"\n")
        except OSError as error:
            temporary.unlink(missing_ok=True)
            if error.errno in FULL:
                raise disk_full(path, None) from error
            raise PassError(
                f"can't be written ({error.strerror})", where=file, hint="Fix it and run with --resume."
            ) from error
        self.lines[key] = line
        self._checked.add(key)
        return path

    def path(self, line: Line) -> Path:
        return self.work / UNITS / line.file

    def _append(self, line: bytes) -> None:
        with (self.work / LINES).open("ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    def _read_lines(self) -> dict[str, Line]:
        path = self.work / LINES
        content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:  # a torn last line: cut it off, so that the next one starts cleanly
            with path.open("r+b") as file:
                file.truncate(len(whole))
        lines = {}
        for number, text in enumerate(whole.splitlines(), 1):
            try:
                values = json.loads(text)
                if values.pop("line_sha256") != _line_sha256(values):
                    raise ValueError("isn't what was committed")
                line = Line.from_json(values)
                if Path(line.file).name != line.file:
                    raise ValueError("names a file elsewhere")
                lines[line.key] = line
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise ResumeError(
                    f"line {number} is damaged", where=LINES, hint=AGAIN, data={"reason": "damaged", "line": number}
                ) from error
        return lines


def _read_run(work: Path) -> dict[str, Any]:
    """What the interrupted run was. raises ResumeError for what no run wrote"""
    try:
        stored = json.loads((work / RUN).read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ResumeError(
            f"is damaged ({error})", where=RUN, hint=AGAIN, data={"reason": "damaged", "cause": str(error)}
        ) from error
    except OSError as error:
        raise ResumeError(
            f"can't be read ({error.strerror})",
            where=RUN,
            hint=AGAIN,
            data={"reason": "not-read", "cause": error.strerror},
        ) from error
    if not isinstance(stored, dict):
        raise ResumeError("is damaged (not a JSON object)", where=RUN, hint=AGAIN, data={"reason": "damaged"})
    return stored


def _line_sha256(line: dict[str, Any]) -> str:
    """The hash of a line's values, as they are when JSON is read again: there a key is text, and sorted as such."""
    values = json.loads(json.dumps(line))
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def has_begun(work: Path) -> bool:
    """Whether a work directory has anything to resume: before run.json is there, nothing is committed."""
    return (work / RUN).exists()


def remove_work(work: Path) -> None:
    """Delete a work directory that a journal of ours made.

    raises UsageError if it holds anything else, or a run is using it
    """
    if work.is_symlink() or not work.is_dir():
        raise UsageError("is not a work directory of this tool", where=str(work), hint="Move it away first.")
    ours = {RUN, LINES, LOCK, UNITS, "artifact", "scratch"} if has_begun(work) else {UNITS, Path(RUN).stem + ".tmp"}
    foreign = sorted({path.name for path in work.iterdir()} - ours) + _links(work)
    if foreign:
        raise UsageError(
            f"holds things this tool did not write ({', '.join(foreign[:3])})",
            where=str(work),
            hint="Move them away first.",
            data={"reason": "foreign-files", "names": foreign[:3]},
        )
    if (work / LOCK).exists():
        with _open_lock(work) as lock:
            _lock(lock, work)
    for path in sorted(work.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    work.rmdir()


def _links(work: Path) -> list[str]:
    """What is neither a folder nor a regular file; a journal makes no such, and a link may lead anywhere."""
    return sorted(
        path.relative_to(work).as_posix()
        for path in work.rglob("*")
        if not (stat.S_ISREG(path.lstat().st_mode) or stat.S_ISDIR(path.lstat().st_mode))
    )


def _open_lock(work: Path) -> TextIO:
    """The lock's file, made if need be; a link in its place is not followed, and nothing is cut off.

    raises UsageError for what can't be opened, such as a folder
    """
    try:
        handle = os.open(work / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        if error.errno in FULL:
            raise
        raise UsageError(
            f"can't be opened ({error.strerror})",
            where=f"{work.name}/{LOCK}",
            hint="Move the work directory away.",
            data={"reason": "not-opened", "cause": error.strerror},
        ) from error
    return os.fdopen(handle, "w")


def _lock(file: TextIO, work: Path) -> None:
    """raises UsageError while another process holds it"""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise UsageError(
            "another run is using this work directory", where=work.name, data={"reason": "in-use"}
        ) from error


def _write_durably(path: Path, content: bytes) -> None:
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _sync_directory(path.parent)


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
