"""Reads YAML into a Recipe. Every field is checked before any weight is opened, and every error names its place.

The sections besides `steps` are the classes of `schema`. Each step is an instance of its pass.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import yaml

from compressor.errors import RecipeError
from compressor.passes import find_pass, pass_names
from compressor.protocol import Pass
from compressor.recipe.overrides import apply_override, put_value
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
from compressor.recipe.validation import refuse_unknown, validated
from compressor.recipe.yaml_source import Path as KeyPath
from compressor.recipe.yaml_source import Source, read_yaml

Data = TypeVar("Data", bound=DataSettings)


@dataclass(frozen=True)
class Step:
    """path  its place in the recipe, e.g. ("steps", 0)"""

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
        """Whether any step needs calibration samples."""
        return any(step.settings.traits.reads != "weights" for step in self.steps)

    def pinned(self, calibration: str | None, held_out: str | None) -> Recipe:
        """The recipe for the artifact: without folders of this machine, and with the hashes of the data.

        calibration, held_out  sha256 of the data for `data` and `eval.data`; None if it was not read
        Random tokens follow from the seed and the model's vocabulary, so they get no hash.
        """

        def pin(data: DataSettings, sha256: str | None) -> DataSettings:
            if data.source == "random":
                return data
            return data.model_copy(update={"source": bare_source(data.source), "sha256": sha256 or data.sha256})

        measured = self.eval.model_copy(update={"data": pin(self.eval.data, held_out)})
        return replace(self, data=pin(self.data, calibration), eval=measured)

    def fit_lengths(self, limit: Callable[[int], int | None]) -> Recipe:
        """The recipe with each `length` that is not set reduced to the limit of a model.

        limit  number of tokens -> None if the model accepts them in one sample, else its limit
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
        """The recipe with every default. Reading it again gives the same recipe."""
        sweeps = [[_resolved_step(step) for step in sweep] for sweep in self.sweeps]
        sections = {key: getattr(self, key).model_dump(mode="json") for key in SECTIONS}
        steps = [sweep[0] if len(sweep) == 1 else {"sweep": sweep} for sweep in sweeps]
        return {"version": 1, "name": self.name, "seed": self.seed, **sections, "steps": steps}

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.resolved(), sort_keys=False, allow_unicode=True)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(json.dumps(self.resolved(), sort_keys=True).encode()).hexdigest()


Option = tuple[str, KeyPath, Any]  # (the option as the user wrote it, the place of its value, the value)
TOP_KEYS = ("version", "name", "seed", *SECTIONS, "steps")


def find_recipe(name: str) -> Path:
    """A file, or the name of a bundled recipe. raises RecipeError"""
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
        hint=f"Check the path, or use a bundled recipe: {', '.join(known)}.",
        data={"reason": "no-such-recipe", "known": known},
    )


