"""Writes the page of model families from the figures of families.py."""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass, field
from typing import Any

from family_models import FAMILIES, TITLES

WIDTH = 100
WORKS = ("exact", "works")
SAME = 70  # families whose messages agree in so many characters, apart from numbers, share a reason
MOST = 400  # characters of a message
INTRODUCTION = """<!-- Measured by scripts/bench/families.py --docs. Measure again instead of editing this page. -->

# Model families

This page shows for which model families the passes work. It is the result of a measurement with hundreds of runs, so it
is not made anew with each change. For each family, `scripts/bench/families.py --docs docs/families.md` builds a tiny
random model of its class (transformers {transformers}, torch {torch}), saves it in bfloat16, and runs a few recipes on
it. Real checkpoints have other sizes, so always run `compress-model plan` first: it says the same within seconds.

- `gptq` (4 bits, groups of 32) has "yes" if the artifact is exact: every quantized weight has the value of its codes
  bit for bit, every other tensor of the source has the same bytes, and the model that transformers loads computes the
  same bits as the source with these values. The percentage is the share of all matrices, embeddings included, that is
  quantized.
- The other columns have "yes" if the run ends and its artifact passes its verification.
- A number leads to the reason [below](#reasons), in the words of the message for the first of the families with that
  reason. `plan` tells a refusal before any work. "failed" (the run ends with an error), "crashed", "differs" and "lost
  tensors" are defects.
- An empty cell was not tried: each kind of models has its own recipes.

Of {tried} families, {exact} are quantized exactly.
"""


@dataclass
class Reason:
    """Why recipes of some families don't work, in the words of the first of them."""

    number: int
    outcome: str
    told: str
    families: list[str] = field(default_factory=list)

    def item(self) -> str:
        return _item(f"{self.number}. {self.outcome}: {', '.join(self.families)}. {_line(self.told)}")


def page(report: dict[str, Any]) -> str:
    """The whole page. report: what families.py has written"""
    rows = {name: report["rows"][name] for name in FAMILIES if name in report["rows"]}
    built = {name: row for name, row in rows.items() if "build" not in row["recipes"]}
    exact = sum(row["recipes"].get("gptq", {}).get("outcome") == "exact" for row in built.values())
    versions = {key: report[key].partition("+")[0] for key in ("transformers", "torch")}
    parts = [introduction(**versions, tried=len(built), exact=exact)]
    reasons: dict[tuple[str, str], Reason] = {}
    for kind, title in TITLES.items():
        if shown := {name: row for name, row in built.items() if row["kind"] == kind}:
            parts.append(f"## {title}\n\n{_table(shown, reasons)}")
    parts.append("## Reasons\n\n" + "\n".join(reason.item() for reason in reasons.values()))
    if missing := {name: row["recipes"]["build"]["message"] for name, row in rows.items() if name not in built}:
        listed = "\n".join(_item(f"- `{name}`: {_line(why)}") for name, why in missing.items())
        parts.append(f"## Not built\n\nNo tiny model of these could be made here.\n\n{listed}")
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def introduction(**values: Any) -> str:
    """What stands above the tables: how to read them, the versions and the number of families."""
    return _wrapped(INTRODUCTION.format(**values))


def _table(rows: dict[str, Any], reasons: dict[tuple[str, str], Reason]) -> str:
    recipes = list(dict.fromkeys(recipe for row in rows.values() for recipe in row["recipes"]))
    lines = [["family", "class", *recipes], ["--"] * (2 + len(recipes))]
    for name, row in rows.items():
        cells = [_cell(name, recipe, row["recipes"].get(recipe), reasons) for recipe in recipes]
        lines.append([f"`{name}`", row["class"], *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(name: str, recipe: str, result: dict[str, Any] | None, reasons: dict[tuple[str, str], Reason]) -> str:
    """A cell of a table. Adds the family to the reason why the recipe doesn't work."""
    if result is None:
        return ""
    outcome = result["outcome"]
    if outcome in WORKS:
        share = f", {result['quantized_share']:.0%}" if "quantized_share" in result else ""
        code = ", modeling file" if result["export_format"] == "custom" and "quantized_share" in result else ""
        return f"yes{share}{code}"
    told = _told(result)
    same = re.sub(r"\d+|'[^']*'", "0", told)[:SAME]
    reason = reasons.setdefault((outcome, same), Reason(len(reasons) + 1, outcome, told))
    reason.families.append(f"`{name}` ({recipe})")
    return f"{outcome} {reason.number}"


def _told(result: dict[str, Any]) -> str:
    """What the tool said, without the place."""
    found = result.get("differs", []) + [f"{name} is lost" for name in result.get("lost", [])]
    if found:
        return "; ".join(found[:3])
    message = result["message"].rstrip(".")
    short = message if len(message) <= MOST else f"{message[:MOST]}..."
    return f"{short}. {result['hint']}" if result.get("hint") else short


def _line(text: str) -> str:
    """Text of a message as one line of Markdown."""
    plain = " ".join(text.split())
    for sign in "\\`*_<>[]|":
        plain = plain.replace(sign, f"\\{sign}")
    return plain


def _item(text: str) -> str:
    indent = " " * (text.index(" ") + 1)
    return textwrap.fill(text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _wrapped(text: str) -> str:
    """Prose with its paragraphs and list items at the width of the pages."""
    blocks = []
    for paragraph in text.strip().split("\n\n"):
        if paragraph.startswith("- "):
            blocks.append("\n".join(map(_item, paragraph.replace("\n  ", " ").split("\n"))))
        else:
            blocks.append(paragraph if paragraph.startswith(("#", "<!--")) else _prose(paragraph))
    return "\n\n".join(blocks)


def _prose(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), WIDTH, break_long_words=False, break_on_hyphens=False)
