"""Computes the shapes of a model with fewer heads, fewer neurons and a narrower residual stream.

`compressor.analysis.prunable_units` finds what can be removed. A pass decides what is removed, as a Decision:

    sites    name of a prunable module -> ascending indices of the units that stay; a module without entry stays whole
    hidden   indices of the residual stream that stay, or null: all of them
    removed  names of prunable modules that are removed as a whole; the same as an empty list under `sites`

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
from typing import Any, Literal

from compressor.errors import Because, PreflightError, values_of
from compressor.model.facts import KINDS, Cut, Decision, ModelFacts, PrunableModule, Redefinition
from compressor.model.families import DEPTH_KEYS, HEAD_COUNT_KEYS, NORM_EPS_KEYS, WIDTH_KEYS
from compressor.model.module_names import is_inside
from compressor.model.residual_records import Residual, ResidualNorm

Export = Literal["auto", "stock", "custom"]
Kept = dict[str, dict[int, tuple[int, ...]]]  # parameter -> axis -> indices that stay


def kept_units(site: PrunableModule, decision: Decision) -> tuple[int, ...]:
    if site.name in decision.get("removed", ()):
        return ()
    return tuple(decision["sites"].get(site.name, range(site.units)))


def check_decision(sites: Sequence[PrunableModule], decision: Decision, where: str = "decision") -> None:
    """raises PreflightError for an unknown prunable module, units that it doesn't have, or one that must stay"""
    known = {site.name: site for site in sites}
    named = [*decision["sites"], *decision.get("removed", ())]
    if unknown := [name for name in named if name not in known]:
        raise PreflightError(
            f"{unknown[0]} is not a prunable module of this model",
            where=where,
            hint="Begin again with --fresh, so that the choice is made for this model.",
            data={"reason": "no-site", "site": unknown[0]},
        )
    for site in sites:
        kept = kept_units(site, decision)
        if list(kept) != sorted(set(kept)) or (kept and not 0 <= kept[0] <= kept[-1] < site.units):
            raise PreflightError(
                f"{list(kept)} are not ascending numbers of units of {site.name}, which has {site.units}",
                where=where,
                hint="Begin again with --fresh, so that the choice is made for this model.",
                data={"reason": "units", "site": site.name, "kept": list(kept), "units": site.units},
            )
        if not kept and site.layout.removal is None:
            raise PreflightError(
                "every unit of this sub-block would be removed, and the sub-block itself can't be",
                where=site.name,
                hint="Keep at least one unit: set a smaller target, or protect this block with protect_layers.",
                data={"reason": "nothing-kept"},
            )


def pruned_redefinition(
    facts: ModelFacts, sites: Sequence[PrunableModule], decision: Decision, export: Export = "auto"
) -> Redefinition:
    """The definition of the pruned model.

    export  stock: a model of the same class or an error; custom: the modeling file, also if a stock model is possible
    raises  PreflightError for a decision that doesn't fit the model, or a stock model that is impossible
    """
    check_decision(sites, decision)
    width = _reads_width(facts, sites)
    widths = (width, len(decision["hidden"]) if _narrows(facts, decision) else width)
    shapes = pruned_shapes(facts, sites, decision)
    if not shapes:
        return Redefinition(widths=widths, decision=decision)
    why: str | None = "the recipe has export: custom"
    if export != "custom":
        redefinition = _stock(facts, sites, decision)
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
    redefinition = _custom(facts, sites, decision, shapes, why)
    return replace(redefinition, widths=widths, decision=decision)


