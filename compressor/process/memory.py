"""Returns freed memory to the system, so that the resident size follows what is in use."""

from __future__ import annotations

import ctypes
import platform
import sys

M_MMAP_THRESHOLD = -3  # malloc.h
LARGE_BLOCK_BYTES = 4 << 20


def return_large_blocks() -> None:
    """Make glibc return every large memory block to the system as soon as it is freed. Does nothing without glibc.

    By default glibc learns to keep freed blocks of up to 32 MB, and allocations that live from batch to batch then
    settle between them. Measured on a Llama of width 512: the peak of the sweep is 0.96 GB by default and 0.81 GB with
    a threshold of 4 MiB, in the same time. With 1 MiB the sweep of the demo model took a third longer, since every new
    page costs a page fault.
    """
    if (libc := _glibc()) is not None:
        libc.mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK_BYTES)


def return_freed_memory() -> None:
    """Return freed pages to the system. We measured that without it 13 MB per block pile up, for blocks of 13 MB."""
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    """glibc if it is the C library; None elsewhere, where there is nothing to call."""
    return ctypes.CDLL("libc.so.6") if sys.platform == "linux" and platform.libc_ver()[0] == "glibc" else None
