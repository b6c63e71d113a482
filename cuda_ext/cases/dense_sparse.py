"""Products with weights as dense atoms, of which each output combines a few: dense_sparse.cu."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from compressor.kernels.cuda.interface import Kernels
from cuda_ext.cases import arrays
from cuda_ext.cases.arrays import (
    BFLOAT16,
    FLOAT16,
    OUTPUT_UNIT,
    SMALLEST,
    UNIT,
    Memory,
    to_bits,
    to_float64,
)

LANES, WARPS = 32, 8


def pack_ds1(index: NDArray, values: NDArray) -> NDArray:
    """index (N, B, k), values (N, B, k) uint16 -> uint32 (ceil(N / 32), B, k, 32); drawn in dense_sparse.cu."""
    out, blocks, k = index.shape
    padded = np.zeros((-(-out // LANES) * LANES, blocks, k), np.uint32)
    padded[:out] = index.astype(np.uint32) | values.astype(np.uint32) << np.uint32(16)
    return np.ascontiguousarray(padded.reshape(-1, LANES, blocks, k).transpose(0, 2, 3, 1))


@dataclass(frozen=True)
class Case:
    """One call of compressor_dense_sparse; steps: atoms and values are whole numbers up to 127."""

    M: int
    N: int
    B: int
    m: int
    w: int
    k: int
    type: int = FLOAT16
    steps: bool = False
    bias: bool = False
    positive: bool = False  # nothing cancels

    def __str__(self) -> str:
        extras = [name for name in ("steps", "bias", "positive") if getattr(self, name)]
        shape = f"{self.M}x{self.N}-{self.B}x{self.m}x{self.w}-k{self.k}"
        return "-".join(["dense_sparse", shape, ("f16", "bf16")[self.type], *extras])


# Tails of M, N, m and w; two blocks in each dimension of each grid. `responses` holds 3 tiles of 64 columns, so from 4
# on a stage is filled again; `combine` holds 2 stages of 4096 floats, so from 3 of them on.
CASES = (
    # one row
    Case(1, 33, 2, 5, 8, 1),
    Case(1, 40, 5, 2052, 16, 3, positive=True),  # a block of columns for each stage
    Case(1, 70, 11, 130, 40, 21, type=BFLOAT16, steps=True, bias=True),
    # up to 8
    Case(3, 32, 7, 100, 264, 9, positive=True),
    Case(8, 65, 3, 68, 72, 68, type=BFLOAT16, bias=True),
    Case(5, 1, 2, 513, 24, 2, steps=True),  # too many atoms for 8 rows at once
    # up to 64
    Case(33, 34, 9, 66, 200, 6, steps=True, bias=True),
    Case(9, 30, 7, 130, 328, 7, type=BFLOAT16, positive=True),
    # more
    Case(66, 260, 5, 40, 136, 5, bias=True, steps=True),
    Case(67, 20, 7, 260, 16, 4, type=BFLOAT16, positive=True),
)

# For a GPU only.
LARGE_CASES = (
    Case(1, 4096, 16, 192, 256, 24, bias=True),
    Case(16, 4096, 43, 160, 256, 16, type=BFLOAT16, steps=True),
    Case(300, 4096, 16, 256, 256, 32, type=BFLOAT16, bias=True),
)


@dataclass(frozen=True)
class Operands:
    """Arrays of a case in their quantization formats, and what has to come of them."""

    x: NDArray
    atoms: NDArray
    atom_step: NDArray | None
    entries: NDArray
    step: NDArray | None
    bias: NDArray | None
    expected: NDArray  # float64
    size: NDArray  # float64: the sum of the products' absolute values


def make_operands(case: Case, seed: int) -> Operands:
    """Random operands; each row of S names k different atoms, ascending."""
    random = np.random.default_rng([seed, case.M, case.N, case.B, case.m])
    names = random.random((case.N, case.B, case.m)).argpartition(case.k - 1, axis=2)[..., : case.k]
    index = np.sort(names, axis=2)
    shapes = {"x": (case.M, case.B * case.w), "atoms": (case.B, case.m, case.w), "values": index.shape}
    drawn = {name: random.standard_normal(shape) for name, shape in shapes.items()}
    atom_step = step = None
    if case.steps:
        drawn |= {name: random.integers(-127, 128, shapes[name]).astype(float) for name in ("atoms", "values")}
        atom_step = (random.random((case.B, case.m)) * 0.02 + 0.001).astype(np.float32)
        step = (random.random(case.N) * 0.02 + 0.001).astype(np.float32)
    if case.positive:
        drawn = {name: np.abs(array) for name, array in drawn.items()}
    stored = {name: to_bits(array, case.type) for name, array in drawn.items()}
    bias = to_bits(random.standard_normal(case.N), case.type) if case.bias else None

    x, atoms, values = (to_float64(stored[name], case.type) for name in ("x", "atoms", "values"))
    if atom_step is not None and step is not None:
        atoms, values = atoms * atom_step[..., None], values * step[:, None, None]
    b64 = np.zeros(case.N) if bias is None else to_float64(bias, case.type)
    expected, size = np.tile(b64, (case.M, 1)), np.tile(np.abs(b64), (case.M, 1))
    for b in range(case.B):
        part = x[:, b * case.w : (b + 1) * case.w]
        spread = np.zeros((case.N, case.m))
        np.put_along_axis(spread, index[:, b], values[:, b], axis=1)
        expected += part @ atoms[b].T @ spread.T
        size += np.abs(part) @ np.abs(atoms[b]).T @ np.abs(spread).T
    entries = pack_ds1(index, stored["values"])
    return Operands(stored["x"], stored["atoms"], atom_step, entries, step, bias, expected, size)


def bound(case: Case, operands: Operands, products_unit: float) -> NDArray:
    """How far y may be from `expected`, float64 (M, N).

    A product of 16-bit numbers is exact, and z passes at most w additions inside the mma, rounded up to whole tiles of
    64, each off by `products_unit`; then come the atom's step, one fma for each entry of an output, an addition for
    each part, the fma with step and bias, and the rounding to the type of y.
    """
    additions = case.B * case.k + WARPS + 2
    in_sums = (-(-case.w // 64) * 64 * products_unit + additions * UNIT) * operands.size
    return in_sums + OUTPUT_UNIT[case.type] * (np.abs(operands.expected) + in_sums) + SMALLEST[case.type]


launcher = partial(arrays.launcher, name="compressor_dense_sparse")


def workspace_bytes(kernels: Kernels, *shape: int) -> int:
    """What the call with M, N, B, m, w, k needs, or -1 for a bad shape."""
    return kernels.functions["compressor_dense_sparse_workspace_bytes"](*shape)


def run(kernels: Kernels, case: Case, memory: Memory, seed: int, stream: int = 0) -> NDArray:
    """Run the case and compare; raises AssertionError. The output and the workspace start as NaN.

    returns  y as stored, uint16 (M, N)
    """
    operands = make_operands(case, seed)
    given = (operands.x, operands.atoms, operands.atom_step, operands.entries, operands.step, operands.bias)
    placed = [None if array is None else memory.place(array) for array in given]
    y = memory.place(np.full((case.M, case.N), 0x7FFF, np.uint16))
    shape = (case.M, case.N, case.B, case.m, case.w, case.k)
    needed = workspace_bytes(kernels, *shape)
    workspace = memory.place(np.full(needed // 4, np.nan, np.float32))
    addresses = [p.address if p else None for p in [*placed, y, workspace]]
    code = launcher(kernels)(*addresses, needed, *shape, case.type, stream)
    assert code == 0, f"{case}: the launcher returned {code}"
    memory.wait()
    workspace.read()
    stored = np.array(y.read())
    off = np.abs(to_float64(stored, case.type) - operands.expected)
    right = off <= bound(case, operands, memory.products_unit)  # NaN is never right
    assert right.all(), (
        f"{case}, seed {seed}: {(~right).sum()} of {right.size} outputs are wrong, by up to {np.nanmax(off)}"
    )
    return stored
