"""Tests the kernels on a device with small products and transforms, compared with float64."""

from __future__ import annotations

import itertools

import torch

from compressor.kernels.cuda import ds1, mma1, mma8a1
from compressor.kernels.cuda.interface import DTYPES, Kernels
from compressor.kernels.ops.gptq_columns import round_columns, trial_columns
from compressor.kernels.ops.hadamard_matrix import base_matrix, base_of, sylvester

UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}
OUT, GROUP = 70, 128
# rows, columns: tails of both, a short last group; 1096 columns are two slices up to 64 rows
# by bits; the others differ from 4 in how a piece of a tile is decoded alone
SHAPES = {4: {"decode": (5, 1096), "tiled": (20, 1096), "tiled, K in one piece": (66, 200)}}
SHAPES |= {bits: {"decode": (5, 200), "tiled": (20, 200)} for bits in (2, 3, 8)}
# bits, rows, columns, group: each kernel of w_a8.cu with narrow groups or wide ones, a short last group
INT8_SHAPES = {
    "decode": ((4, 5, 200, 128), (8, 13, 328, -1)),
    "tiled": ((4, 20, 328, -1), (8, 20, 200, 64), (4, 66, 200, 128), (8, 66, 328, 256), (4, 130, 200, 64)),
}


def self_test(kernels: Kernels, device: torch.device, stream: int) -> dict[str, str]:
    """ "kernel, dtype" -> "ok", or the error"""
    found = {}
    for dtype in (torch.float16, torch.bfloat16):
        for bits, shapes in SHAPES.items():
            for name, shape in shapes.items():
                found[f"w{bits}_a16 {name}, {dtype}"] = _product(kernels, device, stream, dtype, bits, *shape)
    for number, (name, int8_shapes) in enumerate(INT8_SHAPES.items()):
        for bits, rows, columns, group in int8_shapes:
            dtype = list(DTYPES)[(rows + number) % 3]
            outcome = int8_product(kernels, device, stream, dtype, bits, rows, columns, group)
            found[f"w{bits}_a8 {name}, {rows} rows, {dtype}"] = outcome
    for rows, dtype in zip((1, 5, 66), DTYPES, strict=True):
        for calibrated in (False, True):
            kind = "columns that are given" if calibrated else "columns that are found"
            found[f"int8_outlier {kind}, {rows} rows, {dtype}"] = outlier_product(
                kernels, device, stream, dtype, rows, calibrated
            )
    for rows, dtype in itertools.product((1, 20, 66), ds1.DTYPES):
        found[f"dense_sparse, {rows} rows, {dtype}"] = factor_product(kernels, device, stream, dtype, rows)
    for symmetric in (True, False):
        grid = "symmetric" if symmetric else "zero points"
        found[f"gptq_solve, {grid}"] = solved_columns(kernels, device, stream, symmetric)
    for dtype in DTYPES:
        found[f"hadamard 1024, {dtype}"] = _hadamard(kernels, device, stream, dtype, 1024)
    for n, dtype in zip((96, 640, 1792, 72), itertools.cycle(DTYPES)):
        found[f"hadamard {n}, {dtype}"] = _hadamard(kernels, device, stream, dtype, n)
    return found


def _judge(y: torch.Tensor, exact: torch.Tensor, size: torch.Tensor, operations: int) -> str:
    """Compare y with the bound: each operation has an error of at most 2 · 2^-24 of `size` (tensor cores may truncate),
    and y is rounded once."""
    inside = operations * 2 * UNIT[torch.float32] * size
    allowed = inside + UNIT[y.dtype] * (exact.abs() + inside) + 2.0**-25  # half of float16's smallest step
    off = (y.cpu().double() - exact).abs()
    if bool((off <= allowed).all()):
        return "ok"
    return f"{int((~(off <= allowed)).sum())} of {off.numel()} outputs are wrong, by up to {float(off.max()):.3g}"


