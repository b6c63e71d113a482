"""BCT: quantizes weights, embeddings and activations block by block, and each block has a power of two as its scale.

Paper: Dong and Chen 2023, "Blockwise Compression of Transformer-based Models without Retraining", arXiv 2304.01483, and
the same authors' earlier BBCT, arXiv 2303.09184. Only the abstracts could be read; no code is published. They say:
everything is compressed block by block (embedding, matrix multiplication, GELU, softmax, layer normalization, all
intermediate results), nothing is retrained, the model is up to 7.988 times smaller than float32, and less than 0.90 %
of accuracy is lost on most GLUE tasks. Everything below is therefore our reading, and each choice is marked.

Equations [ours]. For a block x of a matrix, with q = 2^(bits-1) - 1 and the largest value m = max|x|:

    e0  = the least integer e with q 2^e >= m          (0 for a block of zeros)
    c   = clamp(round(x / 2^e), -q, q)                 rounding half to even
    x'  = c 2^e,  and with e = e0 nothing saturates and |x - x'| <= 2^(e-1)

What the paper leaves open, and what we chose
- Block shape. The abstracts give none. 7.988 = 32 / 4.006 means 4-bit codes and 0.006 bits of overhead per weight, that
  is, one byte for about 1,300 weights. Our default is 64 x 64 (0.002 bits with power-of-two scales). With [1, B] each
  row has its own blocks.
- Type of the scale. It is a power of two, so that integer products are aligned by shifts. `scale: float16` is the
  alternative.
- Choice of the scale. `mse` tries e0, e0 - 1, e0 - 2, e0 - 3 and keeps the one with the least squared error of the
  block, so it may clip. `output` weights each column's error by the mean square of its calibration inputs. `max` is e0.
- Bits. Each matrix has 4 or 8. With `budget` or `budget_bits` the choice is made over the whole model. Every selected
  matrix starts at 4 bits. Then those matrices are raised to 8 whose relative output error, |(W - W')X|^2 / |WX|^2 on
  calibration data, falls most per byte, while the bytes of all selected matrices stay within the budget. The error is
  that of up to 512 rows of W, in evenly spaced blocks. For an embedding, the rows that occur in the data count.
- Embeddings have blocks of one row, `embedding_block` wide.
- Biases. With `biases` they are 8-bit codes in blocks of 64 with power-of-two scales. They are a thousandth of the
  weights, and an integer matmul adds them to an accumulator of higher precision, so by default they stay dense. The
  weights and biases of norms stay dense.
- Activations. They have 8 bits, in blocks that are as wide as the weight's blocks. There is one power-of-two scale for
  each token and block (dynamic), or one for each block, from the largest value on calibration data (static; larger
  values saturate). If softmax is selected too, queries, keys, values and the output of softmax are quantized as well.
  The residual stream isn't quantized: it is an accumulator that only norms read.
- Lookup tables replace the functions that `only` names: @activation (GELU, SiLU and others, over the range of their
  inputs on calibration data; outside it they continue along the asymptote), @softmax (exp from -16 to 0, below which a
  term is 0; sums and division are in float32) and @norm (1 / sqrt of a mantissa in [1, 4), shifted; sums are in
  float32). Entries are float32. ReLU is exact and needs no table. The error of a table has a bound (`lookup_tables`).
  For linear interpolation between 256 entries: GELU 4.0e-4 and SiLU 1.0e-3 over their whole range, exp 5.0e-4, and
  1 / sqrt a relative 1.3e-5. The nearest entry is about 80 times worse.
- `stock` writes blocks of one row as symmetric groups of compressed-tensors, which plain transformers loads. A scale is
  then a number in the model's dtype, 2 bytes instead of 1. It is exact in bfloat16 and float32, and in float16 from
  2^-24 on, below which a float16 model has no values. float16 scales are refused with `stock`: bfloat16 would round
  them again, and gptq and rtn offer such scales in the model's own dtype.

Cost: one pass over the weights, four times as much if the scale is searched. A budget adds one run of the whole model
and two quantizations of 512 rows of each matrix. Memory: one weight and, for `output` and `budget`, one second-moment
matrix.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypedDict, cast

from pydantic import Field, PositiveInt, model_validator
from pydantic_core import PydanticCustomError

from compressor.errors import PassError, ShapeError
from compressor.lazy import torch
from compressor.methods.quantization.block_grid import SCALES_TRIED, SHIFTS_TRIED, SLAB_ELEMENTS, quantize_blocks
from compressor.methods.quantization.hessian import Gram
from compressor.methods.quantization.lookup_tables import Table, activation_table, exp_table, root_table
from compressor.model.activations import KNOWN
from compressor.protocol import (
    BlockView,
    DataSize,
    Decision,
    Group,
    Stage,
    Traits,
    Weight,
    WeightPass,
    WholeModel,
    Work,
)

if TYPE_CHECKING:
    from compressor.layers.base import Layer

Side = Annotated[int, Field(ge=1, le=4096)]
EXP_LOW = -16.0  # exp(-16) = 1.13e-7 is the largest error of a softmax term that is set to 0
FORMATS = {  # role -> quantization format, if it isn't that of a matrix
    "embedding": "block_embedding",
    "activation": "table_activation",
    "norm": "table_norm",
    "softmax": "block_attention",
}
FLOAT16_LEAST_SHIFT = -24
PASSES_OVER_TRIED = 14  # of a scale that is tried: codes, their values, errors, and the better of two results
PASSES_OVER_VALUES = 12  # copies, packing, dequantization and errors of a weight
PASSES_OVER_INPUTS = 6
SAMPLED_ROWS = 512  # of a matrix, to measure its errors for a budget: errors of rows are alike


class BitsDecision(TypedDict):
    """bits: of each weight; output_errors: at 4 and at 8 bits"""

    bits: dict[str, int]
    bytes: int
    budget_bytes: int
    output_errors: dict[str, list[float]]


class BCT(WeightPass):
    """Quantize weights to 4 or 8 bits in blocks with power-of-two scales; embeddings, activations and functions too."""

    title: ClassVar[str] = "Quantizes weights, embeddings and activations to 4/8 bits in blocks (BCT)"
    paper: ClassVar[str] = "Dong & Chen 2023, arXiv 2304.01483"

    bits: Literal[4, 8] = Field(8, description="Bits per weight. With a budget, each matrix gets 4 or 8.")
    block_shape: tuple[Side, Side] = Field(
        (64, 64), description="Rows and columns of a block that shares a scale. [1, B] is a block of one row."
    )
    scale: Literal["shift", "float16"] = Field(
        "shift", description="Type of the scales: powers of two in one byte, or float16."
    )
    scale_search: Literal["max", "mse", "output"] = Field(
        "mse",
        description="How a scale is chosen. max: without clipping. mse: with the least squared error. output: with the "
        "least squared error, weighted by the calibration inputs.",
    )
    activations: Literal["none", "dynamic", "static"] = Field(
        "none",
        description="Quantize the inputs to 8 bits in blocks. dynamic: with scales of each token. static: with scales "
        "from calibration data.",
    )
    biases: bool = Field(False, description="Also store the biases of the selected matrices in 8-bit blocks.")
    table_entries: Literal[256, 1024] = Field(
        256, description="Entries of a lookup table, if `only` names @activation, @norm or @softmax."
    )
    table_lookup: Literal["linear", "nearest"] = Field(
        "linear", description="How a lookup table is read. linear: between two entries. nearest: the nearest entry."
    )
    embedding_bits: Literal[4, 8] = Field(8, description="Bits per weight of an embedding, if `only` names @embedding.")
    embedding_block: Side | None = Field(
        None, description="Columns of an embedding that share a scale. null: the whole row."
    )
    stock: bool = Field(
        False, description="Store blocks of one row as compressed-tensors groups, which stock transformers loads."
    )
    budget: PositiveInt | None = Field(
        None, description="Bytes that the selected matrices and lookup tables may use. Each matrix gets 4 or 8 bits."
    )
    budget_bits: float | None = Field(
        None, gt=4, le=16, description="The same budget as bits per weight of the selected matrices, scales included."
    )

    @model_validator(mode="after")
    def _bits_or_budget(self) -> BCT:
        if self.budget is not None and self.budget_bits is not None:
            raise PydanticCustomError("two-budgets", "budget and budget_bits both set the budget: give one of them")
        if self.decides and (self.bits, self.embedding_bits) != (8, 8):
            raise PydanticCustomError("bits-and-budget", "a budget chooses the bits: leave out bits and embedding_bits")
        return self

    @model_validator(mode="after")
    def _has_a_stock_format(self) -> BCT:
        """Check the settings of `stock`. The width of a block and the role of a weight are checked weight by weight."""
        needs = {
            "block_shape": ("block_shape of one row, [1, B]", self.block_shape[0] == 1),
            "scale": ("scale: shift", self.scale == "shift"),
            "activations": ("activations: none", self.activations == "none"),
            "budget": ("no budget", not self.decides),
        }
        lacking = {name: need for name, (need, is_met) in needs.items() if not is_met}
        if self.stock and lacking:
            raise PydanticCustomError(
                "no-stock-format", f"stock: true needs {' and '.join(lacking.values())}", {"lacking": list(lacking)}
            )
        return self

    @property
    def decides(self) -> bool:
        return self.budget is not None or self.budget_bits is not None

    @property
    def traits(self) -> Traits:
        ranges = self.activations == "static" or {"@activation", "@activation!"} & set(self.only)
        needs = self.decides or self.scale_search == "output" or ranges
        return Traits(reads="inputs" if needs else "weights", stores=self._format)

    @property
    def _format(self) -> str:
        if self.stock:
            return "packed_linear"
        return "block_linear" if self.activations == "none" else "block_activation_linear"

    def stored(self, weight: Weight) -> str | None:
        return FORMATS.get(weight.role, self._format)

    def format_params(self, weight: Weight) -> dict[str, Any]:
        if self.stock:
            return stock_params(weight, self.bits, self.block_shape[1])
        if weight.is_function:
            return self._function_params(weight, self._table(weight, None))
        return self._format_params(weight, self._bits(weight, None))

    def check(self, weights: Sequence[Weight]) -> list[tuple[str, dict[str, Any]]]:
        if not self.decides:
            return []
        weights = [weight for weight in weights if not weight.is_function]
        least = sum(stored_bytes(weight.shape, self._format_params(weight, 4)) for weight in weights)
        budget = self._budget_bytes(sum(math.prod(weight.shape) for weight in weights))
        if least > budget:
            message = f"the budget is {budget:,} bytes, and all {len(weights)} matrices at 4 bits are {least:,} bytes"
            values = {"budget": budget, "least": least, "matrices": len(weights), "bits": 4}
            return [(message, {"reason": "budget-too-small", **values})]
        return []

    def work(self, weights: Sequence[Weight], data: DataSize, run: Work) -> Work:
        inputs = weights[0].in_features
        found = Work()
        if data.tokens and weights[0].role != "embedding":
            found += Work(values=float(PASSES_OVER_INPUTS * data.tokens * inputs))
        if self.decides and weights[0].role != "embedding":
            found += Work(products=data.tokens * float(inputs) ** 2, values=2.0 * inputs**2)
        for weight in weights:
            values = float(weight.out_features * inputs)
            found += Work(values=values * (PASSES_OVER_VALUES + PASSES_OVER_TRIED * self._scales_tried))
            if self.decides:
                rows = weight.out_features if weight.role == "embedding" else min(SAMPLED_ROWS, weight.out_features)
                errors = 0.0 if weight.role == "embedding" else 3 * 2.0 * rows * inputs**2
                tried = 2 * PASSES_OVER_TRIED * self._scales_tried + PASSES_OVER_VALUES
                found += Work(exact=errors, values=float(rows * inputs * tried))
        return found

    @property
    def _scales_tried(self) -> int:
        if self.scale_search == "max":
            return 1
        return SHIFTS_TRIED if self.scale == "shift" else SCALES_TRIED

    def memory(self, weights: Sequence[Weight], data: DataSize) -> int:
        """Copies of a weight, the rows that are searched at once, and for a budget the second moments twice."""
        inputs, largest = weights[0].in_features, max(weight.out_features for weight in weights)
        moments = 8 * inputs**2 if self.decides and weights[0].role != "embedding" else 0
        return moments + 20 * largest * inputs + 10 * 4 * SLAB_ELEMENTS

    def folded(self, weights: Sequence[Weight], data: DataSize) -> int:
        """The second moments for a budget, and three values of each input."""
        inputs = weights[0].in_features
        return (4 * inputs**2 if self.decides else 0) + 12 * inputs

    def _budget_bytes(self, weights: int) -> int:
        return self.budget if self.budget is not None else int((self.budget_bits or 0) * weights / 8)

    def decide(self, model: WholeModel) -> BitsDecision:
        """Choose the bits of every matrix within the budget."""
        errors: dict[str, list[float]] = {}
        costs: dict[str, list[int]] = {}
        count = 0
        for view in model.views():
            for stage in view.stages(sequential=False):
                for group, seen in zip(stage, self._fold(view, stage, with_gram=True), strict=True):
                    hessian = None if seen is None or seen.gram is None else seen.gram.hessian()
                    for weight in group:
                        view.progress(weight.name)
                        matrix = view.matrix(weight)
                        if weight.role != "embedding":  # of which few rows occur in the data
                            matrix = some_blocks(matrix, self._block(weight)[0])
                        rounded = [self._quantize(weight, matrix, bits, seen)[2] for bits in (4, 8)]
                        errors[weight.name] = output_errors(matrix, rounded, seen, hessian)
                        count += math.prod(weight.shape)
                        costs[weight.name] = [
                            stored_bytes(weight.shape, self._format_params(weight, bits)) for bits in (4, 8)
                        ]
        budget = self._budget_bytes(count)
        bits = choose_bits(errors, costs, budget)
        chosen = sum(costs[name][bits[name] == 8] for name in bits)
        return {"bits": bits, "bytes": chosen, "budget_bytes": budget, "output_errors": errors}

    def block(self, view: BlockView) -> None:
        from compressor.layers import find_layer

        for stage in view.stages():
            for group, seen in zip(stage, self._fold(view, stage, with_gram=False), strict=True):
                for weight in group:
                    matrix, bits = view.matrix(weight), self._bits(weight, view.decision)
                    codes, scale, rounded = self._quantize(weight, matrix, bits, seen)
                    record = {"weight_error": relative_error(matrix, rounded), "bits": bits}
                    if self.stock:
                        view.put(weight, stock_layer(codes, scale, self.format_params(weight), view.dtype), **record)
                        continue
                    format_params = self._format_params(weight, bits)
                    more: dict[str, Any] = {
                        key: format_params[key] for key in ("activations", "biased") if key in format_params
                    }
                    if "biased" in more:
                        more |= self._bias_blocks(weight, view)
                    if more.get("activations") == "static":
                        more["input_exponent"] = self._input_exponent(weight, seen)
                    layer: Any = find_layer(str(self.stored(weight)))
                    stored = layer.pack(codes, scale, bits=bits, block=tuple(format_params["block"]), **more)
                    view.put(weight, stored, **record)
        self._put_tables(view)

    def _bias_blocks(self, weight: Weight, view: BlockView) -> dict[str, torch.Tensor]:
        from compressor.layers.block_linear import BIAS_BLOCK

        bias = view.bias(weight)
        assert bias is not None  # `biased` is set only for weights that have one
        codes, exponents, _ = quantize_blocks(bias[None], 8, (1, BIAS_BLOCK), search=self.scale_search != "max")
        return {"bias_packed": codes[0], "bias_exponent": exponents[0]}

    def _put_tables(self, view: BlockView) -> None:
        """Replace the selected functions by lookup tables. Their ranges are found with the stored weights."""
        from compressor.layers import find_layer

        functions = view.functions()
        stage = tuple(Group((function,)) for function in functions if function.role == "activation")
        ranges: Iterable[Range] = view.fold(stage, lambda group: Range(), Range.add) if stage else ()
        seen = {group.name: found for group, found in zip(stage, ranges, strict=True)}
        for function in functions:
            table = self._table(function, seen.get(function.name))
            tensors = {"table": table.values.to(view.device)}
            if function.shape:
                tensors["weight"] = view.gain(function)
            layer = find_layer(str(self.stored(function))).from_tensors(self._function_params(function, table), tensors)
            view.put(function, layer, **self._bound(function, table))

    def _table(self, function: Weight, seen: Range | None) -> Table:
        if function.role == "softmax":
            return exp_table(EXP_LOW, self.table_entries)
        if function.role == "norm":
            return root_table(self.table_entries)
        name = function.facts["function"]
        if seen is None or not seen.tokens:  # no calibration yet, or no token was routed here
            return activation_table(name, -KNOWN[name].reach, KNOWN[name].reach, self.table_entries)
        return activation_table(name, seen.smallest, seen.largest, self.table_entries)

    def _function_params(self, function: Weight, table: Table) -> dict[str, Any]:
        found: dict[str, Any] = {"step": table.step, "lookup": self.table_lookup, "entries": self.table_entries}
        if function.role == "activation":
            return {**found, **function.facts, "low": table.low, "slopes": KNOWN[function.facts["function"]].slopes}
        if function.role == "norm":
            return {**found, **function.facts}
        rounds = self.activations != "none"
        return {**found, "bits": 8 if rounds else None, "block": self.block_shape[1] if rounds else None}

    def _bound(self, function: Weight, table: Table) -> dict[str, Any]:
        """Bound of the table's error, for the report; for a norm relative to its output."""
        linear = self.table_lookup == "linear"
        if function.role == "activation":
            known = KNOWN[function.facts["function"]]
            steepness, curvature = known.steepness, known.curvature
        else:
            steepness, curvature = (1.0, 1.0) if function.role == "softmax" else (0.5, 0.75)
        return {"table_range": [table.low, table.high], "table_bound": table.bound(steepness, curvature, linear)}

    def _bits(self, weight: Weight, decision: Decision | None) -> int:
        if decision is not None:
            return int(cast(BitsDecision, decision)["bits"][weight.name])
        return self.embedding_bits if weight.role == "embedding" else self.bits

    def _block(self, weight: Weight) -> tuple[int, int]:
        return (1, self.embedding_block or weight.in_features) if weight.role == "embedding" else self.block_shape

    def _format_params(self, weight: Weight, bits: int) -> dict[str, Any]:
        format_params: dict[str, Any] = {"bits": bits, "block": list(self._block(weight)), "scale": self.scale}
        if bits == 4 and weight.in_features % 2:
            format_params["odd"] = True
        if self.biases and weight.bias is not None:
            format_params["biased"] = True
        if weight.role != "embedding" and self.activations != "none":
            format_params["activations"] = self.activations
        return format_params

    def _quantize(
        self, weight: Weight, matrix: torch.Tensor, bits: int, seen: Seen | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        importance = None
        if self.scale_search == "output" and weight.role != "embedding" and seen is not None and seen.tokens:
            importance = seen.square / seen.tokens
        return quantize_blocks(matrix, bits, self._block(weight), self.scale, self.scale_search != "max", importance)

    def _fold(self, view: BlockView, stage: Stage, with_gram: bool) -> Iterable[Seen | None]:
        """Statistics of each group's inputs on calibration data; None if no setting needs them."""
        if self.traits.reads == "weights" or (stage[0].weights[0].role == "embedding" and not with_gram):
            return [None] * len(stage)

        def start(group: Group) -> Seen:
            weight = group.weights[0]
            if weight.role == "embedding":
                return Seen.of_rows(weight.out_features, view.device)
            return Seen.of_inputs(group.in_features, self._block(weight)[1], with_gram, view.device)

        return view.fold(stage, start, Seen.add)

    def _input_exponent(self, weight: Weight, seen: Seen | None) -> torch.Tensor:
        from compressor.kernels.ops.blocks import shift_exponent

        if seen is None or not seen.tokens:
            raise PassError(
                "no calibration token reached it, so its input range is unknown",
                where=weight.name,
                hint="Set a larger data.samples, or activations: dynamic.",
            )
        return shift_exponent(seen.largest, 127).to(torch.int8)


@dataclass
class Range:
    """The smallest and largest finite input of a function on calibration data."""

    smallest: float = float("inf")
    largest: float = float("-inf")
    tokens: int = 0

    def add(self, x: torch.Tensor) -> Range:
        """Add x (tokens, width)."""
        finite = x[torch.isfinite(x)]
        if len(finite):
            self.smallest = min(self.smallest, float(finite.min()))
            self.largest = max(self.largest, float(finite.max()))
            self.tokens += len(x)
        return self


@dataclass
class Seen:
    """Statistics of a group's inputs on calibration data.

    square   (in,) sum of squares; for an embedding, (rows,) how often each row was looked up
    largest  (blocks,) largest magnitude in each block of inputs
    gram     second moments, if they are needed
    """

    square: torch.Tensor
    largest: torch.Tensor
    block: int
    gram: Gram | None = None
    tokens: int = 0

    @classmethod
    def of_inputs(cls, features: int, block: int, with_gram: bool, device: torch.device) -> Seen:
        gram = Gram.zeros(features, torch.float32, device) if with_gram else None
        largest = torch.zeros(-(-features // block), device=device)
        return cls(torch.zeros(features, device=device), largest, block, gram)

    @classmethod
    def of_rows(cls, rows: int, device: torch.device) -> Seen:
        return cls(torch.zeros(rows, device=device), torch.zeros(0, device=device), 0)

    def add(self, x: torch.Tensor) -> Seen:
        """Add x (tokens, in), or token ids (tokens,)."""
        self.tokens += len(x)
        if x.dim() == 1:
            self.square += torch.bincount(x, minlength=len(self.square))
            return self
        x = x.to(torch.float32)
        self.square += x.square().sum(0)
        padded = torch.nn.functional.pad(x.abs().amax(0), (0, len(self.largest) * self.block - x.shape[1]))
        self.largest = torch.maximum(self.largest, padded.view(-1, self.block).amax(1))
        if self.gram is not None:
            self.gram.add(x)
        return self


def stock_params(weight: Weight, bits: int, width: int) -> dict[str, Any]:
    """Blocks [1, width] as groups of packed_linear. raises ShapeError for a weight that can't have such groups"""
    if weight.role == "embedding" or weight.is_function:
        does = "is a function" if weight.is_function else "is an embedding"
        raise ShapeError(
            f"{does}, which no stock loader can replace",
            where=weight.name,
            hint="Set stock: false, or leave it out with `except`.",
            data={"reason": "no-stock-table", "role": weight.role},
        )
    if width < weight.in_features and weight.in_features % width:
        raise ShapeError(
            f"blocks of {width} do not divide its {weight.in_features} inputs, and stock groups have one size",
            where=weight.name,
            hint="Set stock: false, or a narrower block_shape such as [1, 32], or leave this weight out with `except`.",
            data={"reason": "blocks-do-not-divide", "width": width, "in_features": weight.in_features},
        )
    return {"bits": bits, "group_size": width if width <= weight.in_features else -1, "symmetric": True}


def stock_layer(
    codes: torch.Tensor, exponent: torch.Tensor, format_params: dict[str, Any], dtype: torch.dtype
) -> Layer:
    """Codes (out, in) with exponents (out, groups) as packed_linear, whose scales have the model's dtype.

    Values of a float16 model are multiples of 2^-24, its least number. A block with a smaller scale gets 2^-24, and
    codes that represent the same values.
    """
    from compressor.kernels.ops.blocks import power_of_two
    from compressor.layers.packed_linear import PackedLinear

    if dtype == torch.float16:
        raised = exponent.clamp(min=FLOAT16_LEAST_SHIFT)
        down = power_of_two(exponent.int() - raised.int(), torch.float32).repeat_interleave(
            codes.shape[1] // exponent.shape[1], 1
        )
        codes, exponent = torch.round(codes * down).to(torch.int8), raised
    return PackedLinear.pack(codes, power_of_two(exponent, torch.float32).to(dtype), None, **format_params)


def stored_bytes(shape: tuple[int, ...], format_params: dict[str, Any]) -> int:
    """Bytes of the tensors of a weight (out, in), without its bias and without the scales of static activations."""
    (rows, columns), (height, width) = shape, format_params["block"]
    a_scale = 1 if format_params["scale"] == "shift" else 2
    return rows * -(-columns * format_params["bits"] // 8) + a_scale * -(-rows // height) * -(-columns // width)


def relative_error(matrix: torch.Tensor, rounded: torch.Tensor) -> float:
    return float((rounded - matrix).norm() / matrix.norm().clamp(min=1e-30))


def some_blocks(matrix: torch.Tensor, height: int) -> torch.Tensor:
    """About SAMPLED_ROWS rows of a matrix (out, in) in evenly spaced blocks of this height, or all of them."""
    count = SAMPLED_ROWS // height
    starts = torch.arange(0, len(matrix), height)
    if len(starts) <= max(1, count):
        return matrix
    chosen = starts[torch.linspace(0, len(starts) - 1, max(1, count)).long()]
    return torch.cat([matrix[start : start + height] for start in chosen.tolist()])


def output_errors(
    matrix: torch.Tensor, rounded: Sequence[torch.Tensor], seen: Seen | None, hessian: torch.Tensor | None
) -> list[float]:
    """|(W - W')X|^2 / |WX|^2 of each W' on calibration data; for an embedding, over the rows that were looked up.

    A row counts as often as it was looked up. Without calibration data, all inputs and all rows count the same.
    """
    if seen is None or not seen.tokens:
        return [relative_error(matrix, one) ** 2 for one in rounded]
    changes = [*(one - matrix for one in rounded), matrix]
    if hessian is None:
        parts = [float((change.square().sum(1) * seen.square).sum()) for change in changes]
    else:
        parts = [float((change @ hessian * change).sum()) for change in changes]
    return [part / max(parts[-1], 1e-30) for part in parts[:-1]]


def choose_bits(errors: dict[str, list[float]], costs: dict[str, list[int]], budget: int) -> dict[str, int]:
    """8 bits for the matrices whose error falls most per byte, as long as the budget allows it; 4 for the others.

    errors, costs  name -> [at 4 bits, at 8 bits]
    """
    bits = dict.fromkeys(errors, 4)
    left = budget - sum(cost[0] for cost in costs.values())
    gain = {name: (error[0] - error[1]) / (costs[name][1] - costs[name][0]) for name, error in errors.items()}
    for name in sorted(gain, key=lambda name: (-gain[name], name)):
        more = costs[name][1] - costs[name][0]
        if gain[name] > 0 and more <= left:
            bits[name] = 8
            left -= more
    return bits
