"""Rows of data files and data sets: which kind a source is, and its texts and labels as they are found there.

A file's kind follows from its ending, in any case, after an ending of compression is taken off (`train.jsonl.gz`).
An ending that says nothing of data (.md, .py, none) is plain text, one document. Endings of other formats are refused.

Rows are read as they are: nothing is turned into text that isn't, and no row is left out. What can't be read is a
`RecipeError` that names the file and the row; whatever exception a library makes of a damaged file becomes one too.
Only regular files are opened: a FIFO, device or socket would block for ever.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import difflib
import gzip
import hashlib
import importlib
import io
import json
import lzma
import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import psutil
import yaml

from compressor.data.rows import LABEL, Rows, chat_of, text_of
from compressor.errors import CompressError, DependencyError, RecipeError

JSON_LINES, CSV, ARROW = (".jsonl", ".ndjson"), {".csv": ",", ".tsv": "\t"}, (".arrow", ".feather", ".ipc")
PARQUET = (".parquet", ".pq")
UNPACKERS: dict[str, Callable[[Any], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
CODECS = {".zst": "zstd", ".lz4": "lz4"}  # those of pyarrow
COMPRESSED = (*UNPACKERS, *CODECS)
KNOWN = (
    "text, .jsonl, .ndjson, .json, .csv, .tsv, .parquet, .arrow, .feather, .npz; also with .gz, .bz2, .xz, .zst, .lz4"
)
# formats that hold no plain text, or that are no data; so that they are refused by name and not as bad UTF-8
# fmt: off
OTHER_FORMATS = {
    ".7z", ".avi", ".avro", ".bin", ".bmp", ".db", ".doc", ".docx", ".egg", ".exe", ".gguf", ".gif", ".h5", ".hdf5",
    ".ico", ".jar", ".jpeg", ".jpg", ".lzma", ".mat", ".mdb", ".mov", ".mp3", ".mp4", ".msgpack", ".npy", ".o", ".odt",
    ".onnx", ".orc", ".pdf", ".pickle", ".pkl", ".png", ".ppt", ".pptx", ".pt", ".pth", ".pyc", ".rar", ".rtf",
    ".safetensors", ".snappy", ".so", ".sqlite", ".sqlite3", ".tar", ".tfrecord", ".tgz", ".tiff", ".wav", ".webp",
    ".whl", ".xls", ".xlsx", ".z", ".zip",
}
# fmt: on
MARKS = (  # the mark of UTF-32 begins with that of UTF-16
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
HEAD_BYTES = 1 << 20  # what `plan` looks at of a file
MOST_FILES = 100_000  # in the folder of a data set
CARD = "README.md"
NAMING = ("splits", "filename", "data_files", "data_dir")  # keys of what describes a data set
ROW_BYTES = 64  # least memory that a row takes as a Python string
NUMBER = re.compile(r"[+-]?[0-9]{1,15}(\.0*)?")


class Columns(Protocol):
    """Which of a source's rows and columns are wanted: part of `data.Settings`."""

    @property
    def source(self) -> str: ...
    @property
    def config(self) -> str | None: ...
    @property
    def split(self) -> str: ...
    @property
    def field(self) -> str: ...


def read_rows(settings: Columns) -> Rows:
    """All rows of a file or data set. raises RecipeError, DependencyError for a missing package"""
    if is_dataset(settings.source):
        return _read_dataset(settings)
    path = find_file(settings.source)
    kind, packed = kind_of(path)
    content = read_regular(path)
    plain = _decompressed(path, packed, content, None) if packed else content
    values, labels = _parsed(kind, plain, settings.field, path.name, False)
    if not values:
        reason = "no-rows" if kind else "empty"
        raise RecipeError("holds no rows" if kind else "is empty", where=path.name, data={"reason": reason})
    return Rows(values, labels, hashlib.sha256(content).hexdigest(), path.name, is_whole_text=not kind)


