"""Products of 4- and 8-bit weights with inputs rounded to int8: w_a8.cu. Outputs are the CPU library's bits."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from compressor.kernels.cuda.interface import Kernels
from cuda_ext.cases import arrays
from cuda_ext.cases.arrays import BFLOAT16, FLOAT16, FLOAT32, KINDS, Memory, assert_equal, to_bits, to_float64
from cuda_ext.cases.quantize_rows import round_rows

TILE = 64
LANE = np.arange(32)


def pack_mma8a1(codes: NDArray, bits: int) -> NDArray:
    """Unsigned codes, uint8 (N, K) -> uint32 (N / 64, K / 64, 128 * bits), both rounded up; drawn in w_a8.cu."""
    n, k = codes.shape
    middle = 2 ** (bits - 1)
    padded = np.full((-(-n // TILE) * TILE, -(-k // TILE) * TILE), middle, np.uint8)
    padded[:n, :k] = codes
    signed = padded ^ middle  # code - middle in two's complement of `bits` bits
    # [tile n, n / 16, n % 16, tile k, k / 32, k / 16 % 2, k / 4 % 4, byte]
    tiles = signed.reshape(len(padded) // TILE, 4, 16, -1, 2, 2, 4, 4)
    # [half of n, lane / 4] for n % 16 and [lane % 4] for k / 4 % 4
    tiles = tiles.reshape(len(tiles), 4, 2, 8, *tiles.shape[3:])
    if bits == 4:
        both = tiles[:, :, 0] | tiles[:, :, 1] << 4
        # [tile n, n / 16, lane / 4, tile k, k / 32, k / 16 % 2, lane % 4, byte] -> [.., n / 16, lane, word, byte]
        order = both.transpose(0, 3, 1, 2, 6, 4, 5, 7)
    else:
        # [tile n, n / 16, half, lane / 4, tile k, k / 32, k / 16 % 2, lane % 4, byte] -> [.., k / 32, n / 16, lane, ..]
        order = tiles.transpose(0, 4, 5, 1, 3, 7, 6, 2, 8)
    packed = np.ascontiguousarray(order).view("<u4")
    return packed.reshape(len(tiles), -1, 128 * bits)


@dataclass(frozen=True)
class Case:
    """One call of compressor_w_a8. group_size -1: one group."""

    M: int
    N: int
    K: int
    bits: int = 4
    group_size: int = 64
    type: int = FLOAT16
    scale_type: int = FLOAT16
    zero_points: bool = False
    bias: bool = False

    def __str__(self) -> str:
        extras = [name for name in ("zero_points", "bias") if getattr(self, name)]
        types = f"{KINDS[self.type]}-{KINDS[self.scale_type]}"
        return "-".join([f"w{self.bits}a8-{self.M}x{self.N}x{self.K}", f"g{self.group_size}", types, *extras])


# Tails of M, N and K, two blocks in each dimension of the grid, groups cut short by K. Pipelines hold 3 tiles, up to 16
# rows 4 stages of 4 (4 bits) or 2 tiles (8 bits). Groups of more than 128 columns convert their sums in another way.
CASES = (
    # up to 8 rows
    Case(1, 8, 8),
    Case(1, 66, 1096, group_size=128, zero_points=True, bias=True),
    Case(5, 72, 1544, group_size=-1, type=BFLOAT16, scale_type=BFLOAT16, zero_points=True, bias=True),
    Case(8, 64, 712, bits=8, type=BFLOAT16, scale_type=FLOAT32, zero_points=True),
    Case(3, 65, 328, bits=8, group_size=192, type=FLOAT32, scale_type=FLOAT32, bias=True),
    # up to 16
    Case(13, 70, 1288, type=FLOAT32, zero_points=True, bias=True),
    Case(16, 8, 640, group_size=-1),
    Case(9, 66, 584, bits=8, group_size=128, zero_points=True, bias=True),
    Case(11, 8, 712, bits=8, group_size=-1, zero_points=True),
    # up to 32
    Case(17, 130, 328, zero_points=True, bias=True),
    Case(32, 8, 648, group_size=-1, type=BFLOAT16, zero_points=True),
    Case(19, 66, 392, bits=8, type=FLOAT32, scale_type=FLOAT32, zero_points=True, bias=True),
    Case(23, 40, 328, bits=8, group_size=256, zero_points=True),
    # more
    Case(65, 136, 456, group_size=128, type=BFLOAT16, scale_type=BFLOAT16, zero_points=True, bias=True),
    Case(33, 8, 264, group_size=192, zero_points=True),
    Case(70, 130, 320, bits=8, zero_points=True, bias=True),
    Case(34, 8, 648, bits=8, group_size=-1, zero_points=True, bias=True),
    # more than 128, with 4 bits
    Case(130, 136, 328, zero_points=True, bias=True),
    Case(129, 8, 384, group_size=192, type=FLOAT32, zero_points=True),
)

# For a GPU only: many blocks at once.
LARGE_CASES = (
    Case(1, 8192, 8192, group_size=128, zero_points=True),
    Case(16, 4096, 11008, group_size=128, type=BFLOAT16, scale_type=BFLOAT16, bias=True),
    Case(300, 4096, 4096, group_size=128, zero_points=True),
    Case(300, 4096, 4096, bits=8, group_size=-1, type=BFLOAT16, scale_type=FLOAT32, bias=True),
)


def fma32(a: NDArray, b: NDArray, c: NDArray) -> NDArray:
    """a * b + c of float32, rounded once.

    The product is exact in float64. Their sum isn't always, and rounding it twice may be wrong, so it is rounded to odd
    first: to the neighbour with the last bit set where it isn't exact (Boldo and Melquiond 2008, "Emulation of FMA and
    correctly rounded sums": right with two bits more than the target, and here there are 29).
    """
    product, addend = a.astype(np.float64) * b, c.astype(np.float64)
    total = product + addend
    product, addend, total = np.broadcast_arrays(product, addend, total)
    virtual = total - product
    error = (product - (total - virtual)) + (addend - virtual)  # Knuth's TwoSum: exact
    bits = total.copy().view(np.int64)
    towards_zero = np.where((error > 0) == (total > 0), 1, -1)
    bits += np.where((error != 0) & (bits & 1 == 0) & np.isfinite(total), towards_zero, 0)
    return bits.view(np.float64).astype(np.float32)


@dataclass(frozen=True)
class Operands:
    """Arrays of a case in their quantization formats, and what has to come of them."""

    x: NDArray
    codes: NDArray  # unsigned
    packed: NDArray
    scale: NDArray
    zero_point: NDArray | None
    bias: NDArray | None
    x_codes: NDArray  # int8 (M, K rounded up to 64)
    x_scale: NDArray  # float32 (M)
    x_sum: NDArray  # int32 (M, groups)
    expected: NDArray  # (M, N) in the quantization format of the case's type


def make_operands(case: Case, seed: int) -> Operands:
    """Random operands; a row of zeros, one with an infinity, a scale of 0 and extreme zero points are among them."""
    random = np.random.default_rng([seed, case.M, case.N, case.K])
    group_size = case.group_size if case.group_size > 0 else -(-case.K // TILE) * TILE
    groups = -(-case.K // group_size)
    codes = random.integers(0, 2**case.bits, (case.N, case.K), dtype=np.uint8)
    scale = to_bits(random.random((groups, case.N)) * 0.02 + 0.01, case.scale_type)
    zero_point = None
    if case.zero_points:
        zero_point = random.integers(0, 2**case.bits, (groups, case.N), dtype=np.uint8)
        zero_point[-1, -2:] = 0, 2**case.bits - 1
        scale[0, 0] = 0
    x = random.standard_normal((case.M, case.K))
    x[-1, -1] = 9  # the last element is the largest
    if case.M > 3:
        x[1], x[2, 3] = 0, np.inf
        codes[-2:], x[3] = 2**case.bits - 1, 1 + np.abs(x[3]) / 64  # sums of the largest size, some above 2**24
    x = to_bits(x, case.type)
    bias = to_bits(random.standard_normal(case.N), case.type) if case.bias else None

    x_codes, x_scale = round_rows(to_float64(x, case.type))
    scales = to_float64(scale, case.scale_type)
    total, x_sum = np.zeros((case.M, case.N), np.float32), np.zeros((case.M, groups), np.int32)
    for j in range(groups):
        columns = slice(j * group_size, (j + 1) * group_size)
        zero = np.full(case.N, 2 ** (case.bits - 1)) if zero_point is None else zero_point[j].astype(np.int64)
        # sums of integers below 2^53: float64 has them exactly, whatever the order, and multiplies faster than int64
        exact = x_codes[:, columns].astype(np.float64) @ (codes[:, columns].astype(np.int64) - zero[:, None]).T
        total = fma32(exact.astype(np.float32), scales[j], total)
        x_sum[:, j] = x_codes[:, columns].astype(np.int64).sum(axis=1)
    y = total * x_scale[:, None]
    if bias is not None:
        y = y + to_float64(bias, case.type).astype(np.float32)
    padding = np.zeros((case.M, -case.K % TILE), np.int8)
    return Operands(
        x,
        codes,
        pack_mma8a1(codes, case.bits),
        scale,
        zero_point,
        bias,
        x_codes=np.concatenate([x_codes, padding], axis=1),
        x_scale=x_scale,
        x_sum=x_sum,
        expected=to_bits(y, case.type),
    )


launcher = partial(arrays.launcher, name="compressor_w_a8")


def run(kernels: Kernels, case: Case, memory: Memory, seed: int, stream: int = 0) -> NDArray:
    """Run the case and compare; raises AssertionError. The output starts as NaN, so all of it has to be written.

    returns  y as stored, (M, N)
    """
    operands = make_operands(case, seed)
    x_sum = operands.x_sum if case.zero_points else None
    given = (operands.x_codes, operands.x_scale, x_sum, operands.packed, operands.scale, operands.zero_point)
    placed = [None if array is None else memory.place(array) for array in (*given, operands.bias)]
    y = memory.place(to_bits(np.full((case.M, case.N), np.nan), case.type))
    addresses = [p.address if p else None for p in [*placed, y]]
    sizes = (case.M, case.N, case.K, case.bits, case.group_size, case.scale_type, case.type)
    code = launcher(kernels)(*addresses, *sizes, stream)
    assert code == 0, f"{case}: the launcher returned {code}"
    memory.wait()
    stored = np.array(y.read())
    assert_equal(f"{case}, seed {seed}", stored, operands.expected, case.type)
    return stored
