"""Allocates memory in large pages for a packed weight, which a matmul reads once from end to end."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

LARGE = 2 << 20  # bytes of a large page on x86


def empty_bytes(size: int) -> Tensor:
    """uint8 (size,) on the CPU, of any content.

    From 2 MiB on it uses large pages, if the system provides them on request: translating addresses of 4 KiB pages
    takes a virtual machine up to a fifth of a matmul of one row. Memory that torch reuses has its pages already, so
    they can't be requested. The memory is returned to the system when no tensor uses it.
    """
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if size < LARGE or advice is None:
        return torch.empty(size, dtype=torch.uint8, device="cpu")
    try:
        memory = mmap.mmap(-1, size + LARGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(advice)
    except OSError:  # no large pages here, or no memory, which torch reports
        return torch.empty(size, dtype=torch.uint8, device="cpu")
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    first = -whole.data_ptr() % LARGE
    return whole[first : first + size]
