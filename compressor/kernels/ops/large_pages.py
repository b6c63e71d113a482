"""Memory for a packed weight, which a product reads once from end to end."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

LARGE = 2 << 20  # bytes of a large page on x86


def empty_bytes(size: int) -> Tensor:
    """uint8 (size,) on the CPU, of any content.

    From 2 MiB on it begins with a large page, where the system lends such pages to those who ask: to look up where
    pages of 4 KiB are takes a virtual machine up to a fifth of a product of one row. Memory that torch has had before
    is touched already, too late to ask. What is returned goes back to the system when no tensor reads it any more.
    """
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if size < LARGE or advice is None:
        return torch.empty(size, dtype=torch.uint8, device="cpu")
    try:
        memory = mmap.mmap(-1, size + LARGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(advice)
    except OSError:  # no such pages here, or no memory, which torch will say
        return torch.empty(size, dtype=torch.uint8, device="cpu")
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    first = -whole.data_ptr() % LARGE
    return whole[first : first + size]
