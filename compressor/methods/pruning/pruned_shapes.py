"""Computes the shapes of a model with fewer heads, fewer neurons and a narrower residual stream.

`compressor.analysis.prunable_units` finds what can be removed. A pass decides what is removed, as a `PruningDecision`.

The matrices only get smaller. So the pruned model computes what the model computes with the inputs of the output
projections (`PrunableModule.output_projection`) multiplied by 0 at the removed columns. For the residual stream this
holds with norms over the kept values:

    RMSNorm    sum(x²)/D + eps over D values, of which d are left, is d/D (sum(x²)/d + eps D/d): gain times sqrt(D/d),
               eps times D/d
    LayerNorm  mean and variance over the kept values; the gain and the shift stay

If config.json can describe the result (the same number in every block, as `prunable_units` has proven), it is a model
of the same class. Else the modeling file describes it: shapes one by one, attributes of attention modules that count
heads, and a `removed` layer for a removed sub-block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, cast

from compressor.errors import Because, PreflightError, values_of
from compressor.model.class_changes import (
    ClassChanges,
    ModuleEntry,
    RemovedParams,
    ResizedParams,
    changed_modules,
    changed_shapes,
    resized_entry,
    rms_norm_entry,
)
from compressor.model.facts import KINDS, ModelFacts, PrunableModule, PrunedSlice, PruningDecision, Redefinition
from compressor.model.families import DEPTH_KEYS, HEAD_COUNT_KEYS, NORM_EPS_KEYS, WIDTH_KEYS
from compressor.model.module_names import is_inside
from compressor.model.residual_records import Residual, ResidualNorm
from compressor.protocol import PartView

Export = Literal["auto", "stock", "custom"]
Kept = dict[str, dict[int, tuple[int, ...]]]  # parameter -> axis -> indices that stay


def kept_units(prunable: PrunableModule, decision: PruningDecision) -> tuple[int, ...]:
    if prunable.name in decision.get("removed", ()):
        return ()
    return tuple(decision["sites"].get(prunable.name, range(prunable.units)))


def check_decision(prunables: Sequence[PrunableModule], decision: PruningDecision, where: str = "decision") -> None:
    """raises PreflightError for an unknown prunable module, units that it doesn't have, or one that must stay"""
    known = {prunable.name: prunable for prunable in prunables}
    named = [*decision["sites"], *decision.get("removed", ())]
    if unknown := [name for name in named if name not in known]:
        raise PreflightError(
            f"{unknown[0]} is not a prunable module of this model",
            where=where,
            hint="Begin again with --fresh, so that the choice is made for this model.",
            data={"reason": "no-prunable", "prunable": unknown[0]},
        )
    for prunable in prunables:
        kept = kept_units(prunable, decision)
        if list(kept) != sorted(set(kept)) or (kept and not 0 <= kept[0] <= kept[-1] < prunable.units):
            raise PreflightError(
                f"{list(kept)} are not ascending numbers below {prunable.units}, for {prunable.name}",
                where=where,
                hint="Begin again with --fresh, so that the choice is made for this model.",
                data={"reason": "units", "prunable": prunable.name, "kept": list(kept), "units": prunable.units},
            )
        if not kept and prunable.layout.removal is None:
            raise PreflightError(
                "every head or neuron of this sub-block would be removed, and the sub-block itself can't be",
                where=prunable.name,
                hint="Keep at least one of them: set a smaller target, or protect this block with protect_layers.",
                data={"reason": "nothing-kept"},
            )


def pruned_redefinition(
    facts: ModelFacts, prunables: Sequence[PrunableModule], decision: PruningDecision, export: Export = "auto"
) -> Redefinition:
    """The definition of the pruned model.

    export  stock: a model of the same class or an error; custom: the modeling file, also if a stock model is possible
    raises  PreflightError for a decision that doesn't fit the model, or a stock model that is impossible
    """
    check_decision(prunables, decision)
    width = _reads_width(facts, prunables)
    channels = kept_channels(facts, decision)
    widths = (width, width if channels is None else len(channels))
    shapes = pruned_shapes(facts, prunables, decision)
    if not shapes:
        return Redefinition(widths=widths, decision=decision)
    why: str | None = "the recipe has export: custom"
    if export != "custom":
        redefinition = _stock(facts, prunables, decision)
        if isinstance(redefinition, Redefinition):
            return replace(redefinition, widths=widths, decision=decision)
        why = redefinition
        if export == "stock":
            raise PreflightError(
                f"the config of {facts.architecture} can't describe the pruned model: {why}",
                where="export",
                hint="Set export: auto, which adds a modeling file, or uniform: true if the pass is vtrans.",
                data={"reason": "no-stock-model", "model": facts.architecture, "because": values_of(why)},
            )
    redefinition = _custom(facts, prunables, decision, shapes, why)
    return replace(redefinition, widths=widths, decision=decision)


