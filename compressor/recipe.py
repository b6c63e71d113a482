"""YAML -> Recipe. Every field is checked before any weight is opened, and every error names its place.

Sections: model, data, steps, export, eval, report, limits. Reference: docs/recipe.md, generated from these classes.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt, ValidationError, field_validator

from compressor.errors import RecipeError
from compressor.passes import find_pass, pass_names
from compressor.protocol import Pass
from compressor.yaml_source import Path as KeyPath
from compressor.yaml_source import Source, dotted, read_yaml

UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
METRICS = ("perplexity", "kl_divergence", "top1_agreement", "hidden_cosine", "accuracy", "size", "speed", "memory")
GATED = (
    "perplexity",
    "kl_divergence",
    "top1_agreement",
    "hidden_cosine",
    "accuracy",
    "size_ratio",
    "decode_speed_ratio",
    "prefill_speed_ratio",
    "load_seconds_ratio",
    "peak_memory_ratio",
)
GATE_FORMS = ("", "_min", "_increase_percent", "_drop_points")


def parse_bytes(value: Any) -> Any:
    """4GiB, 500MB or a number -> bytes; anything else is left for the schema to refuse."""
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"\s*([\d.]+)\s*([A-Za-z]*)\s*", value)
    if not found or found[2].upper() not in UNITS:
        raise ValueError("give bytes as a number with KiB, MiB, GiB (1024) or KB, MB, GB (1000)")
    return int(float(found[1]) * UNITS[found[2].upper()])


Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(gt=0)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelSettings(Section):
    """How the model is held while it is compressed."""

    dtype: Literal["source", "float32", "bfloat16", "float16"] = Field(
        "source", description="Type of what stays dense."
    )
    placement: Literal["stream", "resident"] = Field(
        "stream", description="stream frees each block when it is done; resident keeps all of them."
    )


class DataSettings(Section):
    """Text or images, as the model reads them."""

    source: str = Field(
        "stdlib",
        description="stdlib, random, a path (.txt, .jsonl, .csv, .tsv, .npz), or dataset:NAME.",
    )
    config: str | None = Field(None, description="Configuration of dataset:NAME.")
    split: str = Field("train", description="Split of a data set; stdlib has train and heldout.")
    field: str = Field("text", description="Column or JSON key that holds the text.")
    samples: PositiveInt = Field(128, description="How many samples are drawn.")
    length: int = Field(512, ge=2, description="Tokens per sample.")
    pack: bool = Field(True, description="Join documents and cut to exact length; false: one document a sample.")
    seed: int | None = Field(None, ge=0, description="Choice of samples; null is the recipe's seed.")
    sha256: str | None = Field(None, description="Hash that the data must have.")


class EvalDataSettings(DataSettings):
    """Text or images to measure on; the same keys as `data`."""

    split: str = Field("heldout", description="Split of a data set; never the one calibrated on.")
    samples: PositiveInt = Field(64, description="How many samples are drawn.")


class ExportSettings(Section):
    """What is written."""

    format: Literal["auto", "compressed-tensors", "custom"] = Field(
        "auto", description="auto: the stock format where it can hold every weight, else one modelling file."
    )
    stock_only: bool = Field(False, description="Refuse in plan what stock transformers can't load by itself.")
    shard_bytes: Bytes = Field(4 << 30, description="Largest weight file.")
    card: bool = Field(True, description="Write a model card, README.md.")


class EvalSettings(Section):
    """What is measured before and after, and what must hold."""

    metrics: tuple[Literal[METRICS], ...] = Field(  # type: ignore[valid-type]
        ("perplexity", "kl_divergence", "top1_agreement", "size", "speed", "memory"), description="What to measure."
    )
    data: EvalDataSettings = Field(
        default_factory=lambda: EvalDataSettings(), description="Never the calibration samples."
    )
    batch_size: PositiveInt = Field(8, description="Samples per forward pass.")
    gates: dict[str, float] = Field(
        {}, description="NAME: upper bound; NAME_min; NAME_increase_percent; NAME_drop_points."
    )
    confidence: float | None = Field(
        None, gt=0.5, lt=1, description="A gate fails only when this bootstrap interval lies wholly beyond its bound."
    )

    @field_validator("gates")
    @classmethod
    def _known(cls, gates: dict[str, float]) -> dict[str, float]:
        known = [metric + form for metric in GATED for form in GATE_FORMS]
        for name in gates:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                raise ValueError(f"unknown gate {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        return gates


class ReportSettings(Section):
    """Which renderings of report.json are written."""

    html: bool = Field(True, description="report.html, self-contained.")
    markdown: bool = Field(True, description="report.md.")
    junit: bool = Field(True, description="junit.xml with one case per gate.")
    github_summary: Literal["auto", "never"] = Field("auto", description="auto: when $GITHUB_STEP_SUMMARY is set.")


class LimitsSettings(Section):
    """Preflight refuses a run whose plan exceeds one of them."""

    memory: Bytes | None = Field(None, description="null: what is free, less 10 %.")
    disk: Bytes | None = Field(None, description="null: what is free.")


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


SECTIONS: dict[str, type[Section]] = {
    "model": ModelSettings,
    "data": DataSettings,
    "export": ExportSettings,
    "eval": EvalSettings,
    "report": ReportSettings,
    "limits": LimitsSettings,
}
TOP_KEYS = ("version", "name", "seed", *SECTIONS, "steps")


def find_recipe(name: str) -> Path:
    """A file, or the bare name of a recipe that comes with the package. raises RecipeError"""
    path = Path(name).expanduser()
    if path.is_file():
        return path
    for folder in recipe_folders():
        shipped = folder / f"{path.name.removesuffix('.yaml')}.yaml"
        if shipped.is_file() and len(path.parts) == 1:
            return shipped
    known = sorted({file.stem for folder in recipe_folders() for file in folder.glob("*.yaml")})
    raise RecipeError("no such recipe file", where=name, hint=f"Recipes that come along: {', '.join(known)}.")


def recipe_folders() -> list[Path]:
    """Where shipped recipes lie: inside an installed package, or beside it in a checkout."""
    here = Path(__file__).parent
    return [folder for folder in (here / "recipes", here.parent / "recipes") if folder.is_dir()]


def read_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and apply `--set` overrides. raises RecipeError"""
    file = find_recipe(str(path))
    return parse_recipe(file.read_bytes(), file.name, overrides)


