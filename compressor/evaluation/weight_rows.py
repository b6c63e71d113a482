"""Selects rows of a report's `weights`, for its rendered forms."""

from __future__ import annotations

from compressor.evaluation.sections import Report, WeightRow

WORST = 5


def worst_weights(report: Report) -> list[WeightRow]:
    """The weights with the largest relative error of their output (or of the weight)."""
    known = [weight for weight in report["weights"] if error_of(weight) is not None]
    return sorted(known, key=lambda weight: -(error_of(weight) or 0))[:WORST]


def error_of(weight: WeightRow) -> float | None:
    return weight.get("output_error", weight.get("weight_error"))


def tabulated(report: Report) -> list[WeightRow]:
    """The rows of functions that lookup tables replace."""
    return [weight for weight in report["weights"] if "table_bound" in weight]


def outlier_inputs(report: Report) -> list[WeightRow]:
    """The rows of weights whose inputs' outlier features were counted: one row for each input that weights share."""
    return [weight for weight in report["weights"] if weight.get("input") == weight["name"]]
