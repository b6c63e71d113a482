"""Selects weights by globs over their names, for `only` and `except`.

`*` is any text without a dot, `**` any text, `?` one character except a dot, `{a,b}` either, `{0..7}` a number range,
`[0-3]` one character of a set. A pattern without a dot matches the last part of a name. `@role` matches by role, which
is the only way to select functions (activations, norms, softmax); `except` can leave them out by name too. With a
trailing `!`, the pattern may match nothing. Docs: docs/recipe.md.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

from compressor.errors import RecipeError
from compressor.model.weights import FUNCTION_ROLES, ROLES, Weight
from compressor.storage.glob import DOT, Glob, TooManyPlaces

LEFT_OUT = ("head", "embedding", "router", "shortcut")  # unless a pattern names them
REGEX_SIGNS = re.compile(r"^re:|^\.\*|\\|[\^$|()+]")
MAX_ALTERNATIVES = 1000


def compile_pattern(pattern: str, where: str) -> Glob:
    """The glob, which matches whole names. raises RecipeError for a text that is not a glob"""
    body = pattern.removesuffix("!")
    if REGEX_SIGNS.search(body):
        guess = re.sub(r"^re:|[\^$\\()+]", "", body).replace(".*", "**").replace("***", "**")
        raise RecipeError(
            f"pattern {pattern[:200]!r} looks like a regular expression",
            where=where,
            hint=f"Write it as a glob: {guess[:200]!r}.",
            data={"reason": "regex", "pattern": pattern[:200], "glob": guess[:200]},
        )
    if not body:
        raise RecipeError("the pattern is empty", where=where, hint="Write '*' to match every weight.")
    depth = _plain(body)
    text = body if "." in depth or body == "**" else f"**.{body}"
    try:
        glob = Glob()
        at = 0
        if text.startswith("**."):  # `**.` may match nothing
            at = _translate("**.", glob, 0)
            glob.skips[0].append(at)
            text = text[3:]
        glob.last = _translate(text, glob, at)
        return glob
    except ValueError as error:
        reason = "too-many-places" if isinstance(error, TooManyPlaces) else "malformed"
        raise RecipeError(
            f"pattern {pattern[:200]!r} is malformed ({error})",
            where=where,
            hint="Write a glob, such as q_proj, model.layers.*.mlp.** or @experts.",
            data={"reason": reason, "pattern": pattern[:200], "cause": str(error)},
        ) from error


def select(only: Sequence[str], excluded: Sequence[str], weights: Sequence[Weight], where: str) -> list[Weight]:
    """The weights that `only` matches and `except` doesn't, in their own order.

    raises  RecipeError for a pattern that matches nothing, or only weights that `except` leaves out
    """
    out = _match_all(excluded, weights, f"{where}.except")
    chosen: set[str] = set()
    matrices = [weight for weight in weights if not weight.is_function]
    for number, pattern in enumerate(only):
        place = f"{where}.only[{number}]"
        found = _match_all([pattern], weights if pattern.startswith("@") else matrices, place)
        if found and found <= out and not pattern.endswith("!"):
            raise RecipeError(
                f"all {len(found)} weights that {pattern!r} matches are left out by `except`",
                where=place,
                hint=f"Remove {pattern!r} from `only`, or remove these weights from `except`.",
                data={"reason": "left-out", "pattern": pattern, "weights": len(found)},
            )
        chosen |= found
    left = chosen - out
    return [weight for weight in weights if weight.name in left]


def names_it(patterns: Sequence[str], weights: Sequence[Weight], where: str) -> set[str]:
    """Names of the weights that a pattern names explicitly.

    `*`, `**`, the roles of most weights and patterns with a `!` match many weights and name none. A name, a part of
    one, or a role that `*` leaves out names weights.
    """
    most = {f"@{role}" for role in ROLES if role not in (*LEFT_OUT, "experts")}
    meant = [p for p in patterns if re.search(r"\w", p) and p not in most and not p.endswith("!")]
    optional = [pattern + "!" for pattern in meant]
    return {weight.name for weight in select(optional, (), weights, where)} if meant else set()


def _match_all(patterns: Sequence[str], weights: Sequence[Weight], where: str) -> set[str]:
    result: set[str] = set()
    for pattern in patterns:
        if pattern.startswith("@"):
            role = _role(pattern, where)
            found = {weight.name for weight in weights if weight.role == role}
        else:
            expression = compile_pattern(pattern, where)
            plain = not re.search(r"\w", pattern)
            matches_all = pattern.removesuffix("!") in ("*", "**")
            found = {
                weight.name
                for weight in weights
                if not (plain and weight.role in (*LEFT_OUT, *FUNCTION_ROLES))
                and (matches_all or expression.fullmatch(weight.name))
            }
        if not found and not pattern.endswith("!"):
            names = [weight.name for weight in weights]
            parts = sorted({name.rpartition(".")[2] for name in names})
            wanted = pattern.strip("*").strip(".")
            near = difflib.get_close_matches(wanted, [*parts, *names], 3, 0.3)
            raise RecipeError(
                f"pattern {pattern!r} matches none of {len(names)} weights.",
                where=where,
                hint=f"Use names such as {', '.join(near or parts[:3])}; compress-model inspect lists all of them.",
                data={"reason": "matches-none", "pattern": pattern, "weights": len(names), "near": near or parts[:3]},
            )
        result |= found
    return result


def _role(pattern: str, where: str) -> str:
    role = pattern[1:].removesuffix("!")
    if role not in ROLES:
        near = difflib.get_close_matches(role, ROLES, 1)
        raise RecipeError(
            f"unknown role {pattern!r}",
            where=where,
            hint=f"Did you mean @{near[0]}?"
            if near
            else "Use one of the roles " + ", ".join(f"@{role}" for role in ROLES),
            data={"reason": "unknown-role", "pattern": pattern, "near": near},
        )
    return role


def _plain(pattern: str) -> str:
    """The pattern without its braces and brackets, in which a dot is no separator."""
    return re.sub(r"\{[^{}]*\}|\[[^\[\]]*\]", "", pattern)


def _translate(text: str, glob: Glob, start: int) -> int:
    """Add the pattern to the places of a glob, beginning at `start`. Returns the place after it."""
    place, at = start, 0
    while at < len(text):
        sign = text[at]
        if text.startswith("**", at):
            place, at = glob.run(place, lambda sign: True), at + 2
        elif sign == "*":
            place, at = glob.run(place, lambda sign: sign != DOT), at + 1
        elif sign == "?":
            place, at = glob.sign(place, lambda sign: sign != DOT), at + 1
        elif sign == "{":
            end = text.find("}", at)
            if end < 0:
                raise ValueError("a brace is not closed")
            place, at = _alternatives(text[at + 1 : end], glob, place), end + 1
        elif sign == "[":
            end = text.find("]", at)
            body = text[at + 1 : end]
            if end < 0 or not re.fullmatch(r"!?(?:[\w](?:-[\w])?)+", body):
                raise ValueError("a bracket is not a set of characters")
            members = re.compile("[" + body.replace("!", "^") + "]")
            place, at = glob.sign(place, lambda sign, one=members: one.fullmatch(sign) is not None), end + 1  # type: ignore[misc]
        elif sign in "]}":
            raise ValueError(f"{sign!r} has no beginning")
        else:
            place, at = glob.text(place, sign), at + 1
    return place


def _alternatives(body: str, glob: Glob, start: int) -> int:
    span = re.fullmatch(r"(\d{1,9})\.\.(\d{1,9})", body)
    if span:
        first, last = int(span[1]), int(span[2])
        if last < first or last - first >= MAX_ALTERNATIVES:
            raise ValueError(f"range {body} must be ascending and have at most {MAX_ALTERNATIVES} numbers")
        ends = [glob.text(start, str(number)) for number in range(first, last + 1)]
    elif "{" in body:
        raise ValueError("braces can't be nested")
    else:
        ends = [_translate(part, glob, start) for part in body.split(",")]
    behind = glob.place()
    for end in ends:
        glob.skips[end].append(behind)
    return behind