def pruned_shapes(
    facts: ModelFacts, sites: Sequence[PrunableModule], decision: Decision, gone: Sequence[int] = ()
) -> dict[str, tuple[int, ...] | None]:
    """Parameter -> its new shape, for those that change or are new; None if it is removed. Tied ones have no entry.

    gone  blocks that are removed as a whole
    """
    shapes: dict[str, tuple[int, ...] | None] = {}
    residual = facts.residual if _narrows(facts, decision) else None
    for name, axes in kept_slices(facts.shapes, sites, decision, residual).items():
        if name not in facts.tied:
            shape = facts.shapes[name]
            shapes[name] = tuple(len(axes[a]) if a in axes else n for a, n in enumerate(shape))
    for site in sites:
        if kept_units(site, decision) or site.block in gone:
            continue
        bias = shapes.get(site.bias, facts.shapes[site.bias]) if site.bias else None
        for entry in site.layout.removal or ():
            inside = entry.path + "."
            shapes |= dict.fromkeys(name for name in facts.shapes if name.startswith(inside))
            if entry.adds and bias:
                shapes[f"{entry.path}.bias"] = bias
    for block in gone:
        shapes |= dict.fromkeys(name for name in facts.shapes if name.startswith(f"{facts.blocks}.{block}."))
    return {name: shape for name, shape in shapes.items() if shape != facts.shapes.get(name)}


def dropped_blocks(sites: Sequence[PrunableModule], decision: Decision) -> tuple[int, ...]:
    """Blocks that do nothing after pruning, so that a model without them computes the same."""
    left = {site.block for site in sites if kept_units(site, decision) or not site.layout.vanishes}
    return tuple(sorted({site.block for site in sites} - left))


def kept_slices(
    shapes: Mapping[str, Sequence[int]],
    sites: Sequence[PrunableModule],
    decision: Decision,
    residual: Residual | None,
) -> Kept:
    """The kept indices along each axis of every parameter that gets smaller, except those of removed sub-blocks.

    residual  of the model, if its stream gets narrower
    """
    kept: Kept = {}
    known: dict[tuple[Any, ...], tuple[int, ...]] = {}  # blocks of a kind share the rows of their cuts
    for site in sites:
        units = kept_units(site, decision)
        if units and len(units) < site.units:
            for cut in site.cuts:
                key = (id(cut.rows), shapes[cut.parameter][cut.axis], units)
                if key not in known:
                    known[key] = _left(cut, key[1], units)
                kept.setdefault(cut.parameter, {})[cut.axis] = known[key]
    if residual is not None:
        for name, axis in stream_edges(residual):
            kept.setdefault(name, {})[axis] = tuple(decision["hidden"])
    return kept


def _left(cut: Cut, length: int, units: tuple[int, ...]) -> tuple[int, ...]:
    """The indices of an axis of this length that stay with these units."""
    gone = {row for unit in {*range(len(cut.rows))}.difference(units) for row in cut.rows[unit]}
    return tuple(n for n in range(length) if n not in gone)


def stream_edges(residual: Residual) -> Iterator[tuple[str, int]]:
    """Every parameter that reads or writes the residual stream, and its axis along the stream."""
    for norm in residual.norms():
        yield from ((f"{norm.module}.{leaf}", 0) for leaf, has in _leaves(norm) if has)
        yield from ((consumer.parameter, consumer.axis) for consumer in norm.consumers)
    yield from ((write.parameter, write.axis) for write in residual.writes())


def _leaves(norm: ResidualNorm) -> tuple[tuple[str, bool], ...]:
    return (("weight", norm.formula.has_weight), ("bias", norm.formula.has_bias))


def _reads_width(facts: ModelFacts, sites: Sequence[PrunableModule]) -> int:
    """The stream's width: the outputs of an output projection."""
    if not sites:
        return facts.residual.width
    return facts.shapes[sites[0].cuts[0].parameter][1 - sites[0].cuts[0].axis]


def _narrows(facts: ModelFacts, decision: Decision) -> bool:
    kept = decision.get("hidden")
    return kept is not None and len(kept) < facts.residual.width


# a stock model


