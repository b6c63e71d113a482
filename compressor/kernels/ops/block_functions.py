"""Computes what a block has between its matrix products, each in one pass over memory, with the compiled library.

    rms_norm       RMSNorm
    silu_product   the product of a gated MLP, silu(gate) * up
    rotate_halves  rotary position embeddings

Inputs are float32 or bfloat16. Numbers are computed as float32 and are rounded to the type of the inputs where
transformers' modules round. Results don't depend on instructions or threads. The functions have no gradient and are not
in torch.ops: a compiler that records a module is given the module's own operations (`prepared.fused_forward`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.kernels.ops.checks import check_call, refuse
from compressor.kernels.ops.linear import DTYPES, cpu_library, threads_for

TYPES = {dtype: DTYPES[dtype] for dtype in (torch.float32, torch.bfloat16)}


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float, rounds: bool) -> Tensor:
    """y = x * r * (offset + weight), r = 1 / sqrt(mean(x²) + eps), mean and product in float32.

    The sum of squares has 64 partial sums, so r is exact to (K / 64 + 10) 2^-24 of it.

    x        (..., K)
    weight   (K,) of x's dtype
    rounds   whether x * r is rounded to x's dtype before it is multiplied, as in Llama
    returns  (..., K) in x's dtype
    raises   ShapeError for other shapes or dtypes
    """
    check_call("rms_norm", x=x, weight=weight)
    kind = TYPES.get(x.dtype)
    if kind is None or weight.dtype != x.dtype or weight.dim() != 1 or not len(weight) or x.shape[-1:] != weight.shape:
        raise refuse("rms_norm", "float32 or bfloat16 (..., K) and (K,)", x=x, weight=weight)
    x, weight = x.contiguous(), weight.contiguous()
    y = torch.empty_like(x)
    found, columns, numbers = cpu_library(), len(weight), x.numel()
    error = found.functions.rms_norm(
        found.level, threads_for(4 * numbers), x.data_ptr(), kind, weight.data_ptr(), y.data_ptr(), numbers // columns,
        columns, eps, offset, rounds,
    )  # fmt: skip
    if error:
        raise refuse("rms_norm", f"shapes that fit (code {error})", x=x, weight=weight)
    return y


def silu_product(gate: Tensor, up: Tensor) -> Tensor:
    """y = silu(gate) * up, where silu(g) = g / (1 + exp(-g)) is rounded to the dtype before the product.

    silu is exact to 4 · 2^-24 of it before it is rounded.

    gate, up  (...) of one shape and dtype
    returns   (...) in their dtype
    raises    ShapeError for other shapes or dtypes
    """
    check_call("silu_product", gate=gate, up=up)
    kind = TYPES.get(gate.dtype)
    if kind is None or up.dtype != gate.dtype or up.shape != gate.shape:
        raise refuse("silu_product", "float32 or bfloat16 of one shape", gate=gate, up=up)
    gate, up = gate.contiguous(), up.contiguous()
    y = torch.empty_like(gate)
    found, numbers = cpu_library(), gate.numel()
    error = found.functions.silu_product(
        found.level, threads_for(4 * numbers), gate.data_ptr(), up.data_ptr(), kind, y.data_ptr(), numbers
    )
    if error:
        raise refuse("silu_product", f"shapes that fit (code {error})", gate=gate, up=up)
    return y


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """y = x * cos + concat(-second half of x, first half of x) * sin, and heads before tokens.

    Each product is rounded to the dtype before the sum: the bits of these operations in torch.

    x         (sequences, tokens, heads, width), width even
    cos, sin  (sequences or 1, tokens, width) of x's dtype
    returns   (sequences, heads, tokens, width) in x's dtype
    raises    ShapeError for other shapes or dtypes
    """
    check_call("rotate_halves", x=x, cos=cos, sin=sin)
    kind = TYPES.get(x.dtype)
    fits = (
        kind is not None
        and x.dim() == 4
        and cos.dtype == sin.dtype == x.dtype
        and cos.shape == sin.shape
        and cos.shape in ((1, x.shape[1], x.shape[3]), (x.shape[0], x.shape[1], x.shape[3]))
        and x.shape[3] % 2 == 0
    )
    if not fits:
        expected = "float32 or bfloat16 (sequences, tokens, heads, width), and twice (sequences or 1, tokens, width)"
        raise refuse("rotate_halves", expected, x=x, cos=cos, sin=sin)
    sequences, tokens, heads, width = x.shape
    x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
    y = x.new_empty(sequences, heads, tokens, width)
    found = cpu_library()
    error = found.functions.rotate_halves(
        found.level, threads_for(4 * x.numel()), x.data_ptr(), kind, cos.data_ptr(), sin.data_ptr(), y.data_ptr(),
        sequences, tokens, heads, width, 0 if len(cos) == 1 else tokens,
    )  # fmt: skip
    if error:
        raise refuse("rotate_halves", f"shapes that fit (code {error})", x=x, cos=cos, sin=sin)
    return y
