"""Matches globs in linear time for any pattern.

A regular expression tries one division of a name after the other, and many `**` give too many of them. This matcher
follows all places of the pattern that the name can have reached at once. Similar names give the same sets of places, so
the next set is cached.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

MAX_PLACES = 20_000  # for one pattern; a range of 1000 numbers has 4000
DOT = "."
Accepts = Callable[[str], bool]


class TooManyPlaces(ValueError):
    """A pattern with more than `MAX_PLACES` places."""


@dataclass
class Glob:
    """Places are numbered; the first is 0.

    steps    place -> (test of a character, next place)
    skips    place -> places that are reached without a character
    last     place at the end of a whole name
    """

    steps: list[list[tuple[Accepts, int]]] = field(default_factory=lambda: [[]])
    skips: list[list[int]] = field(default_factory=lambda: [[]])
    last: int = 0
    _known: dict[tuple[frozenset[int], str], frozenset[int]] = field(default_factory=dict, repr=False)

    def fullmatch(self, name: str) -> bool:
        """Whether the glob matches the whole name."""
        places = self._with_skips({0})
        for sign in name:
            key = (places, sign)
            if key not in self._known:
                reached = {to for place in places for accepts, to in self.steps[place] if accepts(sign)}
                self._known[key] = self._with_skips(reached)
            places = self._known[key]
        return self.last in places

    def place(self) -> int:
        """A new place. raises TooManyPlaces"""
        if len(self.steps) == MAX_PLACES:
            raise TooManyPlaces(f"it has more than {MAX_PLACES:,} places to be in")
        self.steps.append([])
        self.skips.append([])
        return len(self.steps) - 1

    def sign(self, at: int, accepts: Accepts) -> int:
        """Add one character after a place. Returns the place after it."""
        to = self.place()
        self.steps[at].append((accepts, to))
        return to

    def text(self, at: int, text: str) -> int:
        for letter in text:
            at = self.sign(at, lambda sign, letter=letter: sign == letter)  # type: ignore[misc]
        return at

    def run(self, at: int, accepts: Accepts) -> int:
        """Add any number of characters after a place."""
        to = self.place()
        self.skips[at].append(to)
        self.steps[to].append((accepts, to))
        return to

    def _with_skips(self, places: set[int]) -> frozenset[int]:
        found, waiting = set(places), list(places)
        while waiting:
            for to in self.skips[waiting.pop()]:
                if to not in found:
                    found.add(to)
                    waiting.append(to)
        return frozenset(found)
