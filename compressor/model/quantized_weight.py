"""Records of the weights that a checkpoint stores quantized, the same for all formats."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from compressor.errors import Because, ModelError
from compressor.storage.safetensors_file import TensorInfo

Tensors = Mapping[str, TensorInfo]
Dequantize = Callable[[Mapping[str, Tensor], torch.dtype], Tensor]  # of values by name in the format


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight that is stored as several tensors.

    tensor      name that the dense tensor has in a checkpoint that isn't quantized
    members     name in the format, such as `weight_scale` -> the tensor in the checkpoint; the first has the codes
    shape       of the dense tensor
    bits        of a code
    layout      which codes share a scale, such as `128 x 128 blocks`
    dequantize  (values of the members by their names in the format, dtype) -> the dense tensor in this dtype
    """

    tensor: str
    members: dict[str, str]
    shape: tuple[int, ...]
    bits: int
    layout: str
    dequantize: Dequantize


Find = Callable[[Tensors, Mapping[str, Any]], list[QuantizedWeight]]  # of the tensors and `quantization_config`


@dataclass(frozen=True)
class Quantization:
    """How the weights of a checkpoint are quantized.

    method   name of the format
    bits     of the codes, ascending
    layouts  which codes share a scale
    weights  number of quantized weights
    unread   tensors that only quantized activations need, such as `input_scale`; the dequantized model has none
    members  dense tensor -> the tensors in the files from which it is made; the first has the codes
    """

    method: str
    bits: tuple[int, ...]
    layouts: tuple[str, ...]
    weights: int
    unread: tuple[str, ...] = ()
    members: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __str__(self) -> str:
        bits = " and ".join(map(str, self.bits))
        return f"{bits} bits ({', '.join((self.method, *self.layouts))})"

    @property
    def notice(self) -> Because:
        """The sentence of the warning in plan and report, and of `inspect`."""
        text = f"source has {self}; the baseline is the dequantized model"
        return Because(text, method=self.method, bits=list(self.bits), layouts=list(self.layouts))


def quantization_of(method: str, weights: Sequence[QuantizedWeight], unread: tuple[str, ...]) -> Quantization:
    """The record of the quantized weights of a checkpoint."""
    bits, layouts = sorted({weight.bits for weight in weights}), sorted({weight.layout for weight in weights})
    members = {weight.tensor: tuple(weight.members.values()) for weight in weights}
    return Quantization(method, tuple(bits), tuple(layouts), len(weights), unread, members)


def require(tensors: Tensors, module: str, names: Iterable[str]) -> None:
    """raises ModelError if a quantized module lacks one of these tensors"""
    if lacking := [name for name in names if f"{module}.{name}" not in tensors]:
        raise unsound(module, f"its weight is quantized, and {', '.join(lacking)} is missing")


def unsound(where: str, what: str) -> ModelError:
    """The error of quantized tensors that don't fit together."""
    return ModelError(
        what,
        where=where,
        hint="Download config.json and the weights again from one revision: hf download NAME.",
        data={"reason": "quantized-tensors"},
    )
