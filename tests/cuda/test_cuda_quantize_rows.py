"""Rows rounded to int8 in CUDA, emulated: the CPU library's bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from compressor.kernels import cpu
from compressor.kernels.cuda.interface import Kernels
from compressor.kernels.ops import linear as ops
from cuda_ext.cases import arrays, quantize_rows

TORCH_TYPES = {arrays.FLOAT16: torch.float16, arrays.BFLOAT16: torch.bfloat16, arrays.FLOAT32: torch.float32}
needs_library = pytest.mark.skipif(isinstance(cpu.library(), str), reason="the CPU library is not built")


def to_torch(stored: np.ndarray, kind: int) -> torch.Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(stored))
    return tensor if kind == arrays.FLOAT32 else tensor.view(TORCH_TYPES[kind])


def quantize(emulated: Kernels, x: np.ndarray, kind: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes (M, K) and scales (M) of stored rows."""
    m, k = x.shape
    memory = arrays.GuardedMemory()
    codes = memory.place(np.full((m, -(-k // 64) * 64), 0x55, np.int8))
    scale = memory.place(np.full(m, np.nan, np.float32))
    launch = quantize_rows.launcher(emulated)
    assert launch(memory.place(x).address, codes.address, scale.address, None, m, k, -1, kind, None) == 0
    return codes.read()[:, :k], scale.read()


@needs_library
@pytest.mark.parametrize("kind", TORCH_TYPES)
def test_codes_are_those_of_the_cpu_library(emulated, kind):
    random = np.random.default_rng(kind)
    x = random.standard_normal((40, 328)) * 2.0 ** random.integers(-14, 12, (40, 1))
    x[0], x[1, 5], x[2, 327], x[3, :4] = 0, np.nan, -np.inf, (0.5, 1.5, 2.5, 127)
    if kind != arrays.FLOAT16:
        x[4], x[5] = x[4] / abs(x[4]).max() * 2.0**-120, x[5] / abs(x[5]).max() * 2.0**-121
    stored = arrays.to_bits(x, kind)
    codes, scale = quantize(emulated, stored, kind)
    rows = to_torch(stored, kind)
    library = cpu.required_library()
    expected, absmax = torch.empty(rows.shape, dtype=torch.int8), torch.empty(len(rows))
    places = expected.data_ptr(), absmax.data_ptr(), *rows.shape
    assert library.functions.quantize_rows(library.level, rows.data_ptr(), ops.DTYPES[rows.dtype], *places) == 0
    assert np.array_equal(codes, expected.numpy())
    assert np.array_equal(scale, absmax.numpy() / np.float32(127), equal_nan=True)
    assert np.isnan(scale[1]) and np.isnan(scale[2]) and not codes[1:3].any()
    assert scale[0] == 0
