"""Plans the launches of a call: kernels of cuda_ext/*.cu, grids and arguments; None for a call that no kernel accepts.

A function here has the arguments of its launcher, without the stream. Addresses are ints, 0 for none. It allocates
nothing and reads no operand, so a launcher can be part of a CUDA graph.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import c_float, c_int, c_uint64, c_void_p
from dataclasses import dataclass

FLOAT16, BFLOAT16, FLOAT32 = 0, 1, 2  # device.h: Type


@dataclass(frozen=True)
class Launch:
    """source    the .cu file without its suffix
    kernel    C++ name, one of KERNELS[source]
    grid      blocks in x, y, z
    threads   of a block
    argument  the kernel's only argument, by value
    """

    source: str
    kernel: str
    grid: tuple[int, int, int]
    threads: int
    argument: ctypes.Structure


BITS = (2, 3, 4, 8)  # of w_a16.cu
RUNS = {12: 4, 20: 4, 28: 2, 36: 2}  # hadamard.cu: a factor of n -> largest number of runs of a thread

# all kernels of each source that are launched
KERNELS: dict[str, tuple[str, ...]] = {
    "w_a16": tuple(
        f"w_a16::{kernel}"
        for kind in (FLOAT16, BFLOAT16)
        for kernel in (
            *(f"decode<{bits}, {kind}, {halves}>" for bits in BITS for halves in (1, 2)),
            *(f"tiled<{bits}, {kind}, {rows}>" for bits in BITS for rows in (32, 64)),
            f"add_slices<{kind}>",
        )
    ),
    "quantize_rows": ("quantize_rows::rows",),
    "w_a8": tuple(
        f"w_a8::{kernel}<{bits}, {rows}, {wide}>"
        for bits in (4, 8)
        for kernel, rows in (("decode", 1), ("decode", 2), ("tiled", 32), ("tiled", 64), ("tiled", 128))
        for wide in ("false", "true")
        if (bits, rows) != (8, 128)
    ),
    "int8_outlier": tuple(f"int8_outlier::{kernel}" for kernel in ("one_row", "flag_columns", "round_rows", "product")),
    "dense_sparse": tuple(
        f"dense_sparse::{kernel}"
        for kind in (FLOAT16, BFLOAT16)
        for kernel in (
            *(f"responses<{kind}, {halves}>" for halves in (1, 4)),
            *(f"combine<{kind}, {rows}, {split}>" for rows in (1, 8) for split in (1, 8)),
        )
    ),
    "gptq_solve": ("gptq_solve::columns",),
    "hadamard": (
        *(f"hadamard::rows<{kind}, {chunks}>" for kind in (FLOAT16, BFLOAT16, FLOAT32) for chunks in (1, 2, 4)),
        *(f"hadamard::rows_of_runs<{m}, {runs}>" for m, most in RUNS.items() for runs in (1, 2, 4) if runs <= most),
    ),
}


class WA16Arguments(ctypes.Structure):
    """w_a16.cu: Arguments"""

    _fields_ = (
        *((name, c_void_p) for name in ("x", "packed", "scale", "zero_point", "bias", "y", "sums")),
        *((name, c_int) for name in ("M", "N", "K", "tiles")),
        *((name, c_int) for name in ("tiles_per_group", "tiles_per_slice", "slices", "scale_type")),
    )


class QuantizeRowsArguments(ctypes.Structure):
    """quantize_rows.cu: Arguments"""

    _fields_ = (
        *((name, c_void_p) for name in ("x", "codes", "scale", "sum")),
        *((name, c_int) for name in ("M", "K", "padded", "columns_per_group", "groups", "type")),
    )


class WA8Arguments(ctypes.Structure):
    """w_a8.cu: Arguments"""

    _fields_ = (
        *((name, c_void_p) for name in ("x", "x_scale", "x_sum", "packed", "scale", "zero_point", "bias", "y")),
        *((name, c_int) for name in ("M", "N", "tiles", "tiles_per_group", "groups", "scale_type", "y_type")),
    )


class Int8OutlierArguments(ctypes.Structure):
    """int8_outlier.cu: Arguments"""

    _fields_ = (
        *((name, c_void_p) for name in ("x", "weight", "absmax", "columns", "column_weight", "bias", "y")),
        *((name, c_void_p) for name in ("codes", "step", "mask", "slices")),
        *((name, c_int) for name in ("M", "N", "K", "padded", "words", "slice_count", "rows_per_slice")),
        ("column_count", c_int),
        ("threshold", c_float),
        ("type", c_int),
    )


class DenseSparseArguments(ctypes.Structure):
    """dense_sparse.cu: Arguments"""

    _fields_ = (
        *((name, c_void_p) for name in ("x", "atoms", "atom_step", "entries", "step", "bias", "y", "z")),
        *((name, c_int) for name in ("M", "N", "B", "m", "w", "k", "rows", "padded")),
    )


class GptqSolveArguments(ctypes.Structure):
    """gptq_solve.cu: Arguments"""

    _fields_ = (
        *((name, c_void_p) for name in ("work", "errors", "codes", "upper", "scale", "zero", "group_of")),
        *((name, c_int) for name in ("rows", "groups", "begin", "stop", "end")),
        *(("low", c_float), ("high", c_float), ("nothing", c_int)),
    )


class HadamardArguments(ctypes.Structure):
    """hadamard.cu: Arguments"""

    _fields_ = (
        *(("x", c_void_p), ("y", c_void_p), ("count", c_uint64)),
        *(("n", c_int), ("scale", c_float), ("type", c_int), ("runs", c_int)),
    )


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _w_a16_fits(m: int, n: int, k: int) -> bool:
    return m >= 0 and n >= 0 and k >= 1 and k % 8 == 0 and k <= 1 << 30 and n <= 65535 * 64


def _w_a16_slices(m: int, n: int, k: int) -> tuple[int, int]:
    """(tiles of a slice, number of slices), with no empty slice.

    For up to 64 rows K is divided into slices until there are about 1,024 blocks, 8 for each of the 132 multiprocessors
    of an H100, but of at least 8 tiles, so that the stages fill (our choice). More rows have enough work without it.
    """
    tiles = _ceil(k, 64)
    slices = 1 if m > 64 else 1024 // _ceil(n, 64)
    slices = max(1, min(slices, tiles // 8))
    of_slice = _ceil(tiles, slices)
    return of_slice, _ceil(tiles, of_slice)


def w_a16_workspace_bytes(m: int, n: int, k: int) -> int:
    if not _w_a16_fits(m, n, k):
        return -1
    if m == 0 or n == 0:
        return 0
    _, slices = _w_a16_slices(m, n, k)
    return 0 if slices == 1 else 4 * slices * m * n


def w_a16(
    x: int, packed: int, scale: int, zero_point: int, bias: int, y: int, workspace: int, workspace_bytes: int,
    m: int, n: int, k: int, bits: int, group_size: int, x_type: int, scale_type: int,
) -> list[Launch] | None:  # fmt: skip
    """The launches; None for a call that no kernel accepts."""
    if bits not in BITS or not _w_a16_fits(m, n, k) or (group_size != -1 and (group_size < 64 or group_size % 64)):
        return None
    if x_type not in (FLOAT16, BFLOAT16) or scale_type not in (FLOAT16, BFLOAT16, FLOAT32):
        return None
    if m == 0 or n == 0:
        return []
    if not (x and packed and scale and y) or x % 16 or packed % 16:
        return None
    needed = w_a16_workspace_bytes(m, n, k)
    if needed and (not workspace or workspace % 4 or workspace_bytes < needed):
        return None
    tiles, (of_slice, slices) = _ceil(k, 64), _w_a16_slices(m, n, k)
    argument = WA16Arguments(
        x, packed, scale, zero_point, bias, y, workspace if needed else 0, m, n, k, tiles,
        tiles if group_size == -1 else group_size // 64, of_slice, slices, scale_type,
    )  # fmt: skip
    across = 1
    if m <= 16:
        kernel = f"decode<{bits}, {x_type}, {1 if m <= 8 else 2}>"
    elif m <= 32:
        kernel = f"tiled<{bits}, {x_type}, 32>"
    else:
        kernel, across = f"tiled<{bits}, {x_type}, 64>", _ceil(m, 64)
    launches = [Launch("w_a16", f"w_a16::{kernel}", (across, _ceil(n, 64), slices), 128, argument)]
    if slices > 1:
        launches.append(Launch("w_a16", f"w_a16::add_slices<{x_type}>", (_ceil(m * n, 128), 1, 1), 128, argument))
    return launches


MOST_INT8_COLUMNS = 1 << 24


def _int8_group_fits(group_size: int) -> bool:
    return group_size == -1 or (group_size >= 64 and group_size % 64 == 0 and group_size <= MOST_INT8_COLUMNS)


def quantize_rows(
    x: int, codes: int, scale: int, sums: int, m: int, k: int, group_size: int, kind: int
) -> list[Launch] | None:
    """The launches; None for a call that no kernel accepts."""
    if m < 0 or k < 1 or k % 8 or k > MOST_INT8_COLUMNS or kind not in (FLOAT16, BFLOAT16, FLOAT32):
        return None
    if not _int8_group_fits(group_size):
        return None
    if m == 0:
        return []
    if not (x and codes and scale) or x % 16 or codes % 16:
        return None
    padded = _ceil(k, 64) * 64
    columns = padded if group_size == -1 else group_size
    argument = QuantizeRowsArguments(x, codes, scale, sums, m, k, padded, columns, _ceil(padded, columns), kind)
    return [Launch("quantize_rows", "quantize_rows::rows", (m, 1, 1), 256, argument)]


def w_a8(
    x: int, x_scale: int, x_sum: int, packed: int, scale: int, zero_point: int, bias: int, y: int,
    m: int, n: int, k: int, bits: int, group_size: int, scale_type: int, y_type: int,
) -> list[Launch] | None:  # fmt: skip
    """The launches; None for a call that no kernel accepts."""
    if m < 0 or n < 0 or n > 65535 * 64 or k < 1 or k > MOST_INT8_COLUMNS or bits not in (4, 8):
        return None
    kinds = (FLOAT16, BFLOAT16, FLOAT32)
    if not _int8_group_fits(group_size) or scale_type not in kinds or y_type not in kinds:
        return None
    tiles = _ceil(k, 64)
    tiles_per_group = tiles if group_size == -1 else group_size // 64
    widest = min(tiles, tiles_per_group)
    if widest * 64 * (128 * 16 * 8 if bits == 4 else 128 * 255) >= 1 << 31:
        return None
    if m == 0 or n == 0:
        return []
    if not (x and x_scale and packed and scale and y) or x % 16 or packed % 16 or (zero_point and not x_sum):
        return None
    argument = WA8Arguments(
        x, x_scale, x_sum, packed, scale, zero_point, bias, y, m, n, tiles, tiles_per_group,
        _ceil(tiles, tiles_per_group), scale_type, y_type,
    )  # fmt: skip
    wide = "true" if widest > 2 else "false"
    if m <= 16:
        kernel = f"decode<{bits}, {1 if m <= 8 else 2}, {wide}>"
        return [Launch("w_a8", f"w_a8::{kernel}", (_ceil(n, 64), 1, 1), 128, argument)]
    # three stages of 128 rows and 8-bit weights don't fit 48 KiB
    rows = 32 if m <= 32 else 64 if bits == 8 or m <= 128 else 128
    return [Launch("w_a8", f"w_a8::tiled<{bits}, {rows}, {wide}>", (_ceil(m, rows), _ceil(n, 128), 1), 256, argument)]


def _int8_outlier_slices(m: int) -> tuple[int, int]:
    """(rows of a slice, number of slices): enough blocks of 2048 columns each, and few words to join (our choice)."""
    rows = max(64, _ceil(m, 32))
    return rows, _ceil(m, rows)


def int8_outlier_workspace_bytes(m: int, n: int, k: int) -> int:
    if m < 0 or n < 0 or n > 65535 * 64 or k < 1 or k % 16 or k > 65536:
        return -1
    if m <= 1 or n == 0:
        return 0
    padded = _ceil(k, 64) * 64
    return m * padded + padded // 8 * (1 + _int8_outlier_slices(m)[1]) + m * 4


def int8_outlier(
    x: int, weight: int, absmax: int, columns: int, column_weight: int, bias: int, y: int, workspace: int,
    workspace_bytes: int, m: int, n: int, k: int, column_count: int, threshold: float, kind: int,
) -> list[Launch] | None:  # fmt: skip
    """The launches; None for a call that no kernel accepts."""
    needed = int8_outlier_workspace_bytes(m, n, k)
    threshold = c_float(threshold).value
    if needed < 0 or kind not in (FLOAT16, BFLOAT16, FLOAT32) or not threshold >= 0 or not 0 <= column_count <= k:
        return None
    if (columns == 0) != (column_weight == 0) or (not columns and column_count):
        return None
    if m == 0 or n == 0:
        return []
    if not (x and weight and absmax and y) or x % 16 or weight % 16:
        return None
    if needed and (not workspace or workspace % 16 or workspace_bytes < needed):
        return None
    padded = _ceil(k, 64) * 64
    words = padded // 32
    rows_per_slice, slices = _int8_outlier_slices(m)
    codes = mask = flags = step = 0
    if needed:
        codes, mask = workspace, workspace + m * padded
        flags = mask + 4 * words
        step = flags + 4 * words * slices
    if m > 1 and columns:
        slices = 1
    elif m > 1 and threshold == 0:
        slices = 0
    argument = Int8OutlierArguments(
        x, weight, absmax, columns, column_weight, bias, y, codes, step, mask, flags,
        m, n, k, padded, words, slices, rows_per_slice, column_count, threshold, kind,
    )  # fmt: skip
    across = _ceil(n, 64)
    if m == 1:
        return [Launch("int8_outlier", "int8_outlier::one_row", (across, 1, 1), 256, argument)]
    flag = Launch("int8_outlier", "int8_outlier::flag_columns", (_ceil(words * 4, 256), slices, 1), 256, argument)
    return [
        *([flag] if slices else []),
        Launch("int8_outlier", "int8_outlier::round_rows", (m, 1, 1), 256, argument),
        Launch("int8_outlier", "int8_outlier::product", (_ceil(m, 64), across, 1), 128, argument),
    ]


def _factors_fit(rows: int, n: int, blocks: int, m: int, w: int, k: int) -> bool:
    if rows < 0 or rows > 1 << 30 or n < 0 or n > 65535 * 32 or not 1 <= blocks <= 65535 or not 1 <= k <= m <= 4096:
        return False
    return w >= 8 and w % 8 == 0 and blocks * w <= 1 << 30 and blocks * k <= 1 << 30


def _rows_of_responses(rows: int, m: int) -> int:
    """Rows of x that `combine` processes at once: they share the read of an entry."""
    return 1 if rows == 1 or _ceil(m, 4) * 4 * 8 > 4096 else 8


def dense_sparse_workspace_bytes(rows: int, n: int, blocks: int, m: int, w: int, k: int) -> int:
    if not _factors_fit(rows, n, blocks, m, w, k):
        return -1
    if rows == 0 or n == 0:
        return 0
    at_once = _rows_of_responses(rows, m)
    return 4 * _ceil(rows, at_once) * at_once * blocks * _ceil(m, 4) * 4


def dense_sparse(
    x: int, atoms: int, atom_step: int, entries: int, step: int, bias: int, y: int, workspace: int,
    workspace_bytes: int, rows: int, n: int, blocks: int, m: int, w: int, k: int, kind: int,
) -> list[Launch] | None:  # fmt: skip
    """The launches; None for a call that no kernel accepts."""
    needed = dense_sparse_workspace_bytes(rows, n, blocks, m, w, k)
    if needed < 0 or kind not in (FLOAT16, BFLOAT16):
        return None
    if rows == 0 or n == 0:
        return []
    if not (x and atoms and entries and y and workspace) or x % 16 or atoms % 16 or workspace % 16:
        return None
    if workspace_bytes < needed:
        return None
    at_once = _rows_of_responses(rows, m)
    argument = DenseSparseArguments(
        x, atoms, atom_step, entries, step, bias, y, workspace, rows, n, blocks, m, w, k, at_once, _ceil(m, 4) * 4
    )
    halves, split = 1 if rows <= 8 else 4, 8 if rows <= 64 else 1
    across = (1 if rows <= 8 else _ceil(rows, 32), _ceil(m, 64), blocks)
    outputs = _ceil(n, 32) if split == 8 else _ceil(_ceil(n, 32), 8)
    combine = f"dense_sparse::combine<{kind}, {at_once}, {split}>"
    return [
        Launch("dense_sparse", f"dense_sparse::responses<{kind}, {halves}>", across, 128, argument),
        Launch("dense_sparse", combine, (_ceil(rows, at_once), outputs, 1), 256, argument),
    ]


def gptq_solve(
    work: int, errors: int, codes: int, upper: int, scale: int, zero: int, group_of: int,
    rows: int, groups: int, begin: int, stop: int, end: int, low: float, high: float,
) -> list[Launch] | None:  # fmt: skip
    """The launches; None for a call that no kernel accepts."""
    if rows < 0 or rows > 0x7FFFFFFF - 64 or groups < 0 or not 0 <= begin <= stop <= end <= 1 << 16:
        return None
    if stop - begin > 128 or not c_float(low).value <= c_float(high).value:
        return None
    if rows == 0 or begin == stop:
        return []
    arrays = (work, errors, codes, upper, scale, zero, group_of)
    if not (work and errors and codes and upper and scale and group_of) or groups == 0 or any(a % 4 for a in arrays):
        return None
    argument = GptqSolveArguments(*arrays, rows, groups, begin, stop, end, low, high, 0)
    return [Launch("gptq_solve", "gptq_solve::columns", (_ceil(rows, 64), 1, 1), 64, argument)]


def hadamard_factor(n: int) -> int:
    """The m of n = 2^p m that hadamard.cu multiplies in registers; 1 for a power of two, 0 for an n that it refuses."""
    if n < 8:
        return 0
    odd = n // (n & -n)
    if odd == 1:
        return 1 if n <= 32768 else 0
    m = 4 * odd
    return m if n % 4 == 0 and n // m <= 512 * RUNS.get(m, 0) else 0


def hadamard(x: int, y: int, rows: int, n: int, scale: float, kind: int) -> list[Launch] | None:
    """The launches; None for a call that no kernel accepts."""
    m = hadamard_factor(n)
    if rows < 0 or m == 0 or rows > 1 << 40 or kind not in (FLOAT16, BFLOAT16, FLOAT32):
        return None
    if rows == 0:
        return []
    if not x or not y or x % 16 or y % 16:
        return None
    run, most = (8, 1024) if m == 1 else (m, 512)  # neighbours of a thread, threads
    runs = n // run
    threads = min(runs, most) if runs > 32 else 128
    chunks = max(1, runs // most)
    blocks = _ceil(rows * n, threads * run * chunks)
    if blocks >> 31:
        return None
    kernel = f"rows<{kind}, {chunks}>" if m == 1 else f"rows_of_runs<{m}, {chunks}>"
    argument = HadamardArguments(x, y, rows * n, n, scale, kind, n // m)
    return [Launch("hadamard", f"hadamard::{kernel}", (blocks, 1, 1), threads, argument)]


# by name: the launchers, and the functions that only compute the size of a workspace
PLANS: dict[str, Callable[..., list[Launch] | None]] = {
    "compressor_w_a16": w_a16,
    "compressor_quantize_rows": quantize_rows,
    "compressor_w_a8": w_a8,
    "compressor_int8_outlier": int8_outlier,
    "compressor_dense_sparse": dense_sparse,
    "compressor_gptq_solve": gptq_solve,
    "compressor_hadamard": hadamard,
}
SIZES: dict[str, Callable[..., int]] = {
    "compressor_w_a16_workspace_bytes": w_a16_workspace_bytes,
    "compressor_int8_outlier_workspace_bytes": int8_outlier_workspace_bytes,
    "compressor_dense_sparse_workspace_bytes": dense_sparse_workspace_bytes,
}
