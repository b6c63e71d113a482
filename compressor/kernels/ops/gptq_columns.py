"""Implements the inner loop of GPTQ in torch, with which compiled code must agree: it rounds columns one by one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Columns:
    """work        (n, out) the columns with all earlier updates; columns that are not rounded yet are updated in place
    errors      (n, out) written: errors divided by pivots
    codes       (n, out) written: integers
    upper       (n, n) their part of U
    group_of    (n,) int64 the group of each column, an index into scale and zero_point
    scale       (groups, out)
    zero_point  (groups, out); None if symmetric
    low, high   the codes' range
    """

    work: Tensor
    errors: Tensor
    codes: Tensor
    upper: Tensor
    group_of: Tensor
    scale: Tensor
    zero_point: Tensor | None
    low: int
    high: int

    def tensors(self) -> dict[str, Tensor | None]:
        return {name: value for name, value in vars(self).items() if name not in ("low", "high")}


def trial_columns(symmetric: bool, rows: int) -> tuple[Columns, int, int]:
    """A random part of 20 columns on the CPU for a self-test, and the columns to round: 3 to 16."""
    made = torch.Generator().manual_seed(0)
    count, groups = 20, 2
    upper = (torch.randn(count, count, generator=made) * 0.3).triu()
    upper.diagonal().copy_(torch.rand(count, generator=made) + 0.2)
    scale = torch.rand(groups, rows, generator=made) * 0.3 + 0.01
    zero_point = None if symmetric else torch.randint(-8, 8, (groups, rows), generator=made).float()
    work = torch.randn(count, rows, generator=made)
    empty = torch.full_like(work, torch.nan)
    part = Columns(work, empty, empty.clone(), upper, torch.arange(count) % groups, scale, zero_point, -8, 7)
    return part, 3, 17


def round_columns(part: Columns, begin: int, stop: int) -> None:
    """Round columns begin to stop - 1 of the part and update all its later columns, in torch.

    It does not use addr_, which fuses product and sum in full vectors but not in their tails, so that its bits depend
    on the shape.

    The part is not checked here; `compressor.kernels.ops.gptq_solve` checks it.
    """
    count, groups = len(part.work), part.group_of.tolist()
    pivots = part.upper.diagonal().tolist()
    product = torch.empty_like(part.work)
    for j in range(begin, stop):
        column, code, error, scale = part.work[j], part.codes[j], part.errors[j], part.scale[groups[j]]
        torch.div(column, scale, out=code)
        code.round_()
        if part.zero_point is None:
            code.clamp_(part.low, part.high)
            torch.mul(code, scale, out=error)
        else:
            zero = part.zero_point[groups[j]]
            code.add_(zero).clamp_(part.low, part.high)
            torch.sub(code, zero, out=error).mul_(scale)
        torch.sub(column, error, out=error).div_(pivots[j])
        if j + 1 < count:
            later = part.work[j + 1 :]
            later.sub_(torch.mul(part.upper[j, j + 1 :].unsqueeze(1), error, out=product[: len(later)]))
