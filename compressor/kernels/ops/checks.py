"""Checks the tensors of a compiled operation before their addresses are passed to it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compressor.errors import KernelError, ShapeError
from compressor.kernels.cuda import devices


def check_call(name: str, **tensors: Tensor | None) -> None:
    """raises RuntimeError if a gradient is needed, KernelError for tensors that are not on the CPU"""
    _check_gradients(name, tensors)
    if any(tensor is not None and not tensor.is_cpu for tensor in tensors.values()):
        raise _elsewhere(name, "Move all tensors to the CPU with .cpu().", tensors)


def check_cuda_call(name: str, **tensors: Tensor | None) -> None:
    """The same, with KernelError for tensors that are not all on one CUDA device."""
    _check_gradients(name, tensors)
    places = [tensor.device for tensor in tensors.values() if tensor is not None]
    if not devices.is_cuda(places[0]) or places.count(places[0]) != len(places):
        hint = "Move all tensors to one CUDA device; call `prepare` again for a model that was moved."
        raise _elsewhere(name, hint, tensors)


def _check_gradients(name: str, tensors: dict[str, Tensor | None]) -> None:
    for role, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(f"{name} has no gradient ({role} wants one): call it under no_grad")


def _elsewhere(name: str, hint: str, tensors: dict[str, Tensor | None]) -> KernelError:
    found = ", ".join(f"{role} on {tensor.device}" for role, tensor in tensors.items() if tensor is not None)
    devices_of = {role: str(tensor.device) for role, tensor in tensors.items() if tensor is not None}
    return KernelError(f"{name}: {found}", hint=hint, data={"op": name, "devices": devices_of})


def operands(**tensors: Tensor | None) -> dict[str, Any]:
    """Operands of a call for the data of an error: dtype and shape by name, None for a missing one."""
    return {
        role: None if tensor is None else {"dtype": str(tensor.dtype), "shape": list(tensor.shape)}
        for role, tensor in tensors.items()
    }


def refuse(name: str, expected: str, reason: str = "operands", /, **tensors: Tensor | None) -> ShapeError:
    """The error that names all operands of a call."""
    found = ", ".join(
        f"{role} none" if tensor is None else f"{role} {tensor.dtype} {tuple(tensor.shape)}"
        for role, tensor in tensors.items()
    )
    data = {"op": name, "reason": reason, "operands": operands(**tensors)}
    return ShapeError(f"{name}: {found}; expected {expected}", data=data)
