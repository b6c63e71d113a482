"""Groups names of tensors or weights by kind, so that those of a model of many blocks fit on a screen."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence


def kinds(names: Sequence[str], how: Sequence[Hashable]) -> list[tuple[str, list[int]]]:
    """(name of the kind, positions of its names), in the order in which the kinds appear.

    Names of a kind have the same place in different blocks (or experts), and the same `how`. The name of a kind has `*`
    for all numbers that any name has there, or ranges: model.layers.0,2-5.mlp.down_proj

    how  what happens to each name
    """
    found: dict[tuple[Hashable, ...], list[int]] = {}
    everywhere: dict[tuple[str, ...], list[set[int]]] = {}  # pattern -> at each `*` the numbers of all its names
    for position, (name, happens) in enumerate(zip(names, how, strict=True)):
        pattern = _pattern(name)
        found.setdefault((pattern, happens), []).append(position)
        seen = everywhere.setdefault(pattern, [set() for part in pattern if part == "*"])
        for known, number in zip(seen, _numbers(name), strict=True):
            known.add(number)
    return [
        (_label([names[position] for position in alike], everywhere[_pattern(names[alike[0]])]), alike)
        for alike in found.values()
    ]


def _pattern(name: str) -> tuple[str, ...]:
    return tuple("*" if part.isdigit() else part for part in name.split("."))


def _numbers(name: str) -> list[int]:
    return [int(part) for part in name.split(".") if part.isdigit()]


def _label(alike: Sequence[str], everywhere: Sequence[set[int]]) -> str:
    here = [set(column) for column in zip(*map(_numbers, alike), strict=True)]
    labels = iter(
        "*" if len(held) > 1 and held == known else ranges(held) for held, known in zip(here, everywhere, strict=True)
    )
    return ".".join(next(labels) if part == "*" else part for part in _pattern(alike[0]))


def ranges(numbers: Iterable[int]) -> str:
    """Numbers as text, neighbours as a range: {0, 2, 3, 4} is 0,2-4."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)
