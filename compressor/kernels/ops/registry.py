"""Registers operations in the namespace `compressor` of torch: schema, implementation, and shapes for tracing."""

from __future__ import annotations

from collections.abc import Callable

import torch

_LIBRARY = torch.library.Library("compressor", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)


def register(name: str, schema: str, run: Callable[..., object], fake: Callable[..., object]) -> None:
    """Define torch.ops.compressor.<name>.

    schema  arguments and results, "(Tensor x) -> Tensor"
    run     the implementation on the CPU
    fake    the same for shapes only: tensors without contents
    """
    _LIBRARY.define(name + schema, tags=_TAGS)
    _LIBRARY.impl(name, run, "CPU")
    torch.library.register_fake(f"compressor::{name}", fake, lib=_LIBRARY)


def register_cuda(name: str, run: Callable[..., object]) -> None:
    """Set the implementation of the defined torch.ops.compressor.<name> for CUDA devices."""
    _LIBRARY.impl(name, run, "CUDA")