def recipe_folders() -> list[Path]:
    """The folders of bundled recipes: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).parent.parent
    return [folder for folder in (package / "recipes", package.parent / "recipes") if folder.is_dir()]


def read_recipe(path: Path | str, overrides: Sequence[str] = (), options: Sequence[Option] = ()) -> Recipe:
    """Read a recipe file and apply `--set` overrides. raises RecipeError"""
    file = find_recipe(str(path))
    return parse_recipe(file.read_bytes(), file.name, overrides, options)


def parse_recipe(
    content: bytes, name: str = "recipe", overrides: Sequence[str] = (), options: Sequence[Option] = ()
) -> Recipe:
    """Parse a recipe. `overrides` are `KEY=VALUE` texts of --set, `options` are settings of other options."""
    source = read_yaml(content, name)
    if not isinstance(source.value, dict):
        raise RecipeError(
            "the recipe is not a map of keys",
            where=source.where(()),
            hint="Write `version: 1` in its first line, and `steps:` below it.",
            data={"reason": "not-a-map"},
        )
    for override in overrides:
        apply_override(source, override)
    for place, path, value in options:
        put_value(source, path, value, place)
    return _build(source)


def _build(source: Source) -> Recipe:
    tree = source.value
    refuse_unknown(tree, TOP_KEYS, source, ())
    if tree.get("version") != 1 or isinstance(tree.get("version"), bool):
        found = repr(tree["version"]) if "version" in tree else "none"
        raise RecipeError(
            f"this release reads recipes of version 1, and the version is {found}",
            where=source.where(("version",)),
            hint="Write `version: 1` in the first line of the recipe.",
            data={"reason": "version", "found": found},
        )
    name = tree.get("name", _name_of(source.name))
    if not (isinstance(name, str) and re.fullmatch(r"[a-z0-9-]{1,80}", name)):
        raise RecipeError(
            f"name {name!r} must be lower-case letters, digits and -",
            where=source.where(("name",)),
            hint="Write a name such as gptq-w4.",
            data={"reason": "bad-name", "name": str(name)[:160]},
        )
    seed = tree.get("seed", 0)
    if type(seed) is not int or not 0 <= seed < 2**32:
        raise RecipeError(
            f"seed {seed!r} must be a whole number from 0 to 2^32 - 1",
            where=source.where(("seed",)),
            hint="Write a number such as seed: 0.",
            data={"reason": "bad-seed", "seed": repr(seed)[:160]},
        )
    sections = {key: validated(model, tree.get(key, {}), source, (key,)) for key, model in SECTIONS.items()}
    return Recipe(name=name, seed=seed, sweeps=_sweeps(tree.get("steps"), source), **sections)


def _sweeps(steps: Any, source: Source) -> tuple[tuple[Step, ...], ...]:
    """The sweeps of `steps`. A single step is a sweep of its own."""
    if not isinstance(steps, list) or not steps:
        raise RecipeError(
            "the recipe has no steps",
            where=source.where(("steps",)),
            hint="Add a step, as in steps: [{pass: gptq}].",
            data={"reason": "no-steps"},
        )
    sweeps = []
    for number, entry in enumerate(steps):
        path: KeyPath = ("steps", number)
        if isinstance(entry, dict) and "sweep" in entry:
            refuse_unknown(entry, ("sweep",), source, path)
            members = entry["sweep"]
            if not isinstance(members, list) or not members:
                raise RecipeError(
                    "a sweep is a list of steps",
                    where=source.where((*path, "sweep")),
                    hint="Write its steps as a list, as in sweep: [{pass: awq}, {pass: gptq}].",
                    data={"reason": "sweep-without-steps"},
                )
            sweeps.append(tuple(_step(member, source, (*path, "sweep", i)) for i, member in enumerate(members)))
        else:
            sweeps.append((_step(entry, source, path),))
    return tuple(sweeps)


def _name_of(file: str) -> str:
    """A name for a recipe without one, made from its file's name."""
    return re.sub(r"[^a-z0-9]+", "-", Path(file).stem.lower()).strip("-")[:80] or "recipe"


def _step(entry: Any, source: Source, path: KeyPath) -> Step:
    if not isinstance(entry, dict) or not isinstance(entry.get("pass"), str):
        raise RecipeError(
            "the step does not name its pass",
            where=source.where(path),
            hint="Write it as {pass: NAME, ...} with one of: " + ", ".join(pass_names()),
            data={"reason": "step-without-pass", "known": pass_names()},
        )
    try:
        cls = find_pass(entry["pass"])
    except RecipeError as error:
        raise RecipeError(error.what, where=source.where((*path, "pass")), hint=error.hint, data=error.data) from error
    settings = {key: value for key, value in entry.items() if key != "pass"}
    return Step(path, entry["pass"], validated(cls, settings, source, path))


def _resolved_step(step: Step) -> dict[str, Any]:
    return {"pass": step.name, **step.settings.model_dump(mode="json", by_alias=True)}
