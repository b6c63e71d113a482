"""SliceGPT: the residual stream rotated to its principal axes, and the least of them cut from every matrix.

Paper: Ashkboos, Croci, do Nascimento, Hoefler, Hensman 2024, "SliceGPT: Compress Large Language Models by Deleting
Rows and Columns", arXiv 2401.15024. With the norms folded (`fuse_norms`), the stream may be rotated by an orthogonal Q.
Taken from the eigenvectors of its second moments, C = sum of x x^T over calibration tokens = Q diag(lambda) Q^T, the
first d columns keep as much of the signal as any d directions can: |X - X Q_d Q_d^T|^2 is the sum of the dropped
eigenvalues. So tables and writers become W Q_d or Q_d^T W, readers W Q_d, and the model is narrower, dense, and faster
anywhere.

Orientation
- `global` (ours): one Q for the whole stream, from the second moments of all sites, each scaled to trace 1, of tokens
  scaled to length 1: raw ones cost our trained model (docs/benchmarks.md) 6.5 % of perplexity at 25 %, these 1.0 %. The
  result is an ordinary model of its own class with a smaller hidden size. A norm of width d has to divide by the old
  width D:
      x / sqrt(sum x^2 / D + eps) = sqrt(D/d) x / sqrt(mean(x^2) + eps D/d),
  so all gains are sqrt(D/d) and eps is eps D/d. It needs a class that lets head_dim differ from hidden / heads.
- `per_site` (the paper's): another Q before each attention and each MLP, from the signals that the sliced model gives
  there, one site after the other. Beside both branches stands a matrix Q_k[:, :d]^T Q_k+1[:, :d], and after the last
  one the basis is the original, so the head stays whole. It needs the modelling file.

"25 %" is the share of the width that goes. Heads, MLP width and vocabulary stay, so parameters fall by that share only
where the stream is everywhere on one side of a matrix. Newer, longer-trained models bear it worse: Llama-2-7B goes from
perplexity 5.47 to 7.24 at 25 % (the paper's table 1), Llama-3.1-8B from 6.24 to 13.79 (an independent re-run).

Where we differ from the reference: float64 throughout; no damping on the diagonal (it moves no eigenvector); no mean
taken from the tables of RMSNorm models; the model's own eps. Cost: one run of the model, one eigendecomposition, one
pass over the weights. Memory: one covariance (D, D) float64 beside one block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from typing import Any, ClassVar, Literal

from pydantic import Field, PositiveInt

from compressor.errors import PreflightError
from compressor.lazy import torch
from compressor.protocol import Carry, Fact, ModelFacts, Pass, Remodel, StreamSite, Traits
from compressor.rotation import Covariance, pca, random_orthogonal
from compressor.slicing import (
    global_parameters,
    kept_width,
    per_site_parameters,
    stream_shape,
    uniform_widths,
    widest_that_shrinks,
)
from compressor.stream import Tap
from compressor.turning import pooled_covariance, turn, turn_readers, turn_writers

RANK_TOLERANCE = 1e-12  # of the largest eigenvalue; float64 second moments of float32 signals are noise below
HARD_FROM = 0.1  # of the width: Llama-3.1-8B goes from 6.24 to 8.04 at 10 % and to 11.31 at 20 %
HARD = "models trained on far more text than Llama 2 lose much more from this; measure it"
ENOUGH = 4  # calibration tokens for each dimension of the stream
EPS_KEYS = ("rms_norm_eps", "layer_norm_eps", "layernorm_epsilon", "layer_norm_epsilon", "norm_eps", "norm_epsilon")


class SliceGPT(Pass):
    """Rows and columns of every matrix deleted along the least principal axes of the residual stream."""

    title: ClassVar[str] = "Residual stream cut to its principal axes: a narrower dense model"
    paper: ClassVar[str] = "Ashkboos et al. 2024, arXiv 2401.15024"

    sparsity: float = Field(0.25, ge=0, le=0.5, description="Share of the stream's width that goes; not of parameters.")
    round_to: PositiveInt = Field(8, description="The width is rounded down to a multiple, for fast products.")
    orientation: Literal["per_site", "global"] = Field(
        "per_site", description="A rotation at each site and matrices beside the branches, or one for the whole stream."
    )
    covariance: Literal["raw", "normalised"] | None = Field(
        None, description="Signals as they are, or each token scaled to length 1; null: raw per site, else normalised."
    )
    final_orientation: Literal["random", "pca"] = Field(
        "random", description="Spread the kept axes evenly, which later quantization likes, or keep them in order."
    )

    @property
    def traits(self) -> Traits:
        return Traits(reads="inputs", requires=frozenset({Fact.NORMS_FOLDED}))

    @property
    def reshapes(self) -> bool:
        return True

    @property
    def _normalises(self) -> bool:
        return (self.covariance or ("raw" if self.orientation == "per_site" else "normalised")) == "normalised"

    def remodel(self, model: ModelFacts) -> Remodel:
        """raises PreflightError for a width of nothing, a model that grows, or a class that ties width to heads"""
        width = model.residual.width
        kept = kept_width(width, self.sparsity, self.round_to)
        if kept < 1:
            raise PreflightError(
                f"nothing is left of a width of {width} at sparsity {self.sparsity}, rounded to {self.round_to}",
                where="slicegpt.round_to",
                hint="Set round_to to at most half the width.",
            )
        self._refuse_growth(model, kept)
        notes = (HARD,) if self.sparsity > HARD_FROM else ()
        if self.orientation == "per_site":
            return replace(per_site_remodel(model, kept), notes=notes)
        remodel = replace(global_remodel(model, kept), notes=notes)
        if (why := model.fits(remodel)) is not None:
            raise PreflightError(
                f"{model.architecture} can't be narrower by its config alone ({why})",
                where="slicegpt.orientation",
                hint="A class without a head_dim of its own ties the width to its heads; use orientation: per_site.",
            )
        return remodel

    def survey(self, sites: Iterator[StreamSite], carry: Carry) -> Carry:
        if self.orientation == "per_site":
            return carry
        first = next(sites)
        width, kept, generator = first.residual.width, first.remodel.widths[1], first.generator
        covariance, tokens = pooled_covariance(chain([first], sites), self._normalises)
        values, q = pca(covariance)
        _warn_if_few(first, tokens, values)
        found = {"q": q[:, :kept], "eigenvalues": values, "tokens": torch.tensor(tokens)}
        if self.final_orientation == "random":
            found["q"] = found["q"] @ random_orthogonal(kept, generator).to(q.device)
        assert found["q"].shape == (width, kept)
        return found

    def reshape(self, site: StreamSite, carry: Carry) -> Carry:
        width, kept = site.residual.width, site.remodel.widths[1]
        if self.orientation == "per_site":
            return self._slice_sites(site, carry)
        turn(site, carry["q"].to(site.device))
        ratio = (width / kept) ** 0.5
        if site.index < 0:
            for writer in site.residual.stem:  # a class that multiplies its table by sqrt(hidden) now does so by less
                if writer.scale is not None and abs(writer.scale - width**0.5) < 1e-2 and width > 1:
                    site.write(writer.parameter, site.read(writer.parameter) * ratio)
        taps = [tap for stream in site.sites for tap in stream.taps]
        if site.index == len(site.residual.blocks):
            taps.append(site.residual.end)
        for tap in taps:
            gain = torch.full((kept,), ratio - tap.norm.offset, dtype=torch.float64, device=site.device)
            site.write(f"{tap.module}.weight", gain)
        return carry

    def projections(self, carry: Carry) -> list[torch.Tensor] | None:
        if self.orientation == "global":
            return None
        return [carry[f"basis_{number}"] for number in range(len(carry) - 2)] if carry else []

    def _slice_sites(self, site: StreamSite, carry: Carry) -> Carry:
        """The paper's algorithm 1 for one unit: `basis` (D, d) of the next site goes along, `site` says which it is.

        Signals are those of the model sliced so far: cutting to d columns of Q is projecting onto them, seen from
        another basis.
        """
        widths, device = site.remodel.widths[1:], site.device
        if site.index < 0:
            basis = self._basis(site, site.projected([]), widths[0])
            turn_writers(site, site.residual.stem, basis)
            return {"basis": basis, "site": torch.tensor(0)}
        if not site.sites:
            return carry  # the head reads the original basis
        basis, at = carry["basis"].to(device), int(carry["site"])
        bases: list[torch.Tensor] = []
        for number, stream in enumerate(site.sites):
            bases.append(basis)
            for tap in stream.taps:
                turn_readers(site, tap, basis)
            at += 1
            if at == len(widths) - 1:
                following = torch.eye(site.residual.width, dtype=torch.float64, device=device)
            else:
                following = self._basis(site, site.projected(bases), widths[at])
            site.write(f"{site.path}.shortcut_{number}", basis.t() @ following)
            turn_writers(site, stream.writers, following)
            basis = following
        return {"basis": basis, "site": torch.tensor(at), **{f"basis_{n}": found for n, found in enumerate(bases)}}

    def _basis(self, site: StreamSite, signals: Iterator[torch.Tensor], kept: int) -> torch.Tensor:
        """The (D, kept) columns that keep most of the signals."""
        covariance = Covariance.zeros(site.residual.width, site.device)
        for x in signals:
            covariance.add(x, normalised=self._normalises)
        values, q = pca(covariance.matrix)
        if site.index < 0:
            _warn_if_few(site, covariance.tokens, values)
        q = q[:, :kept]
        if self.final_orientation == "random":
            q = q @ random_orthogonal(kept, site.generator).to(q.device)
        return q

    def _refuse_growth(self, model: ModelFacts, kept: int) -> None:
        shape = stream_shape(model.residual, model.shapes)

        def count(width: int) -> int:
            if self.orientation == "global":
                return global_parameters(shape, width)
            return per_site_parameters(shape, uniform_widths(shape, width))

        after = count(kept)
        if self.sparsity and after >= model.given:
            helps = widest_that_shrinks(count, model.given, shape.width, self.round_to)
            least = "no sparsity up to 0.5 makes it smaller"
            if helps is not None and helps >= shape.width / 2:
                least = f"from sparsity {1 - helps / shape.width:.3f} on it gets smaller"
            raise PreflightError(
                f"{after:,} parameters would be left of {model.given:,}", where="slicegpt.sparsity", hint=f"{least}."
            )


def _warn_if_few(site: StreamSite, tokens: int, eigenvalues: torch.Tensor) -> None:
    width = site.residual.width
    rank = int((eigenvalues > RANK_TOLERANCE * eigenvalues[0]).sum())
    if tokens < ENOUGH * width:
        seen = f"{tokens:,} calibration tokens span {rank} of {width} directions"
        site.warn("few-tokens", "slicegpt", f"{seen}; {ENOUGH * width:,} are meant")


def per_site_remodel(model: ModelFacts, kept: int) -> Remodel:
    """Blocks with matrices beside their branches, norms that divide by the old width, and a head as wide as before."""
    residual = model.residual
    sites = [site for block in residual.blocks for site in block]
    widths = (kept,) * len(sites) + (residual.width,)
    shapes: dict[str, tuple[int, ...] | None] = {}
    modules: dict[str, Any] = dict(model.config.get("compressed_modules") or {})

    def narrow(name: str, axis: int, width: int) -> None:
        shapes[name] = _resized(model.shapes[name], axis, width)

    def strip(tap: Tap, width: int) -> None:
        spec = {"width": residual.width, "eps": tap.norm.eps}
        modules[tap.module] = {"form": "rms_norm", "spec": spec, "shape": [width]}
        shapes.update({f"{tap.module}.weight": None} if tap.norm.has_weight else {})

    for writer in residual.stem:
        narrow(writer.parameter, writer.axis, widths[0])
    for site, width, following in zip(sites, widths, widths[1:]):
        for tap in site.taps:
            strip(tap, width)
            for reader in tap.readers:
                narrow(reader.parameter, reader.axis, width)
        for writer in site.writers:
            narrow(writer.parameter, writer.axis, following)
    strip(residual.end, residual.width)
    per_block, at = [], 0
    for block in residual.blocks:
        per_block.append(list(widths[at : at + len(block) + 1]))
        at += len(block)
    held = {name: list(shape) for name, shape in shapes.items() if shape is not None}
    for number, (spec, shape) in enumerate(zip(model.branches(per_block), per_block)):
        path = f"{model.blocks}.{number}"
        modules[path] = {"form": "rotated_block", "spec": spec, "shape": shape}
        shapes |= {f"{path}.shortcut_{n}": (shape[n], shape[n + 1]) for n in range(len(shape) - 1)}
    before = model.config.get("compressed_shapes") or {}
    return Remodel(
        {"compressed_shapes": {**before, **held}, "compressed_modules": modules}, shapes, (residual.width, *widths)
    )


def global_remodel(model: ModelFacts, kept: int) -> Remodel:
    """A stock model of that hidden size: every parameter along the stream, and what config.json has to say."""
    width = model.residual.width
    shapes: dict[str, tuple[int, ...] | None] = {}
    edges = [(reader.parameter, reader.axis) for tap in model.residual.taps() for reader in tap.readers]
    edges += [(writer.parameter, writer.axis) for writer in model.residual.writers()]
    shapes |= {name: _resized(model.shapes[name], axis, kept) for name, axis in edges}
    shapes |= {f"{tap.module}.weight": (kept,) for tap in model.residual.taps() if tap.norm.has_weight}
    eps = model.residual.end.norm.eps * width / kept
    config = {"hidden_size": kept, **{key: eps for key in EPS_KEYS if key in model.config}}
    heads = model.config.get("num_attention_heads")
    if heads:
        config["head_dim"] = model.config.get("head_dim") or width // heads
    return Remodel(config, shapes, (width, kept))


def _resized(shape: tuple[int, ...], axis: int, length: int) -> tuple[int, ...]:
    return (*shape[:axis], length, *shape[axis + 1 :])
