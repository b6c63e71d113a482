"""Implements the operations of compressor.kernels.ops.linear for CUDA devices with the CUDA launchers.

x may be strided; y has its dtype. Sums are float32 or exact, the bias is added in float32, and y is rounded once. The
operations allocate with torch, use torch's current stream and don't wait, so a CUDA graph can contain them. None of
them has a gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from compressor.errors import KernelError, ShapeError
from compressor.kernels.cuda import devices, ds1, mma1, mma8a1
from compressor.kernels.cuda.interface import DTYPES
from compressor.kernels.cuda.plans import hadamard_factor
from compressor.kernels.ops.checks import check_cuda_call
from compressor.kernels.ops.registry import register_cuda

# op -> the layout of its weights, the dtypes of its inputs
LAYOUTS = {
    "linear_weight_only": mma1.LAYOUT,
    "linear_dynamic_int8": mma8a1.LAYOUT,
    "linear_int8_outlier": "int8_rows",
    "linear_dense_sparse": ds1.LAYOUT,
}
INPUTS = {
    "linear_weight_only": (torch.float16, torch.bfloat16),
    "linear_dynamic_int8": tuple(DTYPES),
    "linear_int8_outlier": tuple(DTYPES),
    "linear_dense_sparse": ds1.DTYPES,
}
# as in plans. Checked here too, since ctypes truncates larger ints
MOST_OUTPUTS, MOST_COLUMNS = 65535 * 64, 1 << 30
MOST_INT8_COLUMNS = 65536  # int8_outlier.cu: MAX_COLUMNS
MOST_ROWS = 2**31 - 128  # launchers round them up to blocks of 128 rows or less, in an int


def refusal(
    op: str, out_features: int, in_features: int, bits: int, group_size: int, inputs: torch.dtype | None
) -> str | None:
    """The reason why no CUDA kernel computes `op` for a weight; None if one does. inputs: the dtype of x, None if it is
    unknown. For factors of linear_dense_sparse: `ds1.refusal`."""
    if op == "linear_weight_only":
        reason = mma1.refusal(bits, group_size)
    elif op == "linear_dynamic_int8":
        reason = mma8a1.refusal(in_features, bits, group_size)
    else:
        reason = None  # rows of int8 as they are stored
    if reason is not None:
        return reason
    multiple, most = (16, MOST_INT8_COLUMNS) if op == "linear_int8_outlier" else (8, MOST_COLUMNS)
    if in_features == 0 or in_features % multiple:
        return f"{in_features} inputs, a multiple of {multiple} is wanted"
    if in_features > most or out_features > MOST_OUTPUTS:
        return f"{out_features} x {in_features} is larger than {MOST_OUTPUTS} x {most}"
    if inputs is not None and inputs not in INPUTS[op]:
        return f"inputs are {inputs}, {_named(op)} is wanted"
    return None


def _named(op: str) -> str:
    """The dtypes of an operation's inputs, as text for a message."""
    *others, last = (str(dtype).removeprefix("torch.") for dtype in INPUTS[op])
    return f"{', '.join(others)} or {last}"


@lru_cache(maxsize=4096)
def _sections(
    op: str, inputs: torch.dtype, columns: int, size: int, out: int, bits: int, group_size: int, layout: str
) -> mma1.Sections | None:
    """The sections of a packed weight; None if the call doesn't fit it. Cached, since it costs more than a launch."""
    if layout != LAYOUTS[op] or refusal(op, out, columns, bits, group_size, inputs):
        return None
    return mma1.sections(size, out, columns, group_size, bits)


def _described(**tensors: Tensor | None) -> dict[str, str | None]:
    """Operands for an error's data, such as "torch.float16 (2, 200)"."""
    return {role: None if t is None else f"{t.dtype} {tuple(t.shape)}" for role, t in tensors.items()}


def _too_many_rows(name: str, x: Tensor, rows: int, most: int) -> ShapeError:
    data = {"reason": "rows", "operation": name, "rows": rows, "most": most}
    return ShapeError(f"{name}: x {tuple(x.shape)} has {rows} rows, at most {most}", data=data)


