"""Finds passes by name. Passes of other packages are found through the entry point group `compressor.passes`."""

from __future__ import annotations

import difflib
import importlib
from importlib.metadata import EntryPoint, entry_points

from compressor.errors import RecipeError
from compressor.protocol import Pass

BUILTIN = {
    "awq": "compressor.passes.awq:AWQ",
    "bct": "compressor.passes.bct:BCT",
    "dsformer": "compressor.passes.dsformer:DSFormer",
    "fuse_norms": "compressor.passes.fuse_norms:FuseNorms",
    "gptq": "compressor.passes.gptq:GPTQ",
    "greedy_removal": "compressor.passes.greedy_removal:GreedyRemoval",
    "llm_int8": "compressor.passes.llm_int8:LLMInt8",
    "low_rank": "compressor.passes.low_rank:LowRank",
    "prefill_pruning": "compressor.passes.prefill_pruning:PrefillPruning",
    "rotate": "compressor.passes.rotate:Rotate",
    "rtn": "compressor.passes.rtn:RTN",
    "slicegpt": "compressor.passes.slicegpt:SliceGPT",
    "vtrans": "compressor.passes.vtrans:VTrans",
    "zero_tprune": "compressor.passes.zero_tprune:ZeroTPrune",
}
GROUP = "compressor.passes"


def pass_names() -> list[str]:
    """Every known name, built in or installed, without importing any pass."""
    return sorted({*BUILTIN, *(point.name for point in entry_points(group=GROUP))})


def find_pass(name: str) -> type[Pass]:
    """The settings class of a pass. raises RecipeError for an unknown or broken pass, or for a name with two passes"""
    plugins = [point for point in entry_points(group=GROUP) if point.name == name]
    if len(plugins) + (name in BUILTIN) > 1:
        raise RecipeError(
            f"pass {name!r} is defined {len(plugins) + (name in BUILTIN)} times",
            hint="Uninstall one of: " + ", ".join(point.value for point in plugins),
            data={"pass": name, "count": len(plugins) + (name in BUILTIN)},
        )
    if plugins:
        return _load(plugins[0])
    if name in BUILTIN:
        module, _, attribute = BUILTIN[name].partition(":")
        return getattr(importlib.import_module(module), attribute)
    near = difflib.get_close_matches(name, pass_names(), 1)
    hint = f"Did you mean {near[0]!r}?" if near else "Known passes: " + ", ".join(pass_names())
    raise RecipeError(f"unknown pass {name!r}.", hint=hint, data={"reason": "unknown-pass", "name": name, "near": near})


def _load(point: EntryPoint) -> type[Pass]:
    try:
        found = point.load()
    except Exception as error:  # any failure of another package's module
        raise RecipeError(
            f"pass {point.name!r} of {point.value} can't be imported ({error})",
            hint="Reinstall that package.",
            data={"reason": "not-imported", "pass": point.name, "entry": point.value, "cause": str(error)},
        ) from error
    if not (isinstance(found, type) and issubclass(found, Pass)):
        raise RecipeError(
            f"{point.value} is not a Pass",
            hint="Reinstall that package.",
            data={"reason": "no-pass", "entry": point.value},
        )
    return found
