"""Small products of each operation at each level of instructions, held to the reference: is the library sound?"""

from __future__ import annotations

import torch

from compressor.kernels import ops
from compressor.kernels.cpu import LEVELS, levels_here
from compressor.kernels.int8_split import round_rows

ROWS, OUT, COLUMNS, GROUP = 14, 70, 96, 32
FEW = 2  # without VNNI few and many rows are multiplied in different ways


def self_test() -> dict[str, str]:
    """ "op, level" -> "ok", or how far it was from the reference

    raises KernelError if the library isn't there
    """
    found: dict[str, str] = {}
    functions = ops.cpu_library().functions
    made = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, COLUMNS, generator=made)
    for name, widths in ops.BITS.items():
        for bits in widths:
            codes = torch.randint(0, 2**bits, (OUT, COLUMNS), generator=made, dtype=torch.uint8)
            scale = torch.rand(OUT, COLUMNS // GROUP, generator=made) + 0.5
            zeros = torch.randint(0, 2**bits, scale.shape, generator=made, dtype=torch.uint8)
            packed = ops.pack_weight(codes, scale, zeros, None, bits, GROUP, ops.LAYOUT)
            index = torch.arange(COLUMNS) // GROUP
            weight = (codes.double() - zeros.double()[:, index]) * scale.double()[:, index]
            inputs = x.double()
            if name == "linear_dynamic_int8":
                rounded, absmax = round_rows(x)
                inputs = rounded.double() * (absmax / 127).double().unsqueeze(1)
            size = inputs.abs() @ weight.abs().t()
            for level in levels_here(functions):
                y = torch.full((ROWS, OUT), torch.nan)
                errors = [
                    getattr(functions, name)(
                        level, 1, rows.data_ptr(), 0, packed.data_ptr(), packed.numel(), 0, 0, to.data_ptr(),
                        len(rows), OUT, COLUMNS, bits, GROUP,
                    )
                    for rows, to in ((x[:FEW], y[:FEW]), (x[FEW:], y[FEW:]))
                ]  # fmt: skip
                distance = float(((y.double() - inputs @ weight.t()).abs() / size).max())
                # the bounds of the ops (docs/kernels.md) are below this
                sound = not any(errors) and distance <= 16 * GROUP * 2.0**-24
                found[f"{name} {bits} bits, {LEVELS[level]}"] = (
                    "ok" if sound else f"errors {errors}, relative distance {distance:.3g}"
                )
    return found
