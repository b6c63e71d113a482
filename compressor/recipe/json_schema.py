"""Makes the JSON Schema of recipes, for editors."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from compressor.passes import find_pass, pass_names
from compressor.recipe.schema import SECTIONS


def recipe_json_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of recipes, with one alternative per pass."""
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
