"""Finds the weights and functions of each step: what its patterns select, without what can't be stored."""

from __future__ import annotations

from collections.abc import Sequence

from compressor.engine.plan_records import Findings, Selected, SkippedRow, StepPath, sharer
from compressor.errors import Because, CompressError, PreflightError, WidthError, values_of
from compressor.layers import DENSE
from compressor.model.functions import Functions, find_functions
from compressor.model.replaceable import why_not_replaceable
from compressor.model.structure import Structure
from compressor.model.weights import FUNCTION_ROLES, Weight
from compressor.protocol import WeightPass
from compressor.recipe.recipe import Recipe, Step
from compressor.recipe.weight_patterns import LEFT_OUT, names_it, select
from compressor.recipe.yaml_source import dotted


def named_functions(recipe: Recipe, structure: Structure, findings: Findings) -> Functions:
    """The model's functions, if a step names any. Adds problems for those that can't be replaced in this model."""
    named: dict[str, StepPath] = {}
    for step in recipe.steps:
        for pattern in step.settings.only:
            named.setdefault(pattern, step.path)
    roles = [role for role in FUNCTION_ROLES if {f"@{role}", f"@{role}!"} & named.keys()]
    if not roles:
        return Functions()
    functions = find_functions(structure)
    findings.problems += [
        PreflightError(
            f"the {role} of {structure.architecture} can't be replaced: {functions.refused[role]}",
            where=dotted(named[f"@{role}"]),
            hint=f"Leave out @{role}, or write @{role}! where it may be absent.",
            data={
                "reason": "not-replaced",
                "role": role,
                "model": structure.architecture,
                "because": values_of(functions.refused[role]),
            },
        )
        for role in roles
        if role in functions.refused and f"@{role}" in named
    ]
    return functions


def select_weights(recipe: Recipe, structure: Structure, functions: Functions, findings: Findings) -> Selected:
    """The weights that the patterns of each step select, without functions that can't be replaced in this model."""
    whole = {weight.name: why for _, weight, why in structure.whole}
    candidates = [weight for _, weight in structure.weights()]
    candidates += [weight for _, weight, _ in structure.whole]
    candidates += [function for _, function in functions.all()]
    known: dict[type, bool] = {}
    selected: dict[StepPath, tuple[Weight, ...]] = {}
    for step in recipe.steps:
        if not isinstance(step.settings, WeightPass):
            selected[step.path] = ()
            continue
        try:
            chosen = select(step.settings.only, step.settings.except_, candidates, dotted(step.path))
        except CompressError as problem:
            findings.problems.append(problem)
            chosen = []
        chosen = _without_shared_tables(structure, step, chosen, candidates, findings)
        reasons = {}
        for weight in chosen:
            is_read = structure.is_read_elsewhere(weight)
            why = whole.get(weight.name) or why_not_replaceable(structure.model, weight, known, is_read)
            if why is not None:
                reasons[weight.name] = why
        selected[step.path] = tuple(_without_unfit(step, chosen, reasons, findings))
    return selected


def without_odd_widths(recipe: Recipe, selected: Selected, findings: Findings) -> Selected:
    """Remove weights that no group size divides, unless a pattern names them."""
    return {step.path: _of_even_widths(step, selected[step.path], findings) for step in recipe.steps}


def _of_even_widths(step: Step, chosen: Sequence[Weight], findings: Findings) -> tuple[Weight, ...]:
    reasons, settings = {}, step.settings
    for weight in chosen:
        if not isinstance(settings, WeightPass) or weight.is_function or settings.stored(weight) in (None, DENSE):
            continue
        try:
            settings.format_params(weight)
        except WidthError:
            why = f"no group size divides its {weight.in_features} inputs"
            reasons[weight.name] = Because(why, reason="odd-width", inputs=weight.in_features)
        except CompressError:
            pass  # `planned_formats` meets the same error and adds the problem
    meant = names_it(step.settings.only, chosen, "steps") if reasons else set()
    if all(weight.name in reasons for weight in chosen):
        return tuple(chosen)  # no weight would be left: each is a problem
    unmeant = {name: why for name, why in reasons.items() if name not in meant}
    return tuple(_without_unfit(step, chosen, unmeant, findings))


