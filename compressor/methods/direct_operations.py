"""Lets arithmetic on values in memory skip what the engine does around each operation of a model."""

from __future__ import annotations

from contextlib import AbstractContextManager

from compressor.lazy import torch


def direct_operations() -> AbstractContextManager[None]:
    """A context without the modes of torch functions that give back mapped pages and widen 16-bit products.

    Each mode costs about 4 µs an operation, and a solve has a thousand operations whatever the size of its matrix. A
    run of `gptq` over 128 experts of 256 x 512, with its evaluation, takes 1.2 times as long with both (our
    measurement, one thread, AVX2). All operands must be in memory, in float32 or float64, or the modes are missed.
    """
    return torch._C.DisableTorchFunction()
