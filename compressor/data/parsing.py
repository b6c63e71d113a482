"""Parses one data file (JSON, CSV, Parquet, Arrow or plain text) into the columns of its rows.

Rows are read unchanged: no other value is converted to text, and no row is left out. A value that can't be read is a
`RecipeError` that names the file and the row. Any exception of a library for a damaged file becomes one too.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from dataclasses import dataclass
from typing import Any

from compressor.data.chats import chat_of, without_nulls
from compressor.data.files import ARROW, CSV, JSON_LINES, PARQUET, check_size, load_package, reading
from compressor.data.rows import no_field, two_columns
from compressor.data.settings import LABEL, Wanted
from compressor.errors import RecipeError

MARKS = (  # the mark of UTF-32 begins with that of UTF-16
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
ROW_BYTES = 64  # smallest memory of a row as a Python string
NUMBER = re.compile(r"[+-]?[0-9]{1,15}(\.0*)?")


@dataclass(frozen=True)
class Parsed:
    """values: the column `field`; beside: the other columns of those that were wanted, by name."""

    field: str
    values: list[Any]
    beside: dict[str, list[Any]]


def parse(kind: str, content: bytes, wanted: Wanted, name: str, is_truncated: bool) -> Parsed:
    """The columns of a file's content. is_truncated: the content is a beginning, so the last row may be incomplete."""
    if kind in (*PARQUET, *ARROW):
        with reading(name):
            file = load_package("pyarrow").BufferReader(content)
            return _from_arrow(*open_arrow(kind, file, wanted, name), wanted, name)
    text = _decode(content, name, is_truncated)
    if not text.strip() and not is_truncated:
        raise RecipeError("is empty", where=name, hint="Name a file with text or rows.", data={"reason": "empty"})
    if kind in CSV:
        return _from_csv(text, CSV[kind], wanted, name, is_truncated)
    if kind in JSON_LINES:
        lines = text.split("\n")
        return _from_objects(_json_lines(lines[:-1] if is_truncated else lines, name), wanted, name)
    if kind == ".json":
        return _from_json(text, wanted, name)
    return Parsed(wanted.fields[0], [text.replace("\r\n", "\n")], {})


def _decode(content: bytes, name: str, is_truncated: bool) -> str:
    mark, encoding = next(((mark, found) for mark, found in MARKS if content.startswith(mark)), (b"", "utf-8"))
    try:
        text = codecs.getincrementaldecoder(encoding)().decode(content[len(mark) :], final=not is_truncated)
    except UnicodeDecodeError as error:
        at = error.start + len(mark)
        raise RecipeError(
            f"is not {encoding.upper()} (byte {at})",
            where=name,
            hint=f"Convert it to UTF-8, for example with iconv -f ENCODING -t UTF-8 {name}.",
            data={"reason": "bad-encoding", "encoding": encoding, "byte": at},
        ) from error
    if (at := text.find("\0")) >= 0:
        line = text.count("\n", 0, at) + 1
        raise RecipeError(
            f"contains a null character (line {line})",
            where=name,
            hint="Use a text file; if it is UTF-16 without a byte order mark, convert it: iconv -f UTF-16LE -t UTF-8.",
            data={"reason": "null-character", "line": line},
        )
    return text


def _json_lines(lines: list[str], name: str) -> list[dict[str, Any]]:
    """Objects of lines. Lines end only at a line feed, since a text may contain other line separators."""
    found = []
    for number, line in enumerate(lines, 1):
        if line.strip(" \t\r"):
            row = _load_json(line, f"{name}:{number}")
            if not isinstance(row, dict):
                raise RecipeError(
                    "is not a JSON object",
                    where=f"{name}:{number}",
                    hint='Write one object per line, such as {"text": "..."}.',
                    data={"reason": "no-object"},
                )
            found.append(row)
    return found


