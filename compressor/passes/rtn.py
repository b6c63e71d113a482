"""Round-to-nearest: rounds each weight to the nearest point of its grid, without calibration.

Every other quantizer must be better than this baseline, and GPTQ falls back to it. Its grid (range, scale, zero point,
searched range) is the same as GPTQ's (`uniform_grid`), so a comparison of the two shows the effect of error feedback
alone. Cost: one pass over the weights, about sixteen times as much if the range is searched; memory for one weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from compressor.methods.quantization.packed_codes import GroupSize, packed_params, quantization_format, store_nearest
from compressor.protocol import BlockView, DataSize, Traits, Weight, WeightPass, Work

PASSES_OVER_VALUES = 80  # copies, rounding and packing of a weight; packing takes most of it


class RTN(WeightPass):
    """Round each weight to the nearest point of its grid; no calibration data."""

    title: ClassVar[str] = "Rounds weights to nearest; the baseline, needs no calibration data"
    paper: ClassVar[str] = ""

    bits: Literal[2, 3, 4, 8] = Field(4, description="Bits per weight.")
    group_size: GroupSize = Field(128, description="Inputs that share a scale. -1: one scale per row.")
    symmetric: bool = Field(
        True, description="true: the grid is centred on zero. false: a zero point is stored per group."
    )
    scale_search: Literal["minmax", "mse"] = Field(
        "mse", description="How a scale is chosen. minmax: by the extremes. mse: with the least squared error."
    )

    @property
    def traits(self) -> Traits:
        return Traits(reads="weights", stores=quantization_format(self.bits, self.symmetric))

    def format_params(self, weight: Weight) -> dict[str, Any]:
        return packed_params(weight, self.bits, self.group_size, self.symmetric)

    def work(self, weights: Sequence[Weight], data: DataSize, run: Work) -> Work:
        count = float(sum(weight.out_features * weight.in_features for weight in weights))
        searched = count if self.scale_search == "mse" else 0.0
        return Work(searched=searched, values=PASSES_OVER_VALUES * count)

    def block(self, view: BlockView) -> None:
        for stage in view.stages(sequential=False):
            for group in stage:
                for weight in group:
                    store_nearest(view, weight, self.bits, self.group_size, self.symmetric, self.scale_search, {})
