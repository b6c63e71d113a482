"""One source for calibration and evaluation: divided by the hash of its documents; two sources: without overlap.

A document belongs to evaluation when its hash says so, and to calibration otherwise. So its part depends on its text
alone: not on the seed, the number of samples, or what else the source holds, and equal documents are in one part.
A quarter goes to evaluation: the defaults ask twice as many samples for calibration, and a large source has more than
enough of both.

The text of a file is one document; and a few long documents can't be divided evenly. They are cut into blocks first,
at line ends or spaces, and neighbours of one part are joined again.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from typing import Any, Protocol, TypedDict

EVALUATION, CALIBRATION = "evaluation", "calibration"
DIVISOR = 4  # one document in so many is for evaluation
FEWEST = 64  # documents that are divided as they are; of this many the share is 16 +- 3.5
BLOCK_CHARACTERS = 8192  # about four samples of the usual 512 tokens, so that few samples hold a seam
LEAST_CHARACTERS = 128
# Phrases that any two texts of a kind share (headings, boilerplate) are no leak. A document as long as this one is.
LONG_CHARACTERS = 100
SHORT_SHARE = 0.01  # of evaluation's characters, that shorter shared documents may make up
# Lines of two text files of one kind may well be equal (of the built-in texts' long lines, 1 % are).
LINE_SHARE = 0.25


class SourcePart(TypedDict):
    """A part of a source that was divided. documents: in the part; of: how many there are"""

    name: str
    documents: int
    of: int


class Place(Protocol):
    """Where documents come from: part of `data.Settings`."""

    @property
    def source(self) -> str: ...
    @property
    def config(self) -> str | None: ...
    @property
    def split(self) -> str: ...
    @property
    def field(self) -> str: ...


def same_source(one: Place, other: Place) -> bool:
    """Whether both sections read the same documents, as far as their settings tell; random tokens are none."""
    return one.source != "random" and _documents_of(one) == _documents_of(other)


def _documents_of(section: Place) -> tuple[str | None, ...]:
    """What the choice of documents depends on: a file has no splits, and images have no column."""
    if section.source == "stdlib":
        return "stdlib", section.split
    name = section.source.removeprefix("dataset:")
    path = os.path.realpath(os.path.expanduser(name)) if "\0" not in name else name
    if os.path.isfile(path):
        return ("file", path, None if path.lower().endswith(".npz") else section.field)
    if not os.path.isdir(path):
        return "name", name, section.config, section.split, section.field
    has_splits = os.path.exists(f"{path}/dataset_dict.json") or not os.path.exists(f"{path}/state.json")
    return ("folder", path, section.field, *((section.config, section.split) if has_splits else ()))


def is_for_evaluation(document: str | bytes) -> bool:
    return _hash(document)[0] % DIVISOR == 0


def positions_of(documents: Sequence[str | bytes], part: str) -> list[int]:
    """Which of the documents belong to a part."""
    return [number for number, document in enumerate(documents) if is_for_evaluation(document) == (part == EVALUATION)]


def part_of_texts(documents: Sequence[str], part: str) -> list[str]:
    """A part of texts that may be cut: documents that are few are cut into blocks, of which a part is taken."""
    if len(set(documents)) >= FEWEST:
        return [documents[number] for number in positions_of(documents, part)]
    size = max(LEAST_CHARACTERS, min(BLOCK_CHARACTERS, sum(map(len, documents)) // FEWEST))
    kept: list[str] = []
    for document in documents:
        joined = ""
        for block in blocks(document, size):
            if is_for_evaluation(block) == (part == EVALUATION):
                joined += block
            elif joined:
                kept.append(joined)
                joined = ""
        kept += [joined] if joined else []
    return kept


def blocks(text: str, size: int) -> list[str]:
    """The text in pieces that join to it again, each of `size` characters or a little more: up to a line end that comes
    soon, else to a space, else cut there."""
    found, start = [], 0
    while start < len(text):
        end = start + size
        if end < len(text):
            line, space = (text.find(sign, end, end + size) for sign in ("\n", " "))
            end = line + 1 if line >= 0 else space if space >= 0 else end
        found.append(text[start:end])
        start = end
    return found


def overlap(
    calibration: Sequence[Any], evaluation: Sequence[Any], *, by_lines: bool
) -> tuple[list[tuple[int, Any]], bool]:
    """(documents of evaluation that calibration holds too, with their numbers; whether they are too many or too long).

    Documents are compared without their white space at the ends and by its runs. by_lines: texts of files, which are
    one document, are compared line by line.
    """
    if by_lines:
        calibration, evaluation = (
            [line for text in texts for line in text.splitlines() if len(line.strip()) > 1]
            for texts in (calibration, evaluation)
        )
    known = {_hash(document) for document in calibration if _size(document)}
    found = [
        (number, document)
        for number, document in enumerate(evaluation, 1)
        if _size(document) and _hash(document) in known
    ]
    total, shared = sum(map(_size, evaluation)), sum(_size(document) for _, document in found)
    if by_lines:
        return found, shared > LINE_SHARE * total
    is_long = any(isinstance(document, bytes) or _size(document) >= LONG_CHARACTERS for _, document in found)
    return found, is_long or shared > SHORT_SHARE * total


def _hash(document: str | bytes) -> bytes:
    """Of an image's bytes, or of a text whose white space doesn't count."""
    content = " ".join(document.split()).encode() if isinstance(document, str) else document
    return hashlib.sha256(content).digest()


def _size(document: str | bytes) -> int:
    return len(document.strip()) if isinstance(document, str) else len(document)
