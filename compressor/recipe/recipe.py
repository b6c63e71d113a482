"""YAML -> Recipe. Every field is checked before any weight is opened, and every error names its place.

The sections beside `steps` are the classes of `settings`, each step is the class of its pass.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from compressor.errors import RecipeError
from compressor.passes import find_pass, pass_names
from compressor.process.utf8 import is_utf8, printable
from compressor.protocol import Pass
from compressor.recipe.schema import (
    SECTIONS,
    DataSettings,
    EvalSettings,
    ExportSettings,
    LimitsSettings,
    ModelSettings,
    ReportSettings,
    bare_source,
)
from compressor.recipe.yaml_source import Path as KeyPath
from compressor.recipe.yaml_source import Source, dotted, read_yaml

Data = TypeVar("Data", bound=DataSettings)


@dataclass(frozen=True)
class Step:
    """path  where it stands in the recipe, e.g. ("steps", 0)"""

    path: KeyPath
    name: str
    settings: Pass


@dataclass(frozen=True)
class Recipe:
    name: str
    seed: int
    model: ModelSettings
    data: DataSettings
    sweeps: tuple[tuple[Step, ...], ...]
    export: ExportSettings
    eval: EvalSettings
    report: ReportSettings
    limits: LimitsSettings

    @property
    def steps(self) -> list[Step]:
        return [step for sweep in self.sweeps for step in sweep]

    @property
    def reads_data(self) -> bool:
        """Whether any step needs the calibration samples."""
        return any(step.settings.traits.reads != "weights" for step in self.steps)

    def pinned(self, calibration: str | None, held_out: str | None) -> Recipe:
        """The recipe as it may be handed on: no folder of this machine, and the data's hashes filled in.

        calibration, held_out  sha256 of what was read for `data` and `eval.data`; None for what wasn't
        Random tokens are made by the seed and depend on the model's vocabulary, so they stay unpinned.
        """

        def pin(data: DataSettings, sha256: str | None) -> DataSettings:
            if data.source == "random":
                return data
            return data.model_copy(update={"source": bare_source(data.source), "sha256": sha256 or data.sha256})

        measured = self.eval.model_copy(update={"data": pin(self.eval.data, held_out)})
        return replace(self, data=pin(self.data, calibration), eval=measured)

    def fit_lengths(self, limit: Callable[[int], int | None]) -> Recipe:
        """The recipe with each `length` that nobody set brought down to what a model takes.

        limit  number of tokens -> None if the model takes them in one sample, else how many it takes
        """
        unset = [part.length for part in (self.data, self.eval.data) if "length" not in part.model_fields_set]
        most = limit(max(unset)) if unset else None
        if most is None:
            return self

        def fit(data: Data) -> Data:
            is_free = "length" not in data.model_fields_set and data.length > most
            return data.model_copy(update={"length": most}) if is_free else data

        return replace(self, data=fit(self.data), eval=self.eval.model_copy(update={"data": fit(self.eval.data)}))

    def resolved(self) -> dict[str, Any]:
        """Every default filled in; reading it again gives the same recipe."""
        sweeps = [[_resolved_step(step) for step in sweep] for sweep in self.sweeps]
        sections = {key: getattr(self, key).model_dump(mode="json") for key in SECTIONS}
        steps = [sweep[0] if len(sweep) == 1 else {"sweep": sweep} for sweep in sweeps]
        return {"version": 1, "name": self.name, "seed": self.seed, **sections, "steps": steps}

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.resolved(), sort_keys=False, allow_unicode=True)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(json.dumps(self.resolved(), sort_keys=True).encode()).hexdigest()


Option = tuple[str, KeyPath, Any]  # (the flag as it was typed, where its value belongs, the value)
TOP_KEYS = ("version", "name", "seed", *SECTIONS, "steps")


def find_recipe(name: str) -> Path:
    """A file, or the bare name of a recipe that comes with the package. raises RecipeError"""
    path = Path(os.path.expanduser(name))
    if path.is_file():
        return path
    for folder in recipe_folders():
        shipped = folder / f"{path.name.removesuffix('.yaml')}.yaml"
        if shipped.is_file() and len(path.parts) == 1:
            return shipped
    known = sorted({file.stem for folder in recipe_folders() for file in folder.glob("*.yaml")})
    raise RecipeError(
        "no such recipe file",
        where=name,
        hint=f"Recipes that come along: {', '.join(known)}.",
        data={"reason": "no-such-recipe", "known": known},
    )


def recipe_folders() -> list[Path]:
    """Where shipped recipes lie: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).parent.parent
    return [folder for folder in (package / "recipes", package.parent / "recipes") if folder.is_dir()]


