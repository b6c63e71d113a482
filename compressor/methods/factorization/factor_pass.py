"""Defines what passes have in common that store factors of a matrix, which are chosen for its calibration inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from compressor.errors import values_of
from compressor.methods.factorization.low_rank import moments_bytes
from compressor.protocol import BlockView, DataSize, Traits, Weight, WeightPass


class FactorPass(WeightPass):
    """Stores factors of matrices in the format `format_name`, or leaves a matrix dense with a warning.

    metric  setting of each such pass: the error of the outputs on calibration data, or of the weights without data
    """

    format_name: ClassVar[str]

    if TYPE_CHECKING:  # each pass declares it, at its place among the settings
        metric: Literal["output", "weight"]

    @property
    def traits(self) -> Traits:
        return Traits(reads="inputs" if self.metric == "output" else "weights", stores=self.format_name)

    def folded(self, weights: Sequence[Weight], data: DataSize) -> int:
        """Second moments, in float64 for few inputs."""
        return moments_bytes(weights[0].in_features) if self.metric == "output" else 0

    def leave_dense(self, view: BlockView, weight: Weight, why: str, record: Mapping[str, Any]) -> None:
        view.warn("stays-dense", weight.name, why, **values_of(why))
        view.keep(weight, fallback="dense", reason=why, **record)
