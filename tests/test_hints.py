"""Every error that a user can act on names the next action."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import compressor
from compressor import errors
from compressor.errors import CompressError, ShapeError
from compressor.recipe.json_schema import recipe_json_schema

PACKAGE = Path(compressor.__file__).parent
KINDS = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, CompressError)}


def made_without_hint(text):
    """Class and line of each error that is made in this source without a hint."""
    found = []
    for node in ast.walk(ast.parse(text)):
        kind = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else None
        if kind in KINDS:
            hints = [keyword.value for keyword in node.keywords if keyword.arg == "hint"]
            if not hints or (isinstance(hints[0], ast.Constant) and not hints[0].value):
                found.append((kind, node.lineno))
    return found


def test_a_missing_hint_is_found():
    text = 'raise UsageError("a")\nraise UsageError("b", hint=None)\nraise UsageError("c", hint="Do this.")\n'
    assert made_without_hint(text) == [("UsageError", 1), ("UsageError", 2)]


def test_every_error_has_a_hint():
    """Operand checks of kernels alone have none: a call of a kernel is code, and the error names what it expects."""
    found = [
        f"{path.relative_to(PACKAGE)}:{line}: {kind}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for kind, line in made_without_hint(path.read_text())
        if not (kind == ShapeError.__name__ and path.is_relative_to(PACKAGE / "kernels"))
    ]
    assert found == []


def test_a_hint_about_a_setting_names_one_that_is_there():
    """Hints of passes, of their mathematics and of the analysis: what stands in backquotes is a key of a recipe."""
    keys = set(re.findall(r'"([a-z_]+)": ', json.dumps(recipe_json_schema())))
    found = {}
    for package in ("passes", "methods", "analysis"):
        for path in sorted((PACKAGE / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.keyword) and node.arg == "hint":
                    for name in re.findall(r"`(\w+)", ast.unparse(node.value)):
                        found.setdefault(name, []).append(f"{path.name}:{node.value.lineno}")
    assert "sites" in found and "prunables" not in keys
    assert {name: places for name, places in found.items() if name not in keys} == {}
