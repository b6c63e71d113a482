"""Reads the rows of a source: a data file or a data set."""

from __future__ import annotations

import hashlib

from compressor.data.chats import check_values
from compressor.data.data_sets import columns_of, open_dataset, read_dataset
from compressor.data.files import (
    ARROW,
    PARQUET,
    decompressed,
    find_file,
    folder_of,
    kind_of,
    load_package,
    read_regular,
    reading,
)
from compressor.data.parsing import Parsed, open_arrow, parse
from compressor.data.rows import Rows
from compressor.data.settings import LABEL, TOOLS, Columns, wanted_of
from compressor.errors import RecipeError

HEAD_BYTES = 1 << 20  # bytes of a file that `plan` reads


def read_rows(settings: Columns) -> Rows:
    """All rows of a file or data set. raises RecipeError, DependencyError for a missing package"""
    if is_dataset(settings.source):
        return read_dataset(settings)
    path = find_file(settings.source)
    kind, packed = kind_of(path)
    content = read_regular(path)
    plain = decompressed(path, packed, content, None) if packed else content
    parsed = parse(kind, plain, wanted_of(settings), path.name, False)
    if not parsed.values:
        reason = "no-rows" if kind else "empty"
        raise RecipeError(
            "contains no rows" if kind else "is empty",
            where=path.name,
            hint="Name a file with text or rows.",
            data={"reason": reason},
        )
    return _rows(parsed, hashlib.sha256(content).hexdigest(), path.name, is_whole_text=not kind)


def _rows(parsed: Parsed, digest: str, name: str, *, is_whole_text: bool) -> Rows:
    labels, tools = parsed.beside.get(LABEL), parsed.beside.get(TOOLS)
    return Rows(parsed.values, labels, digest, name, parsed.field, tools, is_whole_text)


def check_rows(settings: Columns) -> Rows | None:
    """The cheap checks of `read_rows`: the source is there and of a known kind, and its first rows have the field.

    A data set by name is not looked up, because that may download it.

    returns  the first rows, without a hash; None for a source that can't be read in part
    raises   as `read_rows` does
    """
    wanted = wanted_of(settings)
    if is_dataset(settings.source):
        load_package("datasets")
        if folder_of(settings.source) is not None:
            columns_of(open_dataset(settings), wanted, settings.source)
        return None
    path = find_file(settings.source)
    kind, packed = kind_of(path)
    size = path.stat().st_size
    if kind in (*PARQUET, *ARROW) and not packed:
        with reading(path.name):
            file = load_package("pyarrow").memory_map(str(path))
            open_arrow(kind, file, wanted, path.name)
        return None
    if packed:
        plain = decompressed(path, packed, read_regular(path), HEAD_BYTES)
        is_truncated = len(plain) >= HEAD_BYTES
    else:
        plain, is_truncated = read_regular(path, HEAD_BYTES), size > HEAD_BYTES
    if is_truncated and kind in (".json", *PARQUET, *ARROW):
        return None
    rows = _rows(parse(kind, plain, wanted, path.name, is_truncated), "", path.name, is_whole_text=not kind)
    check_values(rows, is_chat=wanted.is_chat)
    return rows


def is_dataset(source: str) -> bool:
    """Whether a source is read through `datasets`: a folder, or dataset:NAME."""
    return source.startswith("dataset:") or folder_of(source) is not None
