"""Makes a plan from a recipe and a model's structure: what happens to each weight, its size, and every problem.

It writes nothing and reads only the headers of the weight files. A problem that is found here would otherwise appear
after hours of work.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import fields, replace
from importlib.util import find_spec
from pathlib import Path

from compressor.analysis.input_producers import Producers, find_producers, producers_of
from compressor.artifact.artifact_config import artifact_config
from compressor.artifact.export_format import ExportFormat, choose_export_format, next_export_format
from compressor.artifact.stock_formats import FAMILIES, check_loader
from compressor.artifact.writer import carried
from compressor.data.parts import same_source
from compressor.engine.estimates import check_limits, predict_sizes
from compressor.engine.part_work import mappable_experts
from compressor.engine.plan_records import (
    DecidedPlan,
    Findings,
    Plan,
    Reshape,
    Selected,
    Sizes,
    StepPath,
    sharer,
)
from compressor.engine.planned_formats import follow_formats
from compressor.engine.planned_ledger import planned_ledger
from compressor.engine.planned_reshapes import follow_reshapes
from compressor.engine.selected_weights import named_functions, select_weights, skipped_weights, without_odd_widths
from compressor.engine.trial import NoProbeModel, try_loaders
from compressor.errors import CompressError, ModelError, PreflightError, values_of
from compressor.model.attention import replaced_implementations
from compressor.model.facts import Decision
from compressor.model.functions import Functions
from compressor.model.model_names import resolve_model
from compressor.model.redefined_structure import check_redefinition, values_misfit
from compressor.model.replay_proof import prove_by_replay
from compressor.model.reshaped_class import stock_class
from compressor.model.stored_weight import StoredWeight
from compressor.model.structure import Structure, read_structure
from compressor.model.token_limit import limit_of
from compressor.model.trusted_code import auto_map, file_of, is_model_entry
from compressor.protocol import Fact, RewritePass, TokenPass
from compressor.recipe.recipe import Recipe, Step
from compressor.recipe.yaml_source import dotted


def make_plan(
    recipe: Recipe, model: str, *, output: Path | None = None, trust_remote_code: bool = False, prove: bool = True
) -> Plan:
    """The plan of a run: everything that can be known without reading a weight.

    raises ModelError when the model can't be read or its structure can't be found; the result lists all other problems
    """
    source = read_structure(resolve_model(model), dtype=recipe.model.dtype, trust_remote_code=trust_remote_code)
    _check_class(source)
    findings = Findings()
    if prove and (probe := prove_by_replay(source)).is_large:
        size = sum(parameter.nbytes for parameter in probe.empty.parameters())
        message = f"no narrow probe model has its modules, so its structure is found on one of {size:,} bytes"
        findings.warn("wide-probe", source.architecture, message, bytes=size)
    recipe = recipe.fit_lengths(limit_of(source.model))
    _warn_of_unused_code(source, findings)
    _warn_of_quantized_source(source, findings)
    reshapes = follow_reshapes(recipe, source, (), findings)
    plan = _with_storing_steps(recipe, source, reshapes, {}, findings, tries_loaders=prove)
    check_limits(plan.sizes, recipe.limits, output, findings)
    for name, asked in replaced_implementations(source.checkpoint.config).items():
        message = f"{name} {asked} is not used during compression; the model runs with torch's own operations"
        findings.warn("implementation-replaced", "config.json", message, setting=name, asked=asked)
    return replace(plan, problems=tuple(findings.problems), warnings=tuple(findings.warnings))


def decided_plan(plan: Plan, step: Step, decision: Decision) -> DecidedPlan:
    """The plan for the sweeps after a reshaping step has chosen its shapes.

    raises PreflightError for shapes that the model can't have
    """
    planned = plan.reshape_of(step)
    assert isinstance(step.settings, RewritePass | TokenPass)
    redefinition = step.settings.redefine(planned.facts, decision)
    after = check_redefinition(planned.before, redefinition, dotted(step.path), isinstance(step.settings, RewritePass))
    known = (*plan.reshapes[: plan.reshapes.index(planned)], replace(planned, redefinition=redefinition, after=after))
    findings = Findings()
    reshapes = follow_reshapes(plan.recipe, plan.source, known, findings)
    earlier = plan.decisions if isinstance(plan, DecidedPlan) else {}
    decisions = {**earlier, step.path: decision}
    decided = _with_storing_steps(
        plan.recipe, plan.source, reshapes, decisions, findings, tries_loaders=plan.tries_loaders
    )
    if decided.problems:
        raise decided.problems[0]
    return DecidedPlan(**{entry.name: getattr(decided, entry.name) for entry in fields(Plan)}, decisions=decisions)


def _with_storing_steps(
    recipe: Recipe,
    source: Structure,
    reshapes: tuple[Reshape, ...],
    decisions: Mapping[StepPath, Decision],
    findings: Findings,
    *,
    tries_loaders: bool,
) -> Plan:
    """The plan of the steps that store weights, on the model after all reshaping steps."""
    structure = reshapes[-1].after if reshapes else source
    functions, selected = _selection(recipe, structure, findings)
    formats = follow_formats(recipe, structure, selected, findings)
    producers = _find_producers(recipe, structure, selected, findings)
    _check_shared_tables(structure, formats.formats, findings)
    untied = _unties_head(structure, formats.formats, findings)
    export_format = _export_format(recipe, structure, list(formats.formats.values()), tries_loaders, findings)
    sizes = Sizes()
    if export_format is not None:
        _check_config(structure, export_format, list(formats.formats.values()), untied, findings)
        sizes = predict_sizes(recipe, structure, reshapes, selected, functions, formats, export_format, untied)
        _warn_of_mapped_experts(structure, sizes, findings)
    _warn_of_undecided_sizes(recipe, decisions, findings)
    _warn_of_divided_data(recipe, findings)
    _warn_of_unused_tensors(source, structure, reshapes, findings)
    ledger = planned_ledger(recipe, source, structure, reshapes, selected, formats.formats, producers, findings)
    return Plan(
        recipe=recipe,
        source=source,
        structure=structure,
        reshapes=reshapes,
        selected=selected,
        functions=functions,
        formats=formats.formats,
        counted_dense=formats.counted_dense,
        rows=formats.rows,
        skipped=skipped_weights(structure, selected),
        ledger=ledger,
        export_format=export_format,
        untied=untied,
        producers=producers,
        sizes=sizes,
        problems=tuple(findings.problems),
        warnings=tuple(findings.warnings),
        tries_loaders=tries_loaders,
    )


def _selection(recipe: Recipe, structure: Structure, findings: Findings) -> tuple[Functions, Selected]:
    """The functions of the model, if a step selects any, and the weights and functions that each step changes."""
    functions = named_functions(recipe, structure, findings)
    selected = select_weights(recipe, structure, functions, findings)
    _check_facts(recipe, findings)
    return functions, without_odd_widths(recipe, selected, findings)


def _check_class(source: Structure) -> None:
    """raises ModelError for a model whose class is code of its checkpoint, since its artifact could not be verified"""
    cls = stock_class(source.model)
    if not cls.__module__.startswith("transformers."):
        raise ModelError(
            f"{cls.__name__} is code of the checkpoint. An artifact is loaded and verified with a class of "
            "transformers, which has none of this name",
            where=source.checkpoint.directory.name,
            hint="Choose a model of transformers; compress-model eval --trust-remote-code can measure this one.",
            data={"reason": "own-class", "class": cls.__name__},
        )


def _warn_of_unused_code(source: Structure, findings: Findings) -> None:
    """Warn if config.json names code for a model class that isn't used."""
    named = auto_map(source.checkpoint.config, "config.json")
    files = sorted({file_of(ref) for name, references in named.items() if is_model_entry(name) for ref in references})
    if files:
        message = (
            f"config.json names code for {source.architecture}. transformers has a class of this name, which is "
            "used instead; the artifact doesn't hold the code"
        )
        findings.warn("code-not-used", ", ".join(files), message, files=files)