def check_rows(settings: Columns) -> None:
    """The cheap part of `read_rows`: that the source is there, of a known kind, and its first rows hold the field.

    A data set by name is not looked up, because that may download it. raises as `read_rows` does
    """
    if is_dataset(settings.source):
        _package("datasets")
        if _folder_of(settings.source) is not None:
            _columns_of(_open_dataset(settings), settings.field, settings.source)
        return
    path = find_file(settings.source)
    kind, packed = kind_of(path)
    size = path.stat().st_size
    if kind in (*PARQUET, *ARROW) and not packed:
        with reading(path.name):
            file = _package("pyarrow").memory_map(str(path))
            _check_arrow(kind, file, settings.field, path.name)
        return
    if packed:
        plain = _decompressed(path, packed, read_regular(path), HEAD_BYTES)
        is_cut = len(plain) >= HEAD_BYTES
    else:
        plain, is_cut = read_regular(path, HEAD_BYTES), size > HEAD_BYTES
    if is_cut and kind in (".json", *PARQUET, *ARROW):
        return  # can't be read in part
    values, _ = _parsed(kind, plain, settings.field, path.name, is_cut)
    for number, value in enumerate(values, 1):
        if chat_of(value) is None:
            text_of(value, settings.field, path.name, number)


def is_dataset(source: str) -> bool:
    """Whether a source is read through `datasets`: a folder, or dataset:NAME."""
    return source.startswith("dataset:") or _folder_of(source) is not None


def find_file(source: str) -> Path:
    """The regular file that a source names. raises RecipeError"""
    path, mode = _look(source)
    if mode is None:
        raise RecipeError(
            "is a link that leads nowhere" if path.is_symlink() else "no such data file",
            where=source,
            hint="Built in: stdlib, random. Else a path or dataset:NAME.",
            data={"reason": "broken-link" if path.is_symlink() else "no-such-file"},
        )
    _check_regular(mode, source)
    return path


def kind_of(path: Path) -> tuple[str, str]:
    """(ending that says the kind, or "" for plain text; ending of compression or ""). raises RecipeError"""
    endings = [ending.lower() for ending in path.suffixes]
    packed = endings.pop() if endings and endings[-1] in COMPRESSED else ""
    kind = endings[-1] if endings else ""
    if kind in OTHER_FORMATS or kind in COMPRESSED or (kind == ".npz" and packed):
        raise RecipeError(
            f"files that end in {kind} are not read",
            where=path.name,
            hint=f"Kinds that are: {KNOWN}; or a folder.",
            data={"reason": "other-format", "ending": kind},
        )
    known = kind in (*JSON_LINES, ".json", *CSV, *PARQUET, *ARROW)
    return (kind if known else ""), packed


def read_regular(path: Path, most: int | None = None) -> bytes:
    """A file's bytes. raises RecipeError if it is no regular file, can't be read, or is larger than memory allows"""
    try:
        found = path.stat()
        _check_regular(found.st_mode, path.name)
        check_size(found.st_size if most is None else min(most, found.st_size), path.name)
        with path.open("rb") as file:
            return file.read() if most is None else file.read(most)
    except OSError as error:
        raise RecipeError(
            f"can't be read ({error.strerror})",
            where=path.name,
            hint="Check its permissions.",
            data={"reason": "not-read", "cause": error.strerror},
        ) from error


def check_size(size: int, name: str) -> None:
    """raises RecipeError for data of so many bytes that reading them would fill the memory"""
    most = memory_share()
    if size > most:
        raise RecipeError(
            f"holds {size} bytes of data, and {most} can be held in memory here",
            where=name,
            hint="Give a part of it: a few thousand documents are enough.",
            data={"size": size, "limit": most},
        )


def memory_share() -> int:
    """Bytes of data that may be read: as text and as tokens they take several times as much."""
    return psutil.virtual_memory().available // 4


def _look(source: str) -> tuple[Path, int | None]:
    """The path of a source and the mode of what lies there, through links; None for nothing."""
    path = Path(os.path.expanduser(source))
    try:
        return path, path.stat().st_mode
    except FileNotFoundError:
        return path, None
    except (OSError, ValueError) as error:  # no permission, a loop of links, a name too long, a null character
        why = getattr(error, "strerror", None) or str(error)
        raise RecipeError(
            f"can't be looked up ({why})",
            where=source[:200],
            hint="Give another path.",
            data={"reason": "not-looked-up", "cause": why},
        ) from error


