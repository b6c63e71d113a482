"""Checks the texts and labels in the rows of a source. A value that is not one is refused by its row."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

from compressor.data.settings import LABEL, Wanted
from compressor.errors import RecipeError

FOUND = {
    str: "text",
    type(None): "null",
    bool: "a truth value",
    int: "a number",
    float: "a number",
    dict: "an object",
    list: "a list",
    bytes: "bytes",
}


@dataclass(frozen=True)
class Rows:
    """The rows of a source, unchanged.

    values  one entry per document: a text, a chat (list of messages), or a value that `texts_of` refuses
    labels  one per document; None if there are none
    sha256  of the file, or of a data set's texts
    field   the column of the values
    tools   one entry per chat: the functions that it may call, or None; None if there are none
    is_whole_text  the one document is a whole text file and may be divided anywhere
    """

    values: list[Any]
    labels: list[Any] | None
    sha256: str
    name: str
    field: str
    tools: list[Any] | None = None
    is_whole_text: bool = False


def whole_labels(labels: list[Any], name: str) -> list[int]:
    """Labels as class numbers. raises RecipeError with the first row without an integer from 0 on"""
    numbers = []
    for row, label in enumerate(labels, 1):
        is_number = isinstance(label, (int, float)) and not isinstance(label, bool)
        if not is_number or (isinstance(label, float) and not label.is_integer()):
            found = "no label" if label is None else f"the label {label!r:.60}"
            raise RecipeError(
                f"has {found}: a label is missing or not a whole number",
                where=f"{name}, row {row}",
                hint=f"Write a class number (0, 1, ...) into {LABEL!r} of every row, or remove that column.",
                data={"reason": "no-whole-label", "label": None if label is None else f"{label!r:.60}"},
            )
        if not 0 <= label < 2**31:
            raise RecipeError(
                f"has the label {int(label)}; class numbers are 0 to {2**31 - 1}",
                where=f"{name}, row {row}",
                hint="Remove this row if it has no class, or write its class number.",
                data={"reason": "label-out-of-range", "label": int(label)},
            )
        numbers.append(int(label))
    return numbers


def text_of(value: Any, field: str, name: str, row: int) -> str:
    where = f"{name}, row {row}"
    if not isinstance(value, str):
        found = FOUND.get(type(value), type(value).__name__)
        hint = "Remove the rows without text." if value is None else "Set `field` to a column that contains text."
        values = {"reason": "no-text", "found": found, "field": field}
        raise RecipeError(f"has {found} in {field!r}, not text", where=where, hint=hint, data=values)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RecipeError(
            f"has half a surrogate pair in {field!r} (character {error.start + 1})",
            where=where,
            hint="Write the whole character, or remove the row.",
            data={"reason": "half-pair", "field": field, "character": error.start + 1},
        ) from error
    return value


def no_field(wanted: Wanted, keys: list[Any], where: str, what: str, known: str) -> RecipeError:
    names = [str(key) for key in keys]
    near = list(dict.fromkeys(name for field in wanted.fields for name in difflib.get_close_matches(field, names, 1)))
    listed = ", ".join(names[:20]) + (" ..." if len(names) > 20 else "")
    hint = f"Did you mean {near[0]!r}?" if near else f"{known}: {listed[:400] or 'none'}. Name one with `field`."
    values = {"field": wanted.fields[0], "known": names[:20], "near": near}
    asked = " or ".join(map(repr, wanted.fields))
    return RecipeError(f"{what} {asked}", where=where, hint=hint, data={"reason": "no-field", **values})


def two_columns(column: str, name: str) -> RecipeError:
    values = {"reason": "two-columns", "column": column}
    return RecipeError(
        f"has two columns {column!r}", where=name, hint="Rename one of the two columns in the file.", data=values
    )