def pruned_shapes(
    facts: ModelFacts, prunables: Sequence[PrunableModule], decision: PruningDecision, removed: Sequence[int] = ()
) -> dict[str, tuple[int, ...] | None]:
    """Parameter -> its new shape, for those that change or are new; None if it is removed. Tied ones have no entry.

    removed  blocks that are removed as a whole
    """
    shapes: dict[str, tuple[int, ...] | None] = {}
    residual = None if kept_channels(facts, decision) is None else facts.residual
    for name, axes in kept_slices(facts.shapes, prunables, decision, residual).items():
        if name not in facts.tied:
            shape = facts.shapes[name]
            shapes[name] = tuple(len(axes[a]) if a in axes else n for a, n in enumerate(shape))
    for prunable in prunables:
        if kept_units(prunable, decision) or prunable.block in removed:
            continue
        bias = shapes.get(prunable.bias, facts.shapes[prunable.bias]) if prunable.bias else None
        for entry in prunable.layout.removal or ():
            inside = entry.path + "."
            shapes |= dict.fromkeys(name for name in facts.shapes if name.startswith(inside))
            if entry.adds and bias:
                shapes[f"{entry.path}.bias"] = bias
    for block in removed:
        shapes |= dict.fromkeys(name for name in facts.shapes if name.startswith(f"{facts.blocks}.{block}."))
    return {name: shape for name, shape in shapes.items() if shape != facts.shapes.get(name)}


def dropped_blocks(prunables: Sequence[PrunableModule], decision: PruningDecision) -> tuple[int, ...]:
    """Blocks that do nothing after pruning, so that a model without them computes the same."""
    left = {prunable.block for prunable in prunables if kept_units(prunable, decision) or not prunable.layout.vanishes}
    return tuple(sorted({prunable.block for prunable in prunables} - left))


def kept_slices(
    shapes: Mapping[str, Sequence[int]],
    prunables: Sequence[PrunableModule],
    decision: PruningDecision,
    residual: Residual | None,
) -> Kept:
    """The kept indices along each axis of every parameter that gets smaller, except those of removed sub-blocks.

    residual  of the model, if its stream gets narrower
    """
    kept: Kept = {}
    known: dict[tuple[Any, ...], tuple[int, ...]] = {}  # blocks of a kind share the rows of their slices
    for prunable in prunables:
        units = kept_units(prunable, decision)
        if units and len(units) < prunable.units:
            for sliced in prunable.slices:
                key = (id(sliced.rows), shapes[sliced.parameter][sliced.axis], units)
                if key not in known:
                    known[key] = _left(sliced, key[1], units)
                kept.setdefault(sliced.parameter, {})[sliced.axis] = known[key]
    hidden = decision.get("hidden")
    if residual is not None and hidden is not None:
        for name, axis in stream_edges(residual):
            kept.setdefault(name, {})[axis] = tuple(hidden)
    return kept


def _left(sliced: PrunedSlice, length: int, units: tuple[int, ...]) -> tuple[int, ...]:
    """The indices of an axis of this length that stay with these units."""
    removed = {row for unit in {*range(len(sliced.rows))}.difference(units) for row in sliced.rows[unit]}
    return tuple(n for n in range(length) if n not in removed)


def stream_edges(residual: Residual) -> Iterator[tuple[str, int]]:
    """Every parameter that reads or writes the residual stream, and its axis along the stream."""
    for norm in residual.norms():
        yield from ((f"{norm.module}.{leaf}", 0) for leaf, has in _leaves(norm) if has)
        yield from ((consumer.parameter, consumer.axis) for consumer in norm.consumers)
    yield from ((write.parameter, write.axis) for write in residual.writes())


def _leaves(norm: ResidualNorm) -> tuple[tuple[str, bool], ...]:
    return (("weight", norm.formula.has_weight), ("bias", norm.formula.has_bias))


def _reads_width(facts: ModelFacts, prunables: Sequence[PrunableModule]) -> int:
    """The stream's width: the outputs of an output projection."""
    if not prunables:
        return facts.residual.width
    return facts.shapes[prunables[0].slices[0].parameter][1 - prunables[0].slices[0].axis]


def kept_channels(model: ModelFacts | PartView, decision: PruningDecision) -> Sequence[int] | None:
    """The indices of the residual stream that stay; None if all of them do."""
    kept = decision.get("hidden")
    return kept if kept is not None and len(kept) < model.residual.width else None


# a stock model


