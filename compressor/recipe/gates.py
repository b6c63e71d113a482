"""Checks quality gates: bounds on measured values that decide the exit code of a CI job.

NAME is an upper bound on the value after compression, NAME_min a lower bound. NAME_increase_percent bounds the relative
increase, and NAME_drop_points bounds before - after in percentage points. `GATED` lists the names and forms.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

from compressor.errors import UsageError

if TYPE_CHECKING:
    from typing_extensions import ReadOnly

VALUE, CHANGE = ("", "_min"), ("_increase_percent", "_drop_points")


class GateRow(TypedDict):
    """A gate in the report. margin: distance of the value to the bound; interval: the interval that decided, if any."""

    name: str
    metric: str
    bound: float
    value: float | None
    passed: bool
    margin: float | None
    interval: list[float | None] | None


class Pair(TypedDict, total=False):
    """What a gate reads of a value that was measured on both sides."""

    before: ReadOnly[float | None]
    after: ReadOnly[float | None]


class SampledPair(Pair, total=False):
    """intervals: of the value and of its changes, by the form of a gate"""

    intervals: ReadOnly[dict[str, list[float | None]]]


class Ratio(TypedDict):
    """What a gate reads of the sizes."""

    ratio: ReadOnly[float | None]


@dataclass(frozen=True)
class Gated:
    """metrics   the entries of `eval.metrics`, any of which measures it; empty: it is always known
    suffixes  allowed suffixes of a gate on it; a change can be bounded only if `before` is measured too
    compares  whether the value itself compares two models
    """

    metrics: frozenset[str]
    suffixes: tuple[str, ...]
    compares: bool


GATED = {
    **{name: Gated(frozenset({name}), VALUE + CHANGE, False) for name in ("perplexity", "accuracy")},
    **{name: Gated(frozenset({name}), VALUE, True) for name in ("kl_divergence", "top1_agreement", "hidden_cosine")},
    "size_ratio": Gated(frozenset(), VALUE, True),
    **{
        name: Gated(frozenset({"speed", "memory"}), VALUE, True)
        for name in ("decode_speed_ratio", "prefill_speed_ratio", "load_seconds_ratio", "peak_memory_ratio")
    },
}
GATE_NAMES = tuple(metric + suffix for metric, gated in GATED.items() for suffix in gated.suffixes)
SPEED_RATIOS = {
    "decode_speed_ratio": "decode_tokens_per_second",
    "prefill_speed_ratio": "prefill_tokens_per_second",
    "load_seconds_ratio": "load_seconds",
    "peak_memory_ratio": "peak_rss_bytes",
}


def split_gate(name: str) -> tuple[str, str]:
    """NAME_min -> (NAME, "_min"); a name without suffix has the form ""."""
    suffix = next((known for known in (*CHANGE, "_min") if name.endswith(known)), "")
    return name.removesuffix(suffix), suffix


def unknown_gate(name: str) -> str | None:
    """The error in a gate's name with the nearest known names; None if it is known."""
    if name in GATE_NAMES:
        return None
    metric, _ = split_gate(name)
    if metric in GATED:
        names = ", ".join(metric + known for known in GATED[metric].suffixes)
        return f"{metric} has no value before, so {name!r} has nothing to bound; there are {names}"
    near = difflib.get_close_matches(name, GATE_NAMES, 1)
    return f"unknown gate {name!r}; " + (f"did you mean {near[0]!r}?" if near else f"known: {', '.join(GATED)}")


def compares_models(name: str) -> bool:
    """Whether a gate needs a second model: a change, a ratio, or a distance between two."""
    metric, suffix = split_gate(name)
    return suffix in CHANGE or GATED[metric].compares


def unmeasured_gates(names: Iterable[str], metrics: Iterable[str]) -> dict[str, str]:
    """Gate -> the missing entry of `eval.metrics`, for gates that could never hold."""
    asked = set(metrics)
    lacking = {name: GATED[split_gate(name)[0]].metrics for name in names}
    return {name: " or ".join(sorted(needed)) for name, needed in lacking.items() if needed and not needed & asked}


