"""The CUDA matmuls with dynamic activation quantization, emulated: the CPU library's bits, hostile rows."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from compressor.kernels import cpu
from compressor.kernels.cuda.interface import Kernels
from compressor.kernels.ops import linear as ops
from cuda_ext.cases import arrays, quantize_rows, w_a8

TORCH_TYPES = {arrays.FLOAT16: torch.float16, arrays.BFLOAT16: torch.bfloat16, arrays.FLOAT32: torch.float32}
needs_library = pytest.mark.skipif(isinstance(cpu.library(), str), reason="the CPU library is not built")


def to_torch(stored: np.ndarray, kind: int) -> torch.Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(stored))
    return tensor if kind == arrays.FLOAT32 else tensor.view(TORCH_TYPES[kind])


def multiply(emulated: Kernels, case: w_a8.Case, operands: w_a8.Operands, x: np.ndarray) -> np.ndarray:
    """y as stored, of rows as they are stored."""
    memory, m = arrays.GuardedMemory(), len(x)
    codes = memory.place(np.zeros((m, -(-case.K // 64) * 64), np.int8))
    scale, total = memory.place(np.zeros(m, np.float32)), memory.place(np.zeros((m, operands.x_sum.shape[1]), np.int32))
    rows = (codes.address, scale.address, total.address)
    launch = quantize_rows.launcher(emulated)
    assert launch(memory.place(x).address, *rows, m, case.K, case.group_size, case.type, None) == 0
    given = (operands.packed, operands.scale, operands.zero_point, operands.bias)
    placed = [None if array is None else memory.place(array) for array in given]
    y = memory.place(np.full((m, case.N), 0, operands.expected.dtype))
    addresses = [p.address if p else None for p in [*placed, y]]
    sizes = (m, case.N, case.K, case.bits, case.group_size, case.scale_type, case.type, None)
    assert w_a8.launcher(emulated)(*rows, *addresses, *sizes) == 0
    return y.read()


def test_the_model_of_an_fma_rounds_once():
    """Against fractions, on operands whose sum float64 doesn't hold, next to halves between two float32 as well."""
    random = np.random.default_rng(0)
    a, b = ((random.random(2000) + 1).astype(np.float32) for _ in range(2))
    c = (random.standard_normal(2000) * 2.0 ** random.integers(-60, 60, 2000)).astype(np.float32)
    # 1 + 2^-24 is a half between two float32; a product below float64's last bit decides
    a[:2], b[:2], c[:2] = np.float32(2.0**-40), (2.0**-40, -(2.0**-40)), 1 + 2.0**-23
    a[2:4], b[2:4] = np.float32(1 + 2.0**-12), np.float32(1 + 2.0**-12)  # the product ends 2^-24 after 1 + 2^-11
    c[2:4] = 2.0**-80, -(2.0**-80)
    found = w_a8.fma32(a, b, c)
    for x, y, z, result in zip(a, b, c, found, strict=True):
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        off = abs(Fraction(float(result)) - exact)
        for neighbour in (np.nextafter(result, np.float32(np.inf)), np.nextafter(result, np.float32(-np.inf))):
            assert off <= abs(Fraction(float(neighbour)) - exact)
    assert found[2] != found[3]  # the sign of 2^-80 decided


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_words_are_as_drawn(bits):
    """Output by output and column by column, after the drawing in w_a8.cu."""
    codes = np.random.default_rng(bits).integers(0, 2**bits, (70, 136), dtype=np.uint8)
    packed = w_a8.pack_mma8a1(codes, bits)
    assert packed.shape == (2, 3, 128 * bits)
    for n, k in np.ndindex(128, 192):
        code = int(codes[n, k]) if n < 70 and k < 136 else 2 ** (bits - 1)
        lane, piece = n % 8 * 4 + k % 16 // 4, n % 64 // 16
        if bits == 4:
            place, word = piece * 32 + lane, k % 64 // 16
            shift = k % 4 * 8 + (4 if n % 16 >= 8 else 0)
        else:
            place, word = (k % 64 // 32 * 4 + piece) * 32 + lane, k % 32 // 16 * 2 + n % 16 // 8
            shift = k % 4 * 8
        found = int(packed[n // 64, k // 64, place * 4 + word]) >> shift & (2**bits - 1)
        assert found == (code - 2 ** (bits - 1)) % 2**bits


@needs_library
@pytest.mark.parametrize("number", [1, 3, 8, 9, 11, 13, 16, 17])
def test_outputs_are_those_of_the_cpu_library(emulated, number):
    case = w_a8.CASES[number]
    operands = w_a8.make_operands(case, seed=4)
    found = multiply(emulated, case, operands, operands.x)
    scale = to_torch(operands.scale, case.scale_type).t()
    zero_point = None if operands.zero_point is None else torch.from_numpy(operands.zero_point).t()
    codes = torch.from_numpy(operands.codes)
    group_size = case.group_size
    packed = ops.pack_weight(codes, scale, zero_point, None, case.bits, group_size, ops.LAYOUT)
    bias = None if operands.bias is None else to_torch(operands.bias, case.type)
    x = to_torch(operands.x, case.type)
    expected = ops.linear_dynamic_int8(x, packed, bias, None, case.N, case.bits, group_size, ops.LAYOUT)
    assert torch.equal(to_torch(found, case.type).nan_to_num(7777), expected.nan_to_num(7777))


@pytest.mark.parametrize(("bits", "m"), [(bits, m) for bits in (4, 8) for m in (8, 16, 32, 64, 129)])
def test_every_code_and_zero_point_is_decoded_exactly(emulated, bits, m):
    """x of one 1 per row, scales 1: codes of x are 127, and y is the code less its zero point."""
    n, k = 64, 64
    codes = ((np.arange(n)[:, None] * 37 + np.arange(k)[None] * 3) % 2**bits).astype(np.uint8)
    zero_point = (np.arange(n)[None] * 5 % 2**bits).astype(np.uint8)
    case = w_a8.Case(m, n, k, bits, type=arrays.FLOAT32, scale_type=arrays.FLOAT32)
    x, scale = np.eye(k, dtype=np.float32)[np.arange(m) % k], np.full((1, n), 1, np.float32)
    nothing = np.zeros((1, 1))
    packed = w_a8.pack_mma8a1(codes, bits)
    operands = w_a8.Operands(x, codes, packed, scale, zero_point, None, nothing, nothing, nothing, nothing.astype("f4"))
    expected = (codes.T.astype(np.float32) - zero_point)[np.arange(m) % k] * np.float32(127)
    assert np.array_equal(multiply(emulated, case, operands, x), expected * (np.float32(1) / np.float32(127)))


@pytest.mark.parametrize(("bits", "k", "zero"), [(4, 131008, 0), (4, 131008, 15), (8, 65792, 0), (8, 65792, 255)])
def test_the_widest_group_does_not_overflow(emulated, bits, k, zero):
    """The largest sums there can be: all codes at one end of their range, the zero point at the other."""
    code = 2**bits - 1 - zero
    case = w_a8.Case(1, 8, k, bits, group_size=-1, type=arrays.FLOAT32, scale_type=arrays.FLOAT32)
    x, nothing = np.ones((1, k), np.float32), np.zeros((1, 1))
    operands = w_a8.Operands(
        *(x, nothing, w_a8.pack_mma8a1(np.full((8, k), code, np.uint8), bits)),
        *(np.ones((1, 8), np.float32), np.full((1, 8), zero, np.uint8), None),
        *(nothing, nothing, nothing, nothing.astype(np.float32)),
    )
    expected = np.float32(127 * (code - zero) * k) * (np.float32(1) / np.float32(127))
    assert (multiply(emulated, case, operands, x) == expected).all()


@pytest.mark.parametrize(("bits", "m"), [(4, 5), (4, 129), (8, 12), (8, 33)])
def test_nan_and_infinity_stay_in_their_rows(emulated, bits, m):
    case = w_a8.Case(m, 8, 128, bits, type=arrays.BFLOAT16)
    operands = w_a8.make_operands(case, seed=0)
    x = arrays.to_bits(np.random.default_rng(1).standard_normal((m, 128)), arrays.BFLOAT16)
    x[1, 3], x[3, 70] = 0x7FC0, 0xFF80  # NaN, -Inf
    result = arrays.to_float64(multiply(emulated, case, operands, x), arrays.BFLOAT16)
    broken = np.isin(np.arange(m), (1, 3))
    assert np.isnan(result[broken]).all()
    assert np.isfinite(result[~broken]).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_a_row_has_the_same_bits_in_every_kernel(emulated, bits):
    """Alone and among 7, 15, 31, 63 or 128 others: each number of rows is another kernel's."""
    case = w_a8.Case(129, 66, 584, bits, zero_points=True, bias=True)
    operands = w_a8.make_operands(case, seed=3)
    results = [multiply(emulated, case, operands, operands.x[:m])[:1] for m in (1, 8, 16, 32, 64, 129)]
    assert all(np.array_equal(result, results[0]) for result in results)
