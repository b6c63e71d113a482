"""Defines as protocols the settings of a recipe's `data` section that reading data needs, and what they ask for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

LABEL = "label"  # the column of class numbers
TOOLS = "tools"  # the column of the functions that a chat may call
TEXT_FIELD = "text"  # the value of `field` that is not set
CHAT_FIELDS = ("messages", "conversations")  # what data sets of chats call their column


class Columns(Protocol):
    """The rows and columns to read from a source: part of `data.Settings`."""

    @property
    def source(self) -> str: ...
    @property
    def format(self) -> str: ...
    @property
    def config(self) -> str | None: ...
    @property
    def split(self) -> str: ...
    @property
    def field(self) -> str: ...


class Settings(Columns, Protocol):
    """The `data` section of a recipe (`recipe.DataSettings`)."""

    @property
    def samples(self) -> int: ...
    @property
    def length(self) -> int: ...
    @property
    def pack(self) -> bool: ...
    @property
    def sha256(self) -> str | None: ...


@dataclass(frozen=True)
class Wanted:
    """The columns to read.

    fields  names for the column of documents; the first that the source has is read
    beside  columns that are read where the source has them
    """

    fields: tuple[str, ...]
    beside: tuple[str, ...]

    def field_in(self, names: Sequence[str]) -> str | None:
        return next((field for field in self.fields if field in names), None)

    @property
    def is_chat(self) -> bool:
        return TOOLS in self.beside


def wanted_of(settings: Columns) -> Wanted:
    if settings.format != "chat":
        return Wanted((settings.field,), (LABEL,))
    fields = (*CHAT_FIELDS, TEXT_FIELD) if settings.field == TEXT_FIELD else (settings.field,)
    return Wanted(fields, (LABEL, TOOLS))
