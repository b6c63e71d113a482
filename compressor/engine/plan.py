"""Recipe + structure -> plan: what happens to each weight, what it will weigh, and every problem at once.

Nothing is written and only headers are read. A problem found here would otherwise surface after hours.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import torch

from compressor.analysis.model_facts import facts_of
from compressor.artifact.artifact_config import artifact_config
from compressor.artifact.export_format import Route, choose_route, next_route
from compressor.artifact.modeling_file import modelling_file
from compressor.artifact.stock_formats import FAMILIES, check_loader
from compressor.artifact.writer import Named, assign_shards, carried_tensors, untied_copies
from compressor.data.parts import same_source
from compressor.engine.trial import NoTwin, try_loaders
from compressor.errors import Because, CompressError, ModelError, PreflightError, WidthError, values_of
from compressor.layers import DENSE, find_layer
from compressor.model.attention import replaced_implementations
from compressor.model.checkpoint import resolve_model
from compressor.model.facts import Decision, ModelFacts, Remodel
from compressor.model.functions import Functions, find_functions
from compressor.model.redefined_structure import check_remodel
from compressor.model.replaceable import why_not_replaceable
from compressor.model.replay_proof import prove_by_replay
from compressor.model.reshaped_class import stock_class
from compressor.model.stored_weight import StoredWeight
from compressor.model.structure import Structure, read_structure
from compressor.model.token_limit import limit_of
from compressor.model.trusted_code import auto_map, file_of, is_model_entry
from compressor.model.unused_tensors import TELLS
from compressor.model.weights import FUNCTION_ROLES, Weight
from compressor.protocol import Fact
from compressor.recipe.recipe import Recipe, Step
from compressor.recipe.weight_patterns import LEFT_OUT, names_it, select
from compressor.storage.safetensors_file import header_bytes

BATCH_TOKENS = 4096  # calibration tokens per forward pass
# What halted batches may keep, as a multiple of the hidden states that the sweep holds anyway; beyond it batches stay
# at an earlier halt, or start again from the block's input. A Llama block with an MLP three times as wide keeps 4 times
# at its down projection; 3 stays below llm-compressor's peak memory (docs/benchmarks.md).
TAPE_SHARE = 3
INTERPRETER_BYTES = 420 << 20  # resident size of Python with torch and transformers loaded; our measurement
# role of a weight -> what a form has to stand for to take its place (`Layer.stands_for`); else linear
STANDS_FOR = {"embedding": "embedding", "activation": "activation", "norm": "norm", "softmax": "attention"}
KINDS = {
    "linear": "a weight that is multiplied",
    "embedding": "a table that is looked up by rows",
    "activation": "an activation",
    "norm": "a norm",
    "attention": "a softmax of attention",
}
SOME_HASH = "f" * 64  # the data is not read here; every hash is as long as this one


@dataclass(frozen=True)
class Reshape:
    """A step that changes the model itself: what it starts from, what it makes of it."""

    step: Step
    before: Structure
    facts: ModelFacts
    remodel: Remodel
    after: Structure

    def to_dict(self) -> dict[str, Any]:
        counts = {side: parameter_count(found) for side, found in (("before", self.before), ("after", self.after))}
        return {
            "pass": self.step.name,
            "path": ".".join(map(str, self.step.path)),
            "parameters_before": counts["before"],
            "parameters_after": counts["after"],
            "widths": list(self.remodel.widths),
            "notes": list(self.remodel.notes),
            "decision": self.remodel.decision,
            "tokens": self.remodel.tokens,
        }


@dataclass
class Plan:
    """source    the model as it was given
    structure the model that steps which store weights work on: the source, or what `reshapes` make of it
    selected  step path -> the weights it touches
    forms     weight name -> the form it will have (only those that change)
    counted_dense  of these the ones that may stay dense (`Pass.alternatives`) and would be larger for it
    functions activations, norms and softmax, if any step selects such
    unused    tensors of the source that fill nothing in the model: name, bytes, reason, whether they are carried
    sizes     all in bytes; artifact_bytes counts what loading needs, not reports
    tries_loaders  whether the export format is tried on a small twin of the model
    """

    recipe: Recipe
    source: Structure
    structure: Structure
    reshapes: list[Reshape] = field(default_factory=list)
    selected: dict[tuple[str | int, ...], list[Weight]] = field(default_factory=dict)
    forms: dict[str, StoredWeight] = field(default_factory=dict)
    counted_dense: set[str] = field(default_factory=set)
    functions: Functions = field(default_factory=Functions)
    rows: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    problems: list[CompressError] = field(default_factory=list)
    warnings: list[dict[str, str]] = field(default_factory=list)
    route: Route | None = None
    untied: bool = False
    unused: list[dict[str, Any]] = field(default_factory=list)
    source_bytes: int = 0
    weight_bytes: int = 0
    artifact_bytes: int = 0
    peak_memory_bytes: int = 0
    disk_bytes: int = 0
    tries_loaders: bool = True

    def functions_of(self, step: Step, unit: int) -> tuple[Weight, ...]:
        """The functions of a unit that a step selects."""
        chosen = {weight.name for weight in self.selected[step.path]}
        return tuple(function for function in self.functions.by_unit.get(unit, []) if function.name in chosen)

    def reshape_of(self, step: Step) -> Reshape:
        """What a reshaping step makes of the model."""
        return next(reshape for reshape in self.reshapes if reshape.step == step)

    def to_dict(self) -> dict[str, Any]:
        return {
            "recipe": self.recipe.name,
            "architecture": self.structure.architecture,
            "sweeps": [[step.name for step in sweep] for sweep in self.recipe.sweeps],
            "reshapes": [reshape.to_dict() for reshape in self.reshapes],
            "weights": self.rows,
            "skipped": self.skipped,
            "problems": [problem.event() for problem in self.problems],
            "warnings": self.warnings,
            "route": None if self.route is None else {"name": self.route.name, "reason": self.route.reason},
            "untied_head": self.untied,
            "side_files": self.source.checkpoint.side_files.to_dict(),
            "unused_tensors": self.unused,
            "source_bytes": self.source_bytes,
            "predicted_weight_bytes": self.weight_bytes,
            "predicted_artifact_bytes": self.artifact_bytes,
            "peak_memory_bytes": self.peak_memory_bytes,
            "disk_bytes": self.disk_bytes,
        }


def make_plan(
    recipe: Recipe, model: str, *, output: Path | None = None, trust_remote_code: bool = False, prove: bool = True
) -> Plan:
    """Everything that can be known without reading a weight.

    raises ModelError when the model can't be read or taken apart; all other problems are collected in `problems`
    """
    source = read_structure(resolve_model(model), dtype=recipe.model.dtype, trust_remote_code=trust_remote_code)
    _check_class(source)
    if prove:
        prove_by_replay(source)
    recipe = recipe.fit_lengths(limit_of(source.model))
    plan = Plan(recipe, source, source, source_bytes=source.checkpoint.nbytes, tries_loaders=prove)
    _tell_of_code(plan)
    _follow_reshapes(plan)
    _complete(plan)
    _check_limits(plan, output)
    for name, asked in replaced_implementations(source.checkpoint.config).items():
        message = f"{name} {asked} is not used while compressing; the model runs on what torch has"
        plan.warnings.append({"code": "implementation-replaced", "where": "config.json", "message": message})
    return plan


def _check_class(source: Structure) -> None:
    """raises ModelError for a model whose class is code of its checkpoint: no artifact of it could be checked"""
    cls = stock_class(source.model)
    if not cls.__module__.startswith("transformers."):
        raise ModelError(
            f"{cls.__name__} is code of the checkpoint. An artifact is loaded and verified with a class of "
            "transformers, which has none of this name",
            where=source.checkpoint.directory.name,
            hint="`compress-model eval --trust-remote-code` measures such a model; compressing it isn't supported.",
            data={"reason": "own-class", "class": cls.__name__},
        )


def _tell_of_code(plan: Plan) -> None:
    """Say where config.json names code of a model class that isn't used."""
    named = auto_map(plan.source.checkpoint.config, "config.json")
    files = sorted({file_of(ref) for name, references in named.items() if is_model_entry(name) for ref in references})
    if files:
        message = (
            f"config.json names code for {plan.source.architecture}. transformers has a class of this name, which is "
            "used instead; the artifact doesn't hold the code"
        )
        plan.warnings.append({"code": "code-not-used", "where": ", ".join(files), "message": message})