def parse_recipe(content: bytes, name: str = "recipe", overrides: Sequence[str] = ()) -> Recipe:
    source = read_yaml(content, name)
    if not isinstance(source.value, dict):
        raise RecipeError("a recipe is a map of keys", where=source.where(()), hint="Start with `version: 1`.")
    for override in overrides:
        _apply(source, override)
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
        "name": {"type": "string", "pattern": "^[a-z0-9-]+$"},
        "seed": {"type": "integer", "minimum": 0},
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
        raise RecipeError(f"version 1 is needed, {found} was found", where=source.where(("version",)))
    name = tree.get("name", source.name.removesuffix(".yaml").removesuffix(".yml"))
    if "name" in tree and not (isinstance(name, str) and re.fullmatch(r"[a-z0-9-]{1,80}", name)):
        raise RecipeError(f"name {name!r} must be lower-case letters, digits and -", where=source.where(("name",)))
    seed = tree.get("seed", 0)
    if type(seed) is not int or not 0 <= seed < 2**32:
        raise RecipeError(f"seed {seed!r} must be a whole number from 0 to 2^32 - 1", where=source.where(("seed",)))
    sections = {key: _validated(model, tree.get(key, {}), source, (key,)) for key, model in SECTIONS.items()}
    steps = tree.get("steps")
    if not isinstance(steps, list) or not steps:
        raise RecipeError("at least one step is needed", where=source.where(("steps",)), hint="steps: [{pass: gptq}]")
    sweeps = []
    for number, entry in enumerate(steps):
        path: KeyPath = ("steps", number)
        if isinstance(entry, dict) and "sweep" in entry:
            _refuse_unknown(entry, ("sweep",), source, path)
            members = entry["sweep"]
            if not isinstance(members, list) or not members:
                raise RecipeError("a sweep is a list of steps", where=source.where((*path, "sweep")))
            sweeps.append(tuple(_step(member, source, (*path, "sweep", i)) for i, member in enumerate(members)))
        else:
            sweeps.append((_step(entry, source, path),))
    return Recipe(name=str(name), seed=seed, sweeps=tuple(sweeps), **sections)


