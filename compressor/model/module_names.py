"""Compares and renumbers names of modules and parameters."""

from __future__ import annotations


def is_inside(name: str, module: str) -> bool:
    """Whether `name` is that of the module, or of a module or parameter inside it."""
    return name == module or name.startswith(module + ".")


def renumbered(name: str, old: str, new: str) -> str:
    """The same name in another block: the prefix `old` becomes `new`. Other names stay."""
    return new + name.removeprefix(old) if name.startswith(old) else name
