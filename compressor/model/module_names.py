"""Names of modules and parameters: what lies inside a module, and the same name in another block."""

from __future__ import annotations


def is_inside(name: str, module: str) -> bool:
    """Whether `name` is that of the module itself, or of something in it."""
    return name == module or name.startswith(module + ".")


def renumbered(name: str, old: str, new: str) -> str:
    """The same name in another block: `old` in front of it becomes `new`; any other name stays."""
    return new + name.removeprefix(old) if name.startswith(old) else name
