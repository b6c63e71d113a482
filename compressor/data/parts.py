"""Divides one source into calibration and evaluation data by the hash of its documents, and finds overlaps of two.

The hash of a document decides whether it belongs to evaluation or to calibration. So its part depends only on its text,
not on the seed, the number of samples or the rest of the source, and equal documents are in the same part. A quarter of
the documents is for evaluation: the defaults use twice as many samples for calibration, and a large source has enough
of both.

The text of a file is one document, and a few long documents can't be divided evenly. They are first divided into blocks
at line ends or spaces, and neighbouring blocks of one part are joined again.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from typing import Any, Protocol, TypedDict

EVALUATION, CALIBRATION = "evaluation", "calibration"
DIVISOR = 4  # one document of this many is for evaluation
FEWEST = 64  # smallest number of documents that are divided whole; of this many the share is 16 +- 3.5
BLOCK_CHARACTERS = 8192  # about four samples of the usual 512 tokens, so that few samples contain a seam
LEAST_CHARACTERS = 128
# Phrases that two texts of a kind share (headings, boilerplate) are no leak. A document of this length is one.
LONG_CHARACTERS = 100
SHORT_SHARE = 0.01  # largest share of evaluation's characters in shorter shared documents
# Lines of two text files of a kind may be equal (of the built-in texts' long lines, 1 % are).
LINE_SHARE = 0.25


class SourcePart(TypedDict):
    """A part of a source that was divided. documents: in the part; of: how many there are"""

    name: str
    documents: int
    of: int


class Place(Protocol):
    """The source of documents: part of `data.Settings`."""

    @property
    def source(self) -> str: ...
    @property
    def format(self) -> str: ...
    @property
    def config(self) -> str | None: ...
    @property
    def split(self) -> str: ...
    @property
    def field(self) -> str: ...


def same_source(one: Place, other: Place) -> bool:
    """Whether both sections read the same documents, by their settings. Random tokens are not documents."""
    return one.source != "random" and _documents_of(one) == _documents_of(other)


def _documents_of(section: Place) -> tuple[str | None, ...]:
    """The settings that choose the documents: a file has no splits, and images have no column."""
    if section.source == "stdlib":
        return "stdlib", section.split
    name = section.source.removeprefix("dataset:")
    path = os.path.realpath(os.path.expanduser(name)) if "\0" not in name else name
    columns = (section.format, section.field)
    if os.path.isfile(path):
        return ("file", path, *(() if path.lower().endswith(".npz") else columns))
    if not os.path.isdir(path):
        return "name", name, section.config, section.split, *columns
    has_splits = os.path.exists(f"{path}/dataset_dict.json") or not os.path.exists(f"{path}/state.json")
    return ("folder", path, *columns, *((section.config, section.split) if has_splits else ()))


def is_for_evaluation(document: str | bytes) -> bool:
    return _hash(document)[0] % DIVISOR == 0


def positions_of(documents: Sequence[str | bytes], part: str) -> list[int]:
    """Numbers of the documents that belong to a part."""
    return [number for number, document in enumerate(documents) if is_for_evaluation(document) == (part == EVALUATION)]


def part_of_texts(documents: Sequence[str], part: str) -> list[str]:
    """A part of texts that may be divided: if there are few documents, a part of their blocks."""
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
    """The text in blocks that join to it again, each of `size` characters or a little more: up to the next line end if
    it is near, else up to a space, else exactly `size`."""
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
    """(documents of evaluation that are in calibration too, with their numbers; whether they are too many or too long).

    Documents are compared without white space at the ends, and with each run of white space as one. by_lines: texts of
    files, which are one document, are compared line by line.
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
    """Hash of an image's bytes, or of a text without regard to white space."""
    content = " ".join(document.split()).encode() if isinstance(document, str) else document
    return hashlib.sha256(content).digest()


def _size(document: str | bytes) -> int:
    return len(document.strip()) if isinstance(document, str) else len(document)