def _stock(facts: ModelFacts, prunables: Sequence[PrunableModule], decision: PruningDecision) -> Redefinition | str:
    """The pruned model of the same class, or the reason why there is none."""
    removed = dropped_blocks(prunables, decision)
    stay = [prunable for prunable in prunables if prunable.block not in removed]
    config: dict[str, Any] = {}
    for kind in KINDS:
        found_config = _kind_config([prunable for prunable in stay if prunable.kind == kind], decision)
        if isinstance(found_config, str):
            return found_config
        config |= found_config
    count = len({prunable.block for prunable in prunables})
    if removed:
        depths = [key for key in DEPTH_KEYS if facts.config.get(key) == count]
        if not depths or len(removed) == count:
            return "its config can't describe removed blocks"
        kept = [block for block in range(count) if block not in removed]
        config |= {key: len(kept) for key in depths}
        lists = [key for key, value in facts.config.items() if isinstance(value, list) and len(value) == count]
        config |= {key: [facts.config[key][block] for block in kept] for key in lists}
    if (channels := kept_channels(facts, decision)) is not None:
        narrow = _narrow_config(facts, prunables, len(channels))
        if isinstance(narrow, str):
            return narrow
        config = {**narrow, **config}
    if changed_shapes(facts.config) or changed_modules(facts.config):
        return "it is no model of its own class any more"
    blocks = tuple(block for block in range(count) if block not in removed) if removed else None
    redefinition = Redefinition(config, pruned_shapes(facts, prunables, decision, removed), blocks=blocks)
    return facts.fits(redefinition) or redefinition


def _kind_config(prunables: Sequence[PrunableModule], decision: PruningDecision) -> dict[str, Any] | str:
    """The keys of config.json for the number of units of one kind in every block, or the reason why there are none."""
    counts = {len(kept_units(prunable, decision)) for prunable in prunables}
    if all(len(kept_units(prunable, decision)) == prunable.units for prunable in prunables):
        return {}
    if 0 in counts:
        removed = next(s.name for s in prunables if not kept_units(s, decision))
        return Because(f"{removed} is removed as a whole", reason="removed", prunable=removed)
    if len(counts) > 1:
        kind = prunables[0].kind
        return Because(f"the number of {kind} differs from block to block", reason="uneven", kind=kind)
    keys = prunables[0].layout.config
    if keys is None:
        kind = prunables[0].kind
        return Because(f"its config.json has no number of {kind}", reason="count-not-in-config", kind=kind)
    return keys.of(next(iter(counts)))


def width_key(facts: ModelFacts) -> str | None:
    """The key of config.json that is the width of the residual stream."""
    return next((key for key in WIDTH_KEYS if facts.config.get(key) == facts.residual.width), None)


def _narrow_config(facts: ModelFacts, prunables: Sequence[PrunableModule], kept: int) -> dict[str, Any] | str:
    """The keys of config.json for a residual stream of the width `kept`, or the reason why there are none."""
    residual, width = facts.residual, facts.residual.width
    key = width_key(facts)
    if key is None:
        return "its config has no width of the residual stream"
    config: dict[str, Any] = {key: kept}
    if residual.kind == "rms":
        keys = [key for key in NORM_EPS_KEYS if key in facts.config]
        if not keys:
            return "its config has no eps of its norms"
        if not prunables:
            return f"nobody has looked whether norms inside its blocks have the same {keys[0]} as those of the stream"
        if any(prunable.layout.has_norms for prunable in prunables):
            return Because(
                f"norms inside its blocks share {keys[0]} with those of the residual stream",
                reason="eps-of-other-norms",
                key=keys[0],
            )
        if not all(norm.formula.has_weight for norm in residual.norms()):
            return "its norms have no gain to hold the factor of a narrower residual stream"
        config |= {key: residual.end.formula.eps * width / kept for key in keys}
    scaled = [write for write in residual.embeddings if write.scale is not None and is_root(write.scale, width)]
    if scaled and any(owner == scaled[0].parameter for owner in facts.tied.values()):
        return "its embedding is scaled by the width of the stream and shared with the output head"
    heads = next((facts.config[key] for key in HEAD_COUNT_KEYS if facts.config.get(key)), None)
    if heads:
        config["head_dim"] = facts.config.get("head_dim") or width // heads
    return config


def is_root(scale: float, width: int) -> bool:
    """Whether a scale is the square root of the width; Gemma computes it in 16 bits."""
    return width > 1 and abs(scale - width**0.5) < 1e-2


# a model of the modeling file


