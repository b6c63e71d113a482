"""Decides whether a call must be visible to torch, because it is traced or needs a gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = (Tensor, nn.Parameter)
# Looked up once: each name lookup costs as much as the check.
_compiling, _modes, _tracing = torch.compiler.is_compiling, torch._C._len_torch_dispatch_stack, torch._C._is_tracing
_wrapped = torch._C._functorch.is_functorch_wrapped_tensor


def must_be_visible(x: Tensor) -> bool:
    """Whether a call must use torch's registry: a compiler or a tracer records it, or x has no memory of its own (fake
    tensors, tensors inside `torch.vmap`, subclasses)."""
    return _compiling() or type(x) not in _PLAIN or _modes() > 0 or _tracing() or _wrapped(x)


class _NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, name: str) -> Tensor:
        ctx.name = name
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise RuntimeError(
            f"{ctx.name} has no gradient: load the model with kernels='reference' to train it, or what stands before it"
        )


def without_gradient(x: Tensor, y: Tensor, name: str) -> Tensor:
    """y. If x needs a gradient, a backward pass through y raises an error."""
    if x.requires_grad and torch.is_grad_enabled() and not _compiling():
        return _NoGradient.apply(x, y, name)
    return y