def read_recipe(path: Path | str, overrides: Sequence[str] = (), options: Sequence[Option] = ()) -> Recipe:
    """Read a recipe file and apply `--set` overrides. raises RecipeError"""
    file = find_recipe(str(path))
    return parse_recipe(file.read_bytes(), file.name, overrides, options)


def parse_recipe(
    content: bytes, name: str = "recipe", overrides: Sequence[str] = (), options: Sequence[Option] = ()
) -> Recipe:
    """overrides are `KEY=VALUE` texts of --set, options settings that another flag stands for"""
    source = read_yaml(content, name)
    if not isinstance(source.value, dict):
        raise RecipeError(
            "a recipe is a map of keys",
            where=source.where(()),
            hint="Start with `version: 1`.",
            data={"reason": "not-a-map"},
        )
    for override in overrides:
        _apply(source, override)
    for place, path, value in options:
        _put(source, path, value, place)
    return _build(source)


def recipe_json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of the recipe; one alternative per pass."""
    definitions: dict[str, Any] = {}

    def lifted(model: type[BaseModel]) -> dict[str, Any]:
        schema = model.model_json_schema(ref_template="#/$defs/{model}")
        definitions.update(schema.pop("$defs", {}))
        return schema

    steps = []
    for name in pass_names():
        schema = lifted(find_pass(name))
        schema["properties"] = {"pass": {"const": name}, **schema["properties"]}
        schema["required"] = ["pass", *schema.get("required", [])]
        definitions[f"pass_{name}"] = schema
        steps.append({"$ref": f"#/$defs/pass_{name}"})
    definitions["step"] = {"oneOf": steps}
    sweep = {
        "type": "object",
        "additionalProperties": False,
        "required": ["sweep"],
        "properties": {"sweep": {"type": "array", "minItems": 1, "items": {"$ref": "#/$defs/step"}}},
    }
    properties: dict[str, Any] = {
        "version": {"const": 1},
        "name": {"type": "string", "pattern": "^[a-z0-9-]{1,80}$"},
        "seed": {"type": "integer", "minimum": 0, "exclusiveMaximum": 2**32},
        **{key: lifted(model) for key, model in SECTIONS.items()},
        "steps": {"type": "array", "minItems": 1, "items": {"oneOf": [*steps, sweep]}},
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "compress-model recipe",
        "type": "object",
        "additionalProperties": False,
        "required": ["version", "steps"],
        "properties": properties,
        "$defs": definitions,
    }


def _build(source: Source) -> Recipe:
    tree = source.value
    _refuse_unknown(tree, TOP_KEYS, source, ())
    if tree.get("version") != 1 or isinstance(tree.get("version"), bool):
        found = repr(tree["version"]) if "version" in tree else "none"
        raise RecipeError(
            f"version 1 is needed, {found} was found",
            where=source.where(("version",)),
            data={"reason": "version", "found": found},
        )
    name = tree.get("name", _name_of(source.name))
    if not (isinstance(name, str) and re.fullmatch(r"[a-z0-9-]{1,80}", name)):
        raise RecipeError(f"name {name!r} must be lower-case letters, digits and -", where=source.where(("name",)))
    seed = tree.get("seed", 0)
    if type(seed) is not int or not 0 <= seed < 2**32:
        raise RecipeError(f"seed {seed!r} must be a whole number from 0 to 2^32 - 1", where=source.where(("seed",)))
    sections = {key: _validated(model, tree.get(key, {}), source, (key,)) for key, model in SECTIONS.items()}
    steps = tree.get("steps")
    if not isinstance(steps, list) or not steps:
        raise RecipeError(
            "at least one step is needed",
            where=source.where(("steps",)),
            hint="steps: [{pass: gptq}]",
            data={"reason": "no-steps"},
        )
    sweeps = []
    for number, entry in enumerate(steps):
        path: KeyPath = ("steps", number)
        if isinstance(entry, dict) and "sweep" in entry:
            _refuse_unknown(entry, ("sweep",), source, path)
            members = entry["sweep"]
            if not isinstance(members, list) or not members:
                raise RecipeError(
                    "a sweep is a list of steps",
                    where=source.where((*path, "sweep")),
                    data={"reason": "sweep-without-steps"},
                )
            sweeps.append(tuple(_step(member, source, (*path, "sweep", i)) for i, member in enumerate(members)))
        else:
            sweeps.append((_step(entry, source, path),))
    return Recipe(name=name, seed=seed, sweeps=tuple(sweeps), **sections)


def _name_of(file: str) -> str:
    """A name for a recipe that states none, from its file's."""
    return re.sub(r"[^a-z0-9]+", "-", Path(file).stem.lower()).strip("-")[:80] or "recipe"


