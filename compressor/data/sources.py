"""Reads the rows of a source: a data file or a data set."""

from __future__ import annotations

import hashlib

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
from compressor.data.parsing import open_arrow, parse
from compressor.data.rows import Rows, chat_of, text_of
from compressor.data.settings import Columns
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
    values, labels = parse(kind, plain, settings.field, path.name, False)
    if not values:
        reason = "no-rows" if kind else "empty"
        raise RecipeError("contains no rows" if kind else "is empty", where=path.name, data={"reason": reason})
    return Rows(values, labels, hashlib.sha256(content).hexdigest(), path.name, is_whole_text=not kind)


def check_rows(settings: Columns) -> None:
    """The cheap checks of `read_rows`: the source is there and of a known kind, and its first rows have the field.

    A data set by name is not looked up, because that may download it. raises as `read_rows` does
    """
    if is_dataset(settings.source):
        load_package("datasets")
        if folder_of(settings.source) is not None:
            columns_of(open_dataset(settings), settings.field, settings.source)
        return
    path = find_file(settings.source)
    kind, packed = kind_of(path)
    size = path.stat().st_size
    if kind in (*PARQUET, *ARROW) and not packed:
        with reading(path.name):
            file = load_package("pyarrow").memory_map(str(path))
            open_arrow(kind, file, settings.field, path.name)
        return
    if packed:
        plain = decompressed(path, packed, read_regular(path), HEAD_BYTES)
        is_cut = len(plain) >= HEAD_BYTES
    else:
        plain, is_cut = read_regular(path, HEAD_BYTES), size > HEAD_BYTES
    if is_cut and kind in (".json", *PARQUET, *ARROW):
        return  # it can't be read in part
    values, _ = parse(kind, plain, settings.field, path.name, is_cut)
    for number, value in enumerate(values, 1):
        if chat_of(value) is None:
            text_of(value, settings.field, path.name, number)


def is_dataset(source: str) -> bool:
    """Whether a source is read through `datasets`: a folder, or dataset:NAME."""
    return source.startswith("dataset:") or folder_of(source) is not None
