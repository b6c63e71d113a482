"""Times dense x sparse matmuls and GPTQ columns on a GPU, compared with torch: see check_gpu.py.

In torch, a matmul with sparse factors is that of the layer (an embedding bag, float32), and the dense matmul in float16
is a further comparison. GPTQ columns are `round_columns`, a dozen calls for each column. Both are launched from Python,
as a user does, so ours is timed from Python too, beside the time in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from compressor.kernels.cuda.interface import Kernels
from compressor.kernels.ops.gptq_columns import Columns, round_columns
from compressor.kernels.ops.sparse_factors import sparse_product
from cuda_ext.cases import arrays, dense_sparse, gptq_solve

Call = Callable[[], object]
# median seconds of one of the calls, in a CUDA graph or from Python
Timer = Callable[[list[Call], bool], float]

ROTATION_BYTES = 160_000_000
SUB_BLOCK = 32  # compressor.passes.gptq
SOLVER_ROWS = (1024, 4096, 11008)


@dataclass(frozen=True)
class Factors:
    """A weight (out, blocks * width) as atoms and k values a row and block."""

    out: int = 4096
    blocks: int = 16
    width: int = 256
    atoms: int = 160
    k: int = 16


ROWS = (1, 16, 64, 256, 4096)


def stream_of(device: str) -> int:
    return 0 if device == "cpu" else torch.cuda.current_stream().cuda_stream


@dataclass(frozen=True)
class Product:
    """Calls that do the same, and what ours writes: y (M, out) float16."""

    ours: list[Call]
    by_torch: list[Call]
    dense: list[Call]
    y: torch.Tensor


def product_calls(kernels: Kernels, m: int, factors: Factors, device: str, copies: int) -> Product:
    """Products of m random rows with copies of a random weight, one call for each copy."""
    f = factors
    index = torch.rand(f.out, f.blocks, f.atoms).argsort(2)[..., : f.k].sort(2).values
    values = torch.randn(f.out, f.blocks, f.k).half()
    entries = dense_sparse.pack_ds1(index.numpy(), values.numpy().view(np.uint16)).view(np.int32)
    packed = [torch.from_numpy(entries.copy()).to(device) for _ in range(copies)]
    atoms = (torch.randn(f.blocks, f.atoms, f.width) / f.width).half().to(device)
    atom_copies = [atoms.clone() for _ in range(copies)]
    x = torch.randn(m, f.blocks * f.width).half().to(device)
    y = torch.empty(m, f.out, dtype=torch.float16, device=device)
    shape = (m, f.out, f.blocks, f.atoms, f.width, f.k)
    needed = dense_sparse.workspace_bytes(kernels, *shape)
    workspace = torch.empty(max(needed, 16), dtype=torch.uint8, device=device)
    launch = dense_sparse.launcher(kernels)

    def ours(copy: int) -> None:
        code = launch(
            *(x.data_ptr(), atom_copies[copy].data_ptr(), None, packed[copy].data_ptr(), None, None, y.data_ptr()),
            *(workspace.data_ptr(), needed, *shape, arrays.FLOAT16, stream_of(device)),
        )
        if code:
            raise RuntimeError(f"compressor_dense_sparse returned {code} for {shape}")

    wide = [atoms.float(), values.float().to(device), index.to(device)]
    dense = [torch.randn(f.out, f.blocks * f.width, device=device).half() for _ in range(2)]
    return Product(
        ours=[partial(ours, copy) for copy in range(copies)],
        by_torch=[lambda: sparse_product(x.float(), wide[0], wide[1], wide[2]).half()],
        dense=[partial(torch.nn.functional.linear, x, weight) for weight in dense],
        y=y,
    )


def time_products(kernels: Kernels, seconds_of: Timer, device: str = "cuda") -> list[dict[str, Any]]:
    """A row for each number of rows of x."""
    factors = Factors()
    entry_bytes = 4 * factors.out * factors.blocks * factors.k
    rows = []
    for m in ROWS:
        calls = product_calls(kernels, m, factors, device, copies=-(-ROTATION_BYTES // entry_bytes))
        rows.append(
            {
                "M": m,
                **vars(factors),
                "seconds": seconds_of(calls.ours, True),
                "call_seconds": seconds_of(calls.ours, False),
                "torch_call_seconds": seconds_of(calls.by_torch, False),
                "torch_dense_float16_seconds": seconds_of(calls.dense, True),
            }
        )
    return rows


def solver_columns(rows: int, device: str) -> Columns:
    """A random sub-block of a weight with `rows` rows, one group, 4 bits with zero points."""
    work = torch.randn(SUB_BLOCK, rows).to(device)
    upper = (torch.randn(SUB_BLOCK, SUB_BLOCK) * 0.1).triu(1) + torch.eye(SUB_BLOCK)
    scale = (torch.rand(1, rows) * 0.3 + 0.1).to(device)
    zero = torch.full_like(scale, 8.0)
    errors, codes = torch.empty_like(work), torch.empty_like(work)
    index = torch.zeros(SUB_BLOCK, dtype=torch.int64, device=device)
    return Columns(work, errors, codes, upper.to(device), index, scale, zero, 0, 15)


def solver_call(kernels: Kernels, part: Columns, device: str) -> Call:
    """One call that rounds all columns of the part."""
    if part.zero_point is None:
        raise ValueError("the columns to time have zero points")
    group_of = part.group_of.int()
    columns, rows = part.work.shape
    tensors = (part.work, part.errors, part.codes, part.upper, part.scale, part.zero_point, group_of)
    launch = gptq_solve.launcher(kernels)

    def call() -> None:
        addresses = (tensor.data_ptr() for tensor in tensors)
        sizes = (rows, len(part.scale), 0, columns, columns, float(part.low), float(part.high))
        code = launch(*addresses, *sizes, stream_of(device))
        if code:
            raise RuntimeError(f"compressor_gptq_solve returned {code} for {rows} rows of {columns} columns")

    return call


def time_solver(kernels: Kernels, seconds_of: Timer, device: str = "cuda") -> list[dict[str, Any]]:
    """A row for each number of rows of the weight; the torch way waits for the pivots, so no graph can hold it."""
    found = []
    for rows in SOLVER_ROWS:
        part = solver_columns(rows, device)
        call = solver_call(kernels, part, device)
        found.append(
            {
                "rows": rows,
                "columns": SUB_BLOCK,
                "seconds": seconds_of([call], True),
                "call_seconds": seconds_of([call], False),
                "torch_call_seconds": seconds_of([partial(round_columns, part, 0, SUB_BLOCK)], False),
            }
        )
    return found


def product_rates(seconds_of: Timer, device: str = "cuda", size: int = 8192) -> dict[str, float]:
    """Operations per second of torch's largest products: what the device can do, beside its copy."""
    a, b = (torch.randn(size, size).to(device, torch.bfloat16) for _ in range(2))
    c, d = (torch.randint(-127, 128, (size, size), dtype=torch.int8).to(device) for _ in range(2))
    products = {"torch bfloat16": lambda: a @ b.t(), "torch int8": lambda: torch._int_mm(c, d.t())}
    return {name: 2 * size**3 / seconds_of([call], True) for name, call in products.items()}