def plan_again(plan: Plan, step: Step, decision: Decision) -> Plan:
    """The same plan once that reshaping step has chosen its shapes.

    raises PreflightError for shapes that the model can't have
    """
    planned = plan.reshape_of(step)
    remodel = planned.step.settings.remodel(planned.facts, decision)
    where = ".".join(map(str, step.path))
    after = check_remodel(planned.before, remodel, where, step.settings.rewrites)
    known = [*plan.reshapes[: plan.reshapes.index(planned)], replace(planned, remodel=remodel, after=after)]
    again = Plan(
        plan.recipe, plan.source, after, known, source_bytes=plan.source_bytes, tries_loaders=plan.tries_loaders
    )
    _follow_reshapes(again)
    _complete(again)
    if again.problems:
        raise again.problems[0]
    return again


def _complete(plan: Plan) -> None:
    """What the storing steps make of the model that the reshaping ones leave, and what all of it weighs."""
    recipe, structure = plan.recipe, plan.structure
    weights = [weight for _, weight in structure.weights()]
    whole = [weight for _, weight, _ in structure.whole]
    _find_functions(plan)
    _select(plan, [*weights, *whole, *(function for _, function in plan.functions.all())])
    _check_facts(plan)
    _follow_forms(plan)
    _predict(plan)
    for step in recipe.steps:
        is_decided = any(reshape.step == step and reshape.remodel.decision is not None for reshape in plan.reshapes)
        if step.settings.unplanned and not is_decided:
            where = ".".join(map(str, step.path))
            message = f"{step.name}: {step.settings.unplanned}; its sizes here are {step.settings.sizes_are}"
            plan.warnings.append({"code": "sizes-undecided", "where": where, "message": message})
    if recipe.reads_data and same_source(recipe.data, recipe.eval.data):
        message = (
            "names the documents of data: three quarters of them, chosen by the hash of each, are calibrated on, and "
            "the other quarter is measured on"
        )
        plan.warnings.append({"code": "data-divided", "where": "eval.data", "message": message})
    touched = {weight.name for chosen in plan.selected.values() for weight in chosen}
    plan.skipped = [{"name": w.name, "reason": _why_skipped(w, structure)} for w in weights if w.name not in touched]
    plan.skipped += [{"name": weight.name, "reason": why} for _, weight, why in structure.whole]
    plan.skipped += [{"name": name, "reason": f"stays dense: it {why}"} for name, why in structure.left_dense.items()]
    _tell_of_the_checkpoint(plan)