def _product(
    kernels: Kernels, device: torch.device, stream: int, dtype: torch.dtype, bits: int, rows: int, columns: int
) -> str:
    made = torch.Generator().manual_seed(rows)
    groups = mma1.groups_of(columns, GROUP)
    codes = torch.randint(0, 2**bits, (OUT, columns), generator=made, dtype=torch.uint8)
    zeros = torch.randint(0, 2**bits, (OUT, groups), generator=made, dtype=torch.uint8)
    scale = (torch.rand(OUT, groups, generator=made) * 0.02 + 0.01).to(dtype)
    x, bias = (torch.randn(shape, generator=made).to(dtype) for shape in ((rows, columns), (OUT,)))
    index = torch.arange(columns) // GROUP
    weight = (codes.double() - zeros.double()[:, index]) * scale.double()[:, index]
    exact = x.double() @ weight.t() + bias.double()
    size = x.double().abs() @ weight.abs().t() + bias.double().abs()

    packed = mma1.pack(codes, scale, zeros, bits, GROUP).to(device)
    sections = mma1.sections(packed.numel(), OUT, columns, GROUP, bits)
    assert sections is not None and sections.zero_at is not None
    x, bias = x.to(device), bias.to(device)
    y = torch.full((rows, OUT), torch.nan, dtype=dtype, device=device)
    needed = kernels.functions["compressor_w_a16_workspace_bytes"](rows, OUT, columns)
    workspace = torch.full((needed // 4,), torch.nan, device=device)
    at = packed.data_ptr()
    code = kernels.functions["compressor_w_a16"](
        x.data_ptr(), at, at + sections.scale_at, at + sections.zero_at, bias.data_ptr(), y.data_ptr(),
        workspace.data_ptr(), needed, rows, OUT, columns, bits, GROUP, DTYPES[dtype], sections.scale_type, stream,
    )  # fmt: skip
    if code:
        return f"error {code}: {kernels.error_text(code)}"
    # the mma's additions; a product and an addition for each group and slice; the bias
    return _judge(y, exact, size, columns + 2 * groups + 5)


def int8_product(
    kernels: Kernels,
    device: torch.device,
    stream: int,
    dtype: torch.dtype,
    bits: int,
    rows: int,
    columns: int,
    group: int,
) -> str:
    """Check that codes and steps of the rows equal IEEE arithmetic, and that the product is within its bound."""
    made = torch.Generator().manual_seed(rows)
    groups = mma1.groups_of(columns, group)
    codes = torch.randint(0, 2**bits, (OUT, columns), generator=made, dtype=torch.uint8)
    zeros = torch.randint(0, 2**bits, (OUT, groups), generator=made, dtype=torch.uint8)
    scale = (torch.rand(OUT, groups, generator=made) * 0.02 + 0.01).to(dtype)
    x, bias = (torch.randn(shape, generator=made).to(dtype) for shape in ((rows, columns), (OUT,)))
    index = torch.arange(columns) // (columns if group == -1 else group)
    weight = (codes.double() - zeros.double()[:, index]) * scale.double()[:, index]
    largest = x.float().abs().amax(1, keepdim=True)
    x_codes, step = (x.float() * (1 / largest * 127)).round(), largest / 127
    rounded = x_codes.double() * step.double()
    exact = rounded @ weight.t() + bias.double()
    # the terms of an output are the sums of its groups
    size = sum(
        ((rounded[:, index == j] @ weight[:, index == j].t()).abs() for j in range(groups)),
        start=bias.double().abs().expand(rows, OUT),
    )

    packed = mma8a1.pack(codes, scale, zeros, bits, group).to(device)
    sections = mma1.sections(packed.numel(), OUT, columns, group, bits)
    assert sections is not None and sections.zero_at is not None
    x, bias = x.to(device), bias.to(device)
    padded = -(-columns // mma8a1.TILE) * mma8a1.TILE
    codes_of = torch.full((rows, padded), 85, dtype=torch.int8, device=device)
    steps = torch.full((rows,), torch.nan, device=device)
    sums = torch.full((rows, groups), 1 << 20, dtype=torch.int32, device=device)
    y = torch.full((rows, OUT), torch.nan, dtype=dtype, device=device)
    rows_at, kind, at = (codes_of.data_ptr(), steps.data_ptr(), sums.data_ptr()), DTYPES[dtype], packed.data_ptr()
    code = kernels.functions["compressor_quantize_rows"](x.data_ptr(), *rows_at, rows, columns, group, kind, stream)
    code = code or kernels.functions["compressor_w_a8"](
        *rows_at, at, at + sections.scale_at, at + sections.zero_at, bias.data_ptr(), y.data_ptr(),
        rows, OUT, columns, bits, group, sections.scale_type, kind, stream,
    )  # fmt: skip
    if code:
        return f"error {code}: {kernels.error_text(code)}"
    wanted = torch.nn.functional.pad(x_codes, (0, padded - columns)).to(torch.int8)
    if not (torch.equal(codes_of.cpu(), wanted) and torch.equal(steps.cpu(), step[:, 0])):
        return f"{int((codes_of.cpu() != wanted).sum())} of {wanted.numel()} codes or some of {rows} steps are wrong"
    # a group's sum to float32, its fma; the row's step; the bias
    return _judge(y, exact, size, 2 * groups + 2)


def outlier_product(
    kernels: Kernels, device: torch.device, stream: int, dtype: torch.dtype, rows: int, calibrated: bool
) -> str:
    """Check LLM.int8() of rows rounded by IEEE arithmetic, with three outlier columns, one of them the last column."""
    made = torch.Generator().manual_seed(rows)
    columns, threshold = 336, 6.0
    x, bias = (torch.randn(shape, generator=made) for shape in ((rows, columns), (OUT,)))
    x, apart = x.clamp(-4, 4), torch.tensor([3, 70, columns - 1])
    x[-1, apart] = torch.tensor([9.0, -20.0, 7.0])
    x, bias = x.to(dtype), bias.to(dtype)
    codes = torch.randint(-127, 128, (OUT, columns), generator=made, dtype=torch.int8)
    absmax = torch.rand(OUT, generator=made) + 0.1
    if calibrated:
        column_weight = torch.randn(OUT, 3, generator=made).to(dtype)
    else:
        column_weight = (codes[:, apart].float() * absmax[:, None] / 127).to(dtype)
    rest = x.float().index_fill(1, apart, 0)
    largest = rest.abs().amax(1, keepdim=True)
    rounded = (rest * (1 / largest * 127)).round().double() * (largest / 127).double()
    inside = rounded @ (codes.double() * absmax.double()[:, None] / 127).t()
    outside = x[:, apart].double() @ column_weight.double().t()
    exact = inside + outside + bias.double()
    size = inside.abs() + x[:, apart].double().abs() @ column_weight.double().abs().t() + bias.double().abs()

    index = apart.int().to(device) if calibrated else None
    of_index = column_weight.to(device) if calibrated else None
    x, bias, codes, absmax = (tensor.to(device) for tensor in (x, bias, codes, absmax))
    y = torch.full((rows, OUT), torch.nan, dtype=dtype, device=device)
    needed = kernels.functions["compressor_int8_outlier_workspace_bytes"](rows, OUT, columns)
    workspace = torch.full((needed,), 255, dtype=torch.uint8, device=device)
    code = kernels.functions["compressor_int8_outlier"](
        x.data_ptr(), codes.data_ptr(), absmax.data_ptr(), 0 if index is None else index.data_ptr(),
        0 if of_index is None else of_index.data_ptr(), bias.data_ptr(), y.data_ptr(),
        workspace.data_ptr() if needed else 0, needed, rows, OUT, columns, 3 if calibrated else 0,
        0.0 if calibrated else threshold, DTYPES[dtype], stream,
    )  # fmt: skip
    if code:
        return f"error {code}: {kernels.error_text(code)}"
    # the sum to float32, absmax / 127 and its product, that with the step; a product and a sum for each of three
    # columns; the bias
    return _judge(y, exact, size, 4 + 6 + 1)


def factor_product(kernels: Kernels, device: torch.device, stream: int, dtype: torch.dtype, rows: int) -> str:
    """Check three blocks of 72 inputs and 66 atoms; each output combines five of them."""
    made = torch.Generator().manual_seed(rows)
    blocks, atoms, width, k = 3, 66, 72, 5
    x, dense, values, bias = (
        torch.randn(shape, generator=made).to(dtype)
        for shape in ((rows, blocks * width), (blocks, atoms, width), (OUT, blocks, k), (OUT,))
    )
    index = torch.rand(OUT, blocks, atoms, generator=made).argsort(2)[..., :k]
    spread = torch.zeros(OUT, blocks, atoms, dtype=torch.float64).scatter_(2, index, values.double())
    parts = x.double().view(rows, blocks, width)
    exact = torch.einsum("rbw,baw,oba->ro", parts, dense.double(), spread) + bias.double()
    size = torch.einsum("rbw,baw,oba->ro", parts.abs(), dense.double().abs(), spread.abs()) + bias.double().abs()

    entries = ds1.pack(index.to(torch.uint16), values, atoms).to(device)
    x, dense, bias = x.to(device), dense.to(device), bias.to(device)
    y = torch.full((rows, OUT), torch.nan, dtype=dtype, device=device)
    shape = (rows, OUT, blocks, atoms, width, k)
    needed = kernels.functions["compressor_dense_sparse_workspace_bytes"](*shape)
    workspace = torch.full((needed // 4,), torch.nan, device=device)
    code = kernels.functions["compressor_dense_sparse"](
        x.data_ptr(), dense.data_ptr(), 0, entries.data_ptr(), 0, bias.data_ptr(), y.data_ptr(), workspace.data_ptr(),
        needed, *shape, DTYPES[dtype], stream,
    )  # fmt: skip
    if code:
        return f"error {code}: {kernels.error_text(code)}"
    # the mma's additions over whole tiles of 64; one for each value, seven of eight parts; step and bias
    return _judge(y, exact, size, -(-width // 64) * 64 + blocks * k + 7 + 2)


def solved_columns(kernels: Kernels, device: torch.device, stream: int, symmetric: bool) -> str:
    """Check that codes, errors and updates of columns 3 to 16 of 20 are those of torch on the CPU."""
    part, begin, stop = trial_columns(symmetric, rows=70)
    ours = [tensor.to(device, copy=True) for tensor in (part.work, part.errors, part.codes)]
    given = [
        None if tensor is None else tensor.to(device)
        for tensor in (part.upper, part.scale, part.zero_point, part.group_of.int())
    ]
    count, rows = part.work.shape
    code = kernels.functions["compressor_gptq_solve"](
        *(0 if tensor is None else tensor.data_ptr() for tensor in (*ours, *given)), rows, len(part.scale), begin,
        stop, count, float(part.low), float(part.high), stream,
    )  # fmt: skip
    if code:
        return f"error {code}: {kernels.error_text(code)}"
    round_columns(part, begin, stop)
    want = (part.work, part.errors, part.codes)
    parts = (slice(stop, None), slice(begin, stop), slice(begin, stop))  # of work, errors, codes
    pairs = zip(("updates", "errors", "codes"), ours, want, parts, strict=True)
    wrong = [name for name, got, right, where in pairs if not torch.equal(got.cpu()[where], right[where])]
    return f"{', '.join(wrong)} are not those of torch on the CPU" if wrong else "ok"


def _hadamard(kernels: Kernels, device: torch.device, stream: int, dtype: torch.dtype, n: int) -> str:
    rows, m = 3, base_of(n)
    assert m is not None
    x = torch.randn(rows, n, generator=torch.Generator().manual_seed(0)).to(dtype)
    matrix = torch.kron(sylvester(n // m), base_matrix(m))
    scale = 2.0**-5
    exact, size = x.double() @ matrix * scale, (x.double().abs().sum(1, keepdim=True) * scale).expand(rows, n)
    x = x.to(device)
    y = torch.full_like(x, torch.nan)
    code = kernels.functions["compressor_hadamard"](x.data_ptr(), y.data_ptr(), rows, n, scale, DTYPES[dtype], stream)
    if code:
        return f"error {code}: {kernels.error_text(code)}"
    return _judge(y, exact, size, m + (n // m).bit_length() + 1)
