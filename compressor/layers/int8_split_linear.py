"""Implements LLM.int8(): int8 rows of a weight are multiplied by int8 tokens, and outlier columns in 16 bits.

Tensors, the first three with the names and layout of bitsandbytes (docs/format.md):
    weight           int8 (out, in), codes = round(127 · w / SCB)
    SCB              float32 (out,), the largest |w| of each row: w = codes · SCB / 127
    weight_format    uint8 (), 0: rows are stored one after the other
    outlier_columns  int32 (k,), ascending; calibrated only, absent for k = 0
    outlier_weight   (out, k) in the model's dtype, the unchanged outlier columns of the weight; their codes are 0, and
                     SCB is computed without them

Forward: the outlier columns of tokens x (tokens, in) are separated. The rest of each token is rounded to int8 by its
own largest magnitude. The int8 matmul is exact, and its result is scaled in float32. The outlier columns are multiplied
in the dtype of x, with sums in float32. The bias and the cast to that dtype come last, so the result is rounded once.
An outlier column is:
- dynamic: a column in which |x| of any token in this call is >= threshold. The weight's column is the dequantized one.
  A token's result depends on its batch, because another token can make a column an outlier.
- calibrated: a stored column, for any x. A token's result has the same bits in any batch.
- threshold 0: no column; everything is int8. (As in bitsandbytes. As a limit of small thresholds it would be all.)
A token with NaN or Inf gives NaN.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from compressor.errors import ShapeError
from compressor.kernels.ops.int8_split import (
    MOST_INPUTS,
    columns_product,
    dequantize_rows,
    find_outliers,
    round_rows,
    rounded_product,
)
from compressor.layers.base import DAMAGED_HINT, Layer, Stock


class Int8SplitLinear(Layer):
    """Replaces nn.Linear and quantizes its input too. For inference only: rounding has no useful gradient."""

    format_name = "int8_split_linear"
    weight_only = False
    helpers = ("compressor.kernels.ops.int8_split",)
    weight: Tensor
    SCB: Tensor
    weight_format: Tensor
    outlier_columns: Tensor
    outlier_weight: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        threshold: float,
        dtype: torch.dtype,
        bias: bool = False,
        columns: int | None = None,
    ) -> None:
        """columns: number of stored outlier columns; None: they are found in each call."""
        super().__init__()
        if in_features > MOST_INPUTS:
            raise ShapeError(
                f"{in_features} inputs; sums of int8 products stay exact up to {MOST_INPUTS}",
                hint="Leave this weight out with `except`, or use gptq or rtn.",
                data={"inputs": in_features, "limit": MOST_INPUTS},
            )
        self.in_features, self.out_features = in_features, out_features
        self.threshold, self.columns = threshold, columns
        self.register_buffer("weight", torch.zeros(out_features, in_features, dtype=torch.int8))
        self.register_buffer("SCB", torch.zeros(out_features, dtype=torch.float32))
        self.register_buffer("weight_format", torch.zeros((), dtype=torch.uint8))
        if columns:
            self.register_buffer("outlier_columns", torch.zeros(columns, dtype=torch.int32))
            self.register_buffer("outlier_weight", torch.zeros(out_features, columns, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype), requires_grad=False) if bias else None

    @classmethod
    def empty(cls, shape: tuple[int, ...], format_params: dict[str, Any], dtype: torch.dtype, bias: bool) -> Self:
        columns = format_params["outlier_columns"] if format_params["outliers"] == "calibrated" else None
        return cls(shape[1], shape[0], format_params["threshold"], dtype, bias, columns)

    @classmethod
    def stock(cls, format_params: dict[str, Any]) -> Stock | str:
        if format_params["outliers"] == "calibrated":
            return "keeps calibrated outlier columns in 16 bits, for which bitsandbytes has no place"
        return Stock("bitsandbytes", {"threshold": format_params["threshold"]})

    @classmethod
    def pack(cls, matrix: Tensor, threshold: float, dtype: torch.dtype, columns: Tensor | None = None) -> Self:
        """Quantize a weight.

        matrix   (out, in) float32
        dtype    of the model, in which outlier columns are stored
        columns  (k,) int64, ascending: the columns to store unchanged; None: they are found in each call
        """
        out, inputs = matrix.shape
        layer = cls(inputs, out, threshold, dtype, columns=None if columns is None else len(columns))
        if columns is not None and len(columns):
            layer.outlier_columns = columns.to(torch.int32)
            layer.outlier_weight = matrix[:, columns].to(dtype)
            matrix = matrix.index_fill(1, columns, 0)
        layer.weight, layer.SCB = round_rows(matrix)
        return layer.to(matrix.device)

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """The dequantized weight (out, in), with the stored columns."""
        rebuilt = dequantize_rows(self.weight, self.SCB).to(dtype)
        if self.columns:
            rebuilt[:, self.outlier_columns.long()] = self.outlier_weight.to(dtype)
        return rebuilt

    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError("int8_split_linear has no gradient: call eval(), or train the model it was made from")
        with torch.no_grad():
            return self._product(x)

    def _product(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, self.in_features)
        if self.columns is not None:
            apart = self.outlier_columns.long() if self.columns else None
        else:
            apart = find_outliers(tokens, self.threshold) if self.threshold else None
        result = rounded_product(tokens, self.weight, self.SCB, apart)
        if apart is not None and self.columns:
            result += columns_product(tokens[:, apart], self.outlier_weight)
        elif apart is not None and len(apart):
            weight = dequantize_rows(self.weight[:, apart], self.SCB).to(x.dtype)
            result += tokens[:, apart].float() @ weight.float().t()
        if self.bias is not None:
            result += self.bias.float()
        return result.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def format_params(self) -> dict[str, Any]:
        if self.columns is None:
            return {"threshold": self.threshold, "outliers": "dynamic"}
        return {"threshold": self.threshold, "outliers": "calibrated", "outlier_columns": self.columns}

    def tensors(self) -> dict[str, Tensor]:
        names = ["weight", "SCB", "weight_format", *(["outlier_columns", "outlier_weight"] if self.columns else [])]
        return {name: getattr(self, name) for name in names}

    @classmethod
    def from_tensors(
        cls, format_params: dict[str, Any], tensors: dict[str, Tensor], bias: Tensor | None = None
    ) -> Self:
        out, inputs = tensors["weight"].shape
        stored = tensors.get("outlier_weight", tensors["SCB"])
        with torch.device("meta"):
            layer = cls.empty((out, inputs), format_params, stored.dtype, bias=False)
        if set(tensors) != set(layer.tensors()):
            raise ShapeError(
                f"tensors {sorted(tensors)}, {sorted(layer.tensors())} expected",
                hint=DAMAGED_HINT,
                data={"names": sorted(tensors), "expected": sorted(layer.tensors())},
            )
        layer.fill(tensors)
        if int(layer.weight_format):
            raise ShapeError(
                f"weight_format {int(layer.weight_format)}, only 0 can be read (rows one after the other)",
                hint="Quantize the original model again with llm_int8.",
                data={"tensor": "weight_format", "value": int(layer.weight_format)},
            )
        if layer.columns:
            columns = layer.outlier_columns
            if not bool((columns[1:] > columns[:-1]).all()) or int(columns[0]) < 0 or int(columns[-1]) >= inputs:
                raise ShapeError(
                    f"outlier_columns must ascend within {inputs} inputs",
                    hint=DAMAGED_HINT,
                    data={"tensor": "outlier_columns", "inputs": inputs},
                )
        layer.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        return layer
