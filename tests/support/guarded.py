"""Tensors that end at an unreadable page."""

from __future__ import annotations

import ctypes
import mmap

import torch


def guarded(tensor):
    """A copy between two unreadable pages that ends at the second: one element too far is a crash."""
    page, size = mmap.PAGESIZE, tensor.numel() * tensor.element_size()
    inner = -(-size // page) * page
    memory = mmap.mmap(-1, inner + 2 * page)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    assert protect(ctypes.c_void_p(base), page, 0) == 0
    assert protect(ctypes.c_void_p(base + page + inner), page, 0) == 0
    kept = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=page + inner - size)
    kept.copy_(tensor.flatten())
    return kept.view(tensor.shape)