def _tell_of_the_checkpoint(plan: Plan) -> None:
    """What lies in the source's directory and isn't part of the model that is compressed, as warnings."""
    checkpoint, bindings = plan.source.checkpoint, plan.source.bindings
    where = checkpoint.directory.name
    plan.warnings += [{"code": "second-weights", "where": where, "message": told} for told in checkpoint.unread]
    for name in bindings.apart:
        message = (
            "config.json ties it to a tensor that differs from its own, so it stays on its own, as in transformers"
        )
        plan.warnings.append({"code": "not-tied", "where": name, "message": message})
    carried = carried_tensors(plan.structure)
    rows = [(unused, unused.is_carried and unused.tensor in carried) for unused in bindings.unused]
    plan.unused = [
        {
            "name": unused.tensor,
            "bytes": checkpoint.tensors[unused.tensor].nbytes,
            "reason": TELLS[unused.reason],
            "carried": is_carried,
        }
        for unused, is_carried in rows
    ]
    kept = [row for row in plan.unused if row["carried"]]
    lost = [row for row, (unused, _) in zip(plan.unused, rows) if unused.is_carried and not row["carried"]]
    architecture = plan.source.architecture
    if kept:
        message = f"{_count(kept)} that {architecture} doesn't use are carried into the artifact as they are"
        plan.warnings.append({"code": "unused-tensors", "where": _some(kept), "message": message})
    if lost:
        changer = next(reshape.step.name for reshape in plan.reshapes if reshape.step.settings.rewrites)
        message = f"{_count(lost)} that {architecture} doesn't use are left out: {changer} changes the model they fit"
        plan.warnings.append({"code": "left-out-tensors", "where": _some(lost), "message": message})


def _count(rows: list[dict[str, Any]]) -> str:
    return f"{len(rows)} tensors ({sum(row['bytes'] for row in rows):,} bytes)"


def _some(rows: list[dict[str, Any]]) -> str:
    return ", ".join(row["name"] for row in rows[:4])


def parameter_count(structure: Structure) -> int:
    """Parameters of the checkpoint; what is tied counts once."""
    held = {source.tensor for name, _ in structure.model.named_parameters() for source in structure.sources_of(name)}
    return sum(math.prod(structure.checkpoint.tensors[tensor].shape) for tensor in held)


