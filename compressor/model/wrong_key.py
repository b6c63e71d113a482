"""Finds the key of config.json that makes a model fail, by trying other values for each key."""

from __future__ import annotations

import copy
import re
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from compressor.model.config_values import Path, leaves, value_at

SEARCH_SECONDS = 5.0  # processor time for the search; only a failure costs it
SMALL_NUMBERS = (1, 2, 4, 8)  # tried if the default doesn't help or is unknown


def wrong_keys(
    error: Exception,
    values: dict[str, Any],
    attempt: Callable[[dict[str, Any]], object],
    defaults: Mapping[str, Any],
    aliases: Mapping[str, str],
) -> list[Path]:
    """Up to three keys such that a change of one of them alone makes `attempt` succeed.

    The likely keys are tried first, and the others only if none of these is the cause: keys that the failing lines
    read (the innermost first), keys whose value is not a positive number or has the type in the message, and keys with
    another value than the default.
    """
    ends = time.process_time() + SEARCH_SECONDS
    named, message = _named(error, aliases), str(error)
    known = {key: rank for rank, key in enumerate(named)}
    paths = {
        path: value
        for path, value in leaves(values)
        if path[0] not in ("model_type", "architectures", "auto_map") and value != value_at(defaults, path)
    }
    by_line = sorted((path for path in paths if path[-1] in known), key=lambda path: known[path[-1]])
    odd = [path for path, value in paths.items() if not _is_positive(value) or f"'{type(value).__name__}'" in message]
    for group in (by_line, [path for path in odd if path not in by_line], [*paths]):
        for others in (_defaults_of, _small_numbers):
            found: list[Path] = []
            for path in group:
                if any(inner[: len(path)] == path for inner in found):
                    continue  # a map is wrong because of its entries
                for other in others(defaults, path):
                    if time.process_time() > ends or len(found) == 3:
                        return found
                    try:
                        attempt(_changed(values, path, other))
                    except Exception:  # this change doesn't correct it
                        continue
                    found.append(path)
                    break
            if found:
                return found
    return []


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and value > 0


def _defaults_of(defaults: Mapping[str, Any], path: Path) -> list[Any]:
    """The default of the class for a key, and None."""
    default = value_at(defaults, path)
    return [None] if default is None else [default, None]


def _small_numbers(defaults: Mapping[str, Any], path: Path) -> tuple[int, ...]:
    default = value_at(defaults, path)
    return SMALL_NUMBERS if default is None or type(default) in (int, float) else ()


def _changed(values: dict[str, Any], path: Path, other: Any) -> dict[str, Any]:
    """config.json with another value for one key. None leaves the key out."""
    changed = copy.deepcopy(values)
    node = changed
    for part in path[:-1]:
        node = node[part]
    if other is None:
        del node[path[-1]]
    else:
        node[path[-1]] = other
    return changed


def _named(error: Exception, aliases: Mapping[str, str]) -> list[str]:
    """Keys of config.json that the failing lines read as attributes, the innermost first."""
    found: list[str] = []
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        words = re.findall(r"(?:\.|\[\"|\['|get\(\")([A-Za-z_]\w*)", frame.line or "")
        found += [aliases.get(word, word) for word in words]
    found += [aliases.get(word, word) for word in re.findall(r"[A-Za-z_]\w+", str(error))]
    return list(dict.fromkeys(found))