def _folder_of(source: str) -> Path | None:
    path, mode = _look(source.removeprefix("dataset:"))
    return path if mode is not None and stat.S_ISDIR(mode) else None


def _check_regular(mode: int, where: str) -> None:
    if stat.S_ISREG(mode):
        return
    kinds = ((stat.S_ISDIR, "folder"), (stat.S_ISFIFO, "FIFO"), (stat.S_ISSOCK, "socket"))
    kind = next((name for is_kind, name in kinds if is_kind(mode)), "device")
    raise RecipeError(
        f"is a {kind}, not a file",
        where=where,
        hint="Save the data to a file first.",
        data={"reason": "no-regular-file", "kind": kind},
    )


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Whatever a library raises of a damaged file is the file's fault. raises RecipeError, DependencyError"""
    try:
        yield
    except CompressError:
        raise
    except ImportError as error:
        raise DependencyError(
            f"needs a package that is not installed ({error})", where=name, hint="Install it with pip."
        ) from error
    except Exception as error:  # the readers of many formats, each with exceptions of its own; EOFError among them
        said = " ".join(str(error).split())[:200]
        raise RecipeError(
            f"can't be read ({type(error).__name__}{': ' if said else ''}{said})",
            where=name,
            hint="Check that the file is complete and of the kind that its name says.",
            data={"reason": "not-read", "error": type(error).__name__, "cause": said},
        ) from error


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise DependencyError(f"needs the package {package}", where="data", hint="pip install datasets") from error


def _decompressed(path: Path, ending: str, content: bytes, most: int | None) -> bytes:
    """What a compressed file holds, or its first `most` bytes."""
    limit = memory_share() if most is None else most
    with reading(path.name):
        packed = io.BytesIO(content)
        file: Any
        if ending in UNPACKERS:
            file = UNPACKERS[ending](packed)
        else:
            file = _package("pyarrow").CompressedInputStream(packed, CODECS[ending])
        parts, size = [], 0
        while part := file.read(min(1 << 20, limit + 1 - size)):
            parts.append(part)
            size += len(part)
            if most is not None and size >= most:
                break
            check_size(size, path.name)
    return b"".join(parts)[:most]


def _parsed(kind: str, content: bytes, field: str, name: str, is_cut: bool) -> tuple[list[Any], list[Any] | None]:
    """(values, labels) of a file's content; is_cut: more of it follows, so that the last row may be a part."""
    if kind in (*PARQUET, *ARROW):
        with reading(name):
            file = _package("pyarrow").BufferReader(content)
            return _from_arrow(_check_arrow(kind, file, field, name), field, name)
    text = _decode(content, name, is_cut)
    if not text.strip() and not is_cut:
        raise RecipeError("is empty", where=name, data={"reason": "empty"})
    if kind in CSV:
        return _from_csv(text, CSV[kind], field, name, is_cut)
    if kind in JSON_LINES:
        lines = text.split("\n")
        return _from_objects(_json_lines(lines[:-1] if is_cut else lines, name), field, name)
    if kind == ".json":
        return _from_json(text, field, name)
    return [text.replace("\r\n", "\n")], None


def _decode(content: bytes, name: str, is_cut: bool) -> str:
    mark, encoding = next(((mark, found) for mark, found in MARKS if content.startswith(mark)), (b"", "utf-8"))
    try:
        text = codecs.getincrementaldecoder(encoding)().decode(content[len(mark) :], final=not is_cut)
    except UnicodeDecodeError as error:
        at = error.start + len(mark)
        raise RecipeError(
            f"is not {encoding.upper()} (byte {at})",
            where=name,
            hint="Save it as UTF-8.",
            data={"reason": "bad-encoding", "encoding": encoding, "byte": at},
        ) from error
    if (at := text.find("\0")) >= 0:
        line = text.count("\n", 0, at) + 1
        raise RecipeError(
            f"holds a null character (line {line})",
            where=name,
            hint="It isn't text, or is UTF-16 without a byte order mark; save it as UTF-8.",
            data={"reason": "null-character", "line": line},
        )
    return text


