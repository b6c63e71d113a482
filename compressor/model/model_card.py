"""Reads the licence from the front matter of a model card (README.md)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from compressor.model.model_files import regular_file
from compressor.process.utf8 import is_utf8
from compressor.storage.file_names import CARD

MAX_BYTES = 1 << 20  # number of bytes of a card that are read; front matter is short
MAX_LENGTH = 300  # characters of one value
KEYS = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class Licence:
    """A licence as the hub defines it: identifiers such as apache-2.0, and for `other` a name and a link or file.

    identifiers  in the card's order; usually one, () if the card has none
    """

    identifiers: tuple[str, ...] = ()
    name: str | None = None
    link: str | None = None

    def front_matter(self) -> dict[str, Any]:
        """The keys for a model card: the stated ones, or `other`."""
        one = self.identifiers[0] if len(self.identifiers) == 1 else list(self.identifiers) or "other"
        stated = {"license": one, "license_name": self.name, "license_link": self.link}
        return {key: value for key, value in stated.items() if value is not None}


def read_licence(directory: Path) -> Licence:
    """The licence in a directory's card. It is empty if the card has none or its front matter is not YAML."""
    path = directory / CARD
    if not path.is_symlink() and not path.exists():
        return Licence()
    with regular_file(directory, path).open("rb") as file:
        text = file.read(MAX_BYTES).decode("utf-8-sig", errors="replace")
    stated = _front_matter(text)
    found = stated.get("license")
    identifiers = tuple(filter(None, map(_text, found if isinstance(found, list) else [found])))
    return Licence(identifiers, _text(stated.get("license_name")), _text(stated.get("license_link")))


def _front_matter(text: str) -> dict[str, Any]:
    lines = text.splitlines()
    if not lines or lines[0].rstrip() != "---":
        return {}
    ends = [number for number, line in enumerate(lines[1:], 1) if line.rstrip() in ("---", "...")]
    if not ends:
        return {}
    lines = lines[1 : ends[0]]
    whole = _load("\n".join(lines))
    if isinstance(whole, dict):
        return whole
    result: dict[str, Any] = {}  # another part of it is not YAML: read only the keys about the licence
    for key in KEYS:
        for number, line in enumerate(lines):
            if re.match(rf"{key}\s*:", line):
                following = lines[number + 1 :]
                count = next(
                    (n for n, more in enumerate(following) if not re.match(r"\s+\S|-\s", more)), len(following)
                )
                alone = _load("\n".join([line, *following[:count]]))
                result[key] = alone.get(key) if isinstance(alone, dict) else None
                break
    return result


def _load(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError):  # a date or number that isn't one, too
        return None


def _text(value: Any) -> str | None:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return None
    text = " ".join(str(value).split())
    return text[:MAX_LENGTH] or None if is_utf8(text) else None
