"""Multiplies quantized weights with torch's own matmuls, for installations without the CPU library.

    layout           op                   weights it takes
    torch_int4       linear_weight_only   4 bits, groups of 32 to 256, float32 inputs   _weight_int4pack_mm_for_cpu
    torch_int8       linear_weight_only   8 bits, rows, symmetric, float32 inputs       _weight_int8pack_mm
    torch_int8_rows  linear_dynamic_int8  8 bits, rows, symmetric                       _int_mm, where it is exact

With 16-bit inputs torch rounds the sum before the bias is added, and rounds scales to 16 bits. The results differ, so
these are not used. The packed weight is one tensor: the scales, then the codes in torch's layout.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.errors import KernelError
from compressor.kernels.ops.int8_split import MOST_INPUTS, int_mm_is_exact, round_rows

INT4, INT8, INT8_ROWS = LAYOUTS = "torch_int4", "torch_int8", "torch_int8_rows"
GROUPS = (32, 64, 128, 256)  # of torch's int4 matmul
OUTPUTS = 16  # the number of outputs must be a multiple of it


def layout_for(
    op: str, bits: int, group_size: int, shape: tuple[int, int], centred: bool, inputs: torch.dtype | None
) -> tuple[str | None, str]:
    """The layout for a weight, or None, and the reason.

    shape    (out, in)
    centred  whether all zero points are 2**(bits - 1)
    inputs   dtype of x; None: unknown
    """
    out, columns = shape
    if bits == 8 and group_size == -1 and centred:
        if op == "linear_dynamic_int8":
            exact = int_mm_is_exact() and 1 < columns <= MOST_INPUTS  # torch 2.13 gives wrong results for one column
            return (INT8_ROWS, "") if exact else (None, f"torch's product isn't exact for {columns} inputs here")
        if inputs == torch.float32:
            return INT8, ""
        return None, f"torch's int8 product rounds sums of {inputs} inputs before the bias"
    if op == "linear_weight_only" and bits == 4:
        if inputs != torch.float32:
            return None, f"torch's int4 product rounds scales and sums of {inputs} inputs"
        if group_size in GROUPS and columns % group_size == 0 and out % OUTPUTS == 0:
            return INT4, ""
        return None, (
            f"torch's int4 product wants groups of {', '.join(map(str, GROUPS))} that divide the inputs, and outputs "
            f"a multiple of {OUTPUTS}; these are {out} x {columns} in groups of {group_size}"
        )
    return None, f"torch has no {op} of {bits} bits in groups of {group_size}{'' if centred else ' with zero points'}"


def pack(codes: Tensor, scale: Tensor, zero_point: Tensor | None, layout: str) -> Tensor:
    """codes (out, in) uint8, scale (out, groups), zero_point (out, groups) uint8 or None -> uint8 (bytes,)"""
    if layout == INT4:
        weight = torch._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
        scale = scale.float()
        # torch multiplies by (code - 8) * scale + zero
        zeros = torch.zeros_like(scale) if zero_point is None else (8 - zero_point.float()) * scale
        scales = torch.stack([scale.t(), zeros.t()], -1)
    else:
        weight, scales = (codes.to(torch.int16) - 128).to(torch.int8), scale.float()
    return torch.cat([part.contiguous().flatten().view(torch.uint8) for part in (scales, weight)])


def _linear(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    permutation: Tensor | None,
    out_features: int,
    bits: int,
    group_size: int,
    layout: str,
) -> Tensor:
    """x (..., in) -> (..., out) in the dtype of x. Sums and scales are float32; the bias is added before rounding."""
    if permutation is not None:
        x = x.index_select(-1, permutation)
    rows = x.reshape(-1, x.shape[-1])
    columns = rows.shape[1]
    groups = columns // group_size if layout == INT4 else 1
    at = 4 * groups * out_features * (2 if layout == INT4 else 1)
    scales = packed[:at].view(torch.float32)
    if not len(rows):
        y = rows.new_empty(0, out_features, dtype=torch.float32)
    elif layout == INT8_ROWS:
        codes, absmax = round_rows(rows.float())
        sums = torch._int_mm(codes, packed[at:].view(torch.int8).view(out_features, columns).t())
        y = sums.float() * (absmax / 127).unsqueeze(1) * scales
    elif rows.dtype != torch.float32:
        raise KernelError(
            f"{layout} takes float32 inputs, these are {rows.dtype}",
            hint="Call `prepare` again after the model's dtype has changed, or convert the inputs to float32.",
            data={"layout": layout, "dtype": str(rows.dtype)},
        )
    elif layout == INT8:
        y = torch._weight_int8pack_mm(rows, packed[at:].view(torch.int8).view(out_features, columns), scales)
    else:
        weight = packed[at:].view(out_features, columns // 2)
        y = torch._weight_int4pack_mm_for_cpu(rows, weight, group_size, scales.view(groups, out_features, 2))
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype).view(*x.shape[:-1], out_features)


RUN = {"linear_weight_only": _linear, "linear_dynamic_int8": _linear}
