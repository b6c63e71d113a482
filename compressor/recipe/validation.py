"""Checks settings by their class, and reports every problem with its place in the recipe."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from compressor.errors import RecipeError
from compressor.recipe.yaml_source import Path as KeyPath
from compressor.recipe.yaml_source import Source


def validated(model: type[BaseModel], value: Any, source: Source, path: KeyPath) -> Any:
    if not isinstance(value, dict):
        raise RecipeError(
            f"a map of settings is needed, {value!r} was found",
            where=source.where(path),
            hint="Write settings as `name: value`, one a line.",
            data={"reason": "no-map", "found": repr(value)[:120]},
        )
    if (stray := _stray_boolean(model, value)) is not None:
        raise RecipeError(
            "true or false where something else is needed",
            where=source.where((*path, *stray)),
            hint=f"Write a value of the type that docs/settings.md gives for {(*path, *stray)[-1]}.",
            data={"reason": "stray-boolean"},
        )
    try:
        return model.model_validate(value)
    except ValidationError as failure:
        problems = [_problem(error, model, source, path) for error in failure.errors()]
        first, *others = {str(problem): problem for problem in problems}.values()
        rest = "".join(f"\n  also {problem}" for problem in others)
        also = {"also": [{"where": problem.where, **problem.data} for problem in others]} if others else {}
        raise RecipeError(
            first.what + rest,
            where=first.where,
            hint=first.hint if not rest else "Correct these settings; docs/settings.md has the type and range of each.",
            data={**first.data, **also},
        ) from failure


def _problem(error: ErrorDetails, model: type[BaseModel], source: Source, path: KeyPath) -> RecipeError:
    """The error for one problem of pydantic, with its place in the recipe."""
    location = tuple(part for part in error["loc"] if isinstance(part, (str, int)))
    at = _known_path(source.value, (*path, *location))
    if error["type"] == "extra_forbidden":
        return _unknown_key(location[-1], _known_keys(model, location), source.where(at))
    found = f", found {error['input']!r}"[:120] if not isinstance(error["input"], dict) else ""
    return RecipeError(
        error["msg"].removeprefix("Value error, ") + found,
        where=source.where(at),
        hint="Correct this value; docs/settings.md has the type and range of each setting.",
        data=_values_of(error),
    )


def _values_of(error: ErrorDetails) -> dict[str, Any]:
    """The values of a problem of pydantic, by name. Its kind is the reason, and the given value is text."""
    reported = {key: value for key, value in error.get("ctx", {}).items() if isinstance(value, (str, int, float, list))}
    found = {"found": repr(error["input"])[:120]} if not isinstance(error["input"], dict) else {}
    return {"reason": error["type"].replace("_", "-"), **found, **reported}


def _stray_boolean(model: type[BaseModel], value: dict[Any, Any]) -> KeyPath | None:
    """The place of a boolean in a field of another type. pydantic would read it as 0 or 1."""
    for name, field in model.model_fields.items():
        key = field.alias or name
        found = value.get(key)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            inner = _stray_boolean(field.annotation, found) if isinstance(found, dict) else None
            if inner is not None:
                return (key, *inner)
        elif bool not in set(_leaf_types(field.annotation)):
            members = found.items() if isinstance(found, dict) else enumerate(found) if isinstance(found, list) else ()
            places = [(key,)] if isinstance(found, bool) else [(key, at) for at, v in members if isinstance(v, bool)]
            if places:
                return places[0]
    return None


def _leaf_types(annotation: Any) -> Iterable[Any]:
    """The types that a value of this annotation may have: those in unions and containers, and those of literals."""
    members = get_args(annotation)
    if not members:
        yield annotation if isinstance(annotation, type) else type(annotation)
    for member in members:
        yield from _leaf_types(member)


def _known_path(tree: Any, path: KeyPath) -> KeyPath:
    """The longest prefix of a pydantic location that is in the recipe (union branches are not)."""
    known: KeyPath = ()
    for part in path:
        try:
            tree = tree[part]
        except (KeyError, IndexError, TypeError):
            return (*known, part) if isinstance(part, str) and part.isidentifier() and not known else known
        known = (*known, part)
    return known


def _known_keys(model: type[BaseModel], location: KeyPath) -> list[str]:
    for part in location[:-1]:
        field = model.model_fields.get(str(part))
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            break
        model = field.annotation
    return [field.alias or name for name, field in model.model_fields.items()]


def _unknown_key(key: Any, known: list[str], where: str) -> RecipeError:
    near = difflib.get_close_matches(str(key), known, 1)
    return RecipeError(
        f"unknown key {key!r}",
        where=where,
        hint=f"Did you mean {near[0]!r}?" if near else "Use one of these keys: " + ", ".join(known) + ".",
        data={"reason": "unknown-key", "key": key, "near": near, "known": known},
    )


def refuse_unknown(tree: dict[Any, Any], known: Iterable[str], source: Source, path: KeyPath) -> None:
    known = list(known)
    for key in tree:
        if key not in known:
            raise _unknown_key(key, known, source.where((*path, key)))
