"""LLM.int8(): multiplies int8 weights by int8 activations, and the few outlier features in 16 bits.

Paper: Dettmers, Lewis, Belkada, Zettlemoyer 2022, "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale",
arXiv 2208.07339.

Idea. Each row of W and each token of X is rounded to int8 by its own largest magnitude, and multiplied as integers:
Y = (CA · CBᵀ) · SCA · SCBᵀ / 127². In models above some size, a few features of X are so large that a token's largest
magnitude leaves no steps for the other features. Those columns O = {j : any |X_tj| >= threshold} are removed from both
matrices and multiplied in 16 bits; then the others have a fine grid again. This happens at run time, in
`compressor.layers.int8_split_linear`. This pass rounds the weights, and finds O on calibration data if it is asked to.

Where we differ from the paper and from bitsandbytes, and why
- Whole outlier columns are left out when a token's largest magnitude is found (bitsandbytes leaves out single values).
  So the grid of every token is as fine or finer. Activations are not cast to float16 first.
- `outliers: dynamic` multiplies outlier features by dequantized weight columns, as bitsandbytes does. The paper keeps
  16-bit weights, but when they are stored it is not known which columns will be needed.
- `outliers: calibrated` (ours) fixes O on calibration data and stores those weight columns unchanged. So nothing is
  searched at run time, these columns are exact, and a token's result doesn't depend on its batch. A feature that
  becomes large only later is rounded to int8 like all others.
- threshold 0 turns the split off, as in bitsandbytes; inf means the same.
- Rounding is symmetric only: table 1 of the paper finds no gain from a zero point together with the split.

Cost: one pass over the weights; with calibration or a report of outliers, one forward over the calibration data.
Storage besides the weights: 2·out·k bytes for k calibrated columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from compressor.bounds import Count
from compressor.errors import PassError
from compressor.lazy import torch
from compressor.protocol import BlockView, DataSize, Group, Traits, Weight, WeightPass, Work

STUDIED_MAGNITUDE = 6.0  # an outlier in appendix C of the paper; used for the report if the split is off
MOST_COLUMNS = 128  # the paper saw at most 7 features in models up to 13B
PASSES_OVER_WEIGHTS = 16  # copies, rounding, dequantization and errors of a weight
PASSES_OVER_INPUTS = 8  # magnitudes and comparisons of the inputs, if outliers are counted
LISTED_FEATURES = 16  # number of largest features in the report's row of a weight


class LLMInt8(WeightPass):
    """Round weights to int8 rows, and at run time activations, except outlier features."""

    title: ClassVar[str] = "Quantizes weights and activations to int8, with outlier features in 16 bits (LLM.int8())"
    paper: ClassVar[str] = "Dettmers et al. 2022, arXiv 2208.07339"

    threshold: float = Field(6.0, ge=0, description="|x| from which a feature is an outlier. 0 or .inf: no feature is.")
    outliers: Literal["dynamic", "calibrated"] = Field(
        "dynamic",
        description="dynamic: found in each call. calibrated: fixed on calibration data, with their weights stored "
        "unchanged (needs a modeling file).",
    )
    min_frequency: float = Field(
        0.0,
        ge=0,
        le=1,
        description="For calibrated: smallest share of tokens that reach the threshold in an outlier feature.",
    )
    max_outlier_columns: Count = Field(
        MOST_COLUMNS, description="For calibrated: largest number of outlier columns of a weight. The largest are kept."
    )
    outlier_report: bool = Field(
        False, description="Count outlier features on calibration data for the report, also for dynamic."
    )

    @field_validator("threshold")
    @classmethod
    def _off_is_zero(cls, threshold: float) -> float:
        return 0.0 if math.isinf(threshold) else threshold

    @model_validator(mode="after")
    def _settings_are_used(self) -> LLMInt8:
        if self.outliers == "calibrated" and self.threshold == 0:
            raise PydanticCustomError(
                "nothing-calibrated", "threshold 0 turns the split off, so outliers: calibrated has nothing to find"
            )
        if self.outliers == "dynamic" and (self.min_frequency, self.max_outlier_columns) != (0.0, MOST_COLUMNS):
            raise PydanticCustomError(
                "needs-calibrated", "min_frequency and max_outlier_columns need outliers: calibrated"
            )
        return self

    @property
    def traits(self) -> Traits:
        return Traits(reads="inputs" if self._counts else "weights", stores="int8_split_linear")

    @property
    def _counts(self) -> bool:
        return self.outlier_report or self.outliers == "calibrated"

    @property
    def _limit(self) -> float:
        return self.threshold or STUDIED_MAGNITUDE

    @property
    def unplanned(self) -> str:
        if self.outliers == "dynamic":
            return ""
        most = "2 bytes per output and column, at most max_outlier_columns per weight"
        return f"calibration decides how many columns are kept ({most})"

    @property
    def sizes_are(self) -> Literal["exact", "upper bounds", "lower bounds"]:
        return "exact" if self.outliers == "dynamic" else "lower bounds"

    def format_params(self, weight: Weight) -> dict[str, Any]:
        """The format parameters. `plan` counts no outlier columns, since calibration decides their number."""
        found = {"threshold": self.threshold, "outliers": self.outliers}
        return found if self.outliers == "dynamic" else {**found, "outlier_columns": 0}

    def work(self, weights: Sequence[Weight], data: DataSize, run: Work) -> Work:
        count = float(sum(weight.out_features * weight.in_features for weight in weights))
        seen = float(data.tokens * weights[0].in_features) if self._counts else 0.0
        return Work(values=PASSES_OVER_WEIGHTS * count + PASSES_OVER_INPUTS * seen)

    def memory(self, weights: Sequence[Weight], data: DataSize) -> int:
        """Four copies of a weight in float32."""
        return 16 * max(weight.out_features for weight in weights) * weights[0].in_features

    def folded(self, weights: Sequence[Weight], data: DataSize) -> int:
        """The largest value of each input, and how often it was an outlier."""
        return 12 * weights[0].in_features if self._counts else 0

    def block(self, view: BlockView) -> None:
        for stage in view.stages(sequential=False):
            counts: Iterable[Outliers] = ()
            if self._counts:
                counts = view.fold(stage, partial(Outliers.none, self._limit, view.device), Outliers.add)
            for group, count in zip_longest(stage, counts):
                self._store(view, group, count)

    def _store(self, view: BlockView, group: Group, count: Outliers | None) -> None:
        from compressor.layers.int8_split_linear import Int8SplitLinear

        columns = None
        record: dict[str, Any] = {}
        if count is not None:
            if not bool(count.largest.isfinite().all()):
                raise PassError(
                    "its calibration inputs contain NaN or Inf",
                    where=group.name,
                    hint="Set model.dtype: float32, or check the model's outputs on this data.",
                    data={"reason": "not-finite"},
                )
            record = count.record(group)
        if count is not None and self.outliers == "calibrated":
            columns, dropped = choose_columns(count, self.min_frequency, self.max_outlier_columns)
            record["kept_columns"] = len(columns)
            if dropped:
                largest = float(count.largest[dropped].max())
                message = f"{len(dropped)} outlier features beyond max_outlier_columns are rounded, up to {largest:.3g}"
                view.warn("outliers-dropped", group.name, message, features=len(dropped), largest=largest)
        for weight in group:
            matrix = view.matrix(weight)
            layer = Int8SplitLinear.pack(matrix, self.threshold, view.dtype, columns)
            error = (layer.matrix(torch.float32) - matrix).norm() / matrix.norm().clamp(min=1e-30)
            view.put(weight, layer, weight_error=float(error), **record)


@dataclass
class Outliers:
    """Statistics of one input over calibration tokens.

    largest  (in,) float32, largest |x| of each feature
    hits     (in,) int64, number of tokens in which it reached the limit
    touched  number of tokens, out of `tokens`, in which any feature did
    """

    limit: float
    largest: torch.Tensor
    hits: torch.Tensor
    touched: int = 0
    tokens: int = 0

    @classmethod
    def none(cls, limit: float, device: torch.device, group: Group) -> Outliers:
        shape = group.in_features
        return cls(limit, torch.zeros(shape, device=device), torch.zeros(shape, dtype=torch.int64, device=device))

    def add(self, x: torch.Tensor) -> Outliers:
        """x (tokens, in)"""
        if not len(x):
            return self
        size = x.abs().float()
        reaches = size >= self.limit
        self.largest = torch.maximum(self.largest, size.amax(0))
        self.hits += reaches.sum(0)
        self.touched += int(reaches.any(1).sum())
        self.tokens += len(x)
        return self

    @property
    def features(self) -> torch.Tensor:
        """(k,) int64, by decreasing magnitude, then by number."""
        order = torch.argsort(self.largest, descending=True, stable=True)
        return order[self.largest[order] >= self.limit]

    def record(self, group: Group) -> dict[str, Any]:
        """The report's values of one input. Weights that share it have the name of the first of them."""
        features = self.features
        listed = features[:LISTED_FEATURES]
        return {
            "input": group.name,
            "calibration_tokens": self.tokens,
            "outlier_features": len(features),
            "outlier_token_share": self.touched / max(self.tokens, 1),
            "outlier_magnitude": float(self.largest.max()),
            "largest_features": listed.tolist(),
            "largest_magnitudes": self.largest[listed].tolist(),
        }


def choose_columns(count: Outliers, min_frequency: float, most: int) -> tuple[torch.Tensor, list[int]]:
    """(the columns (k,) int64, ascending; outlier features left out because there were more than `most`)."""
    frequent = count.features[count.hits[count.features] >= min_frequency * count.tokens]
    return frequent[:most].sort().values, frequent[most:].tolist()
