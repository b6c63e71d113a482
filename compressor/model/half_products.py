"""Computes products of 16-bit floats in float32 on processors without an instruction for them.

torch multiplies bfloat16 and float16 there value by value. Measured on an AMD EPYC with AVX2 only (torch 2.13, 2
threads, 512 tokens, width 2048): `linear` takes 8 times as long as in float32, a product with an untransposed matrix
370 times, the convolution of patches 29 times. Here the operands are converted, multiplied in float32, and the result
is rounded once to the dtype of the operands. This is what a processor with such instructions computes, except for the
order of the sums.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from itertools import repeat
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

FEW_ROWS = 4  # of inputs: below, converting the weight costs more than multiplying it
CONVERTED_VALUES = 1 << 24  # of a weight at a time

_CHECKS = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
_BATCHED = (torch.bmm, Tensor.bmm)
_PRODUCTS = {
    F.linear,
    *_BATCHED,
    *(torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm),
    *(torch.addmm, Tensor.addmm, torch.baddbmm, Tensor.baddbmm, torch.einsum),
    *(F.conv1d, F.conv2d, F.conv3d, F.scaled_dot_product_attention),
}


def is_slow(dtype: torch.dtype) -> bool:
    """Whether this processor has no instruction for products of this dtype. False for all but 16-bit floats."""
    return dtype in _CHECKS and not _has_instruction(dtype)


@cache
def _has_instruction(dtype: torch.dtype) -> bool:
    """True, too, for a build of torch that can't tell."""
    check = getattr(torch.ops.mkldnn, _CHECKS[dtype], None)
    return check is None or bool(check())


def quick_products(*dtypes: torch.dtype) -> AbstractContextManager[Any]:
    """A context in which products of CPU tensors of a dtype are computed in float32 if the processor is slow at them.

    Enter it before other modes of torch functions, so that they see the products of the model.

    dtypes  those of the model; none: bfloat16 and float16
    """
    slow = frozenset(filter(is_slow, dtypes or _CHECKS))
    return Float32Products(slow) if slow else nullcontext()


class Float32Products(TorchFunctionMode):
    """Computes products of CPU tensors of these 16-bit dtypes in float32. Gradients pass."""

    def __init__(self, dtypes: frozenset[torch.dtype]) -> None:
        super().__init__()
        self.dtypes = dtypes

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        dtype = self._dtype_of((*args, *kwargs.values())) if func in _PRODUCTS and "out" not in kwargs else None
        if dtype is None:
            return func(*args, **kwargs)
        if func is F.linear:
            return _linear(*args, **kwargs)
        if func in _BATCHED:
            return _batched(*args, **kwargs)
        named = {name: _widened(value) for name, value in kwargs.items()}
        return func(*map(_widened, args), **named).to(dtype)

    def _dtype_of(self, operands: tuple[Any, ...]) -> torch.dtype | None:
        """The common dtype of all float operands on the CPU; None if it isn't a slow one."""
        floats = [value for value in operands if isinstance(value, Tensor) and value.is_floating_point()]
        dtypes = {value.dtype for value in floats}
        return dtypes.pop() if len(dtypes) == 1 and dtypes <= self.dtypes and all(x.is_cpu for x in floats) else None


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if weight.dim() != 2 or math.prod(input.shape[:-1]) < FEW_ROWS:
        return F.linear(input, weight, bias)
    x, rows = input.float(), _rows(weight)
    biases = repeat(None) if bias is None else bias.split(rows)
    pairs = zip(weight.split(rows), biases)
    found = [F.linear(x, matrix.float(), _widened(one)).to(input.dtype) for matrix, one in pairs]
    return found[0] if len(found) == 1 else torch.cat(found, dim=-1)


def _batched(input: Tensor, mat2: Tensor) -> Tensor:
    pairs = zip(input.split(_rows(mat2)), mat2.split(_rows(mat2)))
    found = [torch.bmm(first.float(), second.float()).to(input.dtype) for first, second in pairs]
    return found[0] if len(found) == 1 else torch.cat(found)


def _rows(weight: Tensor) -> int:
    """How much of the first dimension of a weight is converted at a time."""
    return max(1, CONVERTED_VALUES // max(1, math.prod(weight.shape[1:])))


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