def _at_16_bytes(x: Tensor) -> Tensor:
    """x, contiguous and aligned, so that kernels can read 16 bytes at a time."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _taken(
    name: str,
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    permutation: Tensor | None,
    out_features: int,
    bits: int,
    group_size: int,
    layout: str,
) -> tuple[Tensor, Tensor, Tensor | None, mma1.Sections, int]:
    """x in packed order, packed and bias as kernels read them, the sections of packed, and the rows of x

    raises  ShapeError, KernelError
    """
    check_cuda_call(name, x=x, packed=packed, bias=bias, permutation=permutation)
    columns = x.shape[-1] if x.dim() else 0
    where = _sections(name, x.dtype, columns, packed.numel(), out_features, bits, group_size, layout)
    if where is None or packed.dtype != torch.uint8 or packed.dim() != 1:
        raise ShapeError(
            f"{name}: x {x.dtype} {tuple(x.shape)}, packed {packed.dtype} {tuple(packed.shape)}, layout {layout!r}; "
            f"{_named(name)}, a multiple of 8 columns, and a weight of {out_features} x {columns}, {bits} bits, "
            f"groups of {group_size} in {LAYOUTS[name]!r} expected",
            data={
                "reason": "operands",
                "operation": name,
                **_described(x=x, packed=packed),
                "out_features": out_features,
                "bits": bits,
                "group_size": group_size,
                "layout": layout,
            },
        )
    if bias is not None and (tuple(bias.shape) != (out_features,) or bias.dtype != x.dtype):
        data = {"reason": "bias", "operation": name, **_described(x=x, bias=bias)}
        text = f"{name}: bias {bias.dtype} {tuple(bias.shape)}, {x.dtype} ({out_features},) expected"
        raise ShapeError(text, data=data)
    if (rows := x.numel() // columns) > MOST_ROWS:
        raise _too_many_rows(name, x, rows, MOST_ROWS)
    if permutation is not None:
        if tuple(permutation.shape) != (columns,) or permutation.dtype != torch.int64:
            text = f"{name}: permutation {permutation.dtype} {tuple(permutation.shape)}, int64 ({columns},)"
            data = {"reason": "permutation", "operation": name, **_described(x=x, permutation=permutation)}
            raise ShapeError(text, data=data)
        x = x.index_select(-1, permutation)
    return _at_16_bytes(x), _at_16_bytes(packed), None if bias is None else bias.contiguous(), where, rows


def linear_weight_only(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    permutation: Tensor | None,
    out_features: int,
    bits: int,
    group_size: int,
    layout: str,
) -> Tensor:
    """y = x W^T + bias, W of 2, 3, 4 or 8 bits in layout "mma1".

    x            (..., in) float16 or bfloat16, in a multiple of 8
    packed       uint8, of ops.pack_weight
    bias         (out,) in the dtype of x
    permutation  (in,) int64: the columns in packed order
    group_size   a multiple of 64, or -1
    raises       ShapeError, KernelError
    """
    name = "linear_weight_only"
    x, packed, bias, where, rows = _taken(name, x, packed, bias, permutation, out_features, bits, group_size, layout)
    columns = x.shape[-1]
    y = x.new_empty((*x.shape[:-1], out_features))
    kernels = devices.kernels_of(x.device)
    needed = kernels.functions["compressor_w_a16_workspace_bytes"](rows, out_features, columns)
    workspace = torch.empty(needed, dtype=torch.uint8, device=x.device) if needed > 0 else None
    at = packed.data_ptr()
    with devices.current(x.device):
        code = kernels.functions["compressor_w_a16"](
            x.data_ptr(), at, at + where.scale_at, at + where.zero_at if where.zero_at is not None else 0,
            0 if bias is None else bias.data_ptr(), y.data_ptr(),
            0 if workspace is None else workspace.data_ptr(), needed,
            rows, out_features, columns, bits, group_size, DTYPES[x.dtype], where.scale_type,
            devices.stream_of(x.device),
        )  # fmt: skip
    if code:
        what = f"{name}: x {x.dtype} {tuple(x.shape)}, {out_features} outputs, {bits} bits, groups of {group_size}"
        raise kernels.error(code, what)
    return y


def linear_dynamic_int8(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    permutation: Tensor | None,
    out_features: int,
    bits: int,
    group_size: int,
    layout: str,
) -> Tensor:
    """y = x' W^T + bias, each row of x' rounded to int8 by its largest magnitude; W 4- or 8-bit in layout "mma8a1".

    The result has the bits of the CPU library.

    x            (..., in) float16, bfloat16 or float32, in a multiple of 8
    packed       uint8, of ops.pack_weight
    bias         (out,) in the dtype of x
    permutation  (in,) int64: the columns in packed order
    group_size   a multiple of 64, or -1
    raises       ShapeError, KernelError
    """
    name = "linear_dynamic_int8"
    x, packed, bias, where, rows = _taken(name, x, packed, bias, permutation, out_features, bits, group_size, layout)
    columns, device, kind = x.shape[-1], x.device, DTYPES[x.dtype]
    y = x.new_empty((*x.shape[:-1], out_features))
    kernels = devices.kernels_of(device)
    padded = -(-columns // mma8a1.TILE) * mma8a1.TILE
    codes = torch.empty(rows, padded, dtype=torch.int8, device=device)
    scale = torch.empty(rows, dtype=torch.float32, device=device)
    # factors of the zero points
    sums = None if where.zero_at is None else torch.empty(rows, where.groups, dtype=torch.int32, device=device)
    codes_at, scale_at, sums_at = codes.data_ptr(), scale.data_ptr(), 0 if sums is None else sums.data_ptr()
    at = packed.data_ptr()
    with devices.current(device):
        stream = devices.stream_of(device)
        code = kernels.functions["compressor_quantize_rows"](
            x.data_ptr(), codes_at, scale_at, sums_at, rows, columns, group_size, kind, stream
        )
        code = code or kernels.functions["compressor_w_a8"](
            codes_at, scale_at, sums_at,
            at, at + where.scale_at, at + where.zero_at if where.zero_at is not None else 0,
            0 if bias is None else bias.data_ptr(), y.data_ptr(),
            rows, out_features, columns, bits, group_size, where.scale_type, kind, stream,
        )  # fmt: skip
    if code:
        what = f"{name}: x {x.dtype} {tuple(x.shape)}, {out_features} outputs, {bits} bits, groups of {group_size}"
        raise kernels.error(code, what)
    return y


def linear_int8_outlier(
    x: Tensor,
    packed: Tensor,
    weight_absmax: Tensor,
    outlier_columns: Tensor | None,
    outlier_weight: Tensor | None,
    bias: Tensor | None,
    threshold: float,
) -> Tensor:
    """LLM.int8() in one call, as `compressor.kernels.ops.linear.linear_int8_outlier`, of the weight as it is stored.

    The result has the bits of the CPU library.

    x                (..., in) float16, bfloat16 or float32, in a multiple of 16 up to 65,536
    packed           (out, in) int8, the codes: w = codes * weight_absmax / 127
    weight_absmax    (out,) float32
    outlier_columns  (k,) int32, ascending, without repetition; those outside of x are left out. None: columns with any
                     |x| >= threshold, none for threshold 0
    outlier_weight   (out, k) in the dtype of x; with outlier_columns
    bias             (out,) in the dtype of x
    raises           ShapeError, KernelError
    """
    name = "linear_int8_outlier"
    check_cuda_call(
        name, x=x, packed=packed, absmax=weight_absmax, columns=outlier_columns, weight=outlier_weight, bias=bias
    )
    columns = x.shape[-1] if x.dim() else 0
    out = weight_absmax.numel()
    count = 0 if outlier_columns is None else outlier_columns.numel()
    # without columns it is empty, so any dtype is allowed
    weight_dtype = x.dtype if outlier_weight is None or count else outlier_weight.dtype
    wanted = [
        (packed, torch.int8, (out, columns)),
        (weight_absmax, torch.float32, (out,)),
        (outlier_columns, torch.int32, (count,)),
        (outlier_weight, weight_dtype, (out, count)),
        (bias, x.dtype, (out,)),
    ]
    fits = all(t is None or (t.dtype == dtype and tuple(t.shape) == shape) for t, dtype, shape in wanted)
    paired = (outlier_columns is None) == (outlier_weight is None) and count <= columns
    refused = refusal(name, out, columns, 8, -1, x.dtype)
    if not fits or not paired or refused is not None:
        shapes = [None if t is None else f"{t.dtype} {tuple(t.shape)}" for t in (x, *(given for given, *_ in wanted))]
        expected = f"int8 (out, {columns}), float32 (out,), int32 (k,), (out, k) and (out,) of x's type expected"
        raise ShapeError(
            f"{name}: x, packed, absmax, columns, their weight and bias are {shapes}; {refused or expected}",
            data={
                "reason": "operands",
                "operation": name,
                **_described(
                    x=x,
                    packed=packed,
                    weight_absmax=weight_absmax,
                    outlier_columns=outlier_columns,
                    outlier_weight=outlier_weight,
                    bias=bias,
                ),
            },
        )
    if not threshold >= 0:
        data = {"reason": "threshold", "operation": name, "threshold": str(threshold)}  # NaN is not valid JSON
        raise ShapeError(f"{name}: threshold {threshold}, 0 or more expected", data=data)
    if (rows := x.numel() // columns) > MOST_ROWS:
        raise _too_many_rows(name, x, rows, MOST_ROWS)
    x, packed = _at_16_bytes(x), _at_16_bytes(packed)
    y = x.new_empty((*x.shape[:-1], out))
    if not y.numel():
        return y
    # without calibrated columns, threshold 0 means that no column is an outlier
    others = [None if t is None or not t.numel() else t.contiguous() for t in (outlier_columns, outlier_weight, bias)]
    columns_at, column_weight_at, bias_at = (0 if t is None else t.data_ptr() for t in others)
    weight_absmax = weight_absmax.contiguous()
    kernels = devices.kernels_of(x.device)
    needed = kernels.functions["compressor_int8_outlier_workspace_bytes"](rows, out, columns)
    workspace = torch.empty(needed, dtype=torch.uint8, device=x.device) if needed > 0 else None
    with devices.current(x.device):
        code = kernels.functions["compressor_int8_outlier"](
            x.data_ptr(), packed.data_ptr(), weight_absmax.data_ptr(), columns_at, column_weight_at, bias_at,
            y.data_ptr(), 0 if workspace is None else workspace.data_ptr(), needed, rows, out, columns, count,
            threshold if outlier_columns is None else 0.0, DTYPES[x.dtype], devices.stream_of(x.device),
        )  # fmt: skip
    if code:
        raise kernels.error(code, f"{name}: x {x.dtype} {tuple(x.shape)}, {out} outputs, {count} columns")
    return y


def linear_dense_sparse(
    x: Tensor,
    dense: Tensor,
    index: Tensor,
    value: Tensor,
    bias: Tensor | None,
    dense_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
) -> Tensor:
    """y[n] = sum over b, t of (x_b · D_b[index[n, b, t]]) · value[n, b, t] + bias[n]: `kernels.dense_sparse`.

    Its z = x_b D_b^T and sums are float32, in an order that depends only on the shape.

    x        (..., blocks · width) float16 or bfloat16, width a multiple of 8
    dense    (blocks, atoms, width) in the dtype of x, D; at most 4096 atoms
    index    int32 (ceil(out / 32), blocks, k, 32), of ds1.pack: values and their atoms. An output with a word that
             names no atom is NaN
    value    (out, blocks, k) in the dtype of x; only its shape is read
    bias     (out,) in the dtype of x
    scales   None: int8 factors are not supported
    raises   ShapeError, KernelError
    """
    name = "linear_dense_sparse"
    check_cuda_call(name, x=x, dense=dense, index=index, value=value, bias=bias)
    if dense_scale is not None or value_scale is not None:
        raise KernelError(
            f"{name}: int8 factors have no CUDA kernel in torch yet",
            hint="Convert the factors to float16 or bfloat16 first, or load with kernels='reference'.",
            data={"reason": "int8-factors", "operation": name},
        )
    fits = (
        x.dim() > 0
        and dense.dim() == value.dim() == 3
        and value.shape[1] == dense.shape[0]
        and x.shape[-1] == dense.shape[0] * dense.shape[2]
        and index.dtype == torch.int32
        and tuple(index.shape) == ds1.packed_shape(*value.shape)
        and (bias is None or (tuple(bias.shape) == (len(value),) and bias.dtype == x.dtype))
    )
    reason = ds1.refusal(dense, value, x.dtype) if fits else None
    if not fits or reason is not None:
        shapes = [None if t is None else f"{t.dtype} {tuple(t.shape)}" for t in (x, dense, index, value, bias)]
        expected = "(..., blocks * width), (blocks, atoms, width), int32 of ds1.pack, (out, blocks, k), (out,) expected"
        operands = _described(x=x, dense=dense, index=index, value=value, bias=bias)
        data = {"reason": "operands", "operation": name, **operands}
        raise ShapeError(f"{name}: x, dense, index, value and bias are {shapes}; {reason or expected}", data=data)
    (blocks, atoms, width), (out, _, k) = dense.shape, value.shape
    if (rows := x.numel() // x.shape[-1]) > ds1.MOST_ROWS:
        raise _too_many_rows(name, x, rows, ds1.MOST_ROWS)
    x, dense, index = _at_16_bytes(x), _at_16_bytes(dense), index.contiguous()
    bias = None if bias is None else bias.contiguous()
    y = x.new_empty((*x.shape[:-1], out))
    kernels = devices.kernels_of(x.device)
    shape = (rows, out, blocks, atoms, width, k)
    needed = kernels.functions["compressor_dense_sparse_workspace_bytes"](*shape)
    workspace = torch.empty(max(needed, 0), dtype=torch.uint8, device=x.device)
    with devices.current(x.device):
        code = kernels.functions["compressor_dense_sparse"](
            x.data_ptr(), dense.data_ptr(), 0, index.data_ptr(), 0, 0 if bias is None else bias.data_ptr(),
            y.data_ptr(), workspace.data_ptr(), needed, *shape, DTYPES[x.dtype], devices.stream_of(x.device),
        )  # fmt: skip
    if code:
        what = f"{name}: x {x.dtype} {tuple(x.shape)}, {out} outputs, {k} of {atoms} atoms in {blocks} blocks"
        raise kernels.error(code, what)
    return y


def hadamard(x: Tensor, scale: float) -> Tensor:
    """x H_n scale for each row, H_n Sylvester's matrix or H_(n / m) (x) H_m with one of Paley's: cuda_ext/hadamard.cu.

    x        (..., n) float16, bfloat16 or float32, n a power of two from 8 to 32768, or one times 12, 20, 28 or 36
             up to 24576, 40960, 28672 or 36864
    raises   ShapeError, KernelError
    """
    check_cuda_call("hadamard", x=x)
    n = x.shape[-1] if x.dim() else 0
    if x.dtype not in DTYPES or not hadamard_factor(n):
        raise ShapeError(
            f"hadamard: x {x.dtype} {tuple(x.shape)}; rows of a 16- or 32-bit float expected, their length a power of "
            "two from 8 to 32768, or one times 12, 20, 28 or 36 up to 24576, 40960, 28672 or 36864",
            data={"reason": "operands", "operation": "hadamard", **_described(x=x)},
        )
    x = _at_16_bytes(x)
    y = torch.empty_like(x)
    kernels = devices.kernels_of(x.device)
    with devices.current(x.device):
        code = kernels.functions["compressor_hadamard"](
            x.data_ptr(), y.data_ptr(), x.numel() // n, n, scale, DTYPES[x.dtype], devices.stream_of(x.device)
        )
    if code:
        raise kernels.error(code, f"hadamard: x {x.dtype} {tuple(x.shape)}")
    return y


# by the names in torch.ops.compressor
RUN: dict[str, Callable[..., Tensor]] = {
    "linear_weight_only": linear_weight_only,
    "linear_dynamic_int8": linear_dynamic_int8,
    "linear_int8_outlier": linear_int8_outlier,
    "linear_dense_sparse": linear_dense_sparse,
}
for _name, _run in RUN.items():
    register_cuda(_name, _run)
