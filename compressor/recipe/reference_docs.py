"""Makes the tables of passes and settings for the command line and the docs."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from compressor.passes import BUILTIN, find_pass, pass_names
from compressor.recipe.schema import SECTIONS


def pass_rows() -> list[dict[str, Any]]:
    rows = []
    for name in pass_names():
        found = find_pass(name)
        provider = "built in" if name in BUILTIN else found.__module__.partition(".")[0]
        rows.append({"pass": name, "what it does": found.title, "paper": found.paper, "from": provider})
    return rows


def setting_rows(name: str) -> list[dict[str, Any]]:
    return settings_of(find_pass(name))


def settings_of(model: type[BaseModel]) -> list[dict[str, Any]]:
    """The setting, type, default and meaning of each field."""
    schema = model.model_json_schema(by_alias=True)
    definitions = schema.get("$defs", {})
    return [
        {
            "setting": key,
            "type": _type(entry, definitions),
            "default": _default(entry),
            "meaning": entry.get("description", ""),
        }
        for key, entry in schema["properties"].items()
    ]


def recipe_reference() -> str:
    """The text of docs/settings.md below its title."""
    parts = []
    for key, model in SECTIONS.items():
        parts += _section(key, model)
    for name in pass_names():
        found = find_pass(name)
        heading = f"{found.title}. {found.paper}".rstrip()
        parts.append(f"### `pass: {name}`\n\n{heading}\n\n{_markdown(setting_rows(name))}")
    return "\n\n".join(parts) + "\n"


def _section(key: str, model: type[BaseModel]) -> list[str]:
    """A section, followed by the sections inside it."""
    parts = [f"### `{key}`\n\n{(model.__doc__ or '').strip()}\n\n{_markdown(settings_of(model))}"]
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            parts += _section(f"{key}.{name}", field.annotation)
    return parts


def _markdown(rows: list[dict[str, Any]]) -> str:
    lines = ["| setting | type | default | meaning |", "|---|---|---|---|"]
    for row in rows:
        kind, default = str(row["type"]).replace("|", "\\|"), str(row["default"]).replace("|", "\\|")
        lines.append(f"| `{row['setting']}` | {kind} | `{default}` | {row['meaning']} |")
    return "\n".join(lines)


def _default(entry: dict[str, Any]) -> str:
    if "$ref" in entry:
        return "see below"
    value = entry.get("default")
    if isinstance(value, list):
        return "[" + ", ".join(map(str, value)) + "]"
    return (
        {None: "null", True: "true", False: "false"}.get(value, str(value))
        if not isinstance(value, (int, float, dict)) or isinstance(value, bool)
        else str(value)
    )


def _type(entry: dict[str, Any], definitions: dict[str, Any]) -> str:
    if "$ref" in entry:
        return "map"
    if "enum" in entry:
        return " | ".join(map(str, entry["enum"]))
    if "const" in entry:
        return str(entry["const"])
    if "anyOf" in entry:
        return " | ".join(_type(option, definitions) for option in entry["anyOf"])
    if entry.get("type") == "array":
        return f"list of {_type(entry.get('items', {}), definitions)}"
    if entry.get("type") == "object":
        return f"map of {_type(entry.get('additionalProperties', {}), definitions)}"
    return str(entry.get("type", "any"))
