"""Turns the rows of a source into texts and labels. A value that is not a text or class number is refused by its row.

A chat is a list of messages, objects with `role` and `content`. The model's own chat template turns it into text.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from compressor.errors import RecipeError

LABEL = "label"  # the column of class numbers
FOUND = {
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
    """values  one entry per document, unchanged: a text, a chat (list of messages), or a value that `texts_of` refuses
    labels  one per document, unchanged; None if there are none
    sha256  of the file, or of a data set's texts
    is_whole_text  the one document is a whole text file and may be divided anywhere
    """

    values: list[Any]
    labels: list[Any] | None
    sha256: str
    name: str
    is_whole_text: bool = False


def texts_of(rows: Rows, field: str, render: Callable[[list[dict[str, Any]]], Any] | None) -> tuple[list[str], bool]:
    """(texts, whether they are rendered chats).

    render  turns a chat into text by the model's chat template; None if it has none
    raises  RecipeError with the row whose value is not a text
    """
    is_chat = bool(rows.values) and chat_of(rows.values[0]) is not None
    if not is_chat:
        return [text_of(value, field, rows.name, number) for number, value in enumerate(rows.values, 1)], False
    texts = []
    for number, value in enumerate(rows.values, 1):
        messages = _messages(value, field, rows.name, number)
        if render is None:
            raise RecipeError(
                f"contains chat messages in {field!r}, and the model's tokenizer has no chat template",
                where=rows.name,
                hint="Set `field` to a column of text, or copy chat_template.jinja beside the model's config.json.",
                data={"reason": "no-chat-template", "field": field},
            )
        try:
            text = render(messages)
        except Exception as error:  # any exception of the model's own template for these messages
            raise RecipeError(
                f"the model's chat template refuses it ({type(error).__name__}: {str(error)[:160]})",
                where=f"{rows.name}, row {number}",
                hint="Remove or correct this row, or set `field` to a column of text.",
                data={"reason": "chat-refused", "error": type(error).__name__, "cause": str(error)[:160]},
            ) from error
        texts.append(text_of(text, field, rows.name, number))
    return texts, True


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


def chat_of(value: Any) -> list[Any] | None:
    """The chat in a value: a list of objects. Old data sets store it as an object of lists."""
    if isinstance(value, list) and value and all(isinstance(message, dict) for message in value):
        return value
    if isinstance(value, dict) and {"role", "content"} <= value.keys():
        columns = {key: column for key, column in value.items() if isinstance(column, list)}
        if {"role", "content"} <= columns.keys() and len({len(column) for column in columns.values()}) == 1:
            return [dict(zip(columns, message, strict=True)) for message in zip(*columns.values(), strict=True)] or None
    return None


def _messages(value: Any, field: str, name: str, row: int) -> list[dict[str, Any]]:
    where = f"{name}, row {row}"
    found = chat_of(value)
    if found is None:
        raise RecipeError(
            f"has no chat in {field!r}, while row 1 has one",
            where=where,
            hint="Remove this row, or write its chat as a list of objects with `role` and `content`.",
            data={"reason": "no-chat", "field": field},
        )
    messages = []
    for number, message in enumerate(found, 1):
        told = {key: part for key, part in message.items() if part is not None}  # None: a column of other rows
        for key in ("role", "content"):
            if not isinstance(told.get(key), str):
                raise RecipeError(
                    f"message {number} in {field!r} has no text in {key!r}",
                    where=where,
                    hint=f"Write a text into {key!r} of this message, or remove the row.",
                    data={"reason": "no-message-text", "message": number, "field": field, "key": key},
                )
            text_of(told[key], f"{field}.{key}", name, row)
        messages.append(told)
    return messages


def no_field(field: str, keys: list[Any], where: str, what: str, known: str) -> RecipeError:
    names = [str(key) for key in keys]
    near = difflib.get_close_matches(field, names, 1)
    listed = ", ".join(names[:20]) + (" ..." if len(names) > 20 else "")
    hint = f"Did you mean {near[0]!r}?" if near else f"{known}: {listed[:400] or 'none'}. Name one with `field`."
    values = {"field": field, "known": names[:20], "near": near}
    return RecipeError(f"{what} {field!r}", where=where, hint=hint, data={"reason": "no-field", **values})


def two_columns(column: str, name: str) -> RecipeError:
    values = {"reason": "two-columns", "column": column}
    return RecipeError(
        f"has two columns {column!r}", where=name, hint="Rename one of the two columns in the file.", data=values
    )