def _load_json(text: str, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_without_repeated_keys)
    except (ValueError, RecursionError) as error:
        repeated = {"repeated": error.key} if isinstance(error, _RepeatedKey) else {}
        raise RecipeError(
            f"is not JSON ({str(error)[:160]})",
            where=where,
            hint="Correct the file at that place, or export it again.",
            data={"reason": "bad-json", "cause": str(error)[:160], **repeated},
        ) from error


class _RepeatedKey(ValueError):
    """A key that appears twice in one object."""

    def __init__(self, key: str) -> None:
        super().__init__(f"the key {key!r} comes twice in one object")
        self.key = key


def _without_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        seen: set[str] = set()
        repeated = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _RepeatedKey(repeated)
    return row


def _from_json(text: str, wanted: Wanted, name: str) -> Parsed:
    """An array of rows, {"data": rows}, an object of columns, one row, or lines of objects."""
    lines = text.split("\n")
    if text.lstrip().startswith("{") and sum(bool(line.strip(" \t\r")) for line in lines) > 1:
        try:
            json.loads(text)
        except (ValueError, RecursionError) as error:
            if getattr(error, "msg", "") == "Extra data":
                return _from_objects(_json_lines(lines, name), wanted, name)
    tree = _load_json(text, name)
    if isinstance(tree, dict) and wanted.field_in(list(tree)) is None and isinstance(tree.get("data"), list):
        tree = tree["data"]
    if isinstance(tree, list):
        for number, row in enumerate(tree, 1):
            if not isinstance(row, dict):
                raise RecipeError(
                    "is not a JSON object",
                    where=f"{name}, row {number}",
                    hint='Write the rows as objects, such as [{"text": "..."}, ...].',
                    data={"reason": "no-object"},
                )
        return _from_objects(tree, wanted, name)
    if not isinstance(tree, dict):
        raise RecipeError(
            "contains no rows",
            where=name,
            hint='Write an array of objects ([{"text": "..."}]) or an object of columns ({"text": ["..."]}).',
            data={"reason": "no-rows"},
        )
    field = wanted.field_in(list(tree))
    values = tree.get(field)
    if field is None or not isinstance(values, list) or (values and chat_of(values) is not None):
        return _from_objects([tree], wanted, name)
    beside = {column: tree[column] for column in wanted.beside if tree.get(column) is not None}
    for column, found in beside.items():
        if not isinstance(found, list) or len(found) != len(values):
            raise RecipeError(
                f"the columns {field!r} and {column!r} have different lengths",
                where=name,
                hint=f"Give every row an entry in {column!r}, or remove that column if it isn't needed.",
                data={"reason": "unequal-columns", "columns": [field, column]},
            )
    return Parsed(field, values, beside)


def _from_objects(rows: list[dict[str, Any]], wanted: Wanted, name: str) -> Parsed:
    """The columns of rows. Every row must have the field that the first row has."""
    field = (wanted.field_in(list(rows[0])) if rows else None) or wanted.fields[0]
    for number, row in enumerate(rows, 1):
        if field not in row:
            expected = wanted if number == 1 else Wanted((field,), wanted.beside)
            what = "has no chat in" if wanted.is_chat else "has no text in"
            raise no_field(expected, list(row), f"{name}, row {number}", what, "Keys")
    beside = {
        column: [row.get(column) for row in rows] for column in wanted.beside if any(column in row for row in rows)
    }
    return Parsed(field, [row[field] for row in rows], beside)


def _from_csv(text: str, delimiter: str, wanted: Wanted, name: str, is_truncated: bool) -> Parsed:
    header: list[str] | None = None
    field, values, place = wanted.fields[0], [], 0
    beside: dict[str, list[Any]] = {}
    for line, row in _csv_rows(text, delimiter, name, is_truncated):
        if header is None:
            header = [name.strip() for name in row]  # `text, label`
            field = field_of(header, wanted, name)
            place, beside = header.index(field), {column: [] for column in wanted.beside if column in header}
            continue
        if len(row) != len(header):
            raise RecipeError(
                f"has {len(row)} fields, the header has {len(header)}",
                where=f"{name}:{line}",
                hint='Put "..." around texts that contain the separator or a line break.',
                data={"fields": len(row), "header": len(header)},
            )
        values.append(row[place])
        for column, found in beside.items():
            entry = row[header.index(column)]
            found.append(_number(entry) if column == LABEL else entry)
    return Parsed(field, values, beside)