def _stock(facts: ModelFacts, sites: Sequence[PrunableModule], decision: Decision) -> Redefinition | str:
    """The pruned model of the same class, or the reason why there is none."""
    gone = dropped_blocks(sites, decision)
    stay = [site for site in sites if site.block not in gone]
    config: dict[str, Any] = {}
    for kind in KINDS:
        said = _kind_config([site for site in stay if site.kind == kind], decision)
        if isinstance(said, str):
            return said
        config |= said
    count = len({site.block for site in sites})
    if gone:
        depths = [key for key in DEPTH_KEYS if facts.config.get(key) == count]
        if not depths or len(gone) == count:
            return "its config can't describe removed blocks"
        kept = [block for block in range(count) if block not in gone]
        config |= {key: len(kept) for key in depths}
        lists = [key for key, value in facts.config.items() if isinstance(value, list) and len(value) == count]
        config |= {key: [facts.config[key][block] for block in kept] for key in lists}
    if _narrows(facts, decision):
        narrow = _narrow_config(facts, sites, decision)
        if isinstance(narrow, str):
            return narrow
        config = {**narrow, **config}
    for key in ("compressed_shapes", "compressed_modules"):
        if facts.config.get(key):
            return "it is no model of its own class any more"
    blocks = tuple(block for block in range(count) if block not in gone) if gone else None
    redefinition = Redefinition(config, pruned_shapes(facts, sites, decision, gone), blocks=blocks)
    return facts.fits(redefinition) or redefinition


def _kind_config(sites: Sequence[PrunableModule], decision: Decision) -> dict[str, Any] | str:
    """The keys of config.json for the number of units of one kind in every block, or the reason why there are none."""
    counts = {len(kept_units(site, decision)) for site in sites}
    if all(len(kept_units(site, decision)) == site.units for site in sites):
        return {}
    if 0 in counts:
        gone = next(s.name for s in sites if not kept_units(s, decision))
        return Because(f"{gone} is removed as a whole", reason="gone", site=gone)
    if len(counts) > 1:
        kind = sites[0].kind
        return Because(f"the number of {kind} differs from block to block", reason="uneven", kind=kind)
    keys = sites[0].layout.config
    if keys is None:
        kind = sites[0].kind
        return Because(f"its config.json has no number of {kind}", reason="count-not-in-config", kind=kind)
    return keys.of(next(iter(counts)))


def width_key(facts: ModelFacts) -> str | None:
    """The key of config.json that is the width of the residual stream."""
    return next((key for key in WIDTH_KEYS if facts.config.get(key) == facts.residual.width), None)


def _narrow_config(facts: ModelFacts, sites: Sequence[PrunableModule], decision: Decision) -> dict[str, Any] | str:
    residual, kept = facts.residual, len(decision["hidden"])
    width = residual.width
    key = width_key(facts)
    if key is None:
        return "its config has no width of the residual stream"
    config: dict[str, Any] = {key: kept}
    if residual.kind == "rms":
        keys = [key for key in NORM_EPS_KEYS if key in facts.config]
        if not keys:
            return "its config has no eps of its norms"
        if not sites:
            return f"nobody has looked whether norms inside its blocks have the same {keys[0]} as those of the stream"
        if any(site.layout.has_norms for site in sites):
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
    sites: Sequence[PrunableModule],
    decision: Decision,
    shapes: dict[str, tuple[int, ...] | None],
    why: str | None,
) -> Redefinition:
    modules: dict[str, Any] = dict(facts.config.get("compressed_modules") or {})
    said: dict[str, Any] = {}
    for kind in KINDS:  # a number that the class can't have block by block may be possible in the config
        alike = [site for site in sites if site.kind == kind and site.layout.per_layer]
        found = _kind_config(alike, decision)
        partly = [site for site in alike if 0 < len(kept_units(site, decision)) < site.units]
        if isinstance(found, str) and partly:
            raise PreflightError(
                f"blocks can't differ in their number of {kind} ({partly[0].layout.per_layer}), and {why}",
                where=partly[0].name,
                hint="Set uniform: true if the pass is vtrans; where it is greedy_removal, remove only whole blocks.",
                data={"reason": "blocks-differ", "kind": kind},
            )
        said |= {} if isinstance(found, str) else found
    for site in sites:
        units = len(kept_units(site, decision))
        if not units:
            modules = _without(modules, [entry.path for entry in site.layout.removal or ()])
            modules |= removed_modules(site, facts.shapes[f"{site.output_projection}.weight"][1 - site.cuts[0].axis])
        elif units < site.units and not site.layout.per_layer:
            for path, module in resized_modules(site, units).items():
                before = modules.get(path, module)["spec"]["attributes"]
                modules[path] = {**module, "spec": {"attributes": {**before, **module["spec"]["attributes"]}}}
    if _narrows(facts, decision):
        for norm in facts.residual.norms():
            modules |= _narrow_norm(norm, facts.residual.width, len(decision["hidden"]))
        modules = _narrow_removed(modules, facts, len(decision["hidden"]))
    held = {name: list(shape) for name, shape in shapes.items() if shape is not None and not _is_in(name, modules)}
    for name, owner in facts.tied.items():
        if held.get(owner) is not None:
            held[name] = held[owner]
    before = facts.config.get("compressed_shapes") or {}
    kept = {name: shape for name, shape in before.items() if shapes.get(name, ()) is not None}
    own = {"compressed_shapes": {**kept, **held}, "compressed_modules": dict(sorted(modules.items()))}
    return Redefinition({**said, **own}, dict(shapes))


