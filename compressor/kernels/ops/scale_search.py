"""Chooses the scale of each group of a row: that of its extremes, or that of the smaller range with the least error.

Compiled code does it for float32 on the CPU, torch (`compressor.kernels.ops.scale_ranges`) for everything else. Both
make the grid of a range by the same operations. Their sums of errors differ by float rounding, so of two ranges with
nearly equal errors they may choose different ones. Compiled scales are the same for every instruction level and number
of threads. Importing this module registers torch.ops.compressor.scale_search.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.kernels.cpu import Library, required_library
from compressor.kernels.ops.checks import check_call, refuse
from compressor.kernels.ops.registry import register, register_cuda
from compressor.kernels.ops.scale_ranges import COARSE_STEP, COARSE_STEPS, FINE_STEP, search_in_torch
from compressor.kernels.prepared.selftest import tried_library

NAME = "scale_search"
STORED = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # the DType of common.h


def scale_search(
    weight: Tensor, importance: Tensor | None, bits: int, symmetric: bool, search: bool, stored: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each group of each row.

    weight      (out, groups, size) float32 or float64
    importance  (groups, size) in the dtype of the weight: weights of the squared errors; None: |error|^2.4 is summed
    bits        2 to 8
    search      false: the scales of the extremes
    stored      dtype of the scales on disk: float32, bfloat16 or float16
    returns     scale (out, groups) float32, exactly representable in `stored`, and zero_point (out, groups) float32
    raises      ShapeError for other shapes or dtypes, KernelError if the library fails its self-test
    """
    shape = weight.shape[1:]
    fits = weight.dim() == 3 and shape[-1] > 0 and weight.dtype in (torch.float32, torch.float64)
    if importance is not None:
        fits &= importance.shape == shape and importance.dtype == weight.dtype
    if not fits or not 2 <= bits <= 8 or stored not in STORED:
        expected = (
            "weight (out, groups, size) and importance (groups, size), both float32 or float64, 2 to 8 bits, and "
            f"scales of float32, bfloat16 or float16 (here {bits} bits, {stored})"
        )
        raise refuse(NAME, expected, weight=weight, importance=importance)
    if weight.dtype == torch.float32 and weight.is_cpu and isinstance(tried_library(), Library):
        return search_compiled(weight, importance, bits, symmetric, search, stored)
    return search_in_torch(weight, importance, bits, symmetric, search, stored)


def search_compiled(
    weight: Tensor,
    importance: Tensor | None,
    bits: int,
    symmetric: bool,
    search: bool,
    stored: torch.dtype,
    level: int | None = None,
    threads: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The same with the library, for float32.

    level    instruction level of the library; None: the one in use
    threads  None: torch's number
    """
    check_call(NAME, weight=weight, importance=importance)
    out, groups, size = weight.shape
    weight = weight.contiguous()
    importance = None if importance is None else importance.contiguous()
    scale, zero_point = (torch.empty(out, groups, dtype=torch.float32, device="cpu") for _ in range(2))
    found = required_library()
    error = found.functions.scale_search(
        found.level if level is None else level,
        torch.get_num_threads() if threads is None else threads,
        weight.data_ptr(),
        0 if importance is None else importance.data_ptr(),
        scale.data_ptr(),
        zero_point.data_ptr(),
        out,
        groups,
        size,
        bits,
        int(symmetric),
        STORED[stored],
        COARSE_STEP,
        FINE_STEP,
        COARSE_STEPS if search else -1,
    )
    if error:
        raise refuse(NAME, f"a level that is there (code {error})", weight=weight, importance=importance)
    return scale, zero_point


def _fake(
    weight: Tensor, importance: Tensor | None, bits: int, symmetric: bool, search: bool, stored: torch.dtype
) -> tuple[Tensor, Tensor]:
    shape = weight.shape[:2]
    return weight.new_empty(shape, dtype=torch.float32), weight.new_empty(shape, dtype=torch.float32)


register(
    NAME,
    "(Tensor weight, Tensor? importance, int bits, bool symmetric, bool search, ScalarType stored) -> (Tensor, Tensor)",
    scale_search,
    _fake,
)
register_cuda(NAME, scale_search)
