"""Makes the ledger of a plan, and that of a run (`compressor.model.ledger`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from compressor.analysis.input_producers import Producers, producers_of
from compressor.engine.line_facts import LineFacts
from compressor.engine.plan_records import Findings, Reshape, Selected, StepPath
from compressor.errors import PreflightError, data_of
from compressor.model.ledger import Ledger, problems_of
from compressor.model.ledger_accounts import Rewriting, make_ledger
from compressor.model.redefined_structure import tensors_after
from compressor.model.stored_weight import StoredWeight
from compressor.model.structure import Structure
from compressor.protocol import RewritePass
from compressor.recipe.recipe import Recipe
from compressor.storage.journal import Line


def planned_ledger(
    recipe: Recipe,
    source: Structure,
    structure: Structure,
    reshapes: Sequence[Reshape],
    selected: Selected,
    formats: Mapping[str, StoredWeight],
    producers: Producers,
    findings: Findings,
) -> Ledger:
    """The ledger before the run. A step that rewrites the model is taken to give all tensors new values. Adds a problem
    if the ledger doesn't balance.
    """
    rescaled = _rescaled(recipe, structure, selected, producers)
    ledger = make_ledger(source, structure, formats.values(), [*_reshaped(reshapes, {}), *rescaled])
    if problems := problems_of(ledger, source.checkpoint):
        findings.problems.append(
            PreflightError(
                "; ".join(problems),
                where=source.checkpoint.directory.name,
                hint="Report this message with the model's name; nothing was written.",
                data={"reason": "unbalanced-ledger", **data_of(problems)},
            )
        )
    return ledger


def ledger_of_run(
    source: Structure,
    structure: Structure,
    recipe: Recipe,
    reshapes: Sequence[Reshape],
    formats: Mapping[str, StoredWeight],
    lines: Mapping[str, Line],
) -> Ledger:
    """The ledger of what a run has written.

    formats  that the weights have got
    lines  of the journal
    """
    sweeps, rescaled = recipe.sweeps, set[str]()
    rewritten: dict[StepPath, set[str]] = {}
    for key, line in lines.items():
        facts, number = LineFacts.of(line), int(key.partition("/")[0])
        if number < len(sweeps):  # without a step that writes, there is a sweep more
            rewritten.setdefault(sweeps[number][0].path, set()).update(facts.rewritten)
        rescaled.update(facts.written)
    scaled = {part.tensor for name in rescaled for part in structure.sources_of(name)}
    steps = [Rewriting(name, scaled) for name in _rescaling(recipe)]
    return make_ledger(source, structure, formats.values(), [*_reshaped(reshapes, rewritten), *steps])


def _reshaped(reshapes: Sequence[Reshape], written: Mapping[StepPath, set[str]]) -> list[Rewriting]:
    """written: step path -> the tensors that the step gave new values; empty before the run"""
    rewriting = [reshape for reshape in reshapes if isinstance(reshape.step.settings, RewritePass)]
    return [
        Rewriting(each.step.name, written.get(each.step.path), tensors_after(each.before, each.redefinition))
        for each in rewriting
    ]


def _rescaling(recipe: Recipe) -> list[str]:
    """The passes that scale what produces the inputs of weights."""
    return list(dict.fromkeys(step.name for step in recipe.steps if step.settings.traits.rescales))


def _rescaled(recipe: Recipe, structure: Structure, selected: Selected, producers: Producers) -> list[Rewriting]:
    """The tensors that steps may scale, since they produce the inputs of weights that the step selects."""
    found: dict[str, set[str]] = {name: set() for name in _rescaling(recipe)}
    for step in recipe.steps:
        chosen = {weight.parameter for weight in selected[step.path]} if step.name in found else set()
        for part in range(1, structure.block_count + 1) if chosen else ():
            found[step.name] |= {
                source.tensor
                for producer in producers_of(producers, structure, part)
                if any(consumer.parameter in chosen for consumer in producer.consumers)
                for scaled in (*producer.makers, *producer.consumers)
                for source in structure.sources_of(scaled.parameter)
            }
    return [Rewriting(name, tensors) for name, tensors in found.items()]
