"""Rounds GPTQ's columns on a CUDA device: `gptq_columns.round_columns` in few launches of cuda_ext/gptq_solve.cu.

Codes, errors and updates have the bits of torch on a CPU. torch on a GPU divides by multiplying with the inverse, so
its codes may differ in rounding ties.
"""

from __future__ import annotations

import torch

from compressor.kernels.cuda import devices
from compressor.kernels.cuda.interface import Kernels
from compressor.kernels.ops.gptq_columns import Columns

MOST_COLUMNS = 128  # per launch; gptq_solve.cu: MAX_COLUMNS


def takes(work: torch.Tensor) -> bool:
    """Whether a matrix is on a CUDA device, where round_columns must be this one or torch's."""
    return devices.is_cuda(work.device)


def solves(work: torch.Tensor) -> bool:
    """Whether its device has kernels for it.

    raises  KernelError if they fail their self-test
    """
    return work.dtype == torch.float32 and isinstance(devices.kernels_on(work.device), Kernels)


def round_columns(part: Columns, begin: int, stop: int) -> None:
    """Round columns begin to stop - 1 of the part and update all later ones. Rounded columns stay unchanged in `work`.
    A column of a missing group gets codes of NaN.

    part    float32, with checked shapes, all on one device
    raises  ShapeError for too many columns, KernelError
    """
    device = part.work.device
    group_of = part.group_of.int().contiguous()
    upper, scale = part.upper.contiguous(), part.scale.contiguous()
    zero = None if part.zero_point is None else part.zero_point.contiguous()
    read = (upper.data_ptr(), scale.data_ptr(), 0 if zero is None else zero.data_ptr(), group_of.data_ptr())
    written = (part.work.data_ptr(), part.errors.data_ptr(), part.codes.data_ptr())
    count, rows = part.work.shape
    kernels = devices.kernels_of(device)
    with devices.current(device):
        for first in range(begin, stop, MOST_COLUMNS):
            last = min(first + MOST_COLUMNS, stop)
            code = kernels.functions["compressor_gptq_solve"](
                *written, *read, rows, len(part.scale), first, last, count, float(part.low), float(part.high),
                devices.stream_of(device),
            )  # fmt: skip
            if code:
                raise kernels.error(code, f"gptq_solve: {rows} rows, columns {first} to {last - 1} of {count}")