def _warn_of_quantized_source(source: Structure, findings: Findings) -> None:
    """Warn if the source is quantized: its own loss is not measured."""
    quantized = source.checkpoint.quantized
    if quantized is not None:
        unread = f"; {len(quantized.unread)} scales of activations are not used" if quantized.unread else ""
        where, message = source.checkpoint.directory.name, f"{quantized.notice}{unread}"
        findings.warn("quantized-source", where, message, **values_of(quantized.notice), unread=len(quantized.unread))


def _check_facts(recipe: Recipe, findings: Findings) -> None:
    """Add a problem for each step that needs a fact about the model which doesn't hold before that step."""
    facts = {Fact.CONSTANT_TOKEN_COUNT}
    for step in recipe.steps:
        traits = step.settings.traits
        findings.problems += [
            PreflightError(
                f"{step.name} needs {fact.value}, which an earlier step breaks or no earlier step provides",
                where=dotted(step.path),
                hint=f"Put fuse_norms just before {step.name}."
                if fact is Fact.NORMS_FOLDED
                else f"Put {step.name} before the steps that drop tokens.",
                data={"reason": "needs-fact", "pass": step.name, "fact": fact.value},
            )
            for fact in sorted(traits.requires - facts)
        ]
        facts = (facts - traits.breaks) | traits.provides


