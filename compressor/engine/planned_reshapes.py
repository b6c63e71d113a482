"""What the steps that redefine the model will make of it, one after the other, before any of them has run."""

from __future__ import annotations

from compressor.analysis.model_facts import facts_of
from compressor.engine.plan_records import (
    Findings,
    Reshape,
    parameter_count,
)
from compressor.errors import CompressError, ModelError, PreflightError
from compressor.model.redefined_structure import check_redefinition
from compressor.model.structure import Structure
from compressor.protocol import RewritePass, TokenPass, WeightPass
from compressor.recipe.recipe import Recipe, Step
from compressor.recipe.yaml_source import dotted


def follow_reshapes(
    recipe: Recipe, source: Structure, known: tuple[Reshape, ...], findings: Findings
) -> tuple[Reshape, ...]:
    """The model after each reshaping step, beginning with the known ones. It ends at the first step with a problem."""
    reshapes = list(known)
    done = {reshape.step.path for reshape in known}
    for number, sweep in enumerate(recipe.sweeps):
        for step in sweep:
            if isinstance(step.settings, WeightPass) or step.path in done:
                continue
            before = reshapes[-1].after if reshapes else source
            try:
                _check_place(recipe, number, step)
                reshapes.append(_planned_reshape(step, before, parameter_count(source)))
            except CompressError as problem:
                findings.problems.append(problem)
                return tuple(reshapes)
            except Exception as error:  # any: a pass calls the model's own code in unusual ways
                findings.problems.append(_cannot_reshape(step, before, error))
                return tuple(reshapes)
    return tuple(reshapes)


def _planned_reshape(step: Step, before: Structure, source_parameters: int) -> Reshape:
    """What a reshaping step promises about the model before it has made a choice."""
    facts = facts_of(before, source_parameters)
    assert isinstance(step.settings, RewritePass | TokenPass)
    redefinition = step.settings.redefine(facts, None)
    after = check_redefinition(before, redefinition, dotted(step.path), isinstance(step.settings, RewritePass))
    return Reshape(step, before, facts, redefinition, after)


def _cannot_reshape(step: Step, structure: Structure, error: Exception) -> ModelError:
    refusal = ModelError(
        f"{step.name} can't find this model's structure ({type(error).__name__}: {' '.join(str(error).split())[:200]})",
        where=structure.architecture,
        hint="Use another pass. If transformers runs the model, report this message with its config.json.",
        data={"reason": "not-taken-apart", "pass": step.name, "error": type(error).__name__},
    )
    refusal.__cause__ = error
    return refusal


def _check_place(recipe: Recipe, number: int, step: Step) -> None:
    """raises PreflightError for a reshaping step that shares a sweep, comes too late, or selects only some weights"""
    where = dotted(step.path)
    if len(recipe.sweeps[number]) > 1:
        raise PreflightError(
            f"{step.name} changes the model itself and can't share a sweep",
            where=where,
            hint=f"Write {step.name} as a step of its own, outside of `sweep`.",
            data={"reason": "shares-sweep", "pass": step.name},
        )
    earlier = [s for sweep in recipe.sweeps[:number] for s in sweep]
    rewrites = isinstance(step.settings, RewritePass)
    if rewrites and (stored := [s.name for s in earlier if isinstance(s.settings, WeightPass)]):
        raise PreflightError(
            f"{step.name} needs dense weights everywhere, and {stored[0]} comes before it",
            where=where,
            hint=f"Move the step {step.name} before {stored[0]} in the recipe.",
            data={"reason": "needs-dense", "pass": step.name, "before": stored[0]},
        )
    if changed := [s.name for s in earlier if isinstance(s.settings, TokenPass)]:
        raise PreflightError(
            f"{step.name} needs blocks without token gates, and {changed[0]} comes before it",
            where=where,
            hint=f"Move the step {step.name} before {changed[0]}, and use {changed[0]} only once.",
            data={"reason": "needs-own-blocks", "pass": step.name, "before": changed[0]},
        )
    if step.settings.only != ("*",) or step.settings.except_:
        raise PreflightError(
            f"{step.name} changes the whole residual stream and can't be limited to some weights"
            if rewrites
            else f"{step.name} changes no weights, so there are none to select",
            where=where,
            hint=f"Remove `only` and `except` from the step {step.name}.",
            data={"reason": "changes-all" if rewrites else "changes-no-weights", "pass": step.name},
        )
