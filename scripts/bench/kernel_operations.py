"""Compares further operations with torch: dense weights for few rows, Hadamard, dense x sparse, lookup tables.

Our operations and torch's are called in turn, each round in another order, and medians are compared. Each result is
first compared with ours. A copy, a dense weight in place of the factors, and silu are there only to compare times.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle

import torch
import torch.nn.functional as F
from torch import Tensor

from compressor.kernels.ops.dense_product import linear_dense
from compressor.kernels.ops.dense_sparse import linear_dense_sparse
from compressor.kernels.ops.hadamard import hadamard
from compressor.kernels.ops.hadamard_matrix import base_matrix, base_of, sylvester
from compressor.kernels.ops.sparse_factors import sparse_product
from compressor.kernels.ops.table_functions import look_up
from compressor.kernels.ops.table_lookup import table_lookup

LEAST = 5  # calls of each
NEAR = {torch.float32: 1e-4, torch.bfloat16: 0.01}  # of the largest: float32 sums in other orders, or 8 bits


@dataclass
class Operation:
    """seconds: median of ours; ratios: the time of each other way over it"""

    name: str
    seconds: float
    calls: int
    ratios: dict[str, float]


def butterflies(x: Tensor, scale: float) -> Tensor:
    """x (rows, n) times Sylvester's matrix, in log2 n passes of torch."""
    n, y, apart = x.shape[1], x, 1
    while apart < n:
        pairs = y.view(-1, n // (2 * apart), 2, apart)
        y = torch.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], 2)
        apart *= 2
    return y.view(x.shape) * scale


def compare(
    name: str, ours: Callable[[], Tensor], others: dict[str, Callable[[], Tensor]], unlike: set[str], seconds: float
) -> Operation:
    """unlike: the other operations that have different results of the same shape

    raises  ArithmeticError if the result of another operation differs
    """
    answer = ours()
    for other, call in others.items():
        far = float((call() - answer).abs().max() / answer.abs().max())
        if other not in unlike and not far < NEAR[answer.dtype]:
            raise ArithmeticError(f"{name}: {other} is {far:.1e} of the largest away")
    calls = [ours, *others.values()]
    times: list[list[float]] = [[] for _ in calls]
    order, shuffle, end = list(range(len(calls))), random.Random(0).shuffle, time.perf_counter() + seconds
    while len(times[0]) < LEAST or time.perf_counter() < end:
        shuffle(order)
        for place in order:
            start = time.perf_counter()
            calls[place]()
            times[place].append(time.perf_counter() - start)
    medians = [statistics.median(spent[1:]) for spent in times]
    ratios = {other: median / medians[0] for other, median in zip(others, medians[1:], strict=True)}
    return Operation(name, medians[0], len(times[0]), ratios)


def dense_products(seconds: float, quick: bool) -> list[Operation]:
    """An output head of 8192 x 768, whose copies are used in turn, so that it is read from memory."""
    made = torch.Generator().manual_seed(0)
    out, columns, copies = (64, 48, 2) if quick else (8192, 768, 8)
    found = []
    for dtype, rows in ((torch.float32, 1), (torch.float32, 4), (torch.float32, 16), (torch.bfloat16, 4)):
        weights = [torch.randn(out, columns, generator=made).to(dtype) for _ in range(copies)]
        x, mine, theirs = torch.randn(rows, columns, generator=made).to(dtype), cycle(weights), cycle(weights)
        ours = lambda x=x, mine=mine: linear_dense(x, next(mine), None)  # noqa: E731
        ways = {"torch": lambda x=x, theirs=theirs: F.linear(x, next(theirs))}
        name = f"dense {str(dtype).removeprefix('torch.')} {rows}x{out}x{columns}"
        found.append(compare(name, ours, ways, set(), seconds))
    return found


def operations(seconds: float, quick: bool) -> list[Operation]:
    """All operations for this long each; tiny shapes if quick."""
    made = torch.Generator().manual_seed(0)
    found = dense_products(seconds, quick)
    for rows, n in ((1, 64), (16, 48)) if quick else ((1, 4096), (64, 4096), (64, 3584)):
        x, m = torch.randn(rows, n, generator=made), base_of(n) or 0
        whole = torch.kron(sylvester(n // m), base_matrix(m)).float() * n**-0.5
        ways = {"matrix product": lambda x=x, whole=whole: x @ whole, "copy": x.clone}
        if m == 1:
            ways["butterflies"] = lambda x=x, n=n: butterflies(x, n**-0.5)
        found.append(compare(f"hadamard {rows}x{n}", lambda x=x, n=n: hadamard(x, n**-0.5), ways, {"copy"}, seconds))
    blocks, atoms, width, out, k = (2, 12, 16, 64, 4) if quick else (16, 128, 256, 4096, 45)
    dense = torch.randn(blocks, atoms, width, generator=made)
    value = torch.randn(out, blocks, k, generator=made)
    index = torch.rand(out, blocks, atoms, generator=made).argsort(2)[..., :k].sort(2).values
    short, weight = index.to(torch.uint16), torch.randn(out, blocks * width, generator=made)
    for rows in (1, 16) if quick else (1, 16, 64):
        x = torch.randn(rows, blocks * width, generator=made)
        ways = {
            "embedding bag": lambda x=x: sparse_product(x, dense, value, index),
            "dense float32": lambda x=x: x @ weight.t(),
        }
        ours = lambda x=x: linear_dense_sparse(x, dense, short, value, None)  # noqa: E731
        found.append(compare(f"dense x sparse {rows}x{out}x{blocks * width}", ours, ways, {"dense float32"}, seconds))
    table, step = torch.randn(256, generator=made), 2.0**-5
    x = torch.randn(4 if quick else 64, 11008, generator=made)
    for linear in (True, False):
        ways = {
            "look_up": lambda linear=linear: look_up(x, table, -4.0, step, linear),
            "silu": lambda: torch.nn.functional.silu(x),
        }
        ours = lambda linear=linear: table_lookup(x, table, -4.0, -4.0 + 255 * step, linear)  # noqa: E731
        name = f"table {'lines' if linear else 'nearest'} {len(x)}x11008"
        found.append(compare(name, ours, ways, {"silu"}, seconds))
    return found
