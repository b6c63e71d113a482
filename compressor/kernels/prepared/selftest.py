"""Tests each compiled operation at each instruction level with small problems, compared with torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from types import ModuleType

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from compressor.errors import KernelError
from compressor.kernels.cpu import LEVELS, Library, levels_here, library
from compressor.kernels.ops import linear as ops
from compressor.kernels.ops.gptq_columns import round_columns, trial_columns
from compressor.kernels.ops.hadamard_matrix import base_matrix, sylvester
from compressor.kernels.ops.int8_split import columns_product, round_rows, rounded_product
from compressor.kernels.ops.scale_ranges import COARSE_STEP, COARSE_STEPS, FINE_STEP, search_in_torch
from compressor.kernels.ops.table_functions import activate, inverse_root

ROWS, OUT, COLUMNS, GROUP = 14, 70, 96, 32
FEW = 2  # without VNNI, few and many rows use different code
UNIT = 2.0**-24  # half a unit in the last place of float32


@dataclass(frozen=True)
class Problem:
    """call      functions, level -> the operation's error code (0: none) and its result
    expected  the result, in float64 or integers
    allowed   largest error, larger than the operation's bound (docs/kernels.md); 0: exact
    """

    name: str
    call: Callable[[ModuleType, int], tuple[int, Tensor]]
    expected: Tensor
    allowed: Tensor | float = 0.0

    def outcome(self, functions: ModuleType, level: int) -> str:
        """ "ok", or the error"""
        error, result = self.call(functions, level)
        distance = (result.double() - self.expected.double()).abs()
        if not error and bool((distance <= self.allowed).all()):  # False for NaN
            return "ok"
        return f"error {error}, off by {float(distance.max()):.3g}"


def self_test(levels: Iterable[int] | None = None) -> dict[str, str]:
    """ "op, level" -> "ok", or the error

    levels  indices into LEVELS; None: all levels of this processor
    raises  KernelError if there is no library
    """
    functions = ops.cpu_library().functions
    here = levels_here(functions) if levels is None else list(levels)
    with _disable_current_modes():  # the first caller may be a model of fake tensors
        return {f"{p.name}, {LEVELS[level]}": p.outcome(functions, level) for p in problems() for level in here}


@cache
def tried_library() -> Library | str:
    """The compiled library, tested at the level in use, or why it can't be used.

    raises  KernelError if it fails its self-test, or as `library` does
    """
    found = library()
    if isinstance(found, str):
        return found
    failed = {name: message for name, message in self_test([found.level]).items() if message != "ok"}
    wrong = [f"{name}: {message}" for name, message in failed.items()]
    if wrong:
        raise KernelError(
            f"the CPU library fails its self-test: {'; '.join(wrong)}",
            where=str(found.functions.__file__),
            hint="Install compress-model again, set COMPRESSOR_CPU to another level, or load with kernels='reference'.",
            data={"reason": "self-test", "failed": failed},
        )
    return found


def problems() -> list[Problem]:
    """The problems, for any default device and dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"), torch.no_grad():
            return list(_problems())
    finally:
        torch.set_default_dtype(before)


def _problems() -> Iterator[Problem]:
    made = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, COLUMNS, generator=made)
    for name, widths in ops.BITS.items():
        for bits in widths:
            yield _product(name, bits, x, made)
    yield _outlier_product(x, made)
    yield _dense_product(x, made)
    yield _factor_product(x, made)
    yield from _rows_of_int8(x, made)
    yield _hadamard(x)
    yield from _tables(x, made)
    yield _columns()
    yield from _scales(made)
    yield _moments(x)
    yield from _block_functions(x, made)