def _csv_rows(text: str, delimiter: str, name: str, is_truncated: bool) -> list[tuple[int, list[str]]]:
    """(line of its end, fields) of each row that is not blank. A text may have any length and contain line breaks."""
    rows: list[tuple[int, list[str]]] = []
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    before = csv.field_size_limit(len(text) + 1)
    try:
        rows += ((reader.line_num, row) for row in reader if row)
    except csv.Error as error:
        if not is_truncated or reader.line_num < text.count("\n"):  # else the content ends inside a quoted text
            raise RecipeError(
                f"is not valid CSV ({error})",
                where=f"{name}:{reader.line_num}",
                hint="Look for a quote that is not closed in this line and those before it.",
                data={"reason": "bad-csv", "cause": str(error)},
            ) from error
    finally:
        csv.field_size_limit(before)
    return rows[:-1] if is_truncated else rows


def _number(text: str) -> Any:
    """A CSV label: an integer as int. Other values stay text and are refused where labels are used."""
    return int(float(text)) if NUMBER.fullmatch(text.strip()) else text or None


def field_of(names: list[str], wanted: Wanted, name: str) -> str:
    """The column of documents among columns. raises RecipeError if there is none, and if a name is there twice"""
    field = wanted.field_in(names)
    if field is None:
        raise no_field(wanted, names, name, "has no column", "Columns")
    if twice := [column for column in (field, *wanted.beside) if names.count(column) > 1]:
        raise two_columns(twice[0], name)
    return field


def open_arrow(kind: str, file: Any, wanted: Wanted, name: str) -> tuple[Any, str]:
    """(an open Parquet or Arrow file, the column of documents that its header has). `_from_arrow` reads it."""
    if kind in PARQUET:
        opened = load_package("pyarrow.parquet").ParquetFile(file)
        names = opened.schema_arrow.names
    else:
        ipc = load_package("pyarrow.ipc")
        first = file.read(6)
        file.seek(0)
        if first.startswith(b"FEA1"):
            opened = load_package("pyarrow.feather").read_table(file)
            names = opened.column_names
        else:
            opened = ipc.open_file(file) if first == b"ARROW1" else ipc.open_stream(file)
            names = opened.schema.names
    return opened, field_of(names, wanted, name)


def _from_arrow(opened: Any, field: str, wanted: Wanted, name: str) -> Parsed:
    columns = [field, *(column for column in wanted.beside if column != field)]
    if hasattr(opened, "schema_arrow"):
        metadata = opened.metadata
        check_size(metadata.num_rows * ROW_BYTES, name)
        size = 0
        for group in range(metadata.num_row_groups):
            for number in range(metadata.num_columns):
                column = metadata.row_group(group).column(number)
                top = column.path_in_schema.partition(".")[0]
                size += column.total_uncompressed_size if top in columns else 0
        check_size(size, name)
        table = opened.read(columns=[column for column in columns if column in opened.schema_arrow.names])
    else:
        table = opened.read_all() if hasattr(opened, "read_all") else opened
    table.validate(full=True)
    return columns_of_arrow(table, field, wanted)


def columns_of_arrow(table: Any, field: str, wanted: Wanted) -> Parsed:
    """The columns of a pyarrow table. Its columns of objects hold null for a key that only other rows have."""
    found = {column: table.column(column).to_pylist() for column in wanted.beside if column in table.column_names}
    values = table.column(field).to_pylist()
    if wanted.is_chat:
        return Parsed(field, without_nulls(values), without_nulls(found))
    return Parsed(field, values, found)
