"""Columns of a GPTQ sub-block to round, good and bad ones."""

from __future__ import annotations

import dataclasses

import torch

from compressor.kernels.ops.gptq_columns import Columns
from compressor.methods.quantization.hessian import Gram

# name -> what is wrong about the parts, what the error holds besides
BAD = {
    "float64 alone": (dict(work=torch.zeros(8, 5).double()), {}),
    "bfloat16": (dict(work=torch.zeros(8, 5).bfloat16()), {}),
    "float64 among float32": (dict(upper=torch.zeros(8, 8).double()), {}),
    "U of another size": (dict(upper=torch.zeros(7, 7)), {}),
    "scales of fewer rows": (dict(scale=torch.ones(3, 4)), {}),
    "zero points of fewer groups": (dict(zero_point=torch.ones(2, 5)), {}),
    "errors of fewer columns": (dict(errors=torch.zeros(7, 5)), {}),
    "errors of more columns": (dict(errors=torch.zeros(9, 5)), {}),
    "strided codes": (dict(codes=torch.zeros(8, 10)[:, ::2]), {}),
    "one dimension": (dict(work=torch.zeros(8)), {}),
    "groups beyond the scales": (
        dict(group_of=torch.full((8,), 3)),
        {"reason": "groups", "groups": 3, "found": [3] * 8},
    ),
    "groups below 0": (dict(group_of=torch.full((8,), -1)), {"reason": "groups", "groups": 3, "found": [-1] * 8}),
    "groups of 32 bits": (dict(group_of=torch.zeros(8).int()), {}),
    "groups of fewer columns": (dict(group_of=torch.zeros(7).long()), {}),
}


def columns(seed: int, count: int, rows: int, symmetric: bool, groups: int = 3) -> Columns:
    g = torch.Generator().manual_seed(seed)
    upper = torch.triu(torch.randn(count, count, generator=g) * 0.3)
    upper.diagonal().copy_(torch.rand(count, generator=g) + 0.2)
    scale = torch.rand(groups, rows, generator=g) * 0.3 + 0.01
    zero = None if symmetric else torch.randint(-8, 8, (groups, rows), generator=g).float()
    work = torch.randn(count, rows, generator=g)
    work[:, ::5] = (torch.randint(-9, 9, work[:, ::5].shape, generator=g) + 0.5) * scale[0, ::5]  # ties
    group_of = torch.randint(0, groups, (count,), generator=g)
    empty = torch.full_like(work, torch.nan)
    return Columns(work, empty, empty.clone(), upper, group_of, scale, zero, -8, 7)


def copied(part: Columns) -> Columns:
    return dataclasses.replace(part, work=part.work.clone(), errors=part.errors.clone(), codes=part.codes.clone())


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def matrix(rows: int, inputs: int):
    g = torch.Generator().manual_seed(rows + inputs)
    x = torch.randn(2 * inputs, inputs, generator=g) @ torch.randn(inputs, inputs, generator=g) / inputs**0.5
    x *= torch.exp(0.8 * torch.randn(inputs, generator=g))
    return torch.randn(rows, inputs, generator=g), Gram.zeros(inputs, torch.float32, x.device).add(x).hessian()
