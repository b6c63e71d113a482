"""Defines as protocols the settings of a recipe's `data` section that reading data needs."""

from __future__ import annotations

from typing import Protocol


class Columns(Protocol):
    """The rows and columns to read from a source: part of `data.Settings`."""

    @property
    def source(self) -> str: ...
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