def _json_lines(lines: list[str], name: str) -> list[dict[str, Any]]:
    """Lines end at a line feed only: a text may hold other line separators."""
    found = []
    for number, line in enumerate(lines, 1):
        if line.strip(" \t\r"):
            row = _load_json(line, f"{name}:{number}")
            if not isinstance(row, dict):
                raise RecipeError(
                    "is not a JSON object",
                    where=f"{name}:{number}",
                    hint="Each line is one object.",
                    data={"reason": "no-object"},
                )
            found.append(row)
    return found


def _load_json(text: str, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_without_twins)
    except (ValueError, RecursionError) as error:
        twin = {"twin": error.key} if isinstance(error, _TwinKey) else {}
        raise RecipeError(
            f"is not JSON ({str(error)[:160]})",
            where=where,
            hint="Correct it there.",
            data={"reason": "bad-json", "cause": str(error)[:160], **twin},
        ) from error


class _TwinKey(ValueError):
    """A key that comes twice in one object."""

    def __init__(self, key: str) -> None:
        super().__init__(f"the key {key!r} comes twice in one object")
        self.key = key


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        seen: set[str] = set()
        twin = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _TwinKey(twin)
    return row


def _from_json(text: str, field: str, name: str) -> tuple[list[Any], list[Any] | None]:
    """An array of rows, {"data": rows}, an object of columns, one row, or lines of objects."""
    lines = text.split("\n")
    if text.lstrip().startswith("{") and sum(bool(line.strip(" \t\r")) for line in lines) > 1:
        try:
            json.loads(text)
        except (ValueError, RecursionError) as error:
            if getattr(error, "msg", "") == "Extra data":
                return _from_objects(_json_lines(lines, name), field, name)
    tree = _load_json(text, name)
    if isinstance(tree, dict) and field not in tree and isinstance(tree.get("data"), list):
        tree = tree["data"]
    if isinstance(tree, list):
        for number, row in enumerate(tree, 1):
            if not isinstance(row, dict):
                raise RecipeError(
                    "is not a JSON object",
                    where=f"{name}, row {number}",
                    hint="Each row is one object.",
                    data={"reason": "no-object"},
                )
        return _from_objects(tree, field, name)
    if not isinstance(tree, dict):
        raise RecipeError(
            "holds no rows",
            where=name,
            hint="Give an array of objects, or an object of columns.",
            data={"reason": "no-rows"},
        )
    values = tree.get(field)
    if not isinstance(values, list) or (values and chat_of(values) is not None):
        return _from_objects([tree], field, name)
    labels = tree.get(LABEL)
    if labels is not None and (not isinstance(labels, list) or len(labels) != len(values)):
        raise RecipeError(
            f"the columns {field!r} and {LABEL!r} differ in length",
            where=name,
            hint="Give each row one value of both.",
            data={"reason": "unequal-columns", "columns": [field, LABEL]},
        )
    return values, labels


def _from_objects(rows: list[dict[str, Any]], field: str, name: str) -> tuple[list[Any], list[Any] | None]:
    for number, row in enumerate(rows, 1):
        if field not in row:
            raise _no_field(field, list(row), f"{name}, row {number}", "has no text in", "Keys")
    labels = [row.get(LABEL) for row in rows] if any(LABEL in row for row in rows) else None
    return [row[field] for row in rows], labels


def _from_csv(text: str, delimiter: str, field: str, name: str, is_cut: bool) -> tuple[list[Any], list[Any] | None]:
    values: list[Any] = []
    labels: list[Any] = []
    header: list[str] | None = None
    place = label = 0
    for line, row in _csv_rows(text, delimiter, name, is_cut):
        if header is None:
            header = [name.strip() for name in row]  # `text, label`
            if header.count(field) != 1:
                raise (
                    _no_field(field, header, name, "has no column", "Columns")
                    if field not in header
                    else _two_columns(field, name)
                )
            if header.count(LABEL) > 1:
                raise _two_columns(LABEL, name)
            place, label = header.index(field), header.index(LABEL) if LABEL in header else -1
            continue
        if len(row) != len(header):
            raise RecipeError(
                f"has {len(row)} fields, the header has {len(header)}",
                where=f"{name}:{line}",
                hint="Quote texts that hold the separator or a line break.",
                data={"fields": len(row), "header": len(header)},
            )
        values.append(row[place])
        if label >= 0:
            labels.append(_number(row[label]))
    return values, labels if label >= 0 else None


