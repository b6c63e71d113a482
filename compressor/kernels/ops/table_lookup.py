"""Reads functions from lookup tables with the compiled library.

Importing this module registers torch.ops.compressor.table_lookup and table_inverse_root. The same in plain torch:
`look_up`, `activate` with slopes, and `inverse_root` of `compressor.kernels.ops.table_functions`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.errors import ShapeError
from compressor.kernels.ops.checks import check_call, refuse
from compressor.kernels.ops.linear import DTYPES, cpu_library, threads_for
from compressor.kernels.ops.registry import register

MOST_ENTRIES = 2**22  # a position is a float32, and half an entry must be exact


def table_lookup(
    x: Tensor,
    table: Tensor,
    low: float,
    high: float,
    linear: bool,
    left_slope: float = 0.0,
    right_slope: float = 0.0,
) -> Tensor:
    """f(x) from the entries table[k] = f(low + k · step), step = (high - low) / (entries - 1).

    It does the float32 operations of `look_up` in the same order: position = (x - low) / step, clamped; then the
    nearest entry (half to even), or torch.lerp between two entries, with product and sum in one fma, as torch computes
    it on processors with AVX2. Rounded once to x's dtype. `high` of a stored table is low + (entries - 1) · step: its
    knots are exact, so that the division gives back the stored step.

    x        (...) float32, bfloat16 or float16, computed on as float32
    table    (entries,) float32, 2 to 2^22 entries
    slopes   of the straight lines that continue f outside [low, high], as in `activate`; 0: the first or last entry
    returns  (...) in the dtype of x; NaN for NaN
    raises   ShapeError for another dtype or shape, or high <= low
    """
    check_call("table_lookup", x=x, table=table)
    kind = DTYPES.get(x.dtype)
    fits = table.dtype == torch.float32 and table.dim() == 1 and 2 <= len(table) <= MOST_ENTRIES
    if kind is None or not fits:
        expected = f"a float x and a float32 table of 2 to {MOST_ENTRIES} entries"
        raise refuse("table_lookup", expected, x=x, table=table)
    step = (high - low) / (len(table) - 1)
    x, table = x.contiguous(), table.contiguous()
    y = torch.empty_like(x)
    found = cpu_library()
    error = found.functions.table_lookup(
        found.level, threads_for(x.numel() * 4), x.data_ptr(), kind, table.data_ptr(), y.data_ptr(), x.numel(),
        len(table), float(low), step, int(linear), float(left_slope), float(right_slope),
    )  # fmt: skip
    if error:
        raise ShapeError(
            f"table_lookup: no table of {len(table)} entries from {low:g} to {high:g}",
            data={"op": "table_lookup", "entries": len(table), "low": low, "high": high},
        )
    return y


def _fake(
    x: Tensor,
    table: Tensor,
    low: float,
    high: float,
    linear: bool,
    left_slope: float = 0.0,
    right_slope: float = 0.0,
) -> Tensor:
    return x.new_empty(x.shape)


register(
    "table_lookup",
    "(Tensor x, Tensor table, float low, float high, bool linear, float left_slope=0., float right_slope=0.) -> Tensor",
    table_lookup,
    _fake,
)


def table_inverse_root(x: Tensor, table: Tensor, step: float, linear: bool) -> Tensor:
    """1 / sqrt(x) with the bits of `inverse_root`: x = a * 4**s with a in [1, 4), and 1 / sqrt(a) is read.

    x        (...) float32: variances, one per row, so there are few
    table    (entries,) float32, 1 / sqrt(1 + k · step), 2 to 2^22 entries
    returns  (...) float32; Inf for 0, 0 for Inf, NaN for NaN and negative numbers
    raises   ShapeError for another dtype or shape, or step <= 0
    """
    check_call("table_inverse_root", x=x, table=table)
    fits = table.dtype == x.dtype == torch.float32 and table.dim() == 1 and 2 <= len(table) <= MOST_ENTRIES
    if not fits:
        raise refuse("table_inverse_root", f"float32, a table of 2 to {MOST_ENTRIES} entries", x=x, table=table)
    x, table = x.contiguous(), table.contiguous()
    y = torch.empty_like(x)
    found = cpu_library()
    error = found.functions.table_inverse_root(
        found.level, x.data_ptr(), table.data_ptr(), y.data_ptr(), x.numel(), len(table), float(step), int(linear)
    )
    if error:
        raise ShapeError(
            f"table_inverse_root: no table of {len(table)} entries in steps of {step:g}",
            data={"op": "table_inverse_root", "entries": len(table), "step": step},
        )
    return y


def _fake_root(x: Tensor, table: Tensor, step: float, linear: bool) -> Tensor:
    return x.new_empty(x.shape)


register(
    "table_inverse_root", "(Tensor x, Tensor table, float step, bool linear) -> Tensor", table_inverse_root, _fake_root
)
