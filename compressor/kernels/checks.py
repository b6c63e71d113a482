"""What the wrappers of compiled operations ask of their tensors before they pass on addresses."""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.errors import KernelError, ShapeError


def check_call(name: str, **tensors: Tensor | None) -> None:
    """raises RuntimeError where a gradient is wanted, KernelError for tensors elsewhere than on the CPU"""
    for role, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(f"{name} has no gradient ({role} wants one): call it under no_grad")
        if not tensor.is_cpu:
            raise KernelError(f"{name}: {role} on {tensor.device}", hint="All tensors have to be on the CPU.")


def refuse(name: str, expected: str, **tensors: Tensor | None) -> ShapeError:
    """The error that names all operands of a call."""
    found = ", ".join(
        f"{role} none" if tensor is None else f"{role} {tensor.dtype} {tuple(tensor.shape)}"
        for role, tensor in tensors.items()
    )
    return ShapeError(f"{name}: {found}; expected {expected}")
