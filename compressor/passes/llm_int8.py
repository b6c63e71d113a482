"""LLM.int8(): int8 weights times int8 activations, with the few outlier features multiplied in 16 bits.

Paper: Dettmers, Lewis, Belkada, Zettlemoyer 2022, "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale",
arXiv 2208.07339.

Idea. Rows of W and tokens X are each rounded to int8 by their own largest magnitude and multiplied as integers:
Y = (CA · CBᵀ) · SCA · SCBᵀ / 127². From some size on, a few features of X are so large that a token's largest magnitude
leaves no steps for the rest. Those columns O = {j : any |X_tj| >= threshold} are taken out of both and multiplied in 16
bits; the rest then has a fine grid again. That happens at run time, in `compressor.layers.int8_split_linear`; this
pass rounds the weights, and finds O on calibration data where it is asked to.

Where we differ from the paper and from bitsandbytes, and why
- Outlier columns are left out whole when a token's largest magnitude is taken (bitsandbytes leaves out single values),
  so the grid of every token is as fine or finer. Activations are not cast to float16 first.
- `outliers: dynamic` multiplies them with dequantized weight columns, as bitsandbytes does: the paper keeps 16-bit
  weights, but which columns will be needed is not known when they are stored.
- `outliers: calibrated` (ours) fixes O on calibration data and stores those weight columns as they were: nothing is
  searched at run time, the columns' weights are exact, and a token's result doesn't depend on its batch. A feature that
  becomes large only later is rounded to int8 like any other.
- threshold 0 turns the split off, as in bitsandbytes; inf means the same.
- Symmetric rounding only: the paper's table 1 finds no use for a zero point beside the split.

Cost: one pass over the weights; with calibration or a report of outliers one forward pass over the calibration data.
Beside the weights, 2·out·k bytes for k calibrated columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from compressor.bounds import Count
from compressor.errors import PassError
from compressor.lazy import torch
from compressor.protocol import BlockView, Group, Traits, Weight, WeightPass

STUDIED_MAGNITUDE = 6.0  # what the paper's appendix C calls an outlier; for the report where the split is off
MOST_COLUMNS = 128  # the paper saw at most 7 features in models up to 13B
LISTED_FEATURES = 16  # largest ones in the report's row of a weight


class LLMInt8(WeightPass):
    """Round weights to int8 rows; at run time activations too, but for outlier features."""

    title: ClassVar[str] = "Weights and activations to int8, outlier features in 16 bits"
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
        most = "2 bytes an output and column, at most max_outlier_columns of a weight"
        return f"calibration finds how many columns it keeps ({most})"

    @property
    def sizes_are(self) -> Literal["exact", "upper bounds", "lower bounds"]:
        return "exact" if self.outliers == "dynamic" else "lower bounds"

    def spec(self, weight: Weight) -> dict[str, Any]:
        """How many columns calibration will keep is not known before: plan counts none."""
        found = {"threshold": self.threshold, "outliers": self.outliers}
        return found if self.outliers == "dynamic" else {**found, "outlier_columns": 0}

    def block(self, view: BlockView) -> None:
        for stage in view.stages(sequential=False):
            counts: list[Outliers] = []
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
                    "its calibration inputs hold NaN or Inf",
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
                view.warn("outliers-dropped", group.name, message)
        for weight in group:
            matrix = view.matrix(weight)
            layer = Int8SplitLinear.pack(matrix, self.threshold, view.dtype, columns)
            error = (layer.matrix(torch.float32) - matrix).norm() / matrix.norm().clamp(min=1e-30)
            view.put(weight, layer, weight_error=float(error), **record)


@dataclass
class Outliers:
    """What calibration tokens showed of one input.

    largest  (in,) float32, largest |x| of each feature
    hits     (in,) int64, tokens in which it reached the limit
    touched  tokens in which any feature did, of `tokens`
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
        """(k,) int64, by decreasing magnitude and then by number."""
        order = torch.argsort(self.largest, descending=True, stable=True)
        return order[self.largest[order] >= self.limit]

    def record(self, group: Group) -> dict[str, Any]:
        """The report's values of one input; weights that share it carry its first weight's name."""
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