def _csv_rows(text: str, delimiter: str, name: str, is_cut: bool) -> list[tuple[int, list[str]]]:
    """(line it ends on, fields) of each row that isn't blank. A text may be of any length and hold line breaks."""
    rows: list[tuple[int, list[str]]] = []
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    before = csv.field_size_limit(len(text) + 1)
    try:
        rows += ((reader.line_num, row) for row in reader if row)
    except csv.Error as error:
        if not is_cut or reader.line_num < text.count("\n"):  # else the cut went through a quoted text
            raise RecipeError(
                f"is no CSV ({error})",
                where=f"{name}:{reader.line_num}",
                hint="Check the quotes there and before.",
                data={"reason": "bad-csv", "cause": str(error)},
            ) from error
    finally:
        csv.field_size_limit(before)
    return rows[:-1] if is_cut else rows


def _number(text: str) -> Any:
    """A CSV label: a whole number as int; else as it is, to be refused where labels are used."""
    return int(float(text)) if NUMBER.fullmatch(text.strip()) else text or None


def _check_arrow(kind: str, file: Any, field: str, name: str) -> Any:
    """Open a Parquet or Arrow file and see from its header that it has the field; returns what `_from_arrow` reads."""
    if kind in PARQUET:
        opened = _package("pyarrow.parquet").ParquetFile(file)
        names = opened.schema_arrow.names
    else:
        ipc = _package("pyarrow.ipc")
        first = file.read(6)
        file.seek(0)
        if first.startswith(b"FEA1"):
            opened = _package("pyarrow.feather").read_table(file)
            names = opened.column_names
        else:
            opened = ipc.open_file(file) if first == b"ARROW1" else ipc.open_stream(file)
            names = opened.schema.names
    if field not in names:
        raise _no_field(field, names, name, "has no column", "Columns")
    if twice := [column for column in (field, LABEL) if names.count(column) > 1]:
        raise _two_columns(twice[0], name)
    return opened


def _from_arrow(opened: Any, field: str, name: str) -> tuple[list[Any], list[Any] | None]:
    if hasattr(opened, "schema_arrow"):
        metadata, wanted = opened.metadata, [field, LABEL]
        check_size(metadata.num_rows * ROW_BYTES, name)
        size = 0
        for group in range(metadata.num_row_groups):
            for number in range(metadata.num_columns):
                column = metadata.row_group(group).column(number)
                top = column.path_in_schema.partition(".")[0]
                size += column.total_uncompressed_size if top in wanted else 0
        check_size(size, name)
        table = opened.read(columns=[column for column in wanted if column in opened.schema_arrow.names])
    else:
        table = opened.read_all() if hasattr(opened, "read_all") else opened
    table.validate(full=True)
    names = table.column_names
    return table.column(field).to_pylist(), table.column(LABEL).to_pylist() if LABEL in names else None


def _read_dataset(settings: Columns) -> Rows:
    table = _open_dataset(settings)
    columns = _columns_of(table, settings.field, settings.source)
    with reading(settings.source):
        chosen = table.select_columns(columns).with_format("arrow")[:]
        chosen.validate(full=True)
        values = chosen.column(settings.field).to_pylist()
        labels = chosen.column(LABEL).to_pylist() if LABEL in columns else None
    if not values:
        raise RecipeError("holds no rows", where=settings.source, data={"reason": "no-rows"})
    is_text = all(isinstance(value, str) for value in values)
    content = "\0".join(values) if is_text else json.dumps(values, sort_keys=True, default=repr)
    return Rows(values, labels, hashlib.sha256(content.encode()).hexdigest(), settings.source)


def _columns_of(table: Any, field: str, source: str) -> list[str]:
    """The columns to read. raises RecipeError if the field is none of them"""
    names = list(table.column_names)
    if field not in names:
        raise _no_field(field, names, source, "has no column", "Columns")
    return [field, LABEL] if LABEL in names and field != LABEL else [field]


