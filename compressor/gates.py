"""Quality gates: a bound on a measured value decides the exit code of a CI job."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def check_gates(
    gates: Mapping[str, float],
    metrics: Mapping[str, Any],
    speed: Mapping[str, Any],
    sizes: Mapping[str, Any],
    confidence: float | None = None,
) -> list[dict[str, Any]]:
    """One row per gate: name, bound, value, passed, margin, interval, metric. What wasn't measured fails.

    NAME is an upper bound on the value after; NAME_min a lower one; NAME_increase_percent bounds the relative rise;
    NAME_drop_points bounds before - after, in percent points. With a confidence, a gate that the value misses still
    passes unless the bootstrap interval of that same quantity (the metric's `intervals`) lies wholly beyond the bound.
    """
    return [_check(name, bound, metrics, speed, sizes, confidence) for name, bound in sorted(gates.items())]


def _check(
    name: str,
    bound: float,
    metrics: Mapping[str, Any],
    speed: Mapping[str, Any],
    sizes: Mapping[str, Any],
    confidence: float | None,
) -> dict[str, Any]:
    metric, form = name, ""
    for suffix in ("_min", "_increase_percent", "_drop_points"):
        if name.endswith(suffix):
            metric, form = name.removesuffix(suffix), suffix
    row = _ratio_row(metric, speed, sizes) if metric.endswith("_ratio") else metrics.get(metric)
    before, after = (row.get("before"), row.get("after")) if row else (None, None)
    intervals = row.get("intervals", {}) if row and confidence is not None else {}
    interval = intervals.get(form[1:] if form not in ("", "_min") else "value")
    value = _value(form, before, after)
    lower = form == "_min"
    passed = value is not None and (value >= bound if lower else value <= bound)
    if value is not None and not passed and interval and None not in interval:
        passed = interval[1] >= bound if lower else interval[0] <= bound
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


def _ratio_row(metric: str, speed: Mapping[str, Any], sizes: Mapping[str, Any]) -> dict[str, Any] | None:
    if metric == "size_ratio":
        return {"after": sizes["ratio"]}
    names = {
        "decode_speed_ratio": "decode_tokens_per_second",
        "prefill_speed_ratio": "prefill_tokens_per_second",
        "load_seconds_ratio": "load_seconds",
        "peak_memory_ratio": "peak_rss_bytes",
    }
    row = speed.get(names.get(metric, ""))
    if not row or not row.get("before") or row.get("after") is None:
        return None
    return {"after": row["after"] / row["before"]}


def _value(form: str, before: float | None, after: float | None) -> float | None:
    if after is None:
        return None
    if form == "_increase_percent":
        return None if not before else 100 * (after - before) / before
    if form == "_drop_points":
        return None if before is None else 100 * (before - after)
    return after
