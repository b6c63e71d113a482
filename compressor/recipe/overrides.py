"""Changes a recipe's settings from the command line: by `--set`, and by options for a single setting."""

from __future__ import annotations

import re
from typing import Any

from compressor.errors import RecipeError
from compressor.process.utf8 import is_utf8, printable
from compressor.recipe.schema import SECTIONS
from compressor.recipe.yaml_source import Path as KeyPath
from compressor.recipe.yaml_source import Source, dotted, read_yaml


def apply_override(source: Source, override: str) -> None:
    """Apply one `a.b.0.c=VALUE` of --set. VALUE is YAML."""
    key, equals, text = override.partition("=")
    place = f"--set {override}"
    if not is_utf8(override):
        raise RecipeError(
            "contains bytes that are not UTF-8",
            where=printable(place),
            hint="Write the value in UTF-8; `locale` shows the encoding of this terminal.",
            data={"reason": "not-utf-8"},
        )
    if not equals or not key:
        raise RecipeError(
            "it does not have the form KEY=VALUE",
            where=place,
            hint="Write it as in --set steps.0.bits=3.",
            data={"reason": "no-key-and-value"},
        )
    path: KeyPath = tuple(int(part) if re.fullmatch(r"[0-9]{1,6}", part) else part for part in key.split("."))
    put_value(source, path, read_yaml(text.encode(), place).value if text.strip() else None, place)


def put_value(source: Source, path: KeyPath, value: Any, place: str) -> None:
    """Set the value at `path`. All keys of the path except the last must be in the recipe."""
    if path[0] == "steps" and (len(path) < 3 or path[2:] == ("sweep",) or (path[2] == "sweep" and len(path) < 5)):
        raise RecipeError(
            "--set can change the settings of a step, but not the steps",
            where=place,
            hint="Edit the recipe file to change the steps; a setting is changed as in --set steps.0.bits=3.",
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
                hint="Check the number of the step with compress-model plan, or add the step to the recipe file.",
                data={"reason": "not-in-recipe", "key": dotted(path[: depth + 1])},
            ) from None
    last = path[-1]
    if isinstance(node, list):
        if not isinstance(last, int) or last >= len(node):
            hint = f"Set the whole list, as in --set {dotted(path[:-1])}=[...]."
            raise RecipeError(
                f"the list has {len(node)} entries",
                where=place,
                hint=hint,
                data={"reason": "no-entry", "entries": len(node)},
            )
        node[last] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise RecipeError(
            f"{dotted(path[:-1])!r} is a plain value, not a map or a list",
            where=place,
            hint=f"Set the value itself, as in --set {dotted(path[:-1])}=VALUE.",
            data={"reason": "plain-value", "key": dotted(path[:-1])},
        )
    for known in [p for p in source.positions if p[: len(path)] == path]:
        del source.positions[known]
    source.positions[path] = place
