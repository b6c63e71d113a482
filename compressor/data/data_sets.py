"""Reads data sets with `datasets`: by name, or from a folder that names no file outside of it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from compressor.data.files import check_regular, folder_of, load_package, reading
from compressor.data.parsing import columns_of_arrow
from compressor.data.rows import Rows, no_field
from compressor.data.settings import LABEL, TOOLS, Columns, Wanted, wanted_of
from compressor.errors import RecipeError

MOST_FILES = 100_000  # in the folder of a data set
CARD = "README.md"
NAMING = ("splits", "filename", "data_files", "data_dir")  # keys in the description of a data set that name files


def read_dataset(settings: Columns) -> Rows:
    wanted = wanted_of(settings)
    table = open_dataset(settings)
    field, columns = columns_of(table, wanted, settings.source)
    with reading(settings.source):
        chosen = table.select_columns(columns).with_format("arrow")[:]
        chosen.validate(full=True)
        parsed = columns_of_arrow(chosen, field, wanted)
    values, tools = parsed.values, parsed.beside.get(TOOLS)
    if not values:
        raise RecipeError(
            "contains no rows", where=settings.source, hint="Name a split that has rows.", data={"reason": "no-rows"}
        )
    is_text = all(isinstance(value, str) for value in values)
    hashed = values if tools is None else [values, tools]
    content = "\0".join(values) if is_text and tools is None else json.dumps(hashed, sort_keys=True, default=repr)
    digest = hashlib.sha256(content.encode()).hexdigest()
    return Rows(values, parsed.beside.get(LABEL), digest, settings.source, field, tools)


def columns_of(table: Any, wanted: Wanted, source: str) -> tuple[str, list[str]]:
    """(the column of documents, the columns to read). raises RecipeError if the data set lacks the first"""
    names = list(table.column_names)
    field = wanted.field_in(names)
    if field is None:
        raise no_field(wanted, names, source, "has no column", "Columns")
    return field, list(dict.fromkeys([field, *(column for column in wanted.beside if column in names)]))


def open_dataset(settings: Columns) -> Any:
    datasets = load_package("datasets")
    folder = folder_of(settings.source)
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
                    hint=f"Set split to one of: {known}."
                    if known
                    else "Choose another data set: this one has no splits.",
                    data={"split": settings.split, "known": list(splits)},
                )
            return splits[settings.split]
        if folder is not None and (folder / "state.json").is_file():
            return datasets.load_from_disk(name)
        return datasets.load_dataset(name, settings.config, split=settings.split)


def _check_folder(folder: Path, source: str) -> None:
    """raises RecipeError if an entry of it, also through links, is neither a regular file nor a folder"""
    seen: set[tuple[int, int]] = set()
    open_, count = [folder], 0
    while open_:
        here = open_.pop()
        try:
            for entry in os.scandir(here):
                count += 1
                found = os.stat(entry.path)
                if not stat.S_ISDIR(found.st_mode):
                    check_regular(found.st_mode, os.path.join(source, os.path.relpath(entry.path, folder)))
                elif (found.st_dev, found.st_ino) not in seen:
                    seen.add((found.st_dev, found.st_ino))
                    open_.append(Path(entry.path))
        except OSError as error:
            raise RecipeError(
                f"contains {os.path.basename(error.filename or here)!r}, which can't be accessed ({error.strerror})",
                where=source,
                hint="Give yourself read permission for it (chmod), or move it out of the folder.",
                data={"reason": "not-read", "cause": error.strerror},
            ) from error
        if count > MOST_FILES:
            raise RecipeError(
                f"contains more than {MOST_FILES} files",
                where=source,
                hint="Copy the files that are needed to a folder of their own and name that one.",
                data={"reason": "too-many-files", "limit": MOST_FILES},
            )


def _check_named(folder: Path, source: str) -> None:
    """raises RecipeError if the description of a data set names files outside of its folder"""
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
                    f"names the file {name!r} outside of the data set's folder",
                    where=at,
                    hint="Save the data set again with save_to_disk, or move the file into the folder.",
                    data={"reason": "leads-out", "name": name},
                )


def _named_files(value: Any, is_named: bool = False) -> Iterator[str]:
    """The values of `splits`, `filename`, `data_files` or `data_dir`, at any depth."""
    if isinstance(value, str) and is_named:
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _named_files(item, is_named)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _named_files(item, key in NAMING or (is_named and key != "split"))