def _at(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _nothing(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor for a result, filled with a value that no result has."""
    return torch.full(shape, torch.nan if dtype.is_floating_point else 0x55, dtype=dtype, device="cpu")


def _product(name: str, bits: int, x: Tensor, made: torch.Generator) -> Problem:
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

    def call(functions: ModuleType, level: int) -> tuple[int, Tensor]:
        y, error = _nothing(ROWS, OUT), 0
        for rows, to in ((x[:FEW], y[:FEW]), (x[FEW:], y[FEW:])):
            error = error or getattr(functions, name)(
                level, 1, _at(rows), 0, _at(packed), packed.numel(), 0, 0, _at(to), len(rows), OUT, COLUMNS, bits, GROUP
            )
        return error, y

    allowed = 16 * GROUP * UNIT * (inputs.abs() @ weight.abs().t())
    return Problem(f"{name} {bits} bits", call, inputs @ weight.t(), allowed)


def _outlier_product(x: Tensor, made: torch.Generator) -> Problem:
    x, threshold = x.clone(), 6.0
    x[3, 5] = 2 * threshold
    codes, absmax = round_rows(torch.randn(OUT, COLUMNS, generator=made))
    packed, outliers = ops.pack_int8_rows(codes, absmax), torch.tensor([5])
    weight = codes.float() * absmax.unsqueeze(1) / 127
    apart = columns_product(x[:, outliers], weight[:, outliers])

    def call(functions: ModuleType, level: int) -> tuple[int, Tensor]:
        y = _nothing(ROWS, OUT)
        error = functions.linear_int8_outlier(
            level, 1, _at(x), 0, _at(packed), packed.numel(), _at(absmax), 0, 0, 0, 0, 0, 0, _at(y), ROWS, OUT, COLUMNS,
            threshold,
        )  # fmt: skip
        return error, y

    allowed = 16 * UNIT * (x.abs() @ weight.abs().t()).double()
    return Problem("linear_int8_outlier", call, rounded_product(x, codes, absmax, outliers) + apart, allowed)


def _dense_product(x: Tensor, made: torch.Generator) -> Problem:
    weight, bias = torch.randn(OUT, COLUMNS, generator=made), torch.randn(OUT, generator=made)

    def call(functions: ModuleType, level: int) -> tuple[int, Tensor]:
        y = _nothing(ROWS, OUT)
        return functions.linear_dense(level, 1, _at(x), _at(weight), 0, _at(bias), 0, _at(y), ROWS, OUT, COLUMNS), y

    allowed = COLUMNS * UNIT * (x.double().abs() @ weight.double().abs().t() + bias.abs())
    return Problem("linear_dense", call, x.double() @ weight.double().t() + bias, allowed)


def _factor_product(x: Tensor, made: torch.Generator) -> Problem:
    blocks, atoms, k = 2, 20, 5
    dense = torch.randn(blocks, atoms, COLUMNS // blocks, generator=made)
    index = torch.rand(OUT, blocks, atoms, generator=made).argsort(2)[..., :k].sort(2).values
    value = torch.randn(OUT, blocks, k, generator=made)
    weight = torch.zeros(OUT, blocks, atoms).scatter_(2, index, value).double()
    small = index.to(torch.uint16)

    def product(x: Tensor, dense: Tensor, weight: Tensor) -> Tensor:
        return torch.einsum("mbw,baw,nba->mn", x.double().view(ROWS, blocks, -1), dense.double(), weight)

    def call(functions: ModuleType, level: int) -> tuple[int, Tensor]:
        y = _nothing(ROWS, OUT)
        error = functions.linear_dense_sparse(
            level,
            1,
            _at(x),
            0,
            _at(dense),
            0,
            _at(small),
            _at(value),
            0,
            0,
            0,
            _at(y),
            ROWS,
            OUT,
            *dense.shape,
            k,
            0,
            0,
        )
        return error, y

    allowed = 2 * COLUMNS * UNIT * product(x.abs(), dense.abs(), weight.abs())
    return Problem("linear_dense_sparse", call, product(x, dense, weight), allowed)


def _rows_of_int8(x: Tensor, made: torch.Generator) -> Iterator[Problem]:
    codes, absmax = round_rows(x)

    def quantize(functions: ModuleType, level: int) -> tuple[int, Tensor]:
        found, top = _nothing(ROWS, COLUMNS, dtype=torch.int8), _nothing(ROWS)
        error = functions.quantize_rows(level, _at(x), 0, _at(found), _at(top), ROWS, COLUMNS)
        return error, torch.cat([found.float(), top.unsqueeze(1)], 1)

    yield Problem("quantize_rows", quantize, torch.cat([codes.float(), absmax.unsqueeze(1)], 1))
    other = torch.randint(-128, 128, (OUT, COLUMNS), generator=made, dtype=torch.int8)

    def multiply(functions: ModuleType, level: int) -> tuple[int, Tensor]:
        c = _nothing(ROWS, OUT, dtype=torch.int32)
        return functions.int8_matmul(level, 1, _at(codes), _at(other), _at(c), ROWS, OUT, COLUMNS), c

    yield Problem("int8_matmul", multiply, codes.long() @ other.long().t())


def _hadamard(x: Tensor) -> Problem:
    base, scale = base_matrix(12), COLUMNS**-0.5
    held = base.float()

    def call(functions: ModuleType, level: int) -> tuple[int, Tensor]:
        y = _nothing(ROWS, COLUMNS)
        return functions.hadamard(level, 1, _at(x), 0, _at(held), _at(y), ROWS, COLUMNS, 12, scale), y

    allowed = 2 * 12 * UNIT * scale * x.double().abs().sum(1, keepdim=True)
    return Problem("hadamard", call, x.double() @ torch.kron(sylvester(COLUMNS // 12), base) * scale, allowed)


def _tables(x: Tensor, made: torch.Generator) -> Iterator[Problem]:
    """Results are those of `table_functions`, except for the last place."""
    table, low, step, slopes = torch.rand(33, generator=made) + 1, -2.0, 0.125, (0.0, 1.0)
    positive = x.abs() + 2.0**-20
    for linear in (True, False):
        how = "lines" if linear else "nearest"

        def look_up(functions: ModuleType, level: int, linear: bool = linear) -> tuple[int, Tensor]:
            y = _nothing(ROWS, COLUMNS)
            error = functions.table_lookup(
                level, 1, _at(x), 0, _at(table), _at(y), x.numel(), len(table), low, step, int(linear), *slopes
            )
            return error, y

        expected = activate(x, table, low, step, linear, slopes).double()
        yield Problem(f"table_lookup {how}", look_up, expected, 2 * UNIT * expected.abs())

        def root(functions: ModuleType, level: int, linear: bool = linear) -> tuple[int, Tensor]:
            y = _nothing(ROWS, COLUMNS)
            return functions.table_inverse_root(
                level, _at(positive), _at(table), _at(y), x.numel(), len(table), 3 / 32, int(linear)
            ), y

        expected = inverse_root(positive, table, 3 / 32, linear).double()
        yield Problem(f"table_inverse_root {how}", root, expected, 2 * UNIT * expected.abs())


def _columns() -> Problem:
    """Codes, errors and updates must be those of torch, bit for bit."""
    part, begin, stop = trial_columns(symmetric=False, rows=OUT)
    start, expected = part.work, replace(part, work=part.work.clone())
    round_columns(expected, begin, stop)

    def changed(work: Tensor, errors: Tensor, codes: Tensor) -> Tensor:
        return torch.cat([work[stop:], errors[begin:stop], codes[begin:stop]])

    def call(functions: ModuleType, level: int) -> tuple[int, Tensor]:
        written = start.clone(), _nothing(*start.shape), _nothing(*start.shape)
        read = (part.upper, part.scale, part.zero_point, part.group_of)
        error = functions.gptq_solve(
            level, 1, *map(_at, (*written, *read)), OUT, len(part.scale), begin, stop, len(start), float(part.low),
            float(part.high),
        )  # fmt: skip
        return error, changed(*written)

    return Problem("gptq_solve", call, changed(expected.work, expected.errors, expected.codes))


def _scales(made: torch.Generator) -> Iterator[Problem]:
    """Scales and zero points are those of torch, except where two ranges have nearly equal errors: not here."""
    weight = torch.randn(ROWS, COLUMNS // GROUP, GROUP, generator=made)
    importance = torch.rand(COLUMNS // GROUP, GROUP, generator=made)
    for name, kind, symmetric, heavy in (("float32", 0, True, None), ("bfloat16", 1, False, importance)):

        def call(
            functions: ModuleType,
            level: int,
            kind: int = kind,
            symmetric: bool = symmetric,
            heavy: Tensor | None = heavy,
        ) -> tuple[int, Tensor]:
            found = _nothing(2, *weight.shape[:2])
            error = functions.scale_search(
                level, 1, _at(weight), _at(heavy), _at(found[0]), _at(found[1]), *weight.shape, 3, int(symmetric), kind,
                COARSE_STEP, FINE_STEP, COARSE_STEPS,
            )  # fmt: skip
            return error, found

        expected = search_in_torch(weight, heavy, 3, symmetric, True, getattr(torch, name))
        yield Problem(f"scale_search {name}", call, torch.stack(expected))


def _moments(x: Tensor) -> Problem:
    x, columns = x.bfloat16(), x.shape[1]
    exact = x.double().t() @ x.double()

    def call(functions: ModuleType, level: int) -> tuple[int, Tensor]:
        packed, found = _nothing(columns * len(x), dtype=torch.int32), _nothing(columns, columns).fill_(1)
        error = functions.second_moments(
            level, 1, _at(x), _at(packed), _at(found), len(x), columns, columns, 2.0, 0.5
        )  # fmt: skip
        return error, found.triu()

    allowed = (ROWS + 3) * UNIT * (2 + x.double().abs().t() @ x.double().abs())
    return Problem("second_moments", call, (2 + 0.5 * exact).triu(), allowed)


def _block_functions(x: Tensor, made: torch.Generator) -> Iterator[Problem]:
    """What a block computes between its products. Rotations are those of torch, bit for bit."""
    weight, other, eps = torch.randn(COLUMNS, generator=made), torch.randn(ROWS, COLUMNS, generator=made), 1e-5

    def norm(functions: ModuleType, level: int) -> tuple[int, Tensor]:
        y = _nothing(ROWS, COLUMNS)
        return functions.rms_norm(level, 1, _at(x), 0, _at(weight), _at(y), ROWS, COLUMNS, eps, 1.0, 1), y

    inputs = x.double()
    expected = inputs * torch.rsqrt(inputs.square().mean(1, keepdim=True) + eps) * (1 + weight.double())
    yield Problem("rms_norm", norm, expected, 16 * UNIT * expected.abs())

    def gate(functions: ModuleType, level: int) -> tuple[int, Tensor]:
        y = _nothing(ROWS, COLUMNS)
        return functions.silu_product(level, 1, _at(x), _at(other), 0, _at(y), x.numel()), y

    expected = inputs / (1 + torch.exp(-inputs)) * other.double()
    yield Problem("silu_product", gate, expected, 8 * UNIT * expected.abs())
    heads, width = 2, COLUMNS // 2
    cos, sin = torch.randn(2, ROWS, width, generator=made)
    split = x.view(ROWS, heads, width).transpose(0, 1)  # (heads, tokens, width)

    def rotate(functions: ModuleType, level: int) -> tuple[int, Tensor]:
        y = _nothing(heads, ROWS, width)
        error = functions.rotate_halves(level, 1, _at(x), 0, _at(cos), _at(sin), _at(y), 1, ROWS, heads, width, 0)
        return error, y

    first, second = split.chunk(2, -1)
    yield Problem("rotate_halves", rotate, split * cos + torch.cat([-second, first], -1) * sin)