def removed_modules(site: PrunableModule, width: int) -> dict[str, Any]:
    """The layers that replace a removed sub-block; `width` is that of its output projection's output."""
    modules = {}
    for entry in site.layout.removal or ():
        spec = {
            "returns": entry.returns,
            "layer": entry.layer,
            "has_bias": bool(entry.adds and site.bias is not None),
            "of": site.kind,
        }
        shape = [width if entry.adds else 0]
        modules[entry.path] = {"form": "removed", "spec": spec, "shape": shape}
    return modules


def resized_modules(site: PrunableModule, units: int) -> dict[str, Any]:
    """The new attributes of modules that count heads."""
    return {
        path: {
            "form": "resized",
            "spec": {"attributes": {name: number * units for name, number in numbers.items()}},
            "shape": [],
        }
        for path, numbers in site.layout.attributes.items()
        if numbers
    }


def _without(modules: dict[str, Any], paths: Sequence[str]) -> dict[str, Any]:
    return {name: entry for name, entry in modules.items() if not any(is_inside(name, path) for path in paths)}


def _is_in(name: str, modules: Mapping[str, Any]) -> bool:
    """Whether a parameter is one of a `removed` layer, which knows its shape."""
    return any(entry["form"] == "removed" and name == f"{path}.bias" for path, entry in modules.items())


def _narrow_norm(norm: ResidualNorm, width: int, kept: int) -> dict[str, Any]:
    if not norm.formula.has_weight:
        divisor = norm.formula.divisor or width
        if norm.formula.kind == "layer":
            raise PreflightError(
                "this LayerNorm has no gain, so it can't be computed for a narrower residual stream",
                where=norm.module,
                hint="Leave hidden out of `sites`.",
            )
        return {norm.module: {"form": "rms_norm", "spec": {"width": divisor, "eps": norm.formula.eps}, "shape": [kept]}}
    if norm.formula.kind == "layer":
        return {}
    return {
        norm.module: {
            "form": "resized",
            "spec": {"attributes": {}, "eps": norm.formula.eps * width / kept},
            "shape": [],
        }
    }


def _narrow_removed(modules: dict[str, Any], facts: ModelFacts, kept: int) -> dict[str, Any]:
    """The layers in place of removed sub-blocks, with the narrower width of the stream."""
    return {
        path: {**entry, "shape": [kept]} if entry["form"] == "removed" and entry["shape"] != [0] else entry
        for path, entry in modules.items()
    }
