"""The inner loop of GPTQ: columns of a sub-block rounded one by one, in torch and by the compiled library.

Both do the same operations on every element in the same order, each rounded to float32, so their codes are equal bit
for bit. On a CUDA device a kernel does them (`compressor.kernels.cuda.gptq_solve`). float64, other devices and
installations without the library or the kernels use torch.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from compressor.errors import KernelError
from compressor.kernels.cpu import Library, library, required_library
from compressor.lazy import torch


@dataclass(frozen=True)
class Columns:
    """work      (n, out) the columns with all earlier updates; those not yet rounded are updated in place
    errors    (n, out) written: errors over pivots
    codes     (n, out) written: whole numbers
    upper     (n, n) their part of U
    group_of  the group of each column, an index into scale and zero
    scale     (groups, out); zero the same, None if symmetric
    low, high the codes' range
    """

    work: torch.Tensor
    errors: torch.Tensor
    codes: torch.Tensor
    upper: torch.Tensor
    group_of: list[int]
    scale: torch.Tensor
    zero: torch.Tensor | None
    low: int
    high: int


def _on_cuda() -> Any:
    return importlib.import_module("compressor.kernels.cuda.gptq_solve")  # not before torch is there


def solves(work: torch.Tensor) -> bool:
    """Whether the compiled library, or a CUDA kernel on its device, can take this matrix.

    raises KernelError if CUDA kernels are there and fail their self-test
    """
    if _on_cuda().takes(work):
        return bool(_on_cuda().solves(work))
    return work.dtype == torch.float32 and work.device.type == "cpu" and isinstance(library(), Library)


def round_columns(part: Columns, begin: int, stop: int) -> None:
    """Round columns begin to stop - 1 of the part and update all columns of it that follow, in torch.

    Not by addr_: it contracts product and sum in full vectors but not in their tails, so its bits depend on the shape.
    """
    count = len(part.work)
    pivots = part.upper.diagonal().tolist()
    product = torch.empty_like(part.work)
    for j in range(begin, stop):
        column, code, error, scale = part.work[j], part.codes[j], part.errors[j], part.scale[part.group_of[j]]
        torch.div(column, scale, out=code)
        code.round_()
        if part.zero is None:
            code.clamp_(part.low, part.high)
            torch.mul(code, scale, out=error)
        else:
            zero = part.zero[part.group_of[j]]
            code.add_(zero).clamp_(part.low, part.high)
            torch.sub(code, zero, out=error).mul_(scale)
        torch.sub(column, error, out=error).div_(pivots[j])
        if j + 1 < count:
            later = part.work[j + 1 :]
            later.sub_(torch.mul(part.upper[j, j + 1 :].unsqueeze(1), error, out=product[: len(later)]))


def round_compiled(part: Columns, begin: int, stop: int, level: int | None = None, threads: int | None = None) -> None:
    """The same by the library, or by the kernel of a CUDA device.

    level    of instructions; None is the one in use
    threads  None is torch's number; both of the library alone
    raises   KernelError if the library is missing or refuses the arguments; on CUDA ShapeError for other shapes, too
    """
    if _on_cuda().takes(part.work):
        _on_cuda().round_columns(part, begin, stop)
        return
    found = required_library()
    upper = part.upper.contiguous()
    group_of = torch.tensor(part.group_of, dtype=torch.int64)
    for tensor in (part.work, part.errors, part.codes, upper, part.scale, part.zero):
        if tensor is not None and (tensor.dtype != torch.float32 or not tensor.is_contiguous() or not tensor.is_cpu):
            raise KernelError("the compiled GPTQ solver takes contiguous float32 on the CPU", hint="Use round_columns.")
    result = found.functions.gptq_solve(
        found.level if level is None else level,
        torch.get_num_threads() if threads is None else threads,
        part.work.data_ptr(),
        part.errors.data_ptr(),
        part.codes.data_ptr(),
        upper.data_ptr(),
        part.scale.data_ptr(),
        0 if part.zero is None else part.zero.data_ptr(),
        group_of.data_ptr(),
        part.work.shape[1],
        len(part.scale),
        begin,
        stop,
        len(part.work),
        float(part.low),
        float(part.high),
    )
    if result:
        raise KernelError(f"the compiled GPTQ solver refused its arguments (code {result})", hint="Please report this.")
