"""A parameter whose new value is computed slice by slice, so that no whole copy of it exists in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compressor.protocol.views import SLICE_ELEMENTS

Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Changed:
    """value    the parameter as it was, in any dtype
    changes  applied one after the other to each slice in float64
    axis     the slices have the whole of this axis
    """

    value: Tensor
    changes: tuple[Change, ...]
    axis: int

    def then(self, change: Change) -> Changed:
        return replace(self, changes=(*self.changes, change))

    def made(self, dtype: torch.dtype) -> Tensor:
        """The new value, rounded once."""
        if self.value.dim() == 1:
            return self._change(self.value).to(dtype)
        along = 0 if self.axis % self.value.dim() else 1
        made: Tensor | None = None
        for start, part in self._slices(along):
            changed = self._change(part)
            if made is None:
                shape = list(changed.shape)
                shape[along] = self.value.shape[along]
                made = torch.empty(shape, dtype=dtype, device=changed.device)
            made.narrow(along, start, changed.shape[along]).copy_(changed)
        assert made is not None, "a parameter has values"
        return made

    def _slices(self, along: int) -> Iterator[tuple[int, Tensor]]:
        length = self.value.shape[along]
        step = max(1, SLICE_ELEMENTS * length // max(1, self.value.numel()))
        for start in range(0, length, step):
            yield start, self.value.narrow(along, start, min(step, length - start))

    def _change(self, part: Tensor) -> Tensor:
        part = part.to(torch.float64)
        for change in self.changes:
            part = change(part)
        return part