def _step(entry: Any, source: Source, path: KeyPath) -> Step:
    if not isinstance(entry, dict) or not isinstance(entry.get("pass"), str):
        raise RecipeError(
            "a step names its pass",
            where=source.where(path),
            hint="{pass: NAME, ...}; passes: " + ", ".join(pass_names()),
            data={"reason": "step-without-pass", "known": pass_names()},
        )
    try:
        cls = find_pass(entry["pass"])
    except RecipeError as error:
        raise RecipeError(error.what, where=source.where((*path, "pass")), hint=error.hint, data=error.data) from error
    settings = {key: value for key, value in entry.items() if key != "pass"}
    return Step(path, entry["pass"], _validated(cls, settings, source, path))


def _validated(model: type[BaseModel], value: Any, source: Source, path: KeyPath) -> Any:
    if not isinstance(value, dict):
        raise RecipeError(f"a map of settings is needed, {value!r} was found", where=source.where(path))
    if (stray := _stray_boolean(model, value)) is not None:
        raise RecipeError(
            "true or false where something else is needed",
            where=source.where((*path, *stray)),
            data={"reason": "stray-boolean"},
        )
    try:
        return model.model_validate(value)
    except ValidationError as failure:
        problems = []
        for error in failure.errors():
            location = tuple(part for part in error["loc"] if isinstance(part, (str, int)))
            at = _known_path(source.value, (*path, *location))
            if error["type"] == "extra_forbidden":
                problems.append(_unknown_key(location[-1], _known_keys(model, location), source.where(at)))
            else:
                found = f", found {error['input']!r}"[:120] if not isinstance(error["input"], dict) else ""
                problems.append(
                    RecipeError(
                        error["msg"].removeprefix("Value error, ") + found,
                        where=source.where(at),
                        data=_values_of(error),
                    )
                )
        first, *others = {str(problem): problem for problem in problems}.values()
        rest = "".join(f"\n  also {problem}" for problem in others)
        also = {"also": [{"where": problem.where, **problem.data} for problem in others]} if others else {}
        raise RecipeError(
            first.what + rest,
            where=first.where,
            hint=first.hint if not rest else None,
            data={**first.data, **also},
        ) from failure


def _values_of(error: ErrorDetails) -> dict[str, Any]:
    """What pydantic found, by name; the kind of error is its reason. A value that was given is told as text."""
    told = {key: value for key, value in error.get("ctx", {}).items() if isinstance(value, (str, int, float, list))}
    found = {"found": repr(error["input"])[:120]} if not isinstance(error["input"], dict) else {}
    return {"reason": error["type"].replace("_", "-"), **found, **told}


def _stray_boolean(model: type[BaseModel], value: dict[Any, Any]) -> KeyPath | None:
    """Where a boolean stands that is none; pydantic would read it as 0 or 1."""
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
    """The types a value of this annotation may have: those inside unions and containers, and of literals."""
    members = get_args(annotation)
    if not members:
        yield annotation if isinstance(annotation, type) else type(annotation)
    for member in members:
        yield from _leaf_types(member)


def _known_path(tree: Any, path: KeyPath) -> KeyPath:
    """The longest prefix of a pydantic location that stands in the recipe (union branches don't)."""
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
        hint=f"Did you mean {near[0]!r}?" if near else "Known keys: " + ", ".join(known) + ".",
        data={"reason": "unknown-key", "key": key, "near": near, "known": known},
    )


def _refuse_unknown(tree: dict[Any, Any], known: Iterable[str], source: Source, path: KeyPath) -> None:
    known = list(known)
    for key in tree:
        if key not in known:
            raise _unknown_key(key, known, source.where((*path, key)))


def _apply(source: Source, override: str) -> None:
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
    _put(source, path, read_yaml(text.encode(), place).value if text.strip() else None, place)


def _put(source: Source, path: KeyPath, value: Any, place: str) -> None:
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


def _resolved_step(step: Step) -> dict[str, Any]:
    return {"pass": step.name, **step.settings.model_dump(mode="json", by_alias=True)}
