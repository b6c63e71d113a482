"""Reads YAML safely into plain values with their places: no tags, no duplicate keys, no exponential aliases."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import yaml

from compressor.errors import RecipeError
from compressor.process.utf8 import is_utf8

MAX_BYTES = 1 << 20
MAX_NODES = 10_000
MAX_DEPTH = 50
LARGEST = 2**63  # integers must be smaller: libraries store them in 64 bits
SCALARS = ("str", "int", "float", "bool", "null")
Path = tuple[str | int, ...]


@dataclass
class Source:
    """value      plain dicts, lists and scalars
    positions  path -> "file:line:column" (from 1), or the --set that put the value there
    """

    name: str
    value: Any
    positions: dict[Path, str] = field(default_factory=dict)

    def where(self, path: Path) -> str:
        """The position of the value or its nearest known ancestor, with the dotted path."""
        known = path
        while known and known not in self.positions:
            known = known[:-1]
        place = self.positions.get(known, self.name)
        return f"{place} ({dotted(path)})" if path else place


def dotted(path: Path) -> str:
    return ".".join(str(part) for part in path)


def read_yaml(content: bytes, name: str) -> Source:
    """Parse YAML. raises RecipeError with file:line:column"""
    if len(content) > MAX_BYTES:
        raise RecipeError(
            f"has {len(content):,} bytes, at most {MAX_BYTES:,} are read",
            where=name,
            hint="Check that the file is the recipe; a recipe has no data in it.",
            data={"reason": "too-large", "bytes": len(content), "limit": MAX_BYTES},
        )
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"is not UTF-8 (byte {error.start})",
            where=name,
            hint=f"Convert it to UTF-8, for example with iconv -f ENCODING -t UTF-8 {name}.",
            data={"reason": "not-utf-8", "byte": error.start},
        ) from error
    loader = None
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            raise RecipeError(
                "is empty",
                where=name,
                hint="Write `version: 1` in its first line, and `steps:` below it.",
                data={"reason": "empty"},
            )
        source = Source(name, None)
        source.value = _value(loader, node, (), source, [0])
        return source
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        raise RecipeError(
            f"is not valid YAML: {error.problem}",
            where=where,
            hint="Correct this line: check its indentation, quotes, brackets and colons.",
            data={"reason": "not-yaml", "problem": error.problem},
        ) from error
    except yaml.YAMLError as error:
        raise RecipeError(
            f"is not valid YAML: {error}",
            where=name,
            hint="Remove control characters, and check quotes and brackets.",
            data={"reason": "not-yaml", "problem": str(error)},
        ) from error
    except RecursionError as error:
        raise RecipeError(
            "is nested too deeply",
            where=name,
            hint=f"Write at most {MAX_DEPTH} levels of lists and maps.",
            data={"reason": "nested-too-deeply", "levels": MAX_DEPTH},
        ) from error
    finally:
        if loader is not None:
            loader.dispose()


def _value(loader: yaml.SafeLoader, node: yaml.Node, path: Path, source: Source, count: list[int]) -> Any:
    place = f"{source.name}:{node.start_mark.line + 1}:{node.start_mark.column + 1}"
    source.positions.setdefault(path, place)
    count[0] += 1
    if count[0] > MAX_NODES or len(path) > MAX_DEPTH:
        raise RecipeError(
            f"has more than {MAX_NODES:,} nodes or {MAX_DEPTH} levels",
            where=place,
            hint="Write fewer entries, such as one pattern instead of many names, and fewer levels.",
            data={"reason": "too-many-nodes", "nodes": MAX_NODES, "levels": MAX_DEPTH},
        )
    if isinstance(node, yaml.MappingNode):
        if node.tag != "tag:yaml.org,2002:map":
            raise RecipeError(f"tag {node.tag} is not allowed", where=place, hint=_tag_hint(node), data=_tag(node))
        result: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            at = f"{source.name}:{key_node.start_mark.line + 1}:{key_node.start_mark.column + 1}"
            is_word = isinstance(key_node, yaml.ScalarNode) and not key_node.tag.endswith(":merge")
            key = _scalar(loader, key_node, at) if is_word else None
            if not isinstance(key, (str, int)) or isinstance(key, bool):
                raise RecipeError(
                    f"a key is {_kind(key_node)}, and settings have names",
                    where=at,
                    hint="Write the name of a setting there, such as bits, without a tag.",
                    data={"reason": "bad-key"},
                )
            if key in result:
                raise RecipeError(
                    f"key {key!r} appears twice",
                    where=at,
                    hint="Remove one of the two.",
                    data={"reason": "key-twice", "key": key},
                )
            source.positions[(*path, key)] = at
            result[key] = _value(loader, value_node, (*path, key), source, count)
        return result
    if isinstance(node, yaml.SequenceNode):
        if node.tag != "tag:yaml.org,2002:seq":
            raise RecipeError(f"tag {node.tag} is not allowed", where=place, hint=_tag_hint(node), data=_tag(node))
        return [_value(loader, child, (*path, number), source, count) for number, child in enumerate(node.value)]
    return _scalar(loader, node, place)


def _scalar(loader: yaml.SafeLoader, node: yaml.Node, place: str) -> Any:
    """A text, number, boolean or null. raises RecipeError for other values, and for values that no setting can have"""
    if node.tag == "tag:yaml.org,2002:timestamp":
        return node.value
    if not node.tag.startswith("tag:yaml.org,2002:") or node.tag.rpartition(":")[2] not in SCALARS:
        raise RecipeError(f"tag {node.tag} is not allowed", where=place, hint=_tag_hint(node), data=_tag(node))
    if not is_utf8(node.value):
        raise RecipeError(
            f"{_shown(node)} contains half of a surrogate pair",
            where=place,
            hint="Write the whole character instead of its \\u escapes, or remove it.",
            data={"reason": "surrogate", "value": _shown(node)},
        )
    try:
        value = loader.construct_object(node)
    except (ValueError, OverflowError, LookupError) as error:  # a tag such as !!bool on a text that is not one
        raise RecipeError(
            f"{_shown(node)} can't be read ({error})",
            where=place,
            hint="Remove the tag, or put the value in quotes.",
            data={"reason": "unreadable", "value": _shown(node), "cause": str(error)},
        ) from error
    if isinstance(value, int) and abs(value) >= LARGEST:
        raise RecipeError(
            f"{_shown(node)} is larger than any setting, 2^63 - 1 at most",
            where=place,
            hint="See the limits of this setting in docs/settings.md.",
            data={"reason": "too-large-number", "value": _shown(node)},
        )
    return value


def _tag_hint(node: yaml.Node) -> str:
    return f"Remove {node.tag}, and write plain text, numbers, lists and maps."


def _tag(node: yaml.Node) -> dict[str, str]:
    return {"reason": "tag", "tag": node.tag}


def _kind(node: yaml.Node) -> str:
    if isinstance(node, yaml.SequenceNode):
        return "a list"
    return "a map" if isinstance(node, yaml.MappingNode) else _shown(node)


def _shown(node: yaml.Node) -> str:
    return f"{node.value!r}" if len(node.value) <= 80 else f"{node.value[:60]!r}... ({len(node.value):,} characters)"