def read_gates(texts: Iterable[str], where: str) -> dict[str, float]:
    """Parse the NAME=BOUND texts of an option. raises UsageError"""
    gates = {}
    for text in texts:
        name, equals, bound = text.partition("=")
        if not equals:
            raise UsageError(
                f"{text!r} does not have the form NAME=BOUND",
                where=where,
                hint="Write it as in size_ratio=0.6.",
                data={"reason": "no-bound", "gate": text},
            )
        if (problem := unknown_gate(name)) is not None:
            raise UsageError(
                problem,
                where=where,
                hint="Write a name that docs/recipe.md lists under gates.",
                data={"reason": "unknown-gate", "gate": name},
            )
        try:
            gates[name] = float(bound)
        except ValueError:
            gates[name] = math.nan
        if not math.isfinite(gates[name]):
            raise UsageError(
                f"the bound {bound!r} of {name} is not a number",
                where=where,
                hint=f"Write it as in {name}=0.6.",
                data={"reason": "bad-bound", "gate": name, "bound": bound},
            )
    return gates


def check_gates(
    gates: Mapping[str, float],
    metrics: Mapping[str, SampledPair],
    speed: Mapping[str, Pair],
    sizes: Ratio,
    confidence: float | None = None,
) -> list[GateRow]:
    """One row per gate. A gate on a value that was not measured fails.

    With a confidence, a gate whose value is beyond the bound still passes unless the whole bootstrap interval of the
    same quantity (the metric's `intervals`) is beyond the bound.
    """
    return [_check(name, bound, metrics, speed, sizes, confidence) for name, bound in sorted(gates.items())]


def failed_gates(gates: Iterable[GateRow]) -> str:
    """The gates that don't hold, in one line; empty if all hold."""
    return ", ".join(
        f"{gate['name']} {'was not measured' if gate['value'] is None else format(gate['value'], '.6g')}"
        f" (bound {gate['bound']:g})"
        for gate in gates
        if not gate["passed"]
    )


def _check(
    name: str,
    bound: float,
    metrics: Mapping[str, SampledPair],
    speed: Mapping[str, Pair],
    sizes: Ratio,
    confidence: float | None,
) -> GateRow:
    metric, suffix = split_gate(name)
    row = _ratio_row(metric, speed, sizes) if metric.endswith("_ratio") else metrics.get(metric)
    before, after = (row.get("before"), row.get("after")) if row else (None, None)
    intervals = row.get("intervals", {}) if row and confidence is not None else {}
    interval = intervals.get(suffix[1:] if suffix in CHANGE else "value")
    value = _value(suffix, before, after)
    lower = suffix == "_min"
    passed = value is not None and (value >= bound if lower else value <= bound)
    if value is not None and not passed and interval:
        low, high = interval
        if low is not None and high is not None:
            passed = high >= bound if lower else low <= bound
    margin = None if value is None else (value - bound if lower else bound - value)
    return {
        "name": name,
        "metric": metric,
        "bound": bound,
        "value": value,
        "passed": passed,
        "margin": margin,
        "interval": interval,
    }


def _ratio_row(metric: str, speed: Mapping[str, Pair], sizes: Ratio) -> SampledPair | None:
    if metric == "size_ratio":
        return {"after": sizes["ratio"]}
    row = speed.get(SPEED_RATIOS.get(metric, ""))
    before, after = (row.get("before"), row.get("after")) if row else (None, None)
    return {"after": after / before} if before and after is not None else None


def _value(suffix: str, before: float | None, after: float | None) -> float | None:
    if after is None:
        return None
    if suffix == "_increase_percent":
        return None if not before else 100 * (after - before) / before
    if suffix == "_drop_points":
        return None if before is None else 100 * (before - after)
    return after
