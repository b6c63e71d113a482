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
from compressor.model.residual_records import Tap
from compressor.protocol import Carry, Decision, Fact, ModelFacts, Pass, Remodel, StreamSite, Traits


class FuseNorms(Pass):
    """Gains, shifts and means of all norms on the residual stream, moved into the weights around them."""

    title: ClassVar[str] = "Norms folded into the weights around them; logits stay"
    paper: ClassVar[str] = "Ashkboos et al. 2024, arXiv 2401.15024, section 3.2"
    keeps_function: ClassVar[bool] = True

    @property
    def traits(self) -> Traits:
        return Traits(reads="weights", provides=frozenset({Fact.NORMS_FOLDED}))

    @property
    def reshapes(self) -> bool:
        return True

    def remodel(self, model: ModelFacts, decision: Decision | None) -> Remodel:
        config, shapes, notes = untied_head(model)
        if model.residual.kind == "layer":
            for tap in model.residual.taps():
                width = tap.norm.width
                module = {"form": "rms_norm", "spec": {"width": width, "eps": tap.norm.eps}, "shape": [width]}
                config.setdefault("compressed_modules", {})[tap.module] = module
                shapes |= {f"{tap.module}.{leaf}": None for leaf in _held(tap)}
                for reader in tap.readers:
                    if tap.norm.has_bias and reader.bias is None:
                        rows = model.shapes[reader.parameter]
                        shapes[_bias_name(reader.parameter)] = (*rows[: reader.axis], *rows[reader.axis + 1 :])
            held = {name: None if shape is None else list(shape) for name, shape in shapes.items()}
            config["compressed_shapes"] = {name: shape for name, shape in held.items() if name not in model.tied}
        width = model.residual.width
        return Remodel(config, shapes, (width, width), notes)

    def reshape(self, site: StreamSite, carry: Carry) -> Carry:
        layer = site.residual.kind == "layer"
        if site.index < 0 and layer:
            for writer in site.residual.stem:
                site.write(writer.parameter, center(site.read(writer.parameter), writer.axis))
        for stream in site.sites:
            for tap in stream.taps:
                _fold(site, tap)
            for writer in stream.writers if layer else ():
                site.write(writer.parameter, center(site.read(writer.parameter), writer.axis))
        if site.index == len(site.residual.blocks):
            _fold(site, site.residual.end)
        return carry


def _fold(site: StreamSite, tap: Tap) -> None:
    """Move one norm's gain and shift into its readers; a gain that stays part of the model becomes 1."""
    gain = tap.norm.offset + site.read(f"{tap.module}.weight") if tap.norm.has_weight else None
    shift = site.read(f"{tap.module}.bias") if tap.norm.has_bias else None
    for reader in tap.readers:
        matrix = site.read(reader.parameter)
        if shift is not None:  # by the weight as it was
            added = fold_shift(matrix, shift, reader.axis)
            name = reader.bias or _bias_name(reader.parameter)
            site.write(name, added if reader.bias is None else site.read(name) + added)
        if gain is not None:
            site.write(reader.parameter, fold_gain(matrix, gain, reader.axis))
    if gain is not None and tap.norm.kind == "rms":
        site.write(f"{tap.module}.weight", torch.full_like(gain, 1.0 - tap.norm.offset))


def _held(tap: Tap) -> list[str]:
    return [leaf for leaf, there in (("weight", tap.norm.has_weight), ("bias", tap.norm.has_bias)) if there]


def _bias_name(parameter: str) -> str:
    return parameter.removesuffix("weight") + "bias"
