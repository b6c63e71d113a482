"""Fuses each norm into the weights that read its output, so that the residual stream can be rotated.

This is step A of SliceGPT (Ashkboos et al. 2024, arXiv 2401.15024, section 3.2), as a separate step. The weight g and
the bias c of a norm are multiplied into every matrix that reads its output, and the norm becomes
x / sqrt(mean(x^2) + eps):

    W (g x^ + c) + b  =  (W diag(g)) x^ + (W c + b)

A LayerNorm also subtracts the mean of x over the width. So everything that is added to the residual stream (embeddings,
output projections, their biases) is centred instead. Then the stream has mean 0, and the norm need not subtract it.
Logits stay the same, except for rounding.

Where we differ from the reference implementation: embeddings are centred only for LayerNorm models (centring changes
the output of an RMSNorm), and the model's eps is kept. Everything is computed in float64 and rounded once.

An RMSNorm model keeps its class, with norm weights of 1. If its output head was tied to the embedding, it gets its own
weight, since the last norm is fused into the head and not into the embedding. A LayerNorm model becomes one with
RMSNorms, which needs the modeling file. Cost: one pass over the weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import ClassVar

from compressor.lazy import torch
from compressor.methods.rotation.counted_work import changed_bytes
from compressor.methods.rotation.rotation import center, fold_gain, fold_shift, untied_head
from compressor.model.class_changes import ClassChanges, ModuleEntry, rms_norm_entry
from compressor.model.residual_records import ResidualNorm
from compressor.protocol import (
    DataSize,
    Decision,
    Fact,
    ModelFacts,
    PartView,
    PartWork,
    Redefinition,
    RewritePass,
    State,
    Traits,
    Work,
)
from compressor.protocol.work import rewritten


class FuseNorms(RewritePass):
    """Fuse weights, biases and means of all norms on the residual stream into the matrices around them."""

    title: ClassVar[str] = "Fuses norms into the weights around them; the logits stay the same"
    paper: ClassVar[str] = "Ashkboos et al. 2024, arXiv 2401.15024, section 3.2"
    keeps_function: ClassVar[bool] = True

    @property
    def traits(self) -> Traits:
        return Traits(reads="weights", provides=frozenset({Fact.NORMS_FOLDED}))

    def work(self, model: ModelFacts, data: DataSize, parts: Sequence[PartWork]) -> list[Work]:
        return [rewritten(part.values) for part in parts]

    def memory(self, model: ModelFacts, data: DataSize, parts: Sequence[PartWork]) -> int:
        """The new parameters; with LayerNorm one parameter in float64, which a shift reads whole."""
        whole = max(math.prod(shape) for shape in model.shapes.values()) if model.residual.kind == "layer" else 0
        return changed_bytes(parts) + 8 * whole

    def redefine(self, model: ModelFacts, decision: Decision | None) -> Redefinition:
        config, shapes, notes = untied_head(model)
        if model.residual.kind == "layer":
            modules: dict[str, ModuleEntry] = {}
            for norm in model.residual.norms():
                width = norm.formula.width
                modules[norm.module] = rms_norm_entry(width, norm.formula.eps, width)
                shapes |= {f"{norm.module}.{leaf}": None for leaf in _held(norm)}
                for consumer in norm.consumers:
                    if norm.formula.has_bias and consumer.bias is None:
                        rows = model.shapes[consumer.parameter]
                        shapes[_bias_name(consumer.parameter)] = (*rows[: consumer.axis], *rows[consumer.axis + 1 :])
            held = {name: None if shape is None else list(shape) for name, shape in shapes.items()}
            own = {name: shape for name, shape in held.items() if name not in model.tied}
            config |= ClassChanges(compressed_modules=modules, compressed_shapes=own)
        width = model.residual.width
        return Redefinition(config, shapes, (width, width), notes)

    def rewrite(self, view: PartView, state: State) -> State:
        layer = view.residual.kind == "layer"
        if view.index < 0 and layer:
            for write in view.residual.embeddings:
                view.change(write.parameter, partial(center, axis=write.axis), write.axis)
        for stream in view.sublayers:
            for norm in stream.norms:
                _fold(view, norm)
            for write in stream.writes if layer else ():
                view.change(write.parameter, partial(center, axis=write.axis), write.axis)
        if view.index == len(view.residual.blocks):
            _fold(view, view.residual.end)
        return state


def _fold(view: PartView, norm: ResidualNorm) -> None:
    """Multiply one norm's weight and bias into its consumers. A weight that stays in the model becomes 1."""
    gain = norm.formula.offset + view.read(f"{norm.module}.weight") if norm.formula.has_weight else None
    shift = view.read(f"{norm.module}.bias") if norm.formula.has_bias else None
    for consumer in norm.consumers:
        if shift is not None:  # with the weight before it was changed
            added = fold_shift(view.read(consumer.parameter), shift, consumer.axis)
            name = consumer.bias or _bias_name(consumer.parameter)
            view.write(name, added if consumer.bias is None else view.read(name) + added)
        if gain is not None:
            view.change(consumer.parameter, partial(fold_gain, gain=gain, axis=consumer.axis), consumer.axis)
    if gain is not None and norm.formula.kind == "rms":
        view.write(f"{norm.module}.weight", torch.full_like(gain, 1.0 - norm.formula.offset))


def _held(norm: ResidualNorm) -> list[str]:
    return [leaf for leaf, there in (("weight", norm.formula.has_weight), ("bias", norm.formula.has_bias)) if there]


def _bias_name(parameter: str) -> str:
    return parameter.removesuffix("weight") + "bias"
