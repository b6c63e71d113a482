"""GPTQ's columns on a CUDA device: `compressor.kernels.gptq_solve.round_columns` in one launch, cuda_ext/gptq_solve.cu.

Codes, errors and updates have the bits of torch on a CPU; torch on a GPU divides by multiplying with the inverse, so
its codes may differ in ties of rounding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from compressor.errors import KernelError
from compressor.kernels.checks import check_cuda_call, refuse
from compressor.kernels.cuda import devices
from compressor.kernels.cuda.interface import Kernels

if TYPE_CHECKING:
    from compressor.kernels.gptq_solve import Columns

MOST_COLUMNS = 128  # rounded in a call; gptq_solve.cu: MAX_COLUMNS


def takes(work: torch.Tensor) -> bool:
    """Whether it lies on a CUDA device, where round_columns has to be this one or torch's."""
    return devices.is_cuda(work.device)


def solves(work: torch.Tensor) -> bool:
    """Whether there are kernels on its device for it.

    raises KernelError if they are there and fail their self-test
    """
    return work.dtype == torch.float32 and isinstance(devices.found_on(work.device), Kernels)


def round_columns(part: Columns, begin: int, stop: int) -> None:
    """Round columns begin to stop - 1 of the part, at most 128, and update all that follow. Those that were rounded
    are left as they were in `work`. A column of a group that isn't there gets codes of NaN.

    raises ShapeError for other shapes or dtypes than `Columns` says, KernelError
    """
    name = "gptq_solve"
    operands = {
        "work": part.work, "errors": part.errors, "codes": part.codes, "upper": part.upper, "scale": part.scale,
        "zero": part.zero,
    }  # fmt: skip
    check_cuda_call(name, **operands)
    written = (part.work, part.errors, part.codes)
    is_flat = all(tensor is None or tensor.dim() == 2 for tensor in operands.values())
    count, rows = part.work.shape if is_flat else (0, 0)
    groups = len(part.scale) if is_flat else 0
    shapes = {"upper": (count, count), "scale": (groups, rows), "zero": (groups, rows)}
    fits = (
        all(
            tensor is None or (tensor.dtype == torch.float32 and tuple(tensor.shape) == shapes.get(role, (count, rows)))
            for role, tensor in operands.items()
        )
        and all(tensor.is_contiguous() for tensor in written)
        and len(part.group_of) == count
        and 0 <= begin <= stop <= count
        and stop - begin <= MOST_COLUMNS
    )
    if not fits:
        expected = (
            "contiguous float32 (n, out) three times, (n, n), (groups, out) twice, the groups of n columns (here "
            f"{len(part.group_of)}) and 0 <= begin <= stop <= n, {MOST_COLUMNS} apart (here {begin} and {stop})"
        )
        raise refuse(name, expected, **operands)
    device = part.work.device
    group_of = torch.tensor(part.group_of, dtype=torch.int32, device=device)
    upper, scale = part.upper.contiguous(), part.scale.contiguous()
    zero = None if part.zero is None else part.zero.contiguous()
    kernels = devices.kernels_of(device)
    with devices.current(device):
        code = kernels.functions["compressor_gptq_solve"](
            *(tensor.data_ptr() for tensor in (*written, upper, scale)), 0 if zero is None else zero.data_ptr(),
            group_of.data_ptr(), rows, groups, begin, stop, count, float(part.low), float(part.high),
            devices.stream_of(device),
        )  # fmt: skip
    if code:
        text = f"{kernels.name} failed: {kernels.error_text(code)} ({code})"
        raise KernelError(f"{name}: {rows} rows, columns {begin} to {stop - 1} of {count}: {text}")