def _follow_reshapes(plan: Plan) -> None:
    """The model from one reshaping step to the next, but for those done; the first that can't be done ends it."""
    done = {reshape.step.path for reshape in plan.reshapes}
    for number, sweep in enumerate(plan.recipe.sweeps):
        for step in sweep:
            if not step.settings.reshapes or step.path in done:
                continue
            try:
                _check_place(plan.recipe, number, step)
                facts = facts_of(plan.structure, parameter_count(plan.source))
                remodel = step.settings.remodel(facts, None)
                where = ".".join(map(str, step.path))
                after = check_remodel(plan.structure, remodel, where, step.settings.rewrites)
            except CompressError as problem:
                plan.problems.append(problem)
                return
            except Exception as error:  # any: a pass runs the model's own code in ways of its own
                plan.problems.append(_cannot_reshape(step, plan.structure, error))
                return
            plan.reshapes.append(Reshape(step, plan.structure, facts, remodel, after))
            plan.structure = after


def _cannot_reshape(step: Step, structure: Structure, error: Exception) -> ModelError:
    refusal = ModelError(
        f"{step.name} can't take this model apart ({type(error).__name__}: {' '.join(str(error).split())[:200]})",
        where=structure.architecture,
        hint="Use another pass; if transformers runs the model as it is, please report this.",
        data={"reason": "not-taken-apart", "pass": step.name, "error": type(error).__name__},
    )
    refusal.__cause__ = error
    return refusal


def _check_place(recipe: Recipe, number: int, step: Step) -> None:
    """raises PreflightError for a reshaping step that shares a sweep, comes too late, or is meant for some weights"""
    where = ".".join(map(str, step.path))
    if len(recipe.sweeps[number]) > 1:
        raise PreflightError(
            f"{step.name} changes the model itself and can't share a sweep",
            where=where,
            hint="Give it a step alone.",
            data={"reason": "shares-sweep", "pass": step.name},
        )
    earlier = [s for sweep in recipe.sweeps[:number] for s in sweep]
    if step.settings.rewrites and (stored := [s.name for s in earlier if not s.settings.reshapes]):
        raise PreflightError(
            f"{step.name} needs dense weights everywhere, and {stored[0]} comes before it",
            where=where,
            hint=f"Put {step.name} first.",
            data={"reason": "needs-dense", "pass": step.name, "before": stored[0]},
        )
    if changed := [s.name for s in earlier if s.settings.reshapes and not s.settings.rewrites]:
        raise PreflightError(
            f"{step.name} needs blocks as their class makes them, and {changed[0]} comes before it",
            where=where,
            hint=f"Put {step.name} first, and give a model one {changed[0]}.",
            data={"reason": "needs-own-blocks", "pass": step.name, "before": changed[0]},
        )
    if step.settings.only != ("*",) or step.settings.except_:
        raise PreflightError(
            f"{step.name} changes the whole residual stream and can't be confined to some weights"
            if step.settings.rewrites
            else f"{step.name} touches no weights, so there are none to choose",
            where=where,
            hint="Drop `only` and `except`.",
            data={"reason": "changes-all" if step.settings.rewrites else "changes-no-weights", "pass": step.name},
        )


def _why_skipped(weight: Weight, structure: Structure) -> str:
    if weight.role == "embedding" and (other := _sharer(weight, structure.bindings.tied)) is not None:
        return f"shares its table with {other}"
    if weight.role in LEFT_OUT:
        return f"the {weight.role} stays dense unless named"
    return "no step selects it"


def _find_functions(plan: Plan) -> None:
    """Look for functions where a step names such; those that the model can't have replaced are problems."""
    named: dict[str, tuple[str | int, ...]] = {}
    for step in plan.recipe.steps:
        for pattern in step.settings.only:
            named.setdefault(pattern, step.path)
    roles = [role for role in FUNCTION_ROLES if {f"@{role}", f"@{role}!"} & named.keys()]
    if not roles:
        return
    plan.functions = find_functions(plan.structure)
    plan.problems += [
        PreflightError(
            f"the {role} of {plan.structure.architecture} can't be replaced: {plan.functions.refused[role]}",
            where=".".join(map(str, named[f"@{role}"])),
            hint=f"Leave out @{role}, or write @{role}! where it may be absent.",
            data={
                "reason": "not-replaced",
                "role": role,
                "model": plan.structure.architecture,
                "because": values_of(plan.functions.refused[role]),
            },
        )
        for role in roles
        if role in plan.functions.refused and f"@{role}" in named
    ]


