"""Adds second moments of inputs to one triangle of a Hessian; the other triangle mirrors it.

torch has no symmetric product. Columns are divided in halves: the moments of each half, then one product of the two
halves, so that most of the work is in large products. bfloat16 inputs on a processor that multiplies them faster than
float32, with sums in float32, are not converted: the compiled library does it. Importing this module registers
torch.ops.compressor.hessian_add_, which works without the compiled library.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.errors import ShapeError
from compressor.kernels.cpu import Library, required_library
from compressor.kernels.ops.checks import check_call, refuse
from compressor.kernels.ops.registry import register, register_cuda
from compressor.kernels.prepared.selftest import tried_library

# Columns that aren't divided further. The best of 64, 128, 192 and 256, or within 5 %, for 300 to 11,008 columns
# (AVX-512).
PANEL = 128
PACKED_PANEL = 48  # columns that second_moments.cpp packs together


def hessian_add_(hessian: Tensor, x: Tensor, keep: float, weight: float) -> None:
    """hessian = keep · hessian + weight · xᵀ x, in place, on and above the diagonal.

    Entries left of their row's panel are neither read nor written, those of a panel below the diagonal are undefined:
    use the upper triangle (`Gram.hessian` mirrors it). Products of 16-bit inputs are exact in float32, and are summed
    in the dtype of hessian. The bits depend on the number of threads, as those of torch's products do.

    hessian  (in, in) float32 or float64, on any device
    x        (tokens, in), of a float dtype
    raises   ShapeError for other shapes or dtypes
    """
    if hessian.dim() != 2 or x.dim() != 2 or hessian.shape != (x.shape[1], x.shape[1]):
        raise ShapeError(
            f"hessian {tuple(hessian.shape)}, x {tuple(x.shape)}: (in, in) and (tokens, in) expected",
            data={"op": "hessian_add_", "hessian": list(hessian.shape), "x": list(x.shape)},
        )
    if hessian.dtype.itemsize < 4 or not (hessian.is_floating_point() and x.is_floating_point()):
        raise ShapeError(
            f"hessian {hessian.dtype}, x {x.dtype}: float32 or float64, and a float expected",
            data={"op": "hessian_add_", "hessian": str(hessian.dtype), "x": str(x.dtype)},
        )
    if multiplies(hessian, x):
        add_compiled(hessian, x, keep, weight)
    else:
        _add(hessian, x.to(hessian.dtype), keep, weight)


def multiplies(hessian: Tensor, x: Tensor) -> bool:
    """Whether the compiled library is fast for these operands.

    raises  KernelError if it fails its self-test
    """
    if (hessian.dtype, x.dtype) != (torch.float32, torch.bfloat16) or not hessian.is_cpu or hessian.stride(1) != 1:
        return False
    found = tried_library()
    return isinstance(found, Library) and bool(found.functions.has_bfloat16_products())


def add_compiled(
    hessian: Tensor, x: Tensor, keep: float, weight: float, level: int | None = None, threads: int | None = None
) -> None:
    """The same with the library: hessian float32 with rows in one piece, x bfloat16; the tokens of a call are summed
    apart.

    level    instruction level of the library; None: the one in use. Only avx512vnni and amx are fast
    threads  None: torch's number
    """
    check_call("hessian_add_", hessian=hessian, x=x)
    found = required_library()
    x, (tokens, columns) = x.contiguous(), x.shape
    packed = torch.empty(-(-columns // PACKED_PANEL) * -(-tokens // 2) * PACKED_PANEL, dtype=torch.int32, device="cpu")
    error = found.functions.second_moments(
        found.level if level is None else level,
        torch.get_num_threads() if threads is None else threads,
        x.data_ptr(),
        packed.data_ptr(),
        hessian.data_ptr(),
        tokens,
        columns,
        max(hessian.stride(0), columns),
        float(keep),
        float(weight),
    )
    if error:
        raise refuse("hessian_add_", f"a level that is there (code {error})", hessian=hessian, x=x)


def _add(hessian: Tensor, x: Tensor, keep: float, weight: float) -> None:
    middle = -(-x.shape[1] // (2 * PANEL)) * PANEL
    if middle >= x.shape[1]:
        hessian.addmm_(x.t(), x, beta=keep, alpha=weight)
        return
    first, second = x[:, :middle], x[:, middle:]
    _add(hessian[:middle, :middle], first, keep, weight)
    _add(hessian[middle:, middle:], second, keep, weight)
    hessian[:middle, middle:].addmm_(first.t(), second, beta=keep, alpha=weight)


def _fake(hessian: Tensor, x: Tensor, keep: float, weight: float) -> None:
    return None


register("hessian_add_", "(Tensor(a!) hessian, Tensor x, float keep, float weight) -> ()", hessian_add_, _fake)
register_cuda("hessian_add_", hessian_add_)
