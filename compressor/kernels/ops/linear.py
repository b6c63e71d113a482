"""Registers the linear operations of this package under `torch.ops.compressor`, with shapes for tracing.

    pack_weight           codes, scales and zero points -> one packed tensor, which a kernel reads sequentially
    unpack_weight         the inverse
    linear_weight_only    x @ W.T, weight-only (W2A16, W3A16, W4A16, W8A16)
    linear_int8_outlier   LLM.int8(): int8 matmul with columns of large magnitude in floating point, in one call
    linear_dynamic_int8   x @ W.T with dynamic activation quantization: rows of x are rounded to int8 by their own
                          largest magnitude (W2A8 to W8A8)

x (..., in) is float32, bfloat16 or float16 and may be strided; y (..., out) has its dtype. Sums and scales are float32,
the bias (out,) is added in float32, and y is rounded once. Results don't depend on the instruction level, the number
of threads or the other rows of x. docs/kernels.md shows layout "cpu2". None of them has a gradient.

On the CPU they use the compiled library; without it they raise KernelError with the reason. On CUDA devices
`compressor.kernels.cuda.ops` implements them, in the layouts of CUDA_LAYOUTS.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from compressor.errors import KernelError, ShapeError
from compressor.kernels.cpu import required_library as cpu_library
from compressor.kernels.cpu.reserved_threads import reserved_threads
from compressor.kernels.cuda import mma1, mma8a1
from compressor.kernels.ops.checks import operands
from compressor.kernels.ops.large_pages import empty_bytes
from compressor.kernels.ops.registry import register, register_cuda

LAYOUT = "cpu2"
CUDA_LAYOUTS = {mma1.LAYOUT: mma1, mma8a1.LAYOUT: mma8a1}  # linear_weight_only, linear_dynamic_int8
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
BITS = {"linear_weight_only": (2, 3, 4, 8), "linear_dynamic_int8": (2, 3, 4, 8)}
ON_CPU = "Move x and the weight to the CPU; call `prepare` again for a model that was moved."
BYTES_A_THREAD = 256 * 1024  # of packed weight; for less, waking another thread costs more than it saves
groups_of = mma1.groups_of  # groups of a row; group_size -1 is the whole row


def group_columns(in_features: int, group_size: int) -> int:
    """Columns of a group in the kernels: a multiple of 8."""
    return -(-in_features // 8) * 8 if group_size == -1 else group_size


def _check_layout(layout: str, tensor: Tensor) -> None:
    if layout != LAYOUT:
        raise ShapeError(
            f"packed layout {layout!r}, {', '.join(map(repr, (LAYOUT, *CUDA_LAYOUTS)))} expected",
            data={"reason": "layout", "layout": layout},
        )
    if not tensor.is_cpu:
        raise KernelError(
            f"a weight of layout {LAYOUT!r} is on {tensor.device}, and the CPU library needs it on the CPU",
            hint=f"Use layout {' or '.join(map(repr, CUDA_LAYOUTS))} for a weight on a GPU.",
            data={"layout": LAYOUT, "device": str(tensor.device)},
        )


def pack_weight(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    permutation: Tensor | None,
    bits: int,
    group_size: int,
    layout: str,
) -> Tensor:
    """Pack codes in the order in which the kernels read them.

    codes        (out, in) uint8 in [0, 2**bits - 1]
    scale        (out, groups) float32, bfloat16 or float16, stored unchanged
    zero_point   (out, groups) uint8; None: 2**(bits - 1)
    permutation  (in,) int64: columns in the order in which they form groups; None: the original order
    group_size   a multiple of 8, or -1 for whole rows; the last group may be short
    layout       "cpu2" for the CPU library. For CUDA kernels, with group_size a multiple of 64 or -1: "mma1" for
                 linear_weight_only; "mma8a1" for linear_dynamic_int8, 4 or 8 bits
    returns      uint8 (bytes,), on the device of the codes
    raises       ShapeError, KernelError for layout "cpu2" on another device, or tensors on several
    """
    if codes.dim() != 2 or (group_size < 1 and group_size != -1):
        raise ShapeError(
            f"codes {tuple(codes.shape)}, groups of {group_size}: (out, in), and 1 and more or -1 expected",
            data={"reason": "codes", "codes": list(codes.shape), "group_size": group_size},
        )
    out, columns = codes.shape
    if permutation is not None and (tuple(permutation.shape) != (columns,) or permutation.dtype != torch.int64):
        found = permutation.dtype, tuple(permutation.shape)
        raise ShapeError(
            f"permutation {found}: int64 {(columns,)} expected for codes {(out, columns)}",
            data={"codes": [out, columns], **operands(permutation=permutation)},
        )
    places = {str(tensor.device) for tensor in (codes, scale, zero_point, permutation) if tensor is not None}
    if len(places) > 1:
        hint = "Move all four to the device of the codes."
        message = f"codes, scale, zero point and permutation on {sorted(places)}"
        raise KernelError(message, hint=hint, data={"devices": sorted(places)})
    expected = (out, groups_of(columns, group_size))
    if tuple(scale.shape) != expected or (zero_point is not None and tuple(zero_point.shape) != expected):
        zeros = "none" if zero_point is None else tuple(zero_point.shape)
        raise ShapeError(
            f"scale {tuple(scale.shape)}, zero point {zeros}: {expected} expected for codes {(out, columns)}",
            data={"expected": list(expected), **operands(codes=codes, scale=scale, zero_point=zero_point)},
        )
    if (
        codes.dtype != torch.uint8
        or scale.dtype not in DTYPES
        or (zero_point is not None and zero_point.dtype != torch.uint8)
    ):
        kinds = codes.dtype, scale.dtype, None if zero_point is None else zero_point.dtype
        raise ShapeError(
            f"codes, scale and zero point are {kinds}; uint8, a 16- or 32-bit float and uint8 expected",
            data={"reason": "dtypes", **operands(codes=codes, scale=scale, zero_point=zero_point)},
        )
    if codes.numel() and int(codes.max()) >> bits:
        largest = int(codes.max())
        raise ShapeError(f"code {largest} doesn't fit {bits} bits", data={"code": largest, "bits": bits})
    if permutation is not None:
        codes = codes.index_select(1, permutation)
    if layout in CUDA_LAYOUTS:
        return CUDA_LAYOUTS[layout].pack(codes, scale, zero_point, bits, group_size)
    _check_layout(layout, codes)
    functions = cpu_library().functions
    size = functions.packed_bytes(out, columns, bits, group_columns(columns, group_size), DTYPES[scale.dtype])
    if size < 0:
        raise ShapeError(
            f"no layout {LAYOUT} for {out} x {columns}, {bits} bits, groups of {group_size}",
            data={"reason": "no-layout", **_sizes(out, columns, bits, group_size, LAYOUT)},
        )
    packed = empty_bytes(size)
    codes, scale = codes.contiguous(), scale.contiguous()
    zero_point = None if zero_point is None else zero_point.contiguous()
    zeros_at = 0 if zero_point is None else zero_point.data_ptr()
    functions.pack_weight(
        torch.get_num_threads(), codes.data_ptr(), scale.data_ptr(), zeros_at, packed.data_ptr(), out, columns, bits,
        group_columns(columns, group_size), DTYPES[scale.dtype],
    )  # fmt: skip
    return packed


def unpack_weight(
    packed: Tensor, out_features: int, in_features: int, bits: int, group_size: int, layout: str
) -> tuple[Tensor, Tensor, Tensor]:
    """codes (out, in) uint8 in packed order, scale (out, groups) float32, zero_point (out, groups) uint8

    raises  ShapeError if the packed tensor has another shape, dtype or layout
    """
    if packed.dtype != torch.uint8 or (group_size < 1 and group_size != -1) or min(out_features, in_features) < 0:
        raise _unlike(packed, out_features, in_features, bits, group_size, layout)
    if layout in CUDA_LAYOUTS:
        if (found := CUDA_LAYOUTS[layout].unpack(packed, out_features, in_features, bits, group_size)) is None:
            raise _unlike(packed, out_features, in_features, bits, group_size, layout)
        return found
    _check_layout(layout, packed)
    packed = packed.contiguous()
    groups, group = groups_of(in_features, group_size), group_columns(in_features, group_size)
    codes = packed.new_empty(out_features, in_features)
    scale = packed.new_empty(out_features, groups, dtype=torch.float32)
    zero_point = packed.new_empty(out_features, groups)
    arguments = packed.data_ptr(), packed.numel(), out_features, in_features, bits, group
    places = codes.data_ptr(), scale.data_ptr(), zero_point.data_ptr()
    if cpu_library().functions.unpack_weight(torch.get_num_threads(), *arguments, *places):
        raise _unlike(packed, out_features, in_features, bits, group_size)
    return codes, scale, zero_point


def _sizes(out: int, columns: int, bits: int, group_size: int, layout: str) -> dict[str, Any]:
    return {"out": out, "columns": columns, "bits": bits, "group_size": group_size, "layout": layout}


def _unlike(
    packed: Tensor,
    out_features: int,
    in_features: int,
    bits: int,
    group_size: int,
    layout: str = LAYOUT,
    *,
    op: str | None = None,
    x: Tensor | None = None,
) -> ShapeError:
    call = {} if op is None else {"op": op}
    shown = "" if x is None else f"{op}: x {tuple(x.shape)}; "
    return ShapeError(
        shown
        + f"packed weight of {packed.numel()} bytes ({packed.dtype}) isn't one of {out_features} x {in_features}, "
        f"{bits} bits, groups of {group_size} in layout {layout}",
        data={
            "reason": "packed",
            **call,
            **({} if x is None else operands(x=x)),
            "bytes": packed.numel(),
            "dtype": str(packed.dtype),
            **_sizes(out_features, in_features, bits, group_size, layout),
        },
    )


def _check_call(name: str, x: Tensor, packed: Tensor, *more: Tensor | None) -> None:
    """raises RuntimeError if a gradient is needed, KernelError for tensors that are not on the CPU"""
    if x.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(f"{name} has no gradient: call it under no_grad, or multiply by the dequantized weight")
    if not (x.is_cpu and packed.is_cpu):
        places = {"x": str(x.device), "weight": str(packed.device)}
        message = f"{name}: x on {x.device}, weight on {packed.device}"
        raise KernelError(message, hint=ON_CPU, data={"op": name, "devices": places})
    if more and not all(tensor is None or tensor.is_cpu for tensor in more):
        elsewhere = sorted({str(tensor.device) for tensor in more if tensor is not None})
        raise KernelError(
            f"{name}: x and weight on the CPU, others on {elsewhere}",
            hint="Move the others to the CPU too, with .cpu().",
            data={"op": name, "others": elsewhere},
        )


def check_bias(name: str, bias: Tensor | None, out: int) -> None:
    if bias is not None and (tuple(bias.shape) != (out,) or bias.dtype not in DTYPES or not bias.is_cpu):
        raise ShapeError(
            f"{name}: bias {bias.dtype} {tuple(bias.shape)} on {bias.device}, ({out},) expected",
            data={"op": name, "out": out, "device": str(bias.device), **operands(bias=bias)},
        )


def threads_for(size: int) -> int:
    """Number of threads for the work on this many bytes."""
    most = size // BYTES_A_THREAD
    return min(reserved_threads() or torch.get_num_threads(), most) if most > 1 else 1


def _linear(name: str) -> Callable[..., Tensor]:
    allowed = BITS[name]

    @cache
    def compiled() -> tuple[Callable[..., int], int]:
        found = cpu_library()
        return getattr(found.functions, name), found.level

    def linear(
        x: Tensor,
        packed: Tensor,
        bias: Tensor | None,
        permutation: Tensor | None,
        out_features: int,
        bits: int,
        group_size: int,
        layout: str,
    ) -> Tensor:
        _check_call(name, x, packed, permutation)
        kind = DTYPES.get(x.dtype)
        if kind is None or layout != LAYOUT or bits not in allowed or packed.dtype != torch.uint8 or not x.dim():
            raise ShapeError(
                f"{name}: x {x.dtype} {tuple(x.shape)}, packed {packed.dtype}, {bits} bits, layout {layout!r}; "
                f"a float x, uint8, bits of {allowed} and {LAYOUT!r} expected",
                data={"op": name, "bits": bits, "layout": layout, **operands(x=x, packed=packed)},
            )
        if permutation is not None:
            x = x.index_select(-1, permutation)
        x, packed = x.contiguous(), packed.contiguous()
        columns = x.shape[-1]
        y = x.new_empty((*x.shape[:-1], out_features))
        bias_at, bias_kind = 0, 0
        if bias is not None:
            check_bias(name, bias, out_features)
            bias = bias.contiguous()
            bias_at, bias_kind = bias.data_ptr(), DTYPES[bias.dtype]
        run, level = compiled()
        size = packed.numel()
        error = run(
            level, threads_for(size), x.data_ptr(), kind, packed.data_ptr(), size, bias_at, bias_kind, y.data_ptr(),
            x.numel() // columns if columns else 0, out_features, columns, bits, group_columns(columns, group_size),
        )  # fmt: skip
        if error:
            raise _unlike(packed, out_features, columns, bits, group_size, op=name, x=x)
        return y

    return linear


def pack_int8_rows(codes: Tensor, absmax: Tensor) -> Tensor:
    """The weight of linear_int8_outlier: codes (out, in) int8 in [-127, 127], absmax (out,) float32."""
    unsigned = (codes.to(torch.int16) + 128).to(torch.uint8)
    return pack_weight(unsigned, (absmax / 127).unsqueeze(1), None, None, 8, -1, LAYOUT)


def linear_int8_outlier(
    x: Tensor,
    packed: Tensor,
    weight_absmax: Tensor,
    outlier_columns: Tensor | None,
    outlier_weight: Tensor | None,
    bias: Tensor | None,
    threshold: float,
) -> Tensor:
    """The forward pass of the format int8_split_linear (`compressor.layers.int8_split_linear`) in one call.

    x                (..., in)
    packed           of pack_int8_rows; on CUDA the codes, int8 (out, in)
    weight_absmax    (out,) float32
    outlier_columns  (k,) int64, on CUDA int32, calibrated; None: columns with any |x| >= threshold, none for 0
    outlier_weight   (out, k), those columns of the weight; with outlier_columns
    returns          (..., out) in the dtype of x; other tokens change a token's bits only through the outlier columns
    """
    _check_call("linear_int8_outlier", x, packed, weight_absmax, outlier_columns, outlier_weight)
    out = weight_absmax.numel()
    columns = x.shape[-1] if x.dim() else 0
    count = 0 if outlier_columns is None else outlier_columns.numel()
    fits = (
        x.dtype in DTYPES
        and x.dim() > 0
        and packed.dtype == torch.uint8
        and weight_absmax.dtype == torch.float32
        and weight_absmax.dim() == 1
        and (outlier_columns is None) == (outlier_weight is None)
        and (outlier_columns is None or (outlier_columns.dtype == torch.int64 and outlier_columns.dim() == 1))
        and (outlier_weight is None or (tuple(outlier_weight.shape) == (out, count) and outlier_weight.dtype in DTYPES))
    )
    if not fits:
        found_ones: dict[str, Tensor | None] = {"x": x, "packed": packed, "absmax": weight_absmax}
        found_ones |= {"columns": outlier_columns, "weight": outlier_weight}
        shapes = [None if t is None else f"{t.dtype} {tuple(t.shape)}" for t in found_ones.values()]
        raise ShapeError(
            f"linear_int8_outlier: x, packed, absmax, columns and their weight are {shapes}",
            data={"op": "linear_int8_outlier", "operands": operands(**found_ones)},
        )
    check_bias("linear_int8_outlier", bias, out)
    kept = [
        None if t is None else t.contiguous() for t in (x, packed, weight_absmax, outlier_columns, outlier_weight, bias)
    ]
    at = [0 if tensor is None else tensor.data_ptr() for tensor in kept]
    y = x.new_empty((*x.shape[:-1], out))
    found = cpu_library()
    size = packed.numel()
    error = found.functions.linear_int8_outlier(
        found.level, threads_for(size), at[0], DTYPES[x.dtype], at[1], size,
        at[2], at[3], count, at[4], DTYPES[outlier_weight.dtype] if outlier_weight is not None else 0,
        at[5], DTYPES[bias.dtype] if bias is not None else 0, y.data_ptr(),
        x.numel() // columns if columns else 0, out, columns,
        float(threshold) if outlier_columns is None else 0.0,
    )  # fmt: skip
    if error:
        raise _unlike(packed, out, columns, 8, -1, op="linear_int8_outlier", x=x)
    return y


def _fake_outlier(
    x: Tensor,
    packed: Tensor,
    weight_absmax: Tensor,
    outlier_columns: Tensor | None,
    outlier_weight: Tensor | None,
    bias: Tensor | None,
    threshold: float,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight_absmax.shape[0]))


def _fake_linear(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    permutation: Tensor | None,
    out_features: int,
    bits: int,
    group_size: int,
    layout: str,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def _fake_unpack(
    packed: Tensor, out_features: int, in_features: int, bits: int, group_size: int, layout: str
) -> tuple[Tensor, Tensor, Tensor]:
    groups = groups_of(in_features, group_size)
    return (
        packed.new_empty((out_features, in_features)),
        packed.new_empty((out_features, groups), dtype=torch.float32),
        packed.new_empty((out_features, groups)),
    )


def _fake_pack(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    permutation: Tensor | None,
    bits: int,
    group_size: int,
    layout: str,
) -> Tensor:
    out, columns = codes.shape
    if layout in CUDA_LAYOUTS:
        packed_bytes = CUDA_LAYOUTS[layout].packed_bytes
        size = packed_bytes(out, columns, group_size, scale.dtype, zero_point is not None, bits)
        return codes.new_empty((size,))
    group = group_columns(columns, group_size)
    block = group * 8 * bits + 64 * scale.element_size() + 64
    return codes.new_empty((64 + -(-out // 64) * -(-columns // group) * block,))


_LINEAR = (
    "(Tensor x, Tensor packed, Tensor? bias, Tensor? permutation, SymInt out_features, int bits, int group_size, "
    "str layout) -> Tensor"
)


register(
    "pack_weight",
    "(Tensor codes, Tensor scale, Tensor? zero_point, Tensor? permutation, int bits, int group_size, str layout)"
    " -> Tensor",
    pack_weight,
    _fake_pack,
)
register(
    "unpack_weight",
    "(Tensor packed, SymInt out_features, SymInt in_features, int bits, int group_size, str layout)"
    " -> (Tensor codes, Tensor scale, Tensor zero_point)",
    unpack_weight,
    _fake_unpack,
)
register_cuda("pack_weight", pack_weight)
register_cuda("unpack_weight", unpack_weight)
linear_weight_only = _linear("linear_weight_only")
linear_dynamic_int8 = _linear("linear_dynamic_int8")
register("linear_weight_only", _LINEAR, linear_weight_only, _fake_linear)
register("linear_dynamic_int8", _LINEAR, linear_dynamic_int8, _fake_linear)
register(
    "linear_int8_outlier",
    "(Tensor x, Tensor packed, Tensor weight_absmax, Tensor? outlier_columns, Tensor? outlier_weight, Tensor? bias, "
    "float threshold) -> Tensor",
    linear_int8_outlier,
    _fake_outlier,
)