def _select(plan: Plan, weights: list[Weight]) -> None:
    whole = {weight.name: why for _, weight, why in plan.structure.whole}
    known: dict[type, bool] = {}
    for step in plan.recipe.steps:
        where = ".".join(str(part) for part in step.path)
        if step.settings.reshapes:
            plan.selected[step.path] = []
            continue
        try:
            chosen = select(step.settings.only, step.settings.except_, weights, where)
        except CompressError as problem:
            plan.problems.append(problem)
            chosen = []
        chosen = _without_shared_tables(plan, step, chosen, weights, where)
        reasons = {}
        for weight in chosen:
            is_read = plan.structure.is_read_elsewhere(weight)
            why = whole.get(weight.name) or why_not_replaceable(plan.structure.model, weight, known, is_read)
            if why is not None:
                reasons[weight.name] = why
        plan.selected[step.path] = _without_unfit(plan, step, chosen, reasons)


def _without_unfit(plan: Plan, step: Step, chosen: list[Weight], reasons: dict[str, Because]) -> list[Weight]:
    """What of a step's weights can be stored. One that a pattern means and can't be is a problem; those that a pattern
    takes along stay dense, with a warning for each reason.

    reasons  weight name -> why it can't be stored
    """
    if not reasons:
        return chosen
    where = ".".join(map(str, step.path))
    meant = names_it(step.settings.only, chosen, where)
    by_reason: dict[Because, list[str]] = {}
    for name, why in reasons.items():
        by_reason.setdefault(why, []).append(name)
    for why, names in by_reason.items():
        refused = [name for name in names if name in meant]
        if refused:
            count = f" ({len(refused)} weights)" if len(refused) > 1 else ""
            plan.problems.append(
                PreflightError(
                    f"can't be stored by {step.name}{count}: {why}",
                    where=refused[0],
                    hint="Drop the pattern that names it, or leave it out with `except`; it then stays dense.",
                    data={
                        "reason": "not-storable",
                        "pass": step.name,
                        "weights": len(refused),
                        "because": values_of(why),
                    },
                )
            )
        if kept := [name for name in names if name not in meant]:
            message = f"{len(kept)} weights stay dense, such as {kept[0]}: {why}"
            plan.warnings.append({"code": "stays-dense", "where": kept[0], "message": message})
    left = [weight for weight in chosen if weight.name not in reasons]
    if not left and not any(weight.name in meant for weight in chosen):
        plan.problems.append(
            PreflightError(
                f"no weight is left for {step.name}: {next(iter(reasons.values()))}",
                where=where,
                hint="Choose other settings or another pass for this model.",
                data={
                    "reason": "no-weight-left",
                    "pass": step.name,
                    "because": values_of(next(iter(reasons.values()))),
                },
            )
        )
    return left


def _without_shared_tables(
    plan: Plan, step: Step, chosen: list[Weight], weights: list[Weight], where: str
) -> list[Weight]:
    """A table that the head multiplies by stays dense where only patterns ending in `!` name it, which may fail."""
    tied, only = plan.structure.bindings.tied, step.settings.only
    firm = [pattern for pattern in only if not pattern.endswith("!")]
    if not chosen or len(firm) == len(only):
        return chosen
    meant = {weight.name for weight in select(firm, step.settings.except_, weights, where)}
    kept = []
    for weight in chosen:
        other = _sharer(weight, tied) if weight.role == "embedding" and weight.name not in meant else None
        if other is None:
            kept.append(weight)
            continue
        message = f"shares its table with {other}, which multiplies by it, so it stays dense; the ! allows that"
        plan.warnings.append({"code": "shared-table", "where": weight.name, "message": message})
    return kept


def _check_facts(plan: Plan) -> None:
    facts = {Fact.CONSTANT_TOKEN_COUNT}
    for step in plan.recipe.steps:
        traits = step.settings.traits
        for fact in sorted(traits.requires - facts):
            plan.problems.append(
                PreflightError(
                    f"{step.name} needs {fact.value}, which an earlier step broke or none provided",
                    where=".".join(map(str, step.path)),
                    hint="Change the order of the steps.",
                    data={"reason": "needs-fact", "pass": step.name, "fact": fact.value},
                )
            )
        facts = (facts - traits.breaks) | traits.provides