def _open_dataset(settings: Columns) -> Any:
    datasets = _package("datasets")
    folder = _folder_of(settings.source)
    if folder is not None:
        _check_folder(folder, settings.source)
        _check_named(folder, settings.source)
    name = settings.source.removeprefix("dataset:") if folder is None else str(folder)
    with reading(settings.source):
        if folder is not None and (folder / "dataset_dict.json").is_file():
            splits = datasets.load_from_disk(name)
            if settings.split not in splits:
                known = ", ".join(splits)
                raise RecipeError(
                    f"has no split {settings.split!r}",
                    where=settings.source,
                    hint=f"It has: {known or 'none'}.",
                    data={"split": settings.split, "known": list(splits)},
                )
            return splits[settings.split]
        if folder is not None and (folder / "state.json").is_file():
            return datasets.load_from_disk(name)
        return datasets.load_dataset(name, settings.config, split=settings.split)


def _check_folder(folder: Path, source: str) -> None:
    """raises RecipeError if anything in it, also through links, is no regular file or folder"""
    seen: set[tuple[int, int]] = set()
    open_, count = [folder], 0
    while open_:
        here = open_.pop()
        try:
            for entry in os.scandir(here):
                count += 1
                found = os.stat(entry.path)
                if not stat.S_ISDIR(found.st_mode):
                    _check_regular(found.st_mode, os.path.join(source, os.path.relpath(entry.path, folder)))
                elif (found.st_dev, found.st_ino) not in seen:
                    seen.add((found.st_dev, found.st_ino))
                    open_.append(Path(entry.path))
        except OSError as error:
            raise RecipeError(
                f"holds {os.path.basename(error.filename or here)!r}, which can't be looked up ({error.strerror})",
                where=source,
                hint="Remove it, or check its permissions.",
            ) from error
        if count > MOST_FILES:
            raise RecipeError(f"holds more than {MOST_FILES} files", where=source, hint="Give a smaller folder.")


def _check_named(folder: Path, source: str) -> None:
    """raises RecipeError if what describes a data set names files that lie elsewhere than in its folder"""
    described_by = [folder / CARD, *folder.rglob("state.json"), *folder.rglob("dataset_dict.json")]
    for path in (path for path in described_by if path.is_file()):
        at = os.path.join(source, path.relative_to(folder).as_posix())
        with reading(at):
            text = path.read_text(encoding="utf-8")
            if path.name == CARD:
                parts = re.split(r"^---[ \t]*$", text, maxsplit=2, flags=re.M)
                described = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0].strip() else {}
            else:
                described = json.loads(text)
        for name in _named_files(described):
            if "://" in name or os.path.isabs(name) or ".." in Path(name).parts:
                raise RecipeError(
                    f"names {name!r}, which lies outside of the data set's folder",
                    where=at,
                    hint="Keep all files of a data set in one folder.",
                    data={"reason": "leads-out", "name": name},
                )


def _named_files(value: Any, is_named: bool = False) -> Iterator[str]:
    """What stands under `splits`, `filename`, `data_files` or `data_dir`, at any depth."""
    if isinstance(value, str) and is_named:
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _named_files(item, is_named)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _named_files(item, key in NAMING or (is_named and key != "split"))


def _no_field(field: str, keys: list[Any], where: str, what: str, known: str) -> RecipeError:
    names = [str(key) for key in keys]
    near = difflib.get_close_matches(field, names, 1)
    listed = ", ".join(names[:20]) + (" ..." if len(names) > 20 else "")
    hint = f"Did you mean {near[0]!r}?" if near else f"{known}: {listed[:400] or 'none'}. Name one with `field`."
    values = {"field": field, "known": names[:20], "near": near}
    return RecipeError(f"{what} {field!r}", where=where, hint=hint, data={"reason": "no-field", **values})


def _two_columns(column: str, name: str) -> RecipeError:
    values = {"reason": "two-columns", "column": column}
    return RecipeError(f"has two columns {column!r}", where=name, hint="Rename one of them.", data=values)
