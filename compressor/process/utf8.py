"""Checks that text can be written as UTF-8, which every file and library of a run needs.

Python stores bytes of a name that are not UTF-8 as lone halves of surrogate pairs, and an escape such as `\\ud800` in
JSON or YAML makes one too. Such a text fails only when it is written, so it is refused when it is read.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from typing import Any

from compressor.errors import UsageError

SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")  # without one, JSON in UTF-8 contains no surrogate


def is_utf8(text: str) -> bool:
    """Whether a text can be written."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def printable(text: str) -> str:
    """The text with `\\xff` in place of a byte and `\\ud800` in place of half a pair that can't be written."""
    bytes_shown = re.sub("[\udc80-\udcff]", lambda found: f"\\x{ord(found[0]) - 0xDC00:02x}", text)
    return bytes_shown.encode(errors="backslashreplace").decode()


def check_utf8(name: str | os.PathLike[str], hint: str) -> None:
    """raises UsageError for a file name, or another text of the user, that can't be written"""
    text = os.fspath(name)
    if not is_utf8(text):
        raise UsageError(
            "contains bytes that are not UTF-8", where=printable(text), hint=hint, data={"reason": "not-utf-8"}
        )


class HalfPair(ValueError):
    """A string of a JSON file contains half of a surrogate pair, shown as `half`."""

    def __init__(self, half: str) -> None:
        super().__init__(f"a string contains {half}, half of a surrogate pair")
        self.half = half


def halves(error: BaseException) -> dict[str, str]:
    """The half of a pair that `parse_json` found, if that was the error, for the error's data."""
    return {"half": error.half} if isinstance(error, HalfPair) else {}


def parse_json(text: str | bytes, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """`json.loads` for a file from anywhere.

    pairs   makes the value of an object, in place of a dict
    raises  ValueError, also for a string with half a surrogate pair; RecursionError for very deep nesting
    """
    whole = text.decode("utf-8") if isinstance(text, bytes) else text
    value = json.loads(whole, object_pairs_hook=pairs)
    if SURROGATE_ESCAPE.search(whole):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise HalfPair(printable(error.object[error.start])) from error
    return value