def _step(entry: Any, source: Source, path: KeyPath) -> Step:
    if not isinstance(entry, dict) or not isinstance(entry.get("pass"), str):
        raise RecipeError(
            "a step names its pass",
            where=source.where(path),
            hint="{pass: NAME, ...}; passes: " + ", ".join(pass_names()),
        )
    try:
        cls = find_pass(entry["pass"])
    except RecipeError as error:
        raise RecipeError(error.what, where=source.where((*path, "pass")), hint=error.hint) from error
    settings = {key: value for key, value in entry.items() if key != "pass"}
    return Step(path, entry["pass"], _validated(cls, settings, source, path))


def _validated(model: type[BaseModel], value: Any, source: Source, path: KeyPath) -> Any:
    if not isinstance(value, dict):
        raise RecipeError(f"a map of settings is needed, {value!r} was found", where=source.where(path))
    try:
        return model.model_validate(value)
    except ValidationError as failure:
        problems = []
        for error in failure.errors():
            location = tuple(part for part in error["loc"] if isinstance(part, (str, int)))
            at = _known_path(source.value, (*path, *location))
            if error["type"] == "extra_forbidden":
                problems.append(
                    RecipeError(f"unknown key {location[-1]!r}", where=source.where(at), hint=_near(model, location))
                )
            else:
                found = f", found {error['input']!r}"[:120] if not isinstance(error["input"], dict) else ""
                problems.append(RecipeError(error["msg"].removeprefix("Value error, ") + found, where=source.where(at)))
        unique = list(dict.fromkeys(str(problem) for problem in problems))
        first = problems[0]
        rest = "".join(f"\n  also {line}" for line in unique[1:])
        raise RecipeError(first.what + rest, where=first.where, hint=first.hint if not rest else None) from failure


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


def _near(model: type[BaseModel], location: KeyPath) -> str:
    for part in location[:-1]:
        field = model.model_fields.get(str(part))
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            break
        model = field.annotation
    keys = [field.alias or name for name, field in model.model_fields.items()]
    near = difflib.get_close_matches(str(location[-1]), keys, 1)
    return f"Did you mean {near[0]!r}?" if near else "Known keys: " + ", ".join(keys) + "."


def _refuse_unknown(tree: dict[Any, Any], known: Iterable[str], source: Source, path: KeyPath) -> None:
    known = list(known)
    for key in tree:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            raise RecipeError(
                f"unknown key {key!r}",
                where=source.where((*path, key)),
                hint=f"Did you mean {near[0]!r}?" if near else "Known keys: " + ", ".join(known) + ".",
            )


def _apply(source: Source, override: str) -> None:
    """One `a.b.0.c=VALUE`. The path must lead through the recipe; only the last key may be new."""
    key, equals, text = override.partition("=")
    place = f"--set {override}"
    if not equals or not key:
        raise RecipeError("KEY=VALUE is needed", where=place, hint="For example --set steps.0.bits=3")
    path: KeyPath = tuple(int(part) if part.isdigit() else part for part in key.split("."))
    value = read_yaml(text.encode(), place).value if text.strip() else None
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
                f"{dotted(path[: depth + 1])!r} is not in the recipe", where=place, hint="--set never creates a step."
            ) from None
    last = path[-1]
    if isinstance(node, list):
        if not isinstance(last, int) or last >= len(node):
            raise RecipeError(f"the list has {len(node)} entries", where=place, hint="--set never creates a step.")
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
