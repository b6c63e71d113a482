"""SliceGPT: the residual stream rotated to its principal axes, and the least of them cut from every matrix.

Paper: Ashkboos, Croci, do Nascimento, Hoefler, Hensman 2024, "SliceGPT: Compress Large Language Models by Deleting
Rows and Columns", arXiv 2401.15024. With the norms folded (`fuse_norms`), the stream may be rotated by an orthogonal Q.
Taken from the eigenvectors of its second moments, C = sum of x x^T over calibration tokens = Q diag(lambda) Q^T, the
first d columns keep as much of the signal as any d directions can: |X - X Q_d Q_d^T|^2 is the sum of the dropped
eigenvalues. So tables and writers become W Q_d or Q_d^T W, readers W Q_d, and the model is narrower, dense, and faster
anywhere.

Orientation
- `global` (ours): one Q for the whole stream, from the second moments of all sites, each scaled to trace 1. The result
  is an ordinary model of its own class with a smaller hidden size. A norm of width d has to divide by the old width D:
      x / sqrt(sum x^2 / D + eps) = sqrt(D/d) x / sqrt(mean(x^2) + eps D/d),
  so all gains are sqrt(D/d) and eps is eps D/d. It needs a class that lets head_dim differ from hidden / heads.

"25 %" is the share of the width that goes. Heads, MLP width and vocabulary stay, so parameters fall by that share only
where the stream is everywhere on one side of a matrix. Newer, longer-trained models bear it worse: Llama-2-7B goes from
perplexity 5.47 to 7.24 at 25 % (the paper's table 1), Llama-3.1-8B from 6.24 to 13.79 (an independent re-run).

Where we differ from the reference: float64 throughout; no damping on the diagonal (it moves no eigenvector); no mean
taken from the tables of RMSNorm models; the model's own eps. Cost: one run of the model, one eigendecomposition, one
pass over the weights. Memory: one covariance (D, D) float64 beside one block.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import ClassVar, Literal

from pydantic import Field, PositiveInt

from compressor.errors import PreflightError
from compressor.lazy import torch
from compressor.protocol import Carry, Fact, ModelFacts, Pass, Remodel, StreamSite, Traits
from compressor.rotation import pca, random_orthogonal
from compressor.slicing import global_parameters, kept_width, stream_shape, widest_that_shrinks
from compressor.turning import pooled_covariance, turn

EPS_KEYS = ("rms_norm_eps", "layer_norm_eps", "layernorm_epsilon", "layer_norm_epsilon", "norm_eps", "norm_epsilon")


class SliceGPT(Pass):
    """Rows and columns of every matrix deleted along the least principal axes of the residual stream."""

    title: ClassVar[str] = "Residual stream cut to its principal axes: a narrower dense model"
    paper: ClassVar[str] = "Ashkboos et al. 2024, arXiv 2401.15024"

    sparsity: float = Field(0.25, ge=0, le=0.5, description="Share of the stream's width that goes; not of parameters.")
    round_to: PositiveInt = Field(8, description="The width is rounded down to a multiple, for fast products.")
    orientation: Literal["global"] = Field("global", description="One rotation for the whole stream.")
    covariance: Literal["raw", "normalised"] = Field(
        "raw", description="Signals as they are, or each token scaled to length 1 first."
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
        remodel = global_remodel(model, kept)
        self._refuse_growth(model, kept)
        if (why := model.fits(remodel)) is not None:
            raise PreflightError(
                f"{model.architecture} can't be narrower by its config alone ({why})",
                where="slicegpt.orientation",
                hint="A class without a head_dim of its own ties the width to its heads.",
            )
        return remodel

    def survey(self, sites: Iterator[StreamSite], carry: Carry) -> Carry:
        first = next(sites)
        width, kept, generator = first.residual.width, first.remodel.widths[1], first.generator
        covariance, tokens = pooled_covariance(chain([first], sites), self.covariance == "normalised")
        values, q = pca(covariance)
        found = {"q": q[:, :kept], "eigenvalues": values, "tokens": torch.tensor(tokens)}
        if self.final_orientation == "random":
            found["q"] = found["q"] @ random_orthogonal(kept, generator).to(q.device)
        assert found["q"].shape == (width, kept)
        return found

    def reshape(self, site: StreamSite, carry: Carry) -> Carry:
        width, kept = site.residual.width, site.remodel.widths[1]
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

    def _refuse_growth(self, model: ModelFacts, kept: int) -> None:
        shape = stream_shape(model.residual, model.shapes)
        after = global_parameters(shape, kept)
        if self.sparsity and after >= model.given:
            helps = widest_that_shrinks(
                lambda width: global_parameters(shape, width), model.given, shape.width, self.round_to
            )
            least = "no sparsity up to 0.5 makes it smaller"
            if helps is not None and helps >= shape.width / 2:
                least = f"from sparsity {1 - helps / shape.width:.3f} on it gets smaller"
            raise PreflightError(
                f"{after:,} parameters would be left of {model.given:,}", where="slicegpt.sparsity", hint=f"{least}."
            )


def global_remodel(model: ModelFacts, kept: int) -> Remodel:
    """A stock model of that hidden size: every parameter along the stream, and what config.json has to say."""
    width = model.residual.width
    shapes: dict[str, tuple[int, ...] | None] = {}
    edges = [(reader.parameter, reader.axis) for tap in model.residual.taps() for reader in tap.readers]
    edges += [(writer.parameter, writer.axis) for writer in model.residual.writers()]
    for name, axis in edges:
        shape = list(model.shapes[name])
        shape[axis] = kept
        shapes[name] = tuple(shape)
    shapes |= {f"{tap.module}.weight": (kept,) for tap in model.residual.taps() if tap.norm.has_weight}
    eps = model.residual.end.norm.eps * width / kept
    config = {"hidden_size": kept, **{key: eps for key in EPS_KEYS if key in model.config}}
    heads = model.config.get("num_attention_heads")
    if heads:
        config["head_dim"] = model.config.get("head_dim") or width // heads
    return Remodel(config, shapes, (width, kept))
