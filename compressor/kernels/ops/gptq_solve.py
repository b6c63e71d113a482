"""Runs the inner loop of GPTQ with compiled code, or with torch (`compressor.kernels.ops.gptq_columns`).

Both do the same operations on every element in the same order, each rounded to float32, so their codes are equal bit
for bit (for CUDA devices see `compressor.kernels.cuda.gptq_solve`). Importing this module registers
torch.ops.compressor.gptq_solve_, which works without the compiled library: float64, other devices, and installations
without the library or the CUDA kernels use torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.kernels.cpu import Library, required_library
from compressor.kernels.cuda import gptq_solve as on_cuda
from compressor.kernels.ops.checks import check_call, check_cuda_call, refuse
from compressor.kernels.ops.gptq_columns import Columns, round_columns
from compressor.kernels.ops.registry import register, register_cuda
from compressor.kernels.prepared.selftest import tried_library

NAME = "gptq_solve_"


def gptq_solve_(
    work: Tensor,
    errors: Tensor,
    codes: Tensor,
    upper: Tensor,
    group_of: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    begin: int,
    stop: int,
    low: int,
    high: int,
) -> None:
    """Round columns begin to stop - 1 and spread their errors over all later columns, in place.

    Column j: code = clamp(round(work[j] / scale) + zero_point), half to even; error = (work[j] - (code - zero_point) ·
    scale) / upper[j, j]; work[i] -= upper[j, i] · error for i > j. Rounded columns of `work` are then
    undefined. Frantar et al. 2022, arXiv 2210.17323, algorithm 1. Arguments: as in `Columns`, float32 or float64.

    raises  ShapeError for other shapes or dtypes, KernelError for an error of a CUDA device
    """
    part = Columns(work, errors, codes, upper, group_of, scale, zero_point, low, high)
    if solves(work):
        round_compiled(part, begin, stop)
    else:
        check_columns(part, begin, stop)
        round_columns(part, begin, stop)


def solves(work: Tensor) -> bool:
    """Whether the compiled library, or a CUDA kernel on its device, can process this matrix.

    raises  KernelError if they fail their self-test
    """
    if on_cuda.takes(work):
        return on_cuda.solves(work)
    return work.dtype == torch.float32 and work.device.type == "cpu" and isinstance(tried_library(), Library)


def check_columns(part: Columns, begin: int, stop: int) -> None:
    """raises ShapeError if a part doesn't fit `Columns`. Group numbers on a CUDA device are not read."""
    work, tensors = part.work, part.tensors()
    count, out = work.shape if work.dim() == 2 else (-1, -1)
    groups = len(part.scale) if part.scale.dim() == 2 else -1
    shapes = {"upper": (count, count), "group_of": (count,), "scale": (groups, out), "zero_point": (groups, out)}
    fits, are_there = work.dtype in (torch.float32, torch.float64), 0 <= begin <= stop <= count
    for name, tensor in tensors.items():
        if tensor is not None:
            fits &= tuple(tensor.shape) == shapes.get(name, (count, out))
            fits &= tensor.dtype == (torch.int64 if name == "group_of" else work.dtype)
    if not (fits and are_there) or not all(tensor.is_contiguous() for tensor in (work, part.errors, part.codes)):
        expected = (
            "work, errors and codes (n, out), contiguous, upper (n, n), scale and zero_point (groups, out), all of "
            f"float32 or all of float64, group_of (n,) int64, and 0 <= begin <= stop <= n (here {begin} and {stop})"
        )
        refusal = refuse(NAME, expected, "columns" if fits and not are_there else "operands", **tensors)
        refusal.data.update(begin=begin, stop=stop)
        raise refusal
    of = part.group_of[begin:stop]
    if of.is_cpu and ((of < 0) | (of >= groups)).any():
        refusal = refuse(NAME, f"groups of 0 to {groups - 1}, not {of.tolist()}", "groups", **tensors)
        refusal.data.update(groups=groups, found=of.tolist())
        raise refusal


def round_compiled(part: Columns, begin: int, stop: int, level: int | None = None, threads: int | None = None) -> None:
    """The same with the library, or with the kernel of a CUDA device.

    level    instruction level of the library; None: the one in use
    threads  of the library; None: torch's number
    raises   ShapeError; KernelError if the library is missing or a tensor is on another device
    """
    check_columns(part, begin, stop)
    if part.work.dtype != torch.float32:
        raise refuse(NAME, "float32 in compiled code", "float32-only", **part.tensors())
    if on_cuda.takes(part.work):
        check_cuda_call(NAME, **part.tensors())
        on_cuda.round_columns(part, begin, stop)
        return
    check_call(NAME, **part.tensors())
    found = required_library()
    upper, group_of, scale = part.upper.contiguous(), part.group_of.contiguous(), part.scale.contiguous()
    zero = None if part.zero_point is None else part.zero_point.contiguous()
    result = found.functions.gptq_solve(
        found.level if level is None else level,
        torch.get_num_threads() if threads is None else threads,
        part.work.data_ptr(),
        part.errors.data_ptr(),
        part.codes.data_ptr(),
        upper.data_ptr(),
        scale.data_ptr(),
        0 if zero is None else zero.data_ptr(),
        group_of.data_ptr(),
        part.work.shape[1],
        len(scale),
        begin,
        stop,
        len(part.work),
        float(part.low),
        float(part.high),
    )
    if result:
        raise refuse(NAME, f"fewer columns, or a level that is there (code {result})", **part.tensors())


def _fake(
    work: Tensor, errors: Tensor, codes: Tensor, upper: Tensor, group_of: Tensor, scale: Tensor,
    zero_point: Tensor | None, begin: int, stop: int, low: int, high: int,
) -> None:  # fmt: skip
    return None


register(
    NAME,
    "(Tensor(a!) work, Tensor(b!) errors, Tensor(c!) codes, Tensor upper, Tensor group_of, Tensor scale, "
    "Tensor? zero_point, int begin, int stop, int low, int high) -> ()",
    gptq_solve_,
    _fake,
)
register_cuda(NAME, gptq_solve_)
