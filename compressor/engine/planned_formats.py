"""Follows the quantization format of each weight from step to step, and finds formats that a step can't accept."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from compressor.engine.estimates import stored_tensors
from compressor.engine.plan_records import Findings, Formats, PlanRow, Selected
from compressor.errors import CompressError, PassError, PreflightError
from compressor.layers import DENSE, find_layer
from compressor.model.stored_weight import StoredWeight
from compressor.model.structure import Structure
from compressor.model.weights import Weight
from compressor.protocol import WeightPass
from compressor.recipe.recipe import Recipe, Step
from compressor.recipe.yaml_source import dotted

# role of a weight -> the kind of module that a layer must replace (`Layer.stands_for`); all other roles are linear
STANDS_FOR = {"embedding": "embedding", "activation": "activation", "norm": "norm", "softmax": "attention"}
KINDS = {
    "linear": "the weight of a matmul",
    "embedding": "an embedding",
    "activation": "an activation",
    "norm": "a norm",
    "attention": "a softmax of attention",
}


def follow_formats(recipe: Recipe, structure: Structure, selected: Selected, findings: Findings) -> Formats:
    """The format of each weight before and after each step, and after all steps."""
    rows: list[PlanRow] = []
    formats: dict[str, StoredWeight] = {}
    counted_dense: set[str] = set()
    stored_by: dict[str, Step] = {}
    for number, step in enumerate(recipe.steps):
        settings = step.settings
        if not isinstance(settings, WeightPass):
            continue
        before = {weight.name: _format_of(weight, formats) for weight in selected[step.path]}
        accepts = settings.traits.accepts
        for weight in selected[step.path]:
            name = weight.name
            stored = settings.stored(weight) if before[name] in accepts else None
            if stored is None:
                continue
            dense_bytes = after = _dense_bytes(weight, structure.dtype)
            if stored != DENSE:
                try:
                    formats[name] = _stored_weight(step, settings, weight, stored, structure.bindings.tied)
                except CompressError as problem:
                    findings.problems.append(problem)
                    continue
                stored_by[name] = step
                after = sum(size for *_, size in stored_tensors(formats[name], structure.dtype))
            if dense_bytes > after and _may_stay_dense(settings, weight):
                counted_dense.add(name)
                after = dense_bytes
            size = {"bytes_before": dense_bytes, "bytes_after": after}
            rows.append(PlanRow(name, weight.shape, weight.role, number, step.name, before[name], stored, **size))
        if refused := [name for name, found in before.items() if found not in accepts]:
            findings.problems.append(_stored_already(step, refused, stored_by[refused[0]]))
        findings.problems += _problems_with(step, settings, selected[step.path])
    return Formats(tuple(rows), formats, frozenset(counted_dense))


def _dense_bytes(weight: Weight, dtype: torch.dtype) -> int:
    return math.prod(weight.shape) * dtype.itemsize if weight.shape else 0  # functions have no shape


def _format_of(weight: Weight, formats: dict[str, StoredWeight]) -> str:
    return formats[weight.name].format_name if weight.name in formats else DENSE


def _may_stay_dense(settings: WeightPass, weight: Weight) -> bool:
    return DENSE in settings.alternatives(weight)


def _stored_weight(step: Step, settings: WeightPass, weight: Weight, stored: str, tied: dict[str, str]) -> StoredWeight:
    """The weight in the format that a step would leave. raises CompressError if it can't have this format"""
    if find_layer(stored).stands_for != STANDS_FOR.get(weight.role, "linear"):
        raise _unfit(step, stored, weight)
    if weight.parameter in tied and _may_stay_dense(settings, weight):
        raise _undecided_tie(step, weight, tied[weight.parameter])
    if (params := settings.format_params(weight)) is None:
        raise _without_params(step, stored, weight)
    return StoredWeight(stored, params, weight)


def _without_params(step: Step, stored: str, weight: Weight) -> PassError:
    return PassError(
        f"{step.name} stores {weight.name} as {stored}, but its `format_params` is not there or returns None",
        where=dotted(step.path),
        hint=f"Have format_params of {step.name} return what {stored} is made with; an empty dict if that is nothing.",
        data={"reason": "no-format-params", "weight": weight.name, "format": stored},
    )


def _problems_with(step: Step, settings: WeightPass, chosen: Sequence[Weight]) -> list[CompressError]:
    """Problems that the pass itself finds with the weights of a step."""
    found = settings.check(chosen)
    return [
        PreflightError(
            text,
            where=dotted(step.path),
            hint=f"Change this setting of {step.name}, or select other weights with `only` and `except`.",
            data=values,
        )
        for text, values in found
    ]


def _stored_already(step: Step, refused: list[str], earlier: Step) -> PreflightError:
    return PreflightError(
        f"{step.name} needs dense weights, but {earlier.name} (steps.{earlier.path[1]}) has already "
        f"stored {len(refused)} of them, such as {refused[0]}",
        where=dotted(step.path),
        hint=f"Leave these weights out of one of the two steps with `except`, or remove the step {step.name}.",
        data={
            "reason": "stored-already",
            "pass": step.name,
            "earlier": dotted(earlier.path),
            "weights": len(refused),
            "weight": refused[0],
        },
    )


def _unfit(step: Step, stored: str, weight: Weight) -> PreflightError:
    """The problem of a format that replaces another kind of module: no matmul can replace an embedding or a norm."""
    kind = STANDS_FOR.get(weight.role, "linear")
    return PreflightError(
        f"{weight.name} is {KINDS[kind]}, and {step.name} would store it as {stored}, a format for "
        f"{KINDS[find_layer(stored).stands_for]}",
        where=dotted(step.path),
        hint=f'Set except: ["{weight.name}"] for this step.',
        data={
            "reason": "other-kind",
            "weight": weight.name,
            "kind": kind,
            "pass": step.name,
            "form": stored,
            "stands_for": find_layer(stored).stands_for,
        },
    )


def _undecided_tie(step: Step, weight: Weight, other: str) -> PreflightError:
    """The problem that config.json must say whether the output head is tied, but only the run decides it."""
    return PreflightError(
        f"{weight.name} shares its weight with {other}, and only the run decides whether {step.name} keeps it dense",
        where=dotted(step.path),
        hint=f'Set except: ["{weight.name}"] for this step.',
        data={"reason": "undecided-tie", "weight": weight.name, "other": other, "pass": step.name},
    )
