"""Correctness cases of the CUDA kernels, the same on a GPU and under emulation.

One module for each source, KERNELS[name of the source], with

    CASES, LARGE_CASES   what is run; the large ones on a GPU alone
    run(kernels, case, memory, seed, stream=0)
                         runs a case and compares, raises AssertionError, returns the result as stored. `kernels` are
                         `compressor.kernels.cuda.interface.Kernels`; `memory` places arrays where kernels
                         can read them: GuardedMemory of `arrays`, or the memory of a GPU (scripts/check_gpu)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from cuda_ext.cases import dense_sparse, gptq_solve, hadamard, int8_outlier, quantize_rows, w_a8, w_a16


class Kernel(Protocol):
    """What a module of cases has."""

    CASES: tuple[Any, ...]
    LARGE_CASES: tuple[Any, ...]
    run: Callable[..., Any]


KERNELS: dict[str, Kernel] = {
    "dense_sparse": dense_sparse,
    "gptq_solve": gptq_solve,
    "hadamard": hadamard,
    "int8_outlier": int8_outlier,
    "quantize_rows": quantize_rows,
    "w_a8": w_a8,
    "w_a16": w_a16,
}
