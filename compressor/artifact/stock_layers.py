"""Compares each layer of a stock loader that computes its own matmul with its expected output for the same input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from compressor.artifact.manifest import Manifest
from compressor.errors import Because
from compressor.model.recorded_modules import first_argument, recorded_inputs

Forward = Callable[[Any, Tensor], tuple[Tensor, Tensor]]  # as `stock_formats.Family.forward`


def compare_layers(
    stock: Any, own: Any, inputs: dict[str, Any], manifest: Manifest, forward: Forward
) -> tuple[int, float, list[str]]:
    """Compare each layer of a stock loader with its expected output for the input that our layer reads.

    returns  the number of compared layers; the largest difference as a share of the allowed one; the problems
    """
    names = sorted(entry["parameter"].removesuffix(".weight") for entry in manifest["weights"].values())
    read = _layer_inputs(own, names, inputs)
    problems = _parameter_problems(stock, own)
    largest = 0.0
    for name in names:
        layer, module = own.get_submodule(name), stock.get_submodule(name)
        if not torch.equal(module.weight, layer.weight):
            message = f"stock loader: the codes of {name} differ from what was written"
            problems.append(Because(message, reason="other-codes", module=name))
        with torch.no_grad():
            expected, allowed = forward(layer, read[name])
            share = float(((module(read[name]).float() - expected).abs() / allowed).max())
        if not share <= 1:  # NaN fails too
            message = f"stock loader: {name} differs by {share:.3g} times the difference that rounding allows"
            problems.append(Because(message, reason="beyond-rounding", module=name, share=share))
        largest = max(largest, share)
    return len(names), largest, problems


def _layer_inputs(model: Any, names: Sequence[str], inputs: dict[str, Any]) -> dict[str, Tensor]:
    """The first input that each of these modules reads in one forward pass."""
    modules = {name: model.get_submodule(name) for name in names}
    with recorded_inputs(modules, first_argument) as seen, torch.no_grad():
        model(**inputs)
    return dict(reversed(seen))


def _parameter_problems(stock: Any, own: Any) -> list[str]:
    """Parameters that both models have and that differ in any bit."""
    theirs = dict(stock.named_parameters())
    return [
        Because(f"stock loader: {name} differs from what was written", reason="other-values", tensor=name)
        for name, value in own.named_parameters()
        if name in theirs and not torch.equal(theirs[name], value)
    ]
