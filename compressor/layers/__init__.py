"""Implements the quantization formats. A layer stores, rebuilds and multiplies one weight, and knows no passes.

A format has a name, one file and one class. `find_layer("packed_linear")` imports it. Other packages add theirs through
the entry point group `compressor.layers`.
"""

from __future__ import annotations

import importlib
import sys
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING

from compressor.errors import ArtifactError

if TYPE_CHECKING:
    from compressor.layers.base import Layer as Layer

DENSE = "dense"
BUILTIN = {
    "block_activation_linear": "compressor.layers.block_activation_linear:BlockActivationLinear",
    "block_attention": "compressor.layers.block_attention:BlockAttention",
    "block_embedding": "compressor.layers.block_embedding:BlockEmbedding",
    "block_linear": "compressor.layers.block_linear:BlockLinear",
    "byte_linear": "compressor.layers.byte_linear:ByteLinear",
    "int8_split_linear": "compressor.layers.int8_split_linear:Int8SplitLinear",
    "lazy_block": "compressor.layers.structural.lazy_block:LazyBlock",
    "low_rank_linear": "compressor.layers.low_rank_linear:LowRankLinear",
    "packed_linear": "compressor.layers.packed_linear:PackedLinear",
    "removed": "compressor.layers.structural.removed:Removed",
    "resized": "compressor.layers.structural.resized:Resized",
    "rms_norm": "compressor.layers.structural.rms_norm:RmsNorm",
    "rotated_block": "compressor.layers.structural.rotated_block:RotatedBlock",
    "sparse_factor_linear": "compressor.layers.sparse_factor_linear:SparseFactorLinear",
    "table_activation": "compressor.layers.table_activation:TableActivation",
    "table_norm": "compressor.layers.table_norm:TableNorm",
    "token_gate": "compressor.layers.structural.token_gate:TokenGate",
}


def find_layer(format_name: str) -> type[Layer]:
    """The class of a quantization format. raises ArtifactError naming the known formats"""
    found = [BUILTIN[format_name]] if format_name in BUILTIN else []
    plugins = [point for point in _plugins(tuple(sys.path)) if point.name == format_name]
    if len(found) + len(plugins) > 1:
        raise ArtifactError(
            f"quantization format {format_name!r} is defined {len(found) + len(plugins)} times",
            hint="Uninstall one of: " + ", ".join(point.value for point in plugins),
            data={"format": format_name, "count": len(found) + len(plugins)},
        )
    if plugins:
        return plugins[0].load()
    if not found:
        raise ArtifactError(
            f"unknown quantization format {format_name!r}",
            hint="Install the package that defines it, or use one of: dense, " + ", ".join(sorted(BUILTIN)),
            data={"format_name": format_name},
        )
    module, _, name = found[0].partition(":")
    return getattr(importlib.import_module(module), name)


@cache
def _plugins(path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    """Formats of other packages on this search path, cached: a search takes 20 ms, and a plan needs 150 of them."""
    return tuple(entry_points(group="compressor.layers"))
