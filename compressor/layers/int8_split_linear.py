"""LLM.int8(): a weight as int8 rows, multiplied by int8 tokens, with outlier columns multiplied in 16 bits.

Tensors, the first three as bitsandbytes names and lays them out (docs/format.md):
    weight           int8 (out, in), codes = round(127 · w / SCB)
    SCB              float32 (out,), the largest |w| of each row: w = codes · SCB / 127
    weight_format    uint8 (), 0: rows lie one after the other
    outlier_columns  int32 (k,), ascending; calibrated only, absent for k = 0
    outlier_weight   (out, k) in the model's dtype, those columns of the weight as they were; their codes are 0, and SCB
                     is taken without them

Running. Tokens x (tokens, in) lose their outlier columns, the rest of each is rounded to int8 by its own largest
magnitude; the int8 product is exact, scaled in float32; the outlier columns multiply in the type of x, with sums in
float32; bias and the cast to that type come last, so the result is rounded once. What an outlier column is:
- dynamic: any |x| of the tokens in this call is >= threshold. The weight's column is the dequantized one. A token's
  result depends on its batch: another token can make a column an outlier.
- calibrated: the stored columns, whatever x holds. A token's result is the same bits in any batch.
- threshold 0: none; everything is int8. (bitsandbytes has it so; as a limit of small thresholds it would mean all.)
A token that holds NaN or Inf gives NaN.
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
from compressor.layers.base import Layer, Stock


class Int8SplitLinear(Layer):
    """Drop-in for nn.Linear that rounds its input too. For inference: rounding has no useful gradient, none is kept."""

    form = "int8_split_linear"
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
        """columns: how many outlier columns are stored; None finds them in each call."""
        super().__init__()
        if in_features > MOST_INPUTS:
            raise ShapeError(
                f"{in_features} inputs; sums of int8 products stay exact up to {MOST_INPUTS}",
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
    def empty(cls, shape: tuple[int, ...], spec: dict[str, Any], dtype: torch.dtype, bias: bool) -> Self:
        columns = spec["outlier_columns"] if spec["outliers"] == "calibrated" else None
        return cls(shape[1], shape[0], spec["threshold"], dtype, bias, columns)

    @classmethod
    def stock(cls, spec: dict[str, Any]) -> Stock | str:
        if spec["outliers"] == "calibrated":
            return "keeps calibrated outlier columns in 16 bits, for which bitsandbytes has no place"
        return Stock("bitsandbytes", {"threshold": spec["threshold"]})

    @classmethod
    def pack(cls, matrix: Tensor, threshold: float, dtype: torch.dtype, columns: Tensor | None = None) -> Self:
        """Round a weight.

        matrix   (out, in) float32
        dtype    of the model, in which outlier columns are stored
        columns  (k,) int64, ascending: the columns to store as they are; None finds them in each call
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
        """The weight (out, in) that codes and stored columns stand for."""
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

    def spec(self) -> dict[str, Any]:
        if self.columns is None:
            return {"threshold": self.threshold, "outliers": "dynamic"}
        return {"threshold": self.threshold, "outliers": "calibrated", "outlier_columns": self.columns}

    def tensors(self) -> dict[str, Tensor]:
        names = ["weight", "SCB", "weight_format", *(["outlier_columns", "outlier_weight"] if self.columns else [])]
        return {name: getattr(self, name) for name in names}

    @classmethod
    def from_tensors(cls, spec: dict[str, Any], tensors: dict[str, Tensor], bias: Tensor | None = None) -> Self:
        out, inputs = tensors["weight"].shape
        stored = tensors.get("outlier_weight", tensors["SCB"])
        with torch.device("meta"):
            layer = cls.empty((out, inputs), spec, stored.dtype, bias=False)
        if set(tensors) != set(layer.tensors()):
            raise ShapeError(
                f"tensors {sorted(tensors)}, {sorted(layer.tensors())} expected",
                data={"names": sorted(tensors), "expected": sorted(layer.tensors())},
            )
        layer.fill(tensors)
        if int(layer.weight_format):
            raise ShapeError(
                f"weight_format {int(layer.weight_format)}, only 0 is read (rows one after the other)",
                data={"tensor": "weight_format", "value": int(layer.weight_format)},
            )
        if layer.columns:
            columns = layer.outlier_columns
            if not bool((columns[1:] > columns[:-1]).all()) or int(columns[0]) < 0 or int(columns[-1]) >= inputs:
                raise ShapeError(
                    f"outlier_columns must ascend within {inputs} inputs",
                    data={"tensor": "outlier_columns", "inputs": inputs},
                )
        layer.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        return layer