def _find_producers(recipe: Recipe, structure: Structure, selected: Selected, findings: Findings) -> Producers:
    """The producers of the weights' inputs, if a step scales them. Adds a problem if a step finds none."""
    steps = [step for step in recipe.steps if step.settings.traits.rescales]
    if not steps:
        return {}
    producers = find_producers(structure)
    read = {
        consumer.parameter
        for part in range(1, structure.block_count + 1)
        for producer in producers_of(producers, structure, part)
        for consumer in producer.consumers
    }
    for step in steps:
        chosen = {weight.name for weight in selected[step.path]}
        later = recipe.steps[recipe.steps.index(step) + 1 :]
        if step.settings.traits.stores is None and not any(
            weight.name in chosen for other in later for weight in selected[other.path]
        ):
            message = f"{step.name} leaves its weights dense, and no later step stores any of them"
            findings.warn("nothing-stored", dotted(step.path), message, **{"pass": step.name})
        if not any(weight.parameter in read for weight in selected[step.path]):
            findings.problems.append(
                PreflightError(
                    f"{step.name} scales the inputs of weights in the norm or the matrix before them, and none of the "
                    f"{len(chosen)} selected weights of {structure.architecture} has one that can be scaled",
                    where=dotted(step.path),
                    hint="Select weights of blocks that a norm stands before, or use gptq or rtn.",
                    data={"reason": "no-producer", "pass": step.name, "model": structure.architecture},
                )
            )
    return producers


def _check_shared_tables(structure: Structure, formats: Mapping[str, StoredWeight], findings: Findings) -> None:
    """Add a problem for a stored embedding that the output head multiplies by."""
    for stored in formats.values():
        other = sharer(stored.weight, structure.bindings.tied) if stored.weight.role == "embedding" else None
        if other is not None:
            findings.problems.append(
                PreflightError(
                    f"shares its weight with {other}, which multiplies by it and would be left without a weight",
                    where=stored.weight.name,
                    hint=f'Set except: ["{stored.weight.name}"] for this step.',
                    data={"reason": "shared-embedding", "other": other},
                )
            )


def _unties_head(structure: Structure, formats: Mapping[str, StoredWeight], findings: Findings) -> bool:
    """Whether the output head of the result has its own weight although config.json ties it to the embedding."""
    shared = [
        stored.weight.parameter for stored in formats.values() if stored.weight.parameter in structure.bindings.tied
    ]
    if shared:
        message = "the output head shares the embedding's weight; it gets its own, and config.json is changed to match"
        findings.warn("untied-head", shared[0], message)
    return bool(shared or structure.bindings.apart)


def _export_format(
    recipe: Recipe, structure: Structure, formats: list[StoredWeight], tries_loaders: bool, findings: Findings
) -> ExportFormat | None:
    """The export format; None, with a problem, if no format fits."""
    try:
        export_format = _tried_export_format(recipe, structure, formats, tries_loaders, findings)
    except CompressError as problem:
        findings.problems.append(problem)
        return None
    try:
        check_loader(export_format.name)
    except CompressError as problem:
        findings.problems.append(problem)
    if export_format.name == "compressed-tensors" and (
        asymmetric := [f for f in formats if f.format_name == "byte_linear"]
    ):
        message = (
            f"{len(asymmetric)} weights have asymmetric 8-bit codes, which transformers can read and vLLM "
            "can't; for vLLM set symmetric: true, or 4 bits"
        )
        findings.warn("vllm-asymmetric-8-bits", asymmetric[0].weight.name, message, weights=len(asymmetric))
    return export_format