def _without_unfit(
    step: Step, chosen: Sequence[Weight], reasons: dict[str, Because], findings: Findings
) -> Sequence[Weight]:
    """The weights of a step that can be stored. A weight that a pattern names and that can't be stored is a problem.
    Weights that only a general pattern selects stay dense, with one warning for each reason.

    reasons  weight name -> why it can't be stored
    """
    if not reasons:
        return chosen
    meant = names_it(step.settings.only, chosen, dotted(step.path))
    by_reason: dict[Because, list[str]] = {}
    for name, why in reasons.items():
        by_reason.setdefault(why, []).append(name)
    for why, names in by_reason.items():
        if refused := [name for name in names if name in meant]:
            findings.problems.append(_not_storable(step, refused, why))
        if kept := [name for name in names if name not in meant]:
            values = {"pass": step.name, "weights": len(kept), "because": values_of(why)}
            findings.warn("stays-dense", kept[0], f"{len(kept)} weights stay dense, such as {kept[0]}: {why}", **values)
    left = [weight for weight in chosen if weight.name not in reasons]
    if not left and not any(weight.name in meant for weight in chosen):
        findings.problems.append(_no_weight_left(step, next(iter(reasons.values()))))
    return left


def _not_storable(step: Step, refused: list[str], why: Because) -> PreflightError:
    count = f" ({len(refused)} weights)" if len(refused) > 1 else ""
    return PreflightError(
        f"can't be stored by {step.name}{count}: {why}",
        where=refused[0],
        hint="End the pattern that names it with `!`, or add the name to `except`; the weight then stays dense.",
        data={"reason": "not-storable", "pass": step.name, "weights": len(refused), "because": values_of(why)},
    )


def _no_weight_left(step: Step, why: Because) -> PreflightError:
    return PreflightError(
        f"no weight is left for {step.name}: {why}",
        where=dotted(step.path),
        hint=f"Set another group or block size, or remove the step {step.name} for this model.",
        data={"reason": "no-weight-left", "pass": step.name, "because": values_of(why)},
    )


def _without_shared_tables(
    structure: Structure, step: Step, chosen: list[Weight], candidates: list[Weight], findings: Findings
) -> list[Weight]:
    """Keep an embedding dense that the output head multiplies by, if only patterns with `!` name it: they may fail."""
    only = step.settings.only
    firm = [pattern for pattern in only if not pattern.endswith("!")]
    if not chosen or len(firm) == len(only):
        return chosen
    meant = {weight.name for weight in select(firm, step.settings.except_, candidates, dotted(step.path))}
    kept = []
    for weight in chosen:
        is_sought = weight.role == "embedding" and weight.name not in meant
        other = sharer(weight, structure.bindings.tied) if is_sought else None
        if other is None:
            kept.append(weight)
            continue
        message = f"shares its weight with {other}, which multiplies by it, so it stays dense; the ! allows that"
        findings.warn("shared-embedding", weight.name, message, other=other)
    return kept


def skipped_weights(structure: Structure, selected: Selected) -> tuple[SkippedRow, ...]:
    """The weights that no step changes, each with the reason."""
    touched = {weight.name for chosen in selected.values() for weight in chosen}
    reasons = [(w.name, _why_skipped(w, structure)) for _, w in structure.weights() if w.name not in touched]
    reasons += [(weight.name, str(why)) for _, weight, why in structure.whole]
    reasons += [(name, f"stays dense: it {why}") for name, why in structure.left_dense.items()]
    return tuple({"name": name, "reason": why} for name, why in reasons)


def _why_skipped(weight: Weight, structure: Structure) -> str:
    if weight.role == "embedding" and (other := sharer(weight, structure.bindings.tied)) is not None:
        return f"shares its weight with {other}"
    if weight.role in LEFT_OUT:
        return f"the {weight.role} stays dense unless named"
    return "no step selects it"