def _follow_forms(plan: Plan) -> None:
    """Each weight's stored form from step to step; steps that don't accept what they find are problems."""
    forms: dict[str, str] = {}
    tied = plan.structure.bindings.tied
    changed_by: dict[str, Step] = {}
    dtype_bytes = plan.structure.dtype.itemsize
    for number, step in enumerate(plan.recipe.steps):
        traits = step.settings.traits
        refused: list[Weight] = []
        plan.selected[step.path] = _without_odd_widths(plan, step, plan.selected[step.path])
        for weight in plan.selected[step.path]:
            found = forms.get(weight.name, DENSE)
            if found not in traits.accepts:
                refused.append(weight)
                continue
            stored = step.settings.stored(weight)
            if stored is None:
                continue
            before = after = math.prod(weight.shape) * dtype_bytes if weight.shape else 0
            if stored != DENSE:
                if find_layer(stored).stands_for != STANDS_FOR.get(weight.role, "linear"):
                    plan.problems.append(_unfit(step, stored, weight))
                    continue
                may_stay = DENSE in step.settings.alternatives(weight)
                if may_stay and weight.parameter in tied:
                    plan.problems.append(_undecided_tie(step, weight, tied[weight.parameter]))
                    continue
                try:
                    form = StoredWeight(stored, step.settings.spec(weight) or {}, weight)
                except CompressError as problem:
                    plan.problems.append(problem)
                    continue
                forms[weight.name] = stored
                changed_by[weight.name] = step
                plan.forms[weight.name] = form
                after = sum(size for *_, size in _planned(form, plan.structure.dtype))
                if may_stay and before > after:
                    plan.counted_dense.add(weight.name)
                    after = before
            plan.rows.append(
                {
                    "name": weight.name,
                    "shape": list(weight.shape),
                    "role": weight.role,
                    "step": number,
                    "pass": step.name,
                    "from": found,
                    "to": stored,
                    "bytes_before": before,
                    "bytes_after": after,
                }
            )
        if refused:
            earlier = changed_by[refused[0].name]
            plan.problems.append(
                PreflightError(
                    f"{step.name} needs dense weights, but {earlier.name} (steps.{earlier.path[1]}) has already "
                    f"stored {len(refused)} of them, such as {refused[0].name}",
                    where=".".join(map(str, step.path)),
                    hint="Use `only` and `except` so that each weight has one step.",
                    data={
                        "reason": "stored-already",
                        "pass": step.name,
                        "earlier": ".".join(map(str, earlier.path)),
                        "weights": len(refused),
                        "weight": refused[0].name,
                    },
                )
            )
        plan.problems += [
            PreflightError(text, where=".".join(map(str, step.path)), data=values)
            for text, values in step.settings.check(plan.selected[step.path])
        ]


def _without_odd_widths(plan: Plan, step: Step, chosen: list[Weight]) -> list[Weight]:
    """Without weights that no group size divides, where no pattern means them."""
    reasons = {}
    for weight in chosen:
        if step.settings.stored(weight) in (None, DENSE):
            continue
        try:
            step.settings.spec(weight)
        except WidthError:
            told = f"no group size divides its {weight.in_features} inputs"
            reasons[weight.name] = Because(told, reason="odd-width", in_features=weight.in_features)
        except CompressError:
            pass  # `_follow_forms` asks again, and makes it a problem
    meant = names_it(step.settings.only, chosen, "steps") if reasons else set()
    if all(weight.name in reasons for weight in chosen):
        return chosen  # nothing would be left: each is a problem
    return _without_unfit(plan, step, chosen, {name: why for name, why in reasons.items() if name not in meant})


