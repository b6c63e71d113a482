"""The CUDA Hadamard product, emulated: bad calls."""

from __future__ import annotations

import numpy as np
import pytest

from cuda_ext.cases import arrays, hadamard


# rows, n, scale, type
@pytest.mark.parametrize(
    "bad", [(-1, 8, 1, 2), (1, 4, 1, 2), (1, 24, 1, 2), (1, 65536, 1, 2), (1, 0, 1, 2), (1, 8, 1, 3)]
)
def test_bad_hadamard_shapes_return_minus_one(emulated, bad):
    x = arrays.GuardedArray(np.zeros(8, np.float32))
    assert hadamard.launcher(emulated)(x.address, x.address, *bad, None) == -1


def test_bad_hadamard_addresses_return_minus_one(emulated):
    x = arrays.GuardedArray(np.zeros(8, np.float32)).address
    launch = hadamard.launcher(emulated)
    assert [launch(*a, 1, 8, 1, 2, None) for a in ((None, x), (x, None), (x + 4, x), (x, x + 4))] == [-1] * 4
    assert launch(None, None, 0, 8, 1, 2, None) == 0