def _check_config(
    structure: Structure, export_format: ExportFormat, formats: list[StoredWeight], untied: bool, findings: Findings
) -> None:
    """Add a problem if transformers refuses the config.json of the artifact, or a model of the class made from it."""
    dtype = str(structure.dtype).removeprefix("torch.")
    source = structure.checkpoint.carried_config
    values = artifact_config(source, export_format, formats, structure.model, dtype, untied)
    why = values_misfit(structure, {**values, "model_type": source["model_type"]})
    if why is not None:
        findings.problems.append(
            PreflightError(
                f"transformers refuses the config.json that the artifact would have ({why})",
                where=structure.architecture,
                hint="Set another export.format, or leave the step out that changes these values.",
                data={"reason": "config-refused", "format": export_format.name, "because": values_of(why)},
            )
        )


def _tried_export_format(
    recipe: Recipe, structure: Structure, formats: list[StoredWeight], tries_loaders: bool, findings: Findings
) -> ExportFormat:
    """The export format that fits the weights, tried with the model's class. raises PreflightError if there is none"""
    export = recipe.export
    export_format = choose_export_format(formats, export.format, export.stock_only, structure.model)
    package = FAMILIES[export_format.name].package if export_format.name in FAMILIES else None
    if not tries_loaders or not formats or (package is not None and find_spec(package) is None):
        return export_format
    try:
        while (why := try_loaders(structure, formats, export_format)) is not None:
            export_format = next_export_format(
                export_format, why, formats, export.format, export.stock_only, structure.model
            )
    except NoProbeModel as reason:
        message = (
            f"loading {export_format.name} was not tried: {reason}. The run finds out after its sweep whether it works."
        )
        because = values_of(reason.obstacle)
        findings.warn("format-untried", structure.architecture, message, format=export_format.name, because=because)
    return export_format


def _warn_of_mapped_experts(structure: Structure, sizes: Sizes, findings: Findings) -> None:
    if sizes.maps_experts:
        largest = max(mappable_experts(structure).parts)
        message = (
            f"the experts of a block ({largest:,} bytes) don't fit into memory, so they lie in a mapped file in "
            "the work directory. The artifact is the same, the run takes longer"
        )
        findings.warn("experts-mapped", structure.architecture, message, bytes=largest)


def _warn_of_undecided_sizes(recipe: Recipe, decisions: Container[StepPath], findings: Findings) -> None:
    """Warn if the run decides sizes, so that the sizes of the plan are bounds."""
    for step in recipe.steps:
        if step.settings.unplanned and step.path not in decisions:
            sizes = step.settings.sizes_are
            message = f"{step.name}: {step.settings.unplanned}; its sizes here are {sizes}"
            findings.warn("sizes-undecided", dotted(step.path), message, **{"pass": step.name}, sizes=sizes)


def _warn_of_divided_data(recipe: Recipe, findings: Findings) -> None:
    if recipe.reads_data and same_source(recipe.data, recipe.eval.data):
        message = (
            "names the documents of data: three quarters of them, chosen by hash, are used for calibration, and "
            "the other quarter for evaluation"
        )
        findings.warn("data-divided", "eval.data", message)


def _warn_of_unused_tensors(
    source: Structure, structure: Structure, reshapes: Sequence[Reshape], findings: Findings
) -> None:
    """Warn of tensors that fill no parameter of the model, and of weight files that aren't read."""
    checkpoint, bindings = source.checkpoint, source.bindings
    for message in checkpoint.unread:
        findings.warn("second-weights", checkpoint.directory.name, message, **values_of(message))
    for name in bindings.apart:
        message = "config.json ties it to a tensor with other values, so it stays untied, as in transformers"
        findings.warn("not-tied", name, message)
    if not (unused := carried(source)):
        return
    nbytes = sum(checkpoint.tensors[tensor.tensor].nbytes for tensor in unused)
    where, values = ", ".join(tensor.tensor for tensor in unused[:4]), {"tensors": len(unused), "bytes": nbytes}
    which = f"{len(unused)} tensors ({nbytes:,} bytes) that {source.architecture} doesn't use are"
    if carried(structure):
        findings.warn("unused-tensors", where, f"{which} copied into the artifact unchanged", **values)
    else:
        changer = next(reshape.step.name for reshape in reshapes if isinstance(reshape.step.settings, RewritePass))
        message = f"{which} left out: {changer} changes their model"
        findings.warn("left-out-tensors", where, message, **{"pass": changer}, **values)
