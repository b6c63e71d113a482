"""Implements layers that read a function from a lookup table with the CPU library.

The arithmetic is that of `table_functions`, `table_lookup` or `table_inverse_root` read the entries, and the outputs
have the bits of the replaced layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from compressor.kernels.ops.blocks import round_to_shift
from compressor.kernels.ops.table_functions import normalize, softmax
from compressor.kernels.ops.table_lookup import table_inverse_root, table_lookup
from compressor.kernels.ops.visible_calls import must_be_visible, without_gradient
from compressor.kernels.prepared.dispatch import Choice

STANDS_FOR = ("activation", "norm", "attention")  # the kinds of modules that such layers replace


def reads_lookup_table(module: nn.Module) -> bool:
    """Whether a module is a layer of this package, or of its modeling file, that reads a table and is not prepared."""
    return getattr(module, "format_name", None) in FUNCTIONS and getattr(module, "stands_for", None) in STANDS_FOR


class PreparedLookupTable(nn.Module):
    """An activation, a norm or the softmax of attention from a stored lookup table.

    It has the tensors of the format under their names. Not for training: a backward pass through it is an error.
    """

    table: Tensor
    weight: Tensor | None

    def __init__(self, layer: Any, choice: Choice) -> None:
        """layer: one that `reads_lookup_table`"""
        super().__init__()
        self.format_name, self.format_params, self.choice = layer.format_name, layer.format_params(), choice
        for name, tensor in {"weight": None, **layer.tensors()}.items():
            self.register_buffer(name, tensor)
        self.bias = getattr(layer, "bias", None)
        self.words = f"{len(self.table)} entries, {self.format_params['lookup']}"

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = FUNCTIONS[self.format_name](self, x.detach())
        return without_gradient(x, y, self.format_name)

    def round(self, x: Tensor) -> Tensor:
        """For attention: quantize an intermediate result to 8 bits in blocks, if the layer is stored so."""
        block = self.format_params["block"]
        return x if block is None else round_to_shift(x, block)

    def extra_repr(self) -> str:
        return f"{self.format_name}, {self.words}, {self.choice.kernel}"


def _read(
    x: Tensor, table: Tensor, low: float, step: float, linear: bool, slopes: tuple[float, float] = (0.0, 0.0)
) -> Tensor:
    """`look_up`, or with slopes `activate`"""
    high = low + (len(table) - 1) * step
    # the registry costs as much as a short look-up, so only watched calls use it
    run = torch.ops.compressor.table_lookup if must_be_visible(x) else table_lookup
    return run(x, table, low, high, linear, *slopes)


def _root(x: Tensor, table: Tensor, step: float, linear: bool) -> Tensor:
    """`inverse_root`"""
    run = torch.ops.compressor.table_inverse_root if must_be_visible(x) else table_inverse_root
    return run(x, table, step, linear)


def _activation(layer: PreparedLookupTable, x: Tensor) -> Tensor:
    format_params = layer.format_params
    return _read(
        x,
        layer.table,
        format_params["low"],
        format_params["step"],
        format_params["lookup"] == "linear",
        tuple(format_params["slopes"]),
    )


def _norm(layer: PreparedLookupTable, x: Tensor) -> Tensor:
    params = layer.format_params
    return normalize(
        x, layer.weight, layer.bias, layer.table, params["kind"] == "layer", params["offset"], params["eps"],
        params["step"], params["lookup"] == "linear", _root,
    )  # fmt: skip


def _attention(layer: PreparedLookupTable, scores: Tensor) -> Tensor:
    format_params = layer.format_params
    return layer.round(softmax(scores, layer.table, format_params["step"], format_params["lookup"] == "linear", _read))


OPS = {"table_activation": "table_lookup", "table_norm": "table_inverse_root", "block_attention": "table_lookup"}
FUNCTIONS: dict[str, Callable[[PreparedLookupTable, Tensor], Tensor]] = {
    "table_activation": _activation,
    "table_norm": _norm,
    "block_attention": _attention,
}