def _custom(
    facts: ModelFacts,
    prunables: Sequence[PrunableModule],
    decision: PruningDecision,
    shapes: dict[str, tuple[int, ...] | None],
    why: str | None,
) -> Redefinition:
    modules = changed_modules(facts.config)
    config: dict[str, Any] = {}
    for kind in KINDS:  # a number that the class can't have block by block may be possible in the config
        alike = [prunable for prunable in prunables if prunable.kind == kind and prunable.layout.per_layer]
        found = _kind_config(alike, decision)
        partly = [prunable for prunable in alike if 0 < len(kept_units(prunable, decision)) < prunable.units]
        if isinstance(found, str) and partly:
            raise PreflightError(
                f"blocks can't differ in their number of {kind} ({partly[0].layout.per_layer}), and {why}",
                where=partly[0].name,
                hint="Set uniform: true if the pass is vtrans; where it is greedy_removal, remove only whole blocks.",
                data={"reason": "blocks-differ", "kind": kind},
            )
        config |= {} if isinstance(found, str) else found
    for prunable in prunables:
        units = len(kept_units(prunable, decision))
        if not units:
            modules = _without(modules, [entry.path for entry in prunable.layout.removal or ()])
            modules |= removed_modules(
                prunable, facts.shapes[f"{prunable.output_projection}.weight"][1 - prunable.slices[0].axis]
            )
        elif units < prunable.units and not prunable.layout.per_layer:
            for path, attributes in _resized_attributes(prunable, units).items():
                before = cast(ResizedParams, modules[path]["spec"])["attributes"] if path in modules else {}
                modules[path] = resized_entry({"attributes": {**before, **attributes}})
    if (channels := kept_channels(facts, decision)) is not None:
        for norm in facts.residual.norms():
            modules |= _narrow_norm(norm, facts.residual.width, len(channels))
        modules = _narrow_removed(modules, len(channels))
    held = {name: list(shape) for name, shape in shapes.items() if shape is not None and not _is_in(name, modules)}
    for name, owner in facts.tied.items():
        if held.get(owner) is not None:
            held[name] = held[owner]
    earlier = changed_shapes(facts.config)
    kept = {name: shape for name, shape in earlier.items() if shapes.get(name, ()) is not None}
    own = ClassChanges(compressed_shapes={**kept, **held}, compressed_modules=dict(sorted(modules.items())))
    return Redefinition({**config, **own}, dict(shapes))


def removed_modules(prunable: PrunableModule, width: int) -> dict[str, ModuleEntry]:
    """The layers that replace a removed sub-block; `width` is that of its output projection's output."""
    modules: dict[str, ModuleEntry] = {}
    for entry in prunable.layout.removal or ():
        format_params: RemovedParams = {
            "returns": entry.returns,
            "layer": entry.layer,
            "has_bias": bool(entry.adds and prunable.bias is not None),
            "of": prunable.kind,
        }
        shape = [width if entry.adds else 0]
        modules[entry.path] = {"form": "removed", "spec": format_params, "shape": shape}
    return modules


def resized_modules(prunable: PrunableModule, units: int) -> dict[str, ModuleEntry]:
    """The layers that give modules that count heads their new attributes."""
    found = _resized_attributes(prunable, units)
    return {path: resized_entry({"attributes": attributes}) for path, attributes in found.items()}


def _resized_attributes(prunable: PrunableModule, units: int) -> dict[str, dict[str, int]]:
    """The new attributes of modules that count heads, by path."""
    attributes = prunable.layout.attributes
    return {path: {name: n * units for name, n in numbers.items()} for path, numbers in attributes.items() if numbers}


def _without(modules: Mapping[str, ModuleEntry], paths: Sequence[str]) -> dict[str, ModuleEntry]:
    return {name: entry for name, entry in modules.items() if not any(is_inside(name, path) for path in paths)}


def _is_in(name: str, modules: Mapping[str, ModuleEntry]) -> bool:
    """Whether a parameter is one of a `removed` layer, which knows its shape."""
    return any(entry["form"] == "removed" and name == f"{path}.bias" for path, entry in modules.items())


def _narrow_norm(norm: ResidualNorm, width: int, kept: int) -> dict[str, ModuleEntry]:
    if not norm.formula.has_weight:
        divisor = norm.formula.divisor or width
        if norm.formula.kind == "layer":
            raise PreflightError(
                "this LayerNorm has no gain, so it can't be computed for a narrower residual stream",
                where=norm.module,
                hint="Leave hidden out of `sites`.",
                data={"reason": "norm-without-gain", "norm": norm.module},
            )
        return {norm.module: rms_norm_entry(divisor, norm.formula.eps, kept)}
    if norm.formula.kind == "layer":
        return {}
    return {norm.module: resized_entry({"attributes": {}, "eps": norm.formula.eps * width / kept})}


def _narrow_removed(modules: Mapping[str, ModuleEntry], kept: int) -> dict[str, ModuleEntry]:
    """The layers in place of removed sub-blocks, with the narrower width of the stream."""
    return {
        path: {**entry, "shape": [kept]} if entry["form"] == "removed" and list(entry["shape"]) != [0] else entry
        for path, entry in modules.items()
    }
