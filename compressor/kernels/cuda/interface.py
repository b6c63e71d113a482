"""The C interface of the CUDA kernels, as Python calls it. An operation that is added begins with a row here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from ctypes import c_float, c_int, c_int64, c_void_p
from dataclasses import dataclass
from typing import Any

import torch

from compressor.errors import KernelError, ShapeError

ABI = 5  # cuda_ext/about.cpp: one more whenever a signature is added or changes
BAD_CALL = -1  # what a launcher returns for a shape, a type, an address or a workspace that no kernel takes
DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}  # device.h: Type
LOWEST_CAPABILITY = (8, 0)

# name -> result, arguments; the stream comes last where there is one
SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    # x, packed, scale, zero_point, bias, y, workspace; its bytes; M, N, K, bits, group_size, x_type,
    # scale_type; stream
    "compressor_w_a16": (c_int, [*[c_void_p] * 7, c_int64, *[c_int] * 7, c_void_p]),
    "compressor_w_a16_workspace_bytes": (c_int64, [c_int] * 3),  # M, N, K
    # x, codes, scale, sum; M, K, group_size, type; stream
    "compressor_quantize_rows": (c_int, [*[c_void_p] * 4, *[c_int] * 4, c_void_p]),
    # x's codes, scale, sum; packed, scale, zero_point, bias, y; M, N, K, bits, group_size, scale_type, y_type; stream
    "compressor_w_a8": (c_int, [*[c_void_p] * 8, *[c_int] * 7, c_void_p]),
    # x, weight, absmax, columns, column_weight, bias, y, workspace; its bytes; M, N, K, column_count; threshold; type;
    # stream
    "compressor_int8_outlier": (c_int, [*[c_void_p] * 8, c_int64, *[c_int] * 4, c_float, c_int, c_void_p]),
    "compressor_int8_outlier_workspace_bytes": (c_int64, [c_int] * 3),  # M, N, K
    # x, atoms, their steps, entries, steps, bias, y, workspace; its bytes; M, N, B, m, w, k, type; stream
    "compressor_dense_sparse": (c_int, [*[c_void_p] * 8, c_int64, *[c_int] * 7, c_void_p]),
    "compressor_dense_sparse_workspace_bytes": (c_int64, [c_int] * 6),  # M, N, B, m, w, k
    # work, errors, codes, upper, scale, zero, group_of; rows, groups, begin, stop, end; low, high; stream
    "compressor_gptq_solve": (c_int, [*[c_void_p] * 7, *[c_int] * 5, c_float, c_float, c_void_p]),
    # x, y, rows, n, scale, type, stream
    "compressor_hadamard": (c_int, [c_void_p, c_void_p, c_int64, c_int, c_float, c_int, c_void_p]),
}


@dataclass(frozen=True)
class Kernels:
    """The launchers on one device, whichever way they came.

    name        "cuda library", or "nvrtc, sm_90a"
    functions   by the names of SIGNATURES; addresses are ints, 0 for none. A launcher returns 0, BAD_CALL or an error
    error_text  what an error means
    """

    name: str
    functions: Mapping[str, Callable[..., int]]
    error_text: Callable[[int], str]

    def error(self, code: int, what: str) -> ShapeError | KernelError:
        """What a launcher's code other than 0 means."""
        if code == BAD_CALL:
            return ShapeError(f"{what}: {self.name} takes no such shapes")
        return KernelError(f"{what}: {self.name} failed: {self.error_text(code)} ({code})")
