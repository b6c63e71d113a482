"""Stores a weight as 4- or 8-bit codes with one scale per block of rows and columns (BCT).

Tensors (docs/format.md), for a weight (out, in) in blocks of R x C:
    weight_packed    uint8 (out, ceil(in * bits / 8)), signed codes; at 4 bits two per byte, the low half first
    weight_exponent  int8 (ceil(out / R), ceil(in / C)): the scale is 2**exponent        (scale: shift)
    weight_scale     float16 of the same shape                                          (scale: float16)

    bias_packed      int8 (out,), codes of the bias in blocks of BIAS_BLOCK              (biased: true)
    bias_exponent    int8 (ceil(out / BIAS_BLOCK),): their scales                       (biased: true)

    bytes = out * ceil(in * bits / 8) + s * ceil(out / R) * ceil(in / C),  s = 1 for shifts, 2 for float16,
            and with `biased` out + ceil(out / BIAS_BLOCK)

Without `biased`, a bias stays in the dtype of the model. With 4 bits and an odd `in`, the last half byte of each row is
zero, and the parameters have `odd`, since the number of bytes does not show it.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressor.kernels.ops.blocks import block_counts, expand_blocks, pack_rows, power_of_two, unpack_rows
from compressor.layers.base import Layer

BIAS_BLOCK = 64


class BlockLinear(Layer):
    """Replaces nn.Linear. Multiplies by the dequantized weight."""

    format_name = "block_linear"
    helpers: ClassVar[tuple[str, ...]] = ("compressor.kernels.ops.blocks",)
    weight_packed: Tensor
    weight_exponent: Tensor
    weight_scale: Tensor
    bias_packed: Tensor
    bias_exponent: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        block: tuple[int, int],
        scale: str,
        dtype: torch.dtype,
        bias: bool = False,
        odd: bool = False,
        biased: bool = False,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.dtype = in_features, out_features, dtype
        self.bits, self.block, self.scale = bits, (block[0], block[1]), scale
        shape = (out_features, in_features)
        self.register_buffer("weight_packed", torch.zeros(out_features, -(-in_features * bits // 8), dtype=torch.uint8))
        kind = torch.int8 if scale == "shift" else torch.float16
        self.register_buffer(self.scale_name, torch.zeros(block_counts(shape, self.block), dtype=kind))
        self.biased = biased
        if biased:
            self.register_buffer("bias_packed", torch.zeros(out_features, dtype=torch.int8))
            self.register_buffer("bias_exponent", torch.zeros(-(-out_features // BIAS_BLOCK), dtype=torch.int8))
        dense = bias and not biased
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype), requires_grad=False) if dense else None

    @property
    def scale_name(self) -> str:
        return "weight_exponent" if self.scale == "shift" else "weight_scale"

    @classmethod
    def empty(cls, shape: tuple[int, ...], format_params: dict[str, Any], dtype: torch.dtype, bias: bool) -> Self:
        return cls(shape[1], shape[0], **format_params, dtype=dtype, bias=bias)

    @classmethod
    def holds_bias(cls, format_params: dict[str, Any]) -> bool:
        return bool(format_params.get("biased"))

    def vector(self, dtype: torch.dtype) -> Tensor:
        scale = power_of_two(self.bias_exponent, torch.float32).repeat_interleave(BIAS_BLOCK)
        return (self.bias_packed * scale[: self.out_features]).to(dtype)

    def shift(self, dtype: torch.dtype) -> Tensor | None:
        """The bias."""
        return self.vector(dtype) if self.biased else self.bias

    def codes(self) -> Tensor:
        """Signed codes (out, in) int8."""
        return unpack_rows(self.weight_packed, self.bits, self.in_features)

    def scales(self) -> Tensor:
        """The scale of each block, float32."""
        if self.scale == "shift":
            return power_of_two(self.weight_exponent, torch.float32)
        return self.weight_scale.to(torch.float32)

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """The dequantized weight (out, in)."""
        shape = (self.out_features, self.in_features)
        return (self.codes() * expand_blocks(self.scales(), self.block, shape)).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix(x.dtype), self.shift(x.dtype))

    @classmethod
    def pack(cls, codes: Tensor, scale: Tensor, *, bits: int, block: tuple[int, int], **more: Any) -> Self:
        """Store signed codes.

        codes   (out, in) int8 in -q .. q
        scale   one per block: exponents int8, or scales float16
        more    further parameters of the format, by the names of its spec or its tensors
        raises  ShapeError if the shapes don't fit each other
        """
        format_name = "shift" if scale.dtype == torch.int8 else "float16"
        name = "weight_exponent" if format_name == "shift" else "weight_scale"
        extra = {key: value for key, value in more.items() if isinstance(value, Tensor)}
        format_params = {
            "bits": bits,
            "block": block,
            "scale": format_name,
            **{k: v for k, v in more.items() if k not in extra},
        }
        if bits == 4 and codes.shape[1] % 2:
            format_params["odd"] = True
        shape = (codes.shape[0], codes.shape[1])
        return cls._filled(shape, format_params, {"weight_packed": pack_rows(codes, bits), name: scale, **extra})

    def format_params(self) -> dict[str, Any]:
        format_params = {"bits": self.bits, "block": list(self.block), "scale": self.scale}
        if self.biased:
            format_params["biased"] = True
        return {**format_params, "odd": True} if self.bits == 4 and self.in_features % 2 else format_params

    def tensors(self) -> dict[str, Tensor]:
        names = ("weight_packed", self.scale_name, *(("bias_packed", "bias_exponent") if self.biased else ()))
        return {name: getattr(self, name) for name in names}

    @classmethod
    def from_tensors(
        cls, format_params: dict[str, Any], tensors: dict[str, Tensor], bias: Tensor | None = None
    ) -> Self:
        packed = tensors["weight_packed"]
        columns = packed.shape[1] * 8 // format_params["bits"] - int(format_params.get("odd", False))
        layer = cls._filled((packed.shape[0], columns), format_params, tensors)
        layer.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        return layer

    @classmethod
    def _filled(cls, shape: tuple[int, int], format_params: dict[str, Any], tensors: dict[str, Tensor]) -> Self:
        with torch.device("meta"):
            layer = cls.empty(shape, format_params, torch.float32, False)
        layer.fill(tensors)
        return layer
