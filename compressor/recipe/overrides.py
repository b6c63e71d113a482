"""Changes of a recipe's settings from the command line: `--set`, and flags that stand for a setting."""

from __future__ import annotations

import re
from typing import Any

from compressor.errors import RecipeError
from compressor.process.utf8 import is_utf8, printable
from compressor.recipe.schema import SECTIONS
from compressor.recipe.yaml_source import Path as KeyPath
from compressor.recipe.yaml_source import Source, dotted, read_yaml


def apply_override(source: Source, override: str) -> None:
    """One `a.b.0.c=VALUE` of --set; VALUE is YAML."""
    key, equals, text = override.partition("=")
    place = f"--set {override}"
    if not is_utf8(override):
        raise RecipeError(
            "holds bytes that are not UTF-8",
            where=printable(place),
            hint="Give the value as UTF-8.",
            data={"reason": "not-utf-8"},
        )
    if not equals or not key:
        raise RecipeError(
            "KEY=VALUE is needed",
            where=place,
            hint="For example --set steps.0.bits=3",
            data={"reason": "no-key-and-value"},
        )
    path: KeyPath = tuple(int(part) if re.fullmatch(r"[0-9]{1,6}", part) else part for part in key.split("."))
    put_value(source, path, read_yaml(text.encode(), place).value if text.strip() else None, place)


def put_value(source: Source, path: KeyPath, value: Any, place: str) -> None:
    """Put a value where `path` leads. The path must lead through the recipe; only the last key may be new."""
    if path[0] == "steps" and (len(path) < 3 or path[2:] == ("sweep",) or (path[2] == "sweep" and len(path) < 5)):
        raise RecipeError(
            "--set changes a step's settings, never the steps",
            where=place,
            hint="For example --set steps.0.bits=3",
            data={"reason": "changes-steps"},
        )
    node = source.value
    for depth, part in enumerate(path[:-1]):
        if isinstance(node, dict) and part not in node and depth == 0 and part in SECTIONS:
            node[part] = {}
        if isinstance(node, dict) and depth == 1 and path[:2] in (("eval", "data"), ("eval", "gates")):
            node.setdefault(part, {})
        try:
            node = node[part]
        except (KeyError, IndexError, TypeError):
            raise RecipeError(
                f"{dotted(path[: depth + 1])!r} is not in the recipe",
                where=place,
                hint="--set never creates a step.",
                data={"reason": "not-in-recipe", "key": dotted(path[: depth + 1])},
            ) from None
    last = path[-1]
    if isinstance(node, list):
        if not isinstance(last, int) or last >= len(node):
            raise RecipeError(f"the list has {len(node)} entries", where=place, hint="Give the whole list instead.")
        node[last] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise RecipeError(f"{dotted(path[:-1])!r} holds a plain value", where=place)
    for known in [p for p in source.positions if p[: len(path)] == path]:
        del source.positions[known]
    source.positions[path] = place