def _unfit(step: Step, stored: str, weight: Weight) -> PreflightError:
    """A form stands in for one kind of module: no product can take the place of a table of rows, nor of a norm."""
    kind = STANDS_FOR.get(weight.role, "linear")
    return PreflightError(
        f"{weight.name} is {KINDS[kind]}, and {step.name} would store it as {stored}, which stands for "
        f"{KINDS[find_layer(stored).stands_for]}",
        where=".".join(map(str, step.path)),
        hint="Leave it out with `except`.",
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
    """config.json has to say whether head and table are one, before the run has found out."""
    return PreflightError(
        f"{weight.name} shares its table with {other}, and whether {step.name} leaves it dense is seen in the run only",
        where=".".join(map(str, step.path)),
        hint="Leave it out with `except`.",
        data={"reason": "undecided-tie", "weight": weight.name, "other": other, "pass": step.name},
    )


def _planned(form: StoredWeight, dtype: torch.dtype) -> Iterator[tuple[str, torch.dtype, tuple[int, ...], int]]:
    layer = find_layer(form.form)
    for suffix, (kind, shape) in layer.planned(form.weight.shape, form.spec, dtype).items():
        size = kind.itemsize
        for length in shape:
            size *= length
        yield f"{form.weight.name}.{suffix}", kind, shape, size


def planned_tensors(plan: Plan) -> list[Named]:
    """Every tensor of the result, in the order of units."""
    structure = plan.structure
    stored = {name: form for name, form in plan.forms.items() if name not in plan.counted_dense}
    replaced = {name for form in stored.values() for name in (form.weight.tensor, form.bias)}
    by_unit: dict[int, list[Named]] = {}
    for tensor, unit in structure.unit_of.items():
        if tensor not in replaced:
            info = structure.checkpoint.tensors[tensor]
            kind = structure.bindings.dtype_of(tensor)
            size = info.nbytes // info.dtype.itemsize * kind.itemsize
            by_unit.setdefault(unit, []).append(Named(tensor, kind, info.shape, size))
    for unit, weight in [*structure.weights(), *plan.functions.all()]:
        if weight.name in stored:
            for name, kind, shape, size in _planned(stored[weight.name], structure.dtype):
                by_unit.setdefault(unit, []).append(Named(name, kind, shape, size))
    tensors = [tensor for unit in sorted(by_unit) for tensor in sorted(by_unit[unit], key=lambda t: t.name)]
    by_name = {tensor.name: tensor for tensor in tensors}
    copies = untied_copies(structure, list(stored.values()), plan.untied)
    tensors += [replace(by_name[tensor], name=name) for name, tensor in copies.items()]
    carried = carried_tensors(structure)
    return tensors + [Named(name, i.dtype, i.shape, i.nbytes, i.small) for name, i in carried.items()]


def _predict(plan: Plan) -> None:
    structure, recipe = plan.structure, plan.recipe
    tied = structure.bindings.tied
    for form in plan.forms.values():
        if form.weight.role == "embedding" and (other := _sharer(form.weight, tied)) is not None:
            plan.problems.append(
                PreflightError(
                    f"shares its table with {other}, which multiplies by it, and would leave it without a weight",
                    where=form.weight.name,
                    hint="Leave it out with `except`; an embedding of its own can be stored in blocks.",
                    data={"reason": "shared-table", "other": other},
                )
            )
    shared = [form.weight.parameter for form in plan.forms.values() if form.weight.parameter in tied]
    plan.untied = bool(shared or structure.bindings.apart)
    if shared:
        message = "the head shares the embedding's weights; it gets its own and config.json says so"
        plan.warnings.append({"code": "untied-head", "where": shared[0], "message": message})
    try:
        forms = list(plan.forms.values())
        plan.route = _tried_route(plan, forms)
    except CompressError as problem:
        plan.problems.append(problem)
        return
    try:
        check_loader(plan.route.name)
    except CompressError as problem:
        plan.problems.append(problem)
    if plan.route.name == "compressed-tensors" and (bytes_ := [f for f in forms if f.form == "byte_linear"]):
        plan.warnings.append(
            {
                "code": "vllm-asymmetric-8-bits",
                "where": bytes_[0].weight.name,
                "message": f"{len(bytes_)} weights have asymmetric 8-bit codes, which transformers reads and vLLM "
                "doesn't; for vLLM set symmetric: true, or 4 bits",
            }
        )
    tensors = planned_tensors(plan)
    by_name = {tensor.name: tensor for tensor in tensors}
    shards = assign_shards(tensors, recipe.export.shard_bytes)
    data = sum(tensor.nbytes for tensor in tensors)
    headers = sum(
        header_bytes((name, by_name[name].stored_as, by_name[name].shape) for name in names)
        for names in shards.values()
    )
    plan.weight_bytes = data + headers
    carried = structure.checkpoint.carried_config
    config = artifact_config(carried, plan.route, forms, structure.model, "bfloat16", plan.untied)
    pinned = recipe.pinned(SOME_HASH if recipe.reads_data else None, SOME_HASH)
    side = len(json.dumps(config, indent=2)) + len(pinned.to_yaml().encode())
    if plan.route.name == "custom":
        side += len(modelling_file(structure.model, (form.form for form in forms)))
    side += sum(
        (structure.checkpoint.directory / path).stat().st_size for path in structure.checkpoint.side_files.carried
    )
    plan.artifact_bytes = plan.weight_bytes + side
    _predict_memory(plan)
    plan.disk_bytes = plan.weight_bytes * (len(recipe.sweeps) + 1) + side + (16 << 20)


def _tried_route(plan: Plan, forms: list[StoredWeight]) -> Route:
    """The export format that fits the forms, tried with the model's class. raises PreflightError if there is none"""
    structure, export = plan.structure, plan.recipe.export
    route = choose_route(forms, export.format, export.stock_only, structure.model)
    package = FAMILIES[route.name].package if route.name in FAMILIES else None
    if not plan.tries_loaders or not forms or (package is not None and find_spec(package) is None):
        return route
    try:
        while (why := try_loaders(structure, forms, route)) is not None:
            route = next_route(route, why, forms, export.format, export.stock_only)
    except NoTwin as reason:
        message = f"whether {route.name} can be loaded was not tried: {reason}. The run finds out after its sweep."
        plan.warnings.append({"code": "format-untried", "where": structure.architecture, "message": message})
    return route


def _sharer(weight: Weight, tied: dict[str, str]) -> str | None:
    """Another parameter that shares this one's storage."""
    return tied.get(weight.parameter) or next((t for t, s in tied.items() if s == weight.parameter), None)


def _predict_memory(plan: Plan) -> None:
    """Peak of the sweep process: interpreter, stem and head, one block twice, activations, one group's solve.

    The children that verify and evaluate load the whole model; the larger of the two counts when they run.
    """
    structure, recipe = plan.structure, plan.recipe
    config = structure.model.config.get_text_config()
    by_unit: dict[int, int] = {}
    for tensor, unit in structure.unit_of.items():
        by_unit[unit] = by_unit.get(unit, 0) + structure.checkpoint.tensors[tensor].nbytes
    ends = by_unit.get(0, 0) + by_unit.get(structure.block_count + 1, 0)
    blocks = [by_unit.get(unit, 0) for unit in range(1, structure.block_count + 1)]
    held = sum(blocks) if recipe.model.placement == "resident" else max(blocks)
    reads = {step.settings.traits.reads for step in recipe.steps}
    tokens = recipe.data.samples * recipe.data.length if reads != {"weights"} else 0
    streams = 1 + TAPE_SHARE
    if "gradients" in reads:  # a few batches keep one before each block, and all keep theirs before and after all
        streams = max(streams, 3)
    activations = streams * tokens * _stream_width(structure) * structure.dtype.itemsize
    working = 0
    for form in plan.forms.values():
        if form.weight.is_function:
            continue
        rows, columns = form.weight.shape
        working = max(working, 12 * columns**2 + 6 * 20 * rows * columns // 6)
    batch = (
        min(BATCH_TOKENS, max(tokens, 1))
        * max((f.weight.shape[-1] for f in plan.forms.values() if f.weight.shape), default=0)
        * 24
    )
    sweep = INTERPRETER_BYTES + ends + 2 * held + activations + working + batch
    logits = recipe.eval.batch_size * recipe.eval.data.length * (getattr(config, "vocab_size", 0) or 0) * 4
    children = INTERPRETER_BYTES + 2 * plan.source_bytes + plan.weight_bytes + 6 * logits
    plan.peak_memory_bytes = max(sweep, children)


def _stream_width(structure: Structure) -> int:
    """Values per token between blocks. Where the config has no such key, the widest that a block's weight reads."""
    stated = getattr(structure.model.config.get_text_config(), "hidden_size", None)
    if isinstance(stated, int):
        return stated
    return max((weight.shape[-1] for _, weight in structure.weights() if weight.role != "embedding"), default=0)


def _check_limits(plan: Plan, output: Path | None) -> None:
    limits = plan.recipe.limits
    available = limits.memory or int(psutil.virtual_memory().available * 0.9)
    if plan.peak_memory_bytes > available:
        plan.problems.append(
            PreflightError(
                f"about {plan.peak_memory_bytes:,} bytes of memory are needed, {available:,} may be used",
                where="memory",
                hint="Use fewer or shorter calibration samples, or a machine with more memory.",
                data={"reason": "memory", "needed": plan.peak_memory_bytes, "available": available},
            )
        )
    place = output if output is not None else Path.cwd()
    while not place.exists():
        place = place.parent
    free = limits.disk or shutil.disk_usage(place).free
    if plan.disk_bytes > free:
        plan.problems.append(
            PreflightError(
                f"{plan.disk_bytes:,} bytes of disk are needed, {free:,} may be used",
                where=f"disk of {place}",
                hint="Free some space or choose another --output.",
                data={"reason": "disk", "needed": plan.disk_bytes, "available": free},
            )
        )
