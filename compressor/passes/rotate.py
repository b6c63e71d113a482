"""QuaRot: rotates the residual stream, so that quantization loses less. The logits don't change.

Paper: Ashkboos et al. 2024, arXiv 2404.00456. If the norms are fused, everything that writes to the residual stream may
be multiplied by an orthogonal Q, and everything that reads from it by its transpose. This spreads outlier features of
the stream, and the outlier columns of the weights that read them, over all dimensions. So rounding to 3 or 4 bits loses
less. Only the offline part is done, multiplied into the weights: no Hadamard transform runs with the model, and inputs
of down projections and heads are not rotated.

Q is a seeded randomized Hadamard matrix, a random orthogonal one, or the principal axes of the stream on calibration
data (second moments at each sublayer, scaled to trace 1 and pooled). Cost: one pass over the weights, and for `pca` a
run of the model and one eigendecomposition.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal

from pydantic import Field

from compressor.lazy import torch
from compressor.methods.rotation.counted_work import changed_bytes, pooled_work, rotated_work
from compressor.methods.rotation.rotation import (
    pca,
    pooled_covariance,
    random_orthogonal,
    randomized_hadamard,
    rotate_part,
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
    State,
    Traits,
    Work,
)
from compressor.protocol.work import orthogonal


class Rotate(RewritePass):
    """Multiply one orthogonal matrix for the residual stream into the weights. The logits stay the same."""

    title: ClassVar[str] = "Rotates the residual stream (QuaRot), so that quantization loses less"
    paper: ClassVar[str] = "Ashkboos et al. 2024 (QuaRot), arXiv 2404.00456"
    keeps_function: ClassVar[bool] = True

    rotation: Literal["hadamard", "random", "pca"] = Field(
        "hadamard",
        description="hadamard: randomized Hadamard matrix. random: random orthogonal matrix. pca: principal axes of "
        "the residual stream on calibration data.",
    )

    @property
    def traits(self) -> Traits:
        reads = "inputs" if self.rotation == "pca" else "weights"
        return Traits(reads=reads, requires=frozenset({Fact.NORMS_FOLDED}))  # type: ignore[arg-type]

    def work(self, model: ModelFacts, data: DataSize, parts: Sequence[PartWork]) -> list[Work]:
        width = model.residual.width
        found = [rotated_work(part.values, width) for part in parts]
        if self.rotation == "pca":
            found[0] += pooled_work(parts, [len(block) for block in model.residual.blocks], data, width)
        elif self.rotation == "random":
            found[0] += orthogonal(width)
        return found

    def memory(self, model: ModelFacts, data: DataSize, parts: Sequence[PartWork]) -> int:
        """The new parameters, and the rotation with three more matrices of its size."""
        return changed_bytes(parts) + 32 * model.residual.width**2

    def redefine(self, model: ModelFacts, decision: Decision | None) -> Redefinition:
        return Redefinition(widths=(model.residual.width,) * 2)

    def survey(self, views: Iterator[PartView]) -> State:
        if self.rotation == "pca":
            return {"q": pca(pooled_covariance(views)[0])[1]}
        first = next(views)
        make = randomized_hadamard if self.rotation == "hadamard" else random_orthogonal
        return {"q": make(first.residual.width, first.generator)}

    def rewrite(self, view: PartView, state: State) -> State:
        rotate_part(view, state["q"].to(device=view.device, dtype=torch.float64))
        return state
