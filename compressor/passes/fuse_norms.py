"""Norms folded into what reads them, so that the residual stream can be rotated.

Step A of SliceGPT (Ashkboos et al. 2024, arXiv 2401.15024, section 3.2), as a step of its own. A norm's gain g and
shift c go into every matrix that reads its output, and what is left is x / sqrt(mean(x^2) + eps):

    W (g x^ + c) + b  =  (W diag(g)) x^ + (W c + b)

A LayerNorm also takes the mean of x over the width. What is added to the stream (tables, output matrices, their biases)
is centred instead, so the stream has mean 0 and the norm need not look for it. Logits stay, to rounding.

Where we differ from the reference implementation: means are taken from the tables of LayerNorm models only (an RMSNorm
is not invariant to that), and the model's eps is kept. Everything is computed in float64 and rounded once.

An RMSNorm model stays of its own class, with gains of 1; its head gets weights of its own if it shared the table's,
since the last gain goes into one and not into the other. A LayerNorm model becomes one with RMSNorms, which needs the
modelling file. Cost: one pass over the weights.
"""

from __future__ import annotations

from typing import ClassVar

from compressor.lazy import torch
from compressor.methods.rotation.rotation import center, fold_gain, fold_shift, untied_head
from compressor.model.residual_records import ResidualNorm
from compressor.protocol import Decision, Fact, ModelFacts, PartView, Redefinition, RewritePass, State, Traits


class FuseNorms(RewritePass):
    """Gains, shifts and means of all norms on the residual stream, moved into the weights around them."""

    title: ClassVar[str] = "Norms folded into the weights around them; logits stay"
    paper: ClassVar[str] = "Ashkboos et al. 2024, arXiv 2401.15024, section 3.2"
    keeps_function: ClassVar[bool] = True

    @property
    def traits(self) -> Traits:
        return Traits(reads="weights", provides=frozenset({Fact.NORMS_FOLDED}))

    def redefine(self, model: ModelFacts, decision: Decision | None) -> Redefinition:
        config, shapes, notes = untied_head(model)
        if model.residual.kind == "layer":
            for norm in model.residual.norms():
                width = norm.formula.width
                module = {"form": "rms_norm", "spec": {"width": width, "eps": norm.formula.eps}, "shape": [width]}
                config.setdefault("compressed_modules", {})[norm.module] = module
                shapes |= {f"{norm.module}.{leaf}": None for leaf in _held(norm)}
                for consumer in norm.consumers:
                    if norm.formula.has_bias and consumer.bias is None:
                        rows = model.shapes[consumer.parameter]
                        shapes[_bias_name(consumer.parameter)] = (*rows[: consumer.axis], *rows[consumer.axis + 1 :])
            held = {name: None if shape is None else list(shape) for name, shape in shapes.items()}
            config["compressed_shapes"] = {name: shape for name, shape in held.items() if name not in model.tied}
        width = model.residual.width
        return Redefinition(config, shapes, (width, width), notes)

    def rewrite(self, view: PartView, state: State) -> State:
        layer = view.residual.kind == "layer"
        if view.index < 0 and layer:
            for write in view.residual.embeddings:
                view.write(write.parameter, center(view.read(write.parameter), write.axis))
        for stream in view.sublayers:
            for norm in stream.norms:
                _fold(view, norm)
            for write in stream.writes if layer else ():
                view.write(write.parameter, center(view.read(write.parameter), write.axis))
        if view.index == len(view.residual.blocks):
            _fold(view, view.residual.end)
        return state


def _fold(view: PartView, norm: ResidualNorm) -> None:
    """Move one norm's gain and shift into its consumers; a gain that stays part of the model becomes 1."""
    gain = norm.formula.offset + view.read(f"{norm.module}.weight") if norm.formula.has_weight else None
    shift = view.read(f"{norm.module}.bias") if norm.formula.has_bias else None
    for consumer in norm.consumers:
        matrix = view.read(consumer.parameter)
        if shift is not None:  # by the weight as it was
            added = fold_shift(matrix, shift, consumer.axis)
            name = consumer.bias or _bias_name(consumer.parameter)
            view.write(name, added if consumer.bias is None else view.read(name) + added)
        if gain is not None:
            view.write(consumer.parameter, fold_gain(matrix, gain, consumer.axis))
    if gain is not None and norm.formula.kind == "rms":
        view.write(f"{norm.module}.weight", torch.full_like(gain, 1.0 - norm.formula.offset))


def _held(norm: ResidualNorm) -> list[str]:
    return [leaf for leaf, there in (("weight", norm.formula.has_weight), ("bias", norm.formula.has_bias)) if there]


def _bias_name(parameter: str) -> str:
    return parameter.removesuffix("weight") + "bias"
