"""The weight-only CUDA matmul, emulated: decoding, hostile rows."""

from __future__ import annotations

import numpy as np
import pytest

from cuda_ext.cases import arrays, w_a16


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_code_and_zero_point_is_decoded_exactly(emulated, bits):
    """x of one 1 per row, scale 1: y is the code less its zero point, and exact in both types."""
    n, k = 64, 64
    codes = (np.arange(n)[:, None] * 7 + np.arange(k)[None] * 3) % 2**bits
    zero_point = (np.arange(n) * (5 if bits == 8 else 1) % 2**bits).astype(np.uint8)[None]
    zero_point[0, -1] = 2**bits - 1
    for kind, m in [(kind, m) for kind in (arrays.FLOAT16, arrays.BFLOAT16) for m in (8, 16, 32, 64)]:
        memory = arrays.GuardedMemory()
        given = [
            memory.place(arrays.to_bits(np.eye(k)[-m:], kind)),
            memory.place(w_a16.pack_mma1(codes.astype(np.uint8), bits)),
            memory.place(arrays.to_bits(np.ones((1, n)), arrays.FLOAT32)),
            memory.place(zero_point),
        ]
        y = memory.place(np.full((m, n), 0x7FFF, np.uint16))
        addresses = [p.address for p in given]
        assert w_a16.launcher(emulated)(*addresses, None, y.address, None, 0, m, n, k, bits, 64, kind, 2, None) == 0
        assert (arrays.to_float64(y.read(), kind) == codes.T[-m:] - zero_point.astype(float)).all()


def test_nan_and_infinity_stay_in_their_rows(emulated):
    case = w_a16.Case(5, 8, 128)
    operands = w_a16.make_operands(case, seed=0)
    operands.x[1, 3], operands.x[3, 70] = 0x7E00, 0x7C00  # NaN, +Inf
    memory = arrays.GuardedMemory()
    given = [memory.place(a) for a in (operands.x, operands.packed, operands.scale)]
    y = memory.place(np.full((5, 8), 0x7FFF, np.uint16))
    addresses = [p.address for p in given]
    assert w_a16.launcher(emulated)(*addresses, None, None, y.address, None, 0, 5, 8, 128, 4, 64, 0, 0, None) == 0
    result = arrays.to_float64(y.read(), arrays.FLOAT16)
    assert np.isnan(result[1]).all()
    assert not np.isfinite(result[3]).any()
    assert np.isfinite(result[[0, 2, 4]]).all()


def test_the_rows_of_a_call_do_not_see_each_other(emulated):
    """The same row alone and among others: the same bits, as long as the same kernel takes both."""
    operands = w_a16.make_operands(w_a16.Case(8, 66, 1032), seed=3)
    results = []
    for rows in (slice(0, 8), slice(2, 3)):
        given = [arrays.GuardedArray(a) for a in (operands.x[rows], operands.packed, operands.scale)]
        m = len(operands.x[rows])
        y, sums = (
            arrays.GuardedArray(np.zeros((m, 66), np.uint16)),
            arrays.GuardedArray(np.zeros(2 * 66 * m, np.float32)),
        )
        addresses = [*(g.address for g in given), None, None, y.address, sums.address]
        assert w_a16.launcher(emulated)(*addresses, 8 * 66 * m, m, 66, 1032, 4, 64, 0, 0, None) == 0
        results.append(y.read())
    assert (results[0][2] == results[1][0]).all()
