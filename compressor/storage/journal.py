"""Records durably which parts of a run are done. Each part is one commit: temporary file, sync, rename, one line.

The journal knows nothing about models. Its state is valid at every moment: a file is valid once its line is appended,
an incomplete last line is ignored, and a file without a line is written again. A line contains its own hash, so a
changed line is found when the journal is opened again.
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

RUN, LINES, LOCK, PARTS = "run.json", "journal.jsonl", "lock", "parts"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
AGAIN = "Begin again with --fresh, which deletes the finished parts."


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
    """A work directory. Open it with `create` or `reopen`, and close it to release the lock."""

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
        """A new journal. raises UsageError if the directory can't be written, PassError if the disk is full"""
        try:
            (work / PARTS).mkdir(parents=True)
            _write_durably(work / RUN, json.dumps(fingerprint, indent=1, sort_keys=True).encode())
            return cls(work)
        except OSError as error:
            if work.is_dir() and not has_begun(work):
                remove_work(work)
            if error.errno in FULL:
                raise disk_full(work, None) from error
            raise UsageError(
                f"the work directory can't be made ({error.strerror})",
                where=str(work),
                hint="Pass --output in a directory that you may write to.",
                data={"reason": "not-made", "cause": error.strerror},
            ) from error

    @classmethod
    def reopen(cls, work: Path, fingerprint: Mapping[str, object]) -> Journal:
        """Continue a journal. raises ResumeError naming what differs from the interrupted run, or the damaged file"""
        if not has_begun(work):
            raise ResumeError(
                "there is no interrupted run to resume",
                where=work.name,
                hint="Run the same command without --resume.",
                data={"reason": "no-interrupted-run"},
            )
        if links := _links(work):
            raise ResumeError(
                f"contains a link, a pipe or another special file, which no run creates ({links[0]})",
                where=work.name,
                hint="Move this file to another directory, then begin again with --fresh.",
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
                hint="Use the values of the interrupted run again, or begin again with --fresh.",
                data={
                    "reason": "differs",
                    "was": {name: stored.get(name) for name in differing},
                    "is": {name: fingerprint.get(name) for name in differing},
                },
            )
        try:
            (work / PARTS).mkdir(exist_ok=True)
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
        """The line of a committed part. raises ResumeError if its file was changed since"""
        line = self.lines.get(key)
        if line is not None and key not in self._checked:
            path = self.path(line)
            if not path.is_file() or file_sha256(path) != line.sha256:
                raise ResumeError(
                    "this stored part is missing, or was changed after the run wrote it",
                    where=line.file,
                    hint=AGAIN,
                    data={"reason": "part-changed"},
                )
            self._checked.add(key)
        return line

    def commit(self, key: str, file: str, write: Callable[[Path], None], facts: Mapping[str, Any]) -> Path:
        """Store one part durably and return its path.

        write   writes the whole content to the path in its argument
        facts   JSON values, stored in the part's line
        raises  PassError if the disk is full; earlier commits stay
        """
        path = self.work / PARTS / file
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
                f"can't be written ({error.strerror})",
                where=file,
                hint="Correct the permissions or the disk, then continue with --resume.",
                data={"reason": "not-written", "cause": error.strerror},
            ) from error
        self.lines[key] = line
        self._checked.add(key)
        return path

    def path(self, line: Line) -> Path:
        return self.work / PARTS / line.file

    def _append(self, line: bytes) -> None:
        with (self.work / LINES).open("ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    def _read_lines(self) -> dict[str, Line]:
        path = self.work / LINES
        content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:  # an incomplete last line: remove it before the next one
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
    """The fingerprint of the interrupted run. raises ResumeError for a file that no run wrote"""
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
    """The hash of a line's values as they are after reading the JSON, where every key is text and sorted as text."""
    values = json.loads(json.dumps(line))
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def has_begun(work: Path) -> bool:
    """Whether a work directory can be resumed. Without run.json there is no commit."""
    return (work / RUN).exists()


def remove_work(work: Path) -> None:
    """Delete a work directory that a journal made.

    raises  UsageError if it contains other files, or if a run is using it
    """
    if work.is_symlink() or not work.is_dir():
        raise UsageError(
            "is not a work directory of compress-model",
            where=str(work),
            hint="Move or rename it, then run the command again.",
        )
    ours = {RUN, LINES, LOCK, PARTS, "artifact", "scratch"} if has_begun(work) else {PARTS, Path(RUN).stem + ".tmp"}
    foreign = sorted({path.name for path in work.iterdir()} - ours) + _links(work)
    if foreign:
        raise UsageError(
            f"contains files that compress-model did not write ({', '.join(foreign[:3])})",
            where=str(work),
            hint="Move these files to another directory, then run the command again.",
            data={"reason": "foreign-files", "names": foreign[:3]},
        )
    if (work / LOCK).exists():
        with _open_lock(work) as lock:
            _lock(lock, work)
    for path in sorted(work.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    work.rmdir()


def _links(work: Path) -> list[str]:
    """Entries that are neither folders nor regular files. A journal creates none, and a link may lead anywhere."""
    return sorted(
        path.relative_to(work).as_posix()
        for path in work.rglob("*")
        if not (stat.S_ISREG(path.lstat().st_mode) or stat.S_ISDIR(path.lstat().st_mode))
    )


def _open_lock(work: Path) -> TextIO:
    """The lock file, created if it is missing. A link in its place is not followed, and a file is not truncated.

    raises  UsageError if it can't be opened, such as a folder
    """
    try:
        handle = os.open(work / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        if error.errno in FULL:
            raise
        raise UsageError(
            f"can't be opened ({error.strerror})",
            where=f"{work.name}/{LOCK}",
            hint="Move or rename the work directory, then run the command again.",
            data={"reason": "not-opened", "cause": error.strerror},
        ) from error
    return os.fdopen(handle, "w")


def _lock(file: TextIO, work: Path) -> None:
    """raises UsageError while another process has the lock"""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise UsageError(
            "another run is using this work directory",
            where=work.name,
            hint="Wait until it ends or stop it, or pass another --output.",
            data={"reason": "in-use"},
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
