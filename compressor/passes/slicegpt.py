"""SliceGPT: rotates the residual stream to its principal axes, and removes the smallest of them from every matrix.

Paper: Ashkboos, Croci, do Nascimento, Hoefler, Hensman 2024, "SliceGPT: Compress Large Language Models by Deleting Rows
and Columns", arXiv 2401.15024. If the norms are fused (`fuse_norms`), the stream may be rotated by an orthogonal Q. Let
Q be the eigenvectors of its second moments, C = sum of x x^T over calibration tokens = Q diag(lambda) Q^T. Then the
first d columns keep as much of the stream as any d directions can: |X - X Q_d Q_d^T|^2 is the sum of the dropped
eigenvalues. So embeddings and output projections become W Q_d or Q_d^T W, input projections W Q_d, and the model is
narrower, dense, and faster on any hardware.

Orientation
- `global` (ours): one Q for the whole stream, from the second moments at all sublayers, each scaled to trace 1, of
  tokens scaled to length 1. With unscaled tokens our trained model (docs/benchmarks.md) loses 6.5 % of perplexity at
  25 %, with scaled ones 1.0 %. The result is an ordinary model of the same class with a smaller hidden size. A norm of
  width d has to divide by the old width D:
      x / sqrt(sum x^2 / D + eps) = sqrt(D/d) x / sqrt(mean(x^2) + eps D/d),
  so all norm weights are sqrt(D/d) and eps is eps D/d. It needs a class in which head_dim may differ from hidden /
  heads.
- `per_site` (the paper's): another Q before each attention and each MLP, from the stream of the sliced model there, one
  sublayer after the other. Each residual connection gets a matrix Q_k[:, :d]^T Q_k+1[:, :d]. After the last one the
  basis is the original, so the output head stays whole. It needs the modeling file.
- `auto` (ours): computes both on calibration data, per_site at the largest width that has no more parameters than one
  rotation at the given sparsity. It keeps the one whose output is closer to the dense model's.

With `schedule: variance` each sublayer gets its own width. The number of parameters is the same as with one width for
all, and the stream is wider where the axes hold most of its variance in the unchanged model. Our choice: no sublayer is
narrower than half of the common width, since a few very large tokens can make one axis hold almost all of the variance.

"25 %" is the share of the width that is removed. Heads, MLP width and vocabulary stay, so parameters fall by that share
only if the stream is on one side of every matrix. Newer models, trained longer, lose more: Llama-2-7B gets from
perplexity 5.47 to 7.24 at 25 % (table 1 of the paper), Llama-3.1-8B from 6.24 to 13.79 (an independent re-run).

Where we differ from the reference: everything is in float64; there is no damping on the diagonal (it changes no
eigenvector); embeddings of RMSNorm models are not centred; the model's own eps is kept. Cost: one run of the model, one
eigendecomposition, one pass over the weights. A choice (auto, variance) costs as many more runs as it compares models,
and one for the dense model. Memory: one covariance (D, D) float64 and one block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any, ClassVar, Literal, TypedDict, cast

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from compressor.bounds import Count
from compressor.errors import CompressError, PreflightError
from compressor.lazy import torch
from compressor.methods.divergence import divergence_work, kl_divergence
from compressor.methods.rotation.counted_work import (
    axes_work,
    changed_bytes,
    pooled_work,
    projected_work,
    rotated_work,
)
from compressor.methods.rotation.rotation import (
    Covariance,
    norm_covariance,
    norms_of,
    of_trace_one,
    pca,
    pooled_covariance,
    random_orthogonal,
    rotate_consumers,
    rotate_part,
    rotate_writes,
)
from compressor.methods.rotation.sliced_shapes import (
    StreamShape,
    global_parameters,
    global_redefinition,
    kept_width,
    per_sublayer_parameters,
    per_sublayer_redefinition,
    scheduled_widths,
    staggered_widths,
    stream_shape,
    uniform_widths,
    widest_that_shrinks,
)
from compressor.protocol import (
    DataSize,
    Decision,
    Fact,
    ModelFacts,
    PartView,
    PartWork,
    Redefinition,
    RewritePass,
    RunnableModel,
    State,
    Traits,
    Work,
)
from compressor.protocol.work import eigenvectors, orthogonal

RANK_TOLERANCE = 1e-12  # of the largest eigenvalue; below it, float64 second moments of float32 values are noise
HARD_FROM = 0.1  # of the width; Llama-3.1-8B gets from perplexity 6.24 to 8.04 at 10 % and to 11.31 at 20 %
HARD = "models trained on far more text than Llama 2 lose much more at this sparsity; measure the loss"
ENOUGH = 4  # calibration tokens per dimension of the residual stream


class SliceFigure(TypedDict):
    """A model that `choose` has compared."""

    orientation: str
    widths: list[int]
    parameters: int
    divergence: float


class SliceDecision(TypedDict):
    """widths: one for orientation: global; else at each sublayer, and before the output head"""

    orientation: str
    widths: list[int]
    figures: list[SliceFigure]
    notes: list[str]


@dataclass(frozen=True)
class DenseRun:
    """What one run of the dense model shows.

    spectra  at each sublayer, if widths are scheduled by variance
    pooled   second moments of all sublayers, if orientations are compared
    end      the stream at the end
    """

    spectra: list[torch.Tensor]
    pooled: torch.Tensor | None
    end: list[torch.Tensor]


class SliceGPT(RewritePass):
    """Remove the rows and columns of every matrix that belong to the smallest principal axes of the residual stream."""

    title: ClassVar[str] = "Slices the residual stream to its principal axes: a narrower dense model (SliceGPT)"
    paper: ClassVar[str] = "Ashkboos et al. 2024, arXiv 2401.15024"

    sparsity: float = Field(
        0.25, ge=0, le=0.5, description="Share of the residual stream's width that is removed (not of the parameters)."
    )
    round_to: Count = Field(8, description="Round widths down to a multiple of this number, for fast matmuls.")
    orientation: Literal["per_site", "global", "auto"] = Field(
        "per_site",
        description="per_site: one rotation for each sublayer, with matrices on the residual path. global: one "
        "rotation for the whole residual stream (per_site if the model's class can't be narrower). auto: the better of "
        "the two at the size of global.",
    )
    schedule: Literal["uniform", "variance"] = Field(
        "uniform",
        description="uniform: one width for all sublayers. variance: wider where the stream has more variance, with as "
        "many parameters.",
    )
    covariance: Literal["raw", "normalised"] | None = Field(
        None,
        description="raw: tokens unchanged. normalised: each token scaled to length 1. null: raw for per_site, else "
        "normalised.",
    )
    final_orientation: Literal["random", "pca"] = Field(
        "random",
        description="random: mix the kept axes, which makes later quantization more exact. pca: keep them in order.",
    )

    @model_validator(mode="after")
    def _one_width_has_no_schedule(self) -> SliceGPT:
        if self.schedule == "variance" and self.orientation == "global":
            raise PydanticCustomError(
                "one-width",
                "orientation: global has one width for all sublayers, but schedule: variance gives each its own",
            )
        return self

    @property
    def traits(self) -> Traits:
        return Traits(reads="inputs", requires=frozenset({Fact.NORMS_FOLDED}))

    @property
    def decides(self) -> bool:
        return self.orientation == "auto" or self.schedule == "variance"

    def _normalises(self, per_site: bool) -> bool:
        return (self.covariance or ("raw" if per_site else "normalised")) == "normalised"

    def _kept(self, width: int) -> int:
        kept = kept_width(width, self.sparsity, self.round_to)
        if kept < 1:
            raise PreflightError(
                f"a width of {width} becomes 0 at sparsity {self.sparsity}, rounded down with round_to {self.round_to}",
                where="slicegpt.round_to",
                hint=f"Set round_to to {width // 2} or less, or a smaller sparsity.",
                data={"width": width, "sparsity": self.sparsity, "round_to": self.round_to},
            )
        return kept

    def work(self, model: ModelFacts, data: DataSize, parts: Sequence[PartWork]) -> list[Work]:
        """With `orientation: auto` as if per_site, which is more work, were the better one."""
        width, kept = model.residual.width, self._kept(model.residual.width)
        sublayers = [len(block) for block in model.residual.blocks]
        found = [rotated_work(part.values, kept) for part in parts]
        if self.decides:
            found[0] += self._choice_work(parts, sublayers, data, width, kept)
        if self.orientation == "global" and _why_not_global(model, kept) is None:
            found[0] += pooled_work(parts, sublayers, data, width) + orthogonal(kept)
            return found
        found[0] += axes_work(data, width, kept)
        for number, count in enumerate(sublayers, 1):
            found[number] += _sliced_run(parts[number], count, data, width, kept)
        return found

    def _choice_work(
        self, parts: Sequence[PartWork], sublayers: Sequence[int], data: DataSize, width: int, kept: int
    ) -> Work:
        """Of `choose`: a run of the dense model, and one for each model that it is compared with."""
        found = Work()
        if self.schedule == "variance":
            found += pooled_work(parts, sublayers, data, width) + eigenvectors(width) * (sum(sublayers) - 1)
        if self.orientation != "auto":
            return found
        found += pooled_work(parts, sublayers, data, width)
        for part, count in zip(parts[1:-1], sublayers, strict=True):
            found += part.load * 2 + part.run * data.tokens + projected_work(data, width, kept) * count
            found += _sliced_run(part, count, data, width, kept)
        return found + parts[-1].run * (4 * data.tokens) + divergence_work(2 * data.tokens, parts[-1].outputs)

    def memory(self, model: ModelFacts, data: DataSize, parts: Sequence[PartWork]) -> int:
        """The new parameters, and the second moments with their axes and the work space for these."""
        return changed_bytes(parts) + 48 * model.residual.width**2

    def redefine(self, model: ModelFacts, decision: Decision | None) -> Redefinition:
        """The sliced config and shapes. raises PreflightError for a width of 0, or a model that would become larger"""
        kept, shape = self._kept(model.residual.width), stream_shape(model.residual, model.shapes)
        notes: tuple[str, ...] = (HARD,) if self.sparsity > HARD_FROM else ()
        if decision is not None:
            chosen = cast(SliceDecision, decision)
            widths, one = chosen["widths"], chosen["orientation"] == "global"
            found = global_redefinition(model, widths[0]) if one else per_sublayer_redefinition(model, widths)
            return replace(found, notes=(*notes, *chosen["notes"]), decision=decision)
        if self.orientation != "per_site":
            if (why := _why_not_global(model, kept)) is None:
                self._refuse_growth(model, lambda width: global_parameters(shape, width), shape.width)
                return replace(global_redefinition(model, kept), notes=notes)
            notes += (
                f"{model.architecture} can't be narrower by its config alone ({why}), so orientation is per_site",
            )
        self._refuse_growth(
            model, lambda width: per_sublayer_parameters(shape, uniform_widths(shape, width)), shape.width
        )
        if self.schedule == "variance":  # refuses blocks that can't read one width and write another
            per_sublayer_redefinition(model, staggered_widths(shape, kept, self.round_to))
        return replace(per_sublayer_redefinition(model, uniform_widths(shape, kept)), notes=notes)

    def choose(self, model: RunnableModel) -> SliceDecision:
        facts = model.facts
        shape, kept = stream_shape(facts.residual, facts.shapes), self._kept(facts.residual.width)
        budget, compares = per_sublayer_parameters(shape, uniform_widths(shape, kept)), False
        if self.orientation == "auto" and _why_not_global(facts, kept) is None:
            budget, compares = global_parameters(shape, kept), True
        seen = self._look(model)
        widths, why_not = self._affordable(facts, shape, budget, seen.spectra)
        if not compares:
            assert widths is not None  # `plan` has made a model of one width
            note = f"widths by explained variance, {min(widths)} to {max(widths[:-1])}"
            return {"orientation": "per_site", "widths": list(widths), "figures": [], "notes": [note]}
        assert seen.pooled is not None  # orientation is auto
        ends = {"global": self._end_of_global(model, seen.pooled, kept)}
        if widths is not None:
            ends["per_site"] = self._end_per_site(model, widths)
        figures: list[SliceFigure] = []
        for name, end in ends.items():
            here = (kept,) if name == "global" or widths is None else widths
            count = budget if name == "global" or widths is None else per_sublayer_parameters(shape, widths)
            divergence = _divergence(model, seen.end, end)
            figures.append({"orientation": name, "widths": list(here), "parameters": count, "divergence": divergence})
        best = min(figures, key=lambda figure: figure["divergence"])
        reported = [f"{f['orientation']}: {f['divergence']:.4g} with {f['parameters']:,} parameters" for f in figures]
        why = f" (per_site {why_not})" if why_not else ""
        summary = f"{'; '.join(reported)}{why}: {best['orientation']} kept"
        note = f"divergence from the dense model on calibration data, {summary}"
        return {"orientation": best["orientation"], "widths": best["widths"], "figures": figures, "notes": [note]}

    def survey(self, views: Iterator[PartView]) -> State:
        first = next(views)
        if first.redefinition.follows:
            return {}
        width, kept, generator = first.residual.width, first.redefinition.widths[1], first.generator
        covariance, tokens = pooled_covariance(chain([first], views), self._normalises(per_site=False))
        values, q = pca(covariance)
        _warn_if_few(first, tokens, values)
        found = {"q": q[:, :kept], "eigenvalues": values, "tokens": torch.tensor(tokens)}
        if self.final_orientation == "random":
            found["q"] = found["q"] @ random_orthogonal(kept, generator).to(q.device)
        assert found["q"].shape == (width, kept)
        return found

    def rewrite(self, view: PartView, state: State) -> State:
        width, kept = view.residual.width, view.redefinition.widths[1]
        if view.redefinition.follows:
            return self._slice_sublayers(view, state)
        rotate_part(view, state["q"].to(view.device))
        ratio = (width / kept) ** 0.5
        if view.index < 0:
            # a class that multiplies its embedding by sqrt(hidden) now uses a smaller factor
            for write in view.residual.embeddings:
                if write.scale is not None and abs(write.scale - width**0.5) < 1e-2 and width > 1:
                    view.change(write.parameter, partial(torch.mul, other=ratio), write.axis)
        norms = [norm for stream in view.sublayers for norm in stream.norms]
        if view.index == len(view.residual.blocks):
            norms.append(view.residual.end)
        for norm in norms:
            gain = torch.full((kept,), ratio - norm.formula.offset, dtype=torch.float64, device=view.device)
            view.write(f"{norm.module}.weight", gain)
        return state

    def projections(self, state: State) -> list[torch.Tensor]:
        return [state[f"basis_{number}"] for number in range(len(state) - 2)]

    def _slice_sublayers(self, view: PartView, state: State) -> State:
        """Algorithm 1 of the paper for one part. The state holds the basis (D, d) of the next sublayer, and its number.

        The stream is that of the model sliced so far: slicing to d columns of Q is projecting onto them, seen from
        another basis.
        """
        widths = view.redefinition.widths[1:]
        if view.index < 0:
            values, q, tokens = self._axes(view, [])
            _warn_if_few(view, tokens, values)
            basis = self._spread(view, q[:, : widths[0]])
            rotate_writes(view, view.residual.embeddings, basis)
            return {"basis": basis, "sublayer": torch.tensor(0)}
        if not view.sublayers:
            return state  # the output head reads the original basis
        at = int(state["sublayer"])
        bases = self._bases(view, state["basis"].to(view.device), widths[at + 1 : at + 1 + len(view.sublayers)])
        for number, (stream, basis, following) in enumerate(zip(view.sublayers, bases, bases[1:])):
            for norm in stream.norms:
                rotate_consumers(view, norm, basis)
            view.write(f"{view.path}.shortcut_{number}", basis.t() @ following)
            rotate_writes(view, stream.writes, following)
        found = {f"basis_{number}": basis for number, basis in enumerate(bases[:-1])}
        return {"basis": bases[-1], "sublayer": torch.tensor(at + len(view.sublayers)), **found}

    def _bases(self, view: PartView, entering: torch.Tensor, widths: tuple[int, ...]) -> list[torch.Tensor]:
        """The basis at each sublayer of a block, and the one after the block. `widths` has no entry for the first."""
        bases = [entering]
        for number, width in enumerate(widths):
            if view.index == len(view.residual.blocks) - 1 and number == len(widths) - 1:
                bases.append(torch.eye(view.residual.width, dtype=torch.float64, device=view.device))
            else:
                bases.append(self._spread(view, self._axes(view, bases)[1][:, :width]))
        return bases

    def _axes(self, view: PartView, bases: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Eigenvalues and axes of the stream after the sublayers of these bases, and the number of tokens."""
        covariance = Covariance.zeros(view.residual.width, view.device)
        for x in view.projected(bases):
            covariance.add(
                x, normalised=self._normalises(per_site=True), where=view.path if view.index >= 0 else "embeddings"
            )
        return *pca(covariance.matrix), covariance.tokens

    def _spread(self, view: PartView, q: torch.Tensor) -> torch.Tensor:
        if self.final_orientation == "random":
            return q @ random_orthogonal(q.shape[1], view.generator).to(q.device)
        return q

    def _refuse_growth(self, model: ModelFacts, count: Callable[[int], int], width: int) -> None:
        after = count(self._kept(width))
        if self.sparsity and after >= model.given:
            helps = widest_that_shrinks(count, model.given, width, self.round_to)
            least = "Leave slicegpt out: no sparsity up to 0.5 makes this model smaller"
            reported: dict[str, Any] = {"after": after, "before": model.given, "least": None}
            if helps is not None and helps >= width / 2:
                least = f"Set slicegpt.sparsity to {1 - helps / width:.3f} or more, which makes the model smaller"
                reported["least"] = round(1 - helps / width, 3)
            raise PreflightError(
                f"the model would have {after:,} parameters, and has {model.given:,} now",
                where="slicegpt.sparsity",
                hint=f"{least}.",
                data=reported,
            )

    def _look(self, model: RunnableModel) -> DenseRun:
        spectra: list[torch.Tensor] = []
        pooled: torch.Tensor | None = None
        for view in model.views():
            for norm in norms_of(view):
                if self.schedule == "variance" and view.sublayers:
                    raw = norm_covariance(view, norm, self._normalises(per_site=True))
                    spectra.append(pca(raw.matrix)[0])
                if self.orientation == "auto":
                    shared = norm_covariance(view, norm, self._normalises(per_site=False)).matrix
                    pooled = of_trace_one(shared) + (0 if pooled is None else pooled)
            end = view.states()
        return DenseRun(spectra, pooled, end)

    def _affordable(
        self, facts: ModelFacts, shape: StreamShape, budget: int, spectra: list[torch.Tensor]
    ) -> tuple[tuple[int, ...] | None, str]:
        """Widths of a per_site model with at most this number of parameters, or None and the reason."""

        def count(width: int) -> int:
            return per_sublayer_parameters(shape, uniform_widths(shape, width))

        widest = widest_that_shrinks(count, budget + 1, shape.width, self.round_to)
        if widest is None:
            return None, f"has more than {budget:,} at any width"
        widths = uniform_widths(shape, widest)
        if self.schedule == "variance":
            least = max(self.round_to, widest // 2 - widest // 2 % self.round_to)
            widths = scheduled_widths(shape, [values.tolist() for values in spectra], budget, self.round_to, least)
        try:
            per_sublayer_redefinition(facts, widths)
        except CompressError as error:
            return None, error.what
        return widths, ""

    def _end_of_global(self, model: RunnableModel, pooled: torch.Tensor, kept: int) -> list[torch.Tensor]:
        """The stream at the end of a model that is sliced along one rotation."""
        q = pca(pooled)[1][:, :kept]
        for view in model.views(lambda view: [q] * len(view.sublayers)):
            end = view.states()
        return [(hidden.to(q) @ q @ q.t()).to(hidden) for hidden in end]

    def _end_per_site(self, model: RunnableModel, widths: tuple[int, ...]) -> list[torch.Tensor]:
        """The stream at the end of a model that is sliced along a rotation at each sublayer."""
        carried: dict[str, Any] = {"at": 0}

        def bases(view: PartView) -> list[torch.Tensor]:
            at = carried["at"]
            found = self._bases(view, carried["basis"], widths[at + 1 : at + 1 + len(view.sublayers)])
            carried.update(basis=found[-1], at=at + len(view.sublayers))
            return found[:-1]

        for view in model.views(bases):
            if view.index < 0:
                carried["basis"] = self._axes(view, [])[1][:, : widths[0]]
            end = view.states()
        return end


def _sliced_run(block: PartWork, sublayers: int, data: DataSize, width: int, kept: int) -> Work:
    """Of slicing a block at each sublayer: a run up to the next one for its axes, and one run of the whole block."""
    found = block.run * data.tokens
    for number in range(1, sublayers + 1):
        found += block.run * (data.tokens * number / sublayers) + axes_work(data, width, kept)
        found += projected_work(data, width, kept) * (number + 1)
        found += Work(double=2.0 * width * kept**2)  # the matrix on the residual path
    return found


def _why_not_global(model: ModelFacts, kept: int) -> str | None:
    """Why a model can't be narrower everywhere and keep its class; None if it can."""
    gainless = next((norm.module for norm in model.residual.norms() if not norm.formula.has_weight), None)
    if gainless is not None:  # a fused LayerNorm, or a class whose norms have no weight
        return f"{gainless} has no weight that could correct for the width by which it divides"
    return model.fits(global_redefinition(model, kept))


def _divergence(model: RunnableModel, wanted: list[torch.Tensor], found: list[torch.Tensor]) -> float:
    """Mean KL divergence of the outputs from the dense model's, in nats. For a model without a head: the relative
    squared error of its output. It reads one sample at a time, since logits are large.
    """
    total, count = 0.0, 0
    for batch, (first, second) in enumerate(zip(wanted, found)):
        for sample in range(len(first)):
            chosen = slice(sample, sample + 1)
            with torch.no_grad():
                p, q = (model.output_head(batch, hidden[chosen], chosen).double() for hidden in (first, second))
            if model.facts.residual.end.consumers:
                errors = kl_divergence(p.log_softmax(-1), q.log_softmax(-1))
            else:
                errors = (p - q).square().sum(-1) / p.square().sum(-1)
            total, count = total + float(errors.sum()), count + errors.numel()
    return total / count


def _warn_if_few(view: PartView, tokens: int, eigenvalues: torch.Tensor) -> None:
    width = view.residual.width
    rank = int((eigenvalues > RANK_TOLERANCE * eigenvalues[0]).sum())
    if tokens < ENOUGH * width:
        seen = f"{tokens:,} calibration tokens span {rank} of {width} directions"
        values = {"tokens": tokens, "rank": rank, "width": width, "wanted": ENOUGH * width}
        view.warn("few-tokens", "slicegpt", f"{seen}; use at least {ENOUGH * width:,}", **values)
