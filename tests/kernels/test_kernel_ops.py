"""Operations beside the linear layers: equal bits at all levels, within a derived bound of exact results."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import mmap
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from guarded import guarded
from raising import raises

from compressor.errors import KernelError, ShapeError
from compressor.kernels.cpu import Library, levels_here, library
from compressor.kernels.ops import dense_product, dense_sparse, hadamard, int8_matmul, large_pages, table_lookup
from compressor.kernels.ops.checks import operands
from compressor.kernels.ops.hadamard_matrix import base_matrix, base_of, sylvester
from compressor.kernels.ops.int8_split import round_rows
from compressor.kernels.ops.large_pages import LARGE, empty_bytes
from compressor.kernels.ops.linear import DTYPES as CODES
from compressor.kernels.ops.table_functions import activate, inverse_root, look_up
from compressor.layers.sparse_factor_linear import SparseFactorLinear
from compressor.methods.quantization.lookup_tables import root_table

BUILT = isinstance(library(), Library)
compiled = pytest.mark.skipif(not BUILT, reason=f"{library()}")
HERE = levels_here(library().functions) if BUILT else []
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
UNIT = 2.0**-24  # half a unit in the last place of float32
HALF_UNIT = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # of the rounding to y's type
SMALLEST = {torch.float32: 2.0**-149, torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24}
SECOND_ORDER = 1 + 2.0**-10  # (1 + u)^n - 1 < n u (1 + 2^-10) for n < 2^13
ROWS = [0, 1, 2, 3, 4, 5, 15, 16, 17, 33, 66]


@dataclasses.dataclass(frozen=True)
class Family:
    """problem  rows, shape, dtype -> the operation's arguments, x first
    raw      level, threads, arguments, y -> the compiled function's answer
    exact    arguments -> the result in float64 or int64, and how far from it the operation may be
    """

    name: str
    module: ModuleType
    shapes: list[tuple[int, ...]]
    dtypes: list[torch.dtype]
    problem: Callable
    raw: Callable
    exact: Callable

    def __str__(self):
        return self.name

    def op(self, *arguments):
        return getattr(self.module, self.name)(*arguments)


def drawn(rows, *rest):
    return torch.Generator().manual_seed(rows * 1000 + sum(rest))


def at(tensor):
    return 0 if tensor is None else tensor.data_ptr()


def int8_problem(rows, shape, dtype):
    made = drawn(rows, *shape)
    out, columns = shape
    return tuple(torch.randint(-128, 128, (n, columns), generator=made, dtype=dtype) for n in (rows, out))


def int8_raw(level, threads, arguments, y):
    a, b = arguments
    return library().functions.int8_matmul(level, threads, at(a), at(b), at(y), len(a), *b.shape)


def int8_exact(arguments):
    exact = arguments[0].long() @ arguments[1].long().t()
    return exact, torch.zeros_like(exact)


def hadamard_problem(rows, shape, dtype):
    (n,) = shape
    return torch.randn(rows, n, generator=drawn(rows, n)).to(dtype), n**-0.5


def hadamard_raw(level, threads, arguments, y):
    x, scale = arguments
    base = base_matrix(base_of(x.shape[1])).float()
    return library().functions.hadamard(
        level, threads, at(x), CODES[x.dtype], at(base), at(y), *x.shape, len(base), scale
    )


def matrix(n):
    return torch.kron(sylvester(n // base_of(n)), base_matrix(base_of(n)))


def hadamard_exact(arguments):
    x, scale = arguments
    n, m = x.shape[1], base_of(x.shape[1])
    # m - 1 sums of a block, one of each butterfly, the scale as a float32 and the product with it
    count = m - 1 + (n // m).bit_length() - 1 + 2
    allowed = count * UNIT * SECOND_ORDER * scale * x.double().abs().sum(1, keepdim=True)
    return x.double() @ matrix(n) * scale, allowed


def sparse_problem(rows, shape, dtype):
    blocks, atoms, width, out, k = shape
    made = drawn(rows, *shape)
    x = torch.randn(rows, blocks * width, generator=made).to(dtype)
    dense = torch.randn(blocks, atoms, width, generator=made).to(dtype)
    index = torch.rand(out, blocks, atoms, generator=made).argsort(2)[..., :k].sort(2).values
    value = torch.randn(out, blocks, k, generator=made).to(dtype)
    return x, dense, index.to(torch.uint16), value, torch.randn(out, generator=made)


def sparse_raw(level, threads, arguments, y):
    x, dense, index, value, bias = arguments
    kind = CODES[x.dtype]
    return library().functions.linear_dense_sparse(
        level, threads, at(x), kind, at(dense), kind, at(index), at(value), kind, at(bias), 0, at(y), len(x),
        len(value), *dense.shape, value.shape[2], 0, 0,
    )  # fmt: skip


def sparse_exact(arguments):
    x, dense, index, value, bias = arguments
    blocks, _, width = dense.shape

    def product(x, dense, value):
        responses = torch.einsum("mbw,baw->mba", x.view(-1, blocks, width), dense)
        chosen = responses[:, torch.arange(blocks)[:, None], index.to(torch.int64)]  # (rows, out, blocks, k)
        return (chosen * value).sum((2, 3))

    wide = [tensor.double() for tensor in (x, dense, value)]
    exact, size = product(*wide) + bias.double(), product(*[tensor.abs() for tensor in wide])
    # a column of each lane, four halvings, an fma for each entry; then the bias
    count = -(-dense.shape[2] // 16) + 4 + value.shape[1] * value.shape[2]
    allowed = count * UNIT * SECOND_ORDER * size
    return exact, allowed + UNIT * (exact.abs() + allowed)


def dense_problem(rows, shape, dtype):
    out, columns = shape
    made = drawn(rows, *shape)
    x, weight = (torch.randn(n, columns, generator=made).to(dtype) for n in (rows, out))
    return x, weight, torch.randn(out, generator=made)


def dense_raw(level, threads, arguments, y):
    x, weight, bias = arguments
    out, columns = weight.shape
    return library().functions.linear_dense(
        level, threads, at(x), at(weight), CODES[x.dtype], at(bias), 0, at(y), len(x), out, columns
    )


def dense_exact(arguments):
    x, weight, bias = (tensor.double() for tensor in arguments)
    exact, size = x @ weight.t() + bias, x.abs() @ weight.abs().t()
    allowed = (-(-x.shape[1] // 16) + 4) * UNIT * SECOND_ORDER * size  # an fma for each column of a lane, four halvings
    return exact, allowed + UNIT * (exact.abs() + allowed)


def table_problem(rows, shape, dtype, linear):
    entries, slopes = shape[0], shape[1:] or (0.0, 0.0)
    made = drawn(rows, entries)
    low, step = -4.0, 2.0**-5
    x = torch.randn(rows, 37, generator=made) * entries * step + low
    if rows:  # knots and halfway between them, and far out, though finite in float16
        x[0, :5] = torch.tensor([low, low + step / 2, low + 1.5 * step, low + (entries - 1) * step, 6e4])
    return x.to(dtype), torch.randn(entries, generator=made), low, low + (entries - 1) * step, linear, *slopes


def table_raw(level, threads, arguments, y):
    x, table, low, high, linear, left_slope, right_slope = arguments
    step = (high - low) / (len(table) - 1)
    return library().functions.table_lookup(
        level, threads, at(x), CODES[x.dtype], at(table), at(y), x.numel(), len(table), low, step, int(linear),
        left_slope, right_slope,
    )  # fmt: skip


def table_exact(arguments):
    x, table, low, high, linear, left_slope, right_slope = arguments
    place = ((x.double() - low) / (high - low) * (len(table) - 1)).clamp(0, len(table) - 1)
    left = place.floor().clamp(max=len(table) - 2).long()
    value = table.double()
    straight = left_slope * (x.double() - low).clamp(max=0) + right_slope * (x.double() - high).clamp(min=0)
    beyond = 3 * UNIT * (straight.abs() + table.abs().max().double())  # difference, product and sum are rounded
    if not linear:
        return value[place.round().long()] + straight, torch.where(straight == 0, 0.0, beyond)
    rise = value[left + 1] - value[left]
    # place has two roundings (x - low is rounded where x is far out; then it is clamped), the weight one more of 1, the
    # rise one, the fma one; a weight that falls to the other side of 1/2 changes nothing but their order
    size = table.abs().max().double()
    return value[left] + (place - left) * rise + straight, (2 * place + 3) * UNIT * 2 * size + 3 * UNIT * size + beyond


def root_problem(rows, shape, dtype, linear):
    (entries,) = shape
    made = drawn(rows, entries)
    x = torch.randn(rows, 5, generator=made).abs() * torch.logspace(-12, 12, 5) + 1e-30
    return x, torch.rand(entries, generator=made), 3 / (entries - 1), linear


def root_raw(level, threads, arguments, y):
    x, table, step, linear = arguments
    return library().functions.table_inverse_root(
        level, at(x), at(table), at(y), x.numel(), len(table), step, int(linear)
    )


def root_exact(arguments):
    x, table, step, linear = arguments
    power = torch.floor((torch.frexp(x.double())[1] - 1) / 2)
    a = x.double() / 4.0**power
    exact, allowed = table_exact((a, table, 1.0, 1 + (len(table) - 1) * step, linear, 0.0, 0.0))
    return exact * 2.0**-power, allowed * 2.0**-power  # powers of two round nothing


FAMILIES = [
    Family("int8_matmul", int8_matmul, [(1, 1), (70, 13), (65, 64), (3, 200), (0, 8), (8, 0)], [torch.int8],
           int8_problem, int8_raw, int8_exact),
    Family("hadamard", hadamard, [(n,) for n in (1, 2, 8, 16, 64, 512, 12, 20, 28, 36, 40, 96, 224)], DTYPES,
           hadamard_problem, hadamard_raw, hadamard_exact),
    Family("linear_dense_sparse", dense_sparse,
           [(1, 1, 1, 1, 1), (3, 37, 13, 70, 5), (2, 20, 32, 130, 9), (1, 4, 8, 0, 2), (2, 5, 16, 9, 0)], DTYPES,
           sparse_problem, sparse_raw, sparse_exact),
    Family("linear_dense", dense_product, [(1, 1), (7, 13), (70, 33), (64, 1040), (0, 8), (5, 16)], DTYPES,
           dense_problem, dense_raw, dense_exact),
    *[
        Family("table_lookup", table_lookup, [(2,), (3, 1.0, 0.0), (256, 0.0, 1.0), (1024, -0.3, 0.7)], DTYPES,
               lambda rows, shape, dtype, linear=linear: table_problem(rows, shape, dtype, linear), table_raw,
               table_exact)
        for linear in (True, False)
    ],
    *[
        Family("table_inverse_root", table_lookup, [(2,), (33,), (257,)], [torch.float32],
               lambda rows, shape, dtype, linear=linear: root_problem(rows, shape, dtype, linear), root_raw, root_exact)
        for linear in (True, False)
    ],
]  # fmt: skip
CASES = [(family, shape) for family in FAMILIES for shape in family.shapes]
each_case = pytest.mark.parametrize("family, shape", CASES, ids=[f"{f}-{s}" for f, s in CASES])
each_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f"{f}-{FAMILIES.index(f)}")


def bits(tensor):
    return tensor.view({1: torch.int8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])


def filled(tensor):
    """Of this shape, with what no result is: 0x55 in each byte of integers, NaN."""
    return torch.full_like(tensor, torch.nan if tensor.is_floating_point() else 0x55555555)


@compiled
@each_case
def test_levels_and_threads_give_the_same_bits_within_the_bound(family, shape):
    for dtype in family.dtypes:
        for rows in ROWS:
            arguments = family.problem(rows, shape, dtype)
            expected = family.op(*arguments)
            for level in HERE:
                for threads in (1, 2, 5):
                    y = filled(expected)
                    assert family.raw(level, threads, arguments, y) == 0
                    assert torch.equal(bits(y), bits(expected)), (dtype, rows, level, threads)
            exact, allowed = family.exact(arguments)
            if expected.is_floating_point():
                assert expected.dtype == dtype
                allowed = allowed + HALF_UNIT[dtype] * (exact.abs() + allowed) + SMALLEST[dtype]
            assert expected.shape == exact.shape and ((expected.to(exact.dtype) - exact).abs() <= allowed).all()


@compiled
@each_case
def test_a_row_has_the_same_bits_alone_and_among_others(family, shape):
    for dtype in family.dtypes:
        x, *rest = family.problem(33, shape, dtype)
        together = bits(family.op(x, *rest))
        for size in (1, 7):
            assert torch.equal(together, bits(torch.cat([family.op(part, *rest) for part in x.split(size)])))


@compiled
@each_case
def test_strided_misaligned_and_expanded_inputs_give_the_bits_of_contiguous_ones(family, shape):
    for dtype in family.dtypes:
        x, *rest = family.problem(5, shape, dtype)
        expected = bits(family.op(x, *rest))
        offset = torch.empty(x.numel() + 1, dtype=dtype)[1:].view_as(x).copy_(x)
        for other in (x.t().contiguous().t(), torch.cat([x, x], 1)[:, : x.shape[1]], offset):
            assert torch.equal(bits(family.op(other, *rest)), expected)
        assert torch.equal(bits(family.op(x[:1].expand(4, -1), *rest)), expected[:1].expand(4, -1))
        turned = [r.transpose(0, -1).contiguous().transpose(0, -1) if isinstance(r, torch.Tensor) else r for r in rest]
        assert torch.equal(bits(family.op(x, *turned)), expected)
        if family.name != "int8_matmul":
            wide = x.view(5, 1, -1).expand(5, 2, -1)
            assert torch.equal(bits(family.op(wide, *rest)), expected.view(5, 1, -1).expand(5, 2, -1))


@compiled
@each_case
def test_nothing_is_read_or_written_beyond_the_tensors(family, shape):
    for dtype in family.dtypes:
        for rows in (1, 3, 17):
            arguments = family.problem(rows, shape, dtype)
            expected = family.op(*arguments)
            if not expected.numel() or not all(a.numel() for a in arguments if isinstance(a, torch.Tensor)):
                continue
            kept = tuple(guarded(a) if isinstance(a, torch.Tensor) else a for a in arguments)
            y = guarded(filled(expected))
            for level in HERE:
                y.copy_(filled(expected))
                assert family.raw(level, 1, kept, y) == 0
                assert torch.equal(bits(y), bits(expected))


@compiled
@pytest.mark.parametrize("family", FAMILIES[1:4], ids=str)
def test_a_row_with_nan_or_inf_spoils_itself_alone(family):
    for shape in family.shapes:
        x, *rest = family.problem(20, shape, torch.float32)
        clean = family.op(x, *rest)
        for row, value in ((1, torch.nan), (7, torch.inf), (19, -torch.inf)):
            x[row, -1] = value
        spoilt = torch.tensor([1, 7, 19])
        for level in HERE:
            y = filled(clean)
            assert family.raw(level, 1, (x, *rest), y) == 0
            if family.name != "linear_dense_sparse":
                assert not y[spoilt].isfinite().any()
            others = torch.ones(20, dtype=torch.bool)
            others[spoilt] = False
            assert torch.equal(bits(y[others]), bits(clean[others]))


@compiled
@each_family
def test_operations_pass_the_checks_of_torch_and_compile_with_any_number_of_rows(family):
    operation = getattr(torch.ops.compressor, family.name)
    shape = family.shapes[2]
    torch.compiler.reset()  # all families are traced through one lambda
    traced = torch.compile(lambda *arguments: operation(*arguments), fullgraph=True, dynamic=True, backend="aot_eager")
    for dtype in family.dtypes:
        torch.library.opcheck(operation.default, family.problem(3, shape, dtype))
        for rows in (3, 5, 9):
            arguments = family.problem(rows, shape, dtype)
            assert torch.equal(bits(traced(*arguments)), bits(family.op(*arguments)))


@compiled
def test_an_unknown_level_is_refused():
    for family in FAMILIES:
        arguments = family.problem(2, family.shapes[2], family.dtypes[0])
        assert family.raw(7, 1, arguments, filled(family.op(*arguments))) != 0


@compiled
def test_integer_sums_hold_at_the_largest_width():
    for a, b in ((-128, -128), (127, -128), (-128, 127)):
        first, second = (torch.full((2, 65536), value, dtype=torch.int8) for value in (a, b))
        for level in HERE:
            y = torch.zeros(2, 2, dtype=torch.int32)
            assert int8_raw(level, 1, (first, second), y) == 0 and (y == a * b * 65536).all()


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("exclude", [True, False])
def test_rows_are_rounded_without_their_outliers(exclude, dtype):
    x = torch.randn(9, 77, generator=drawn(9)).to(dtype)
    x[2, 5], x[3], x[4, 6], x[5, 5], x[6] = 20, 0, torch.nan, torch.inf, x[6] * 1e-4
    codes, absmax = int8_matmul.quantize_rows(x, 6.0, exclude)
    outliers = (x.abs() >= 6).any(0)
    assert outliers.nonzero().tolist() == [[5]] and (codes[:, 5] == 0).all()
    for row in range(9):
        left_out = outliers if exclude else x[row].abs() >= 6
        expected, largest = round_rows(torch.where(left_out, 0.0, x[row].float())[None])
        if row in (4, 5):
            assert absmax[row].isnan() and (codes[row] == 0).all()
        else:
            assert absmax[row] == largest and torch.equal(codes[row], torch.where(outliers, 0, expected[0]))
    plain = int8_matmul.quantize_rows(x.view(3, 3, 77), 0.0, exclude)
    expected = round_rows(x.float())
    assert torch.equal(plain[0].view(9, 77), expected[0]) and plain[1].shape == (3, 3)
    assert torch.equal(plain[1].flatten().nan_to_num(-1), expected[1].nan_to_num(-1))
    torch.library.opcheck(torch.ops.compressor.quantize_rows.default, (x[:3], 6.0, exclude))


@compiled
def test_excluding_columns_makes_finer_steps_than_excluding_elements():
    x = torch.tensor([[0.3, 2.0, 5.0, -1.5], [0.0, 0.0, 9.0, 0.0]])  # an outlier column because of another row
    assert int8_matmul.quantize_rows(x, 6.0, True)[1][0] == 2
    assert int8_matmul.quantize_rows(x, 6.0, False)[1][0] == 5


@compiled
def test_a_transform_of_a_power_of_two_undoes_itself():
    for n in (4, 256, 4096):  # whole numbers below 2^24, scales that are powers of two: exact
        x = torch.randint(-8, 9, (3, n), generator=drawn(n)).float()
        assert torch.equal(hadamard.hadamard(hadamard.hadamard(x, 1.0), 1 / n), x)


@pytest.mark.parametrize("n", [0, 3, 6, 10, 18, 44, 52, 100])
def test_a_width_without_a_matrix_is_refused(n):
    with raises(ShapeError, op="hadamard", reason="no-matrix", n=n, shape=[2, n]):
        hadamard.hadamard(torch.zeros(2, n), 1.0)


@compiled
@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("entries", [2, 256, 1024])
def test_a_table_gives_the_bits_of_the_reference(entries, linear):
    for span in (0.75, 12.0):
        made = drawn(entries)
        low, step = -span, 2.0**-6 * 3
        table = torch.randn(entries, generator=made)
        x = (torch.rand(20_003, generator=made) * 1.2 - 0.1) * (entries - 1) * step + low
        knots = low + torch.arange(2 * entries) * step / 2  # entries, and halfway between them
        x = torch.cat([x, knots, torch.tensor([torch.nan, torch.inf, -torch.inf])])
        expected = look_up(x, table, low, step, linear)
        for level in HERE:
            y = filled(x)
            assert table_raw(level, 2, (x, table, low, low + (entries - 1) * step, linear, 0.0, 0.0), y) == 0
            assert torch.equal(y.isnan(), expected.isnan()) and torch.equal(y.nan_to_num(9), expected.nan_to_num(9))
        slopes = (-0.3, 0.7)
        expected = activate(x, table, low, step, linear, slopes)
        for level in HERE:
            assert table_raw(level, 2, (x, table, low, low + (entries - 1) * step, linear, *slopes), y) == 0
            assert torch.equal(y.isnan(), expected.isnan()) and torch.equal(y[:-3], expected[:-3])
            assert y[-2:].tolist() == [torch.inf, torch.inf]


@compiled
@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("entries", [256, 1024])
def test_an_inverse_root_gives_the_bits_of_the_reference(entries, linear):
    table = root_table(entries)
    odd = torch.tensor([0.0, -0.0, -1.0, 1e-45, 2.0**-126, 1.0, 4.0, 3.4e38, torch.inf, -torch.inf, torch.nan])
    x = torch.cat([torch.randn(3001, generator=drawn(entries)).abs() * torch.logspace(-40, 38, 3001), odd])
    expected = inverse_root(x, table.values, table.step, linear)
    for level in HERE:
        y = filled(x)
        assert root_raw(level, 1, (x, table.values, table.step, linear), y) == 0
        assert torch.equal(y.isnan(), expected.isnan()) and torch.equal(y.nan_to_num(9), expected.nan_to_num(9))


@compiled
@pytest.mark.parametrize("values", ["float16", "bfloat16", "int8"])
def test_a_stored_layer_multiplies_as_its_operation(values):
    _, atoms, index, value, _ = sparse_problem(1, (3, 20, 16, 50, 4), torch.float32)
    layer = SparseFactorLinear.pack(atoms, value, index.long(), values)
    x = torch.randn(6, 48, generator=drawn(6))
    dense, stored = layer.factors(torch.float32)
    index = layer.index().to(torch.uint16)
    y = dense_sparse.linear_dense_sparse(x, dense, index, stored, None)
    exact, allowed = sparse_exact((x, dense, layer.index(), stored, torch.zeros(50)))
    assert ((y.double() - exact).abs() <= allowed).all()
    # as stored, without a copy in float32
    scales = (layer.weight_atom_scale, layer.weight_value_scale) if values == "int8" else ()
    stored_as = (layer.weight_atoms, index, layer.weight_values, None, *scales)
    for rows in (x, x[:1], x[:0]):
        assert torch.equal(dense_sparse.linear_dense_sparse(rows, *stored_as), y[: len(rows)])
    torch.library.opcheck(torch.ops.compressor.linear_dense_sparse.default, (x, *stored_as))
    if scales:
        for lacking in ((None, None), (scales[0], scales[1][:49])):
            with raises(ShapeError, **sparse_refusal(x, *stored_as[:4], *lacking)):
                dense_sparse.linear_dense_sparse(x, *stored_as[:4], *lacking)


def sparse_refusal(*given):
    names = ("x", "dense", "index", "value", "bias", "dense_scale", "value_scale")
    found = operands(**dict(itertools.zip_longest(names, given)))
    return {"op": "linear_dense_sparse", "reason": "operands", "operands": found}


@compiled
def test_bad_calls_name_what_they_got():
    codes = torch.zeros(2, 8, dtype=torch.int8)
    matrices = {"op": "int8_matmul", "reason": "operands"}
    with raises(ShapeError, **matrices, operands=operands(a=codes, b=codes[:, :7])):
        int8_matmul.int8_matmul(codes, codes[:, :7])
    with raises(ShapeError, **matrices, operands=operands(a=codes, b=codes.float())):
        int8_matmul.int8_matmul(codes, codes.float())
    long = torch.zeros(1, 65537, dtype=torch.int8)
    with raises(ShapeError, op="int8_matmul", reason="columns", operands=operands(a=long, b=long)):
        int8_matmul.int8_matmul(long, long)
    double = operands(x=torch.zeros(2, 8).double())
    with raises(ShapeError, op="quantize_rows", reason="operands", operands=double):
        int8_matmul.quantize_rows(torch.zeros(2, 8).double(), 0.0, True)
    with raises(ShapeError, op="hadamard", reason="operands", operands=double):
        hadamard.hadamard(torch.zeros(2, 8).double(), 1.0)
    x, dense, index, value, bias = sparse_problem(2, (3, 37, 13, 70, 5), torch.float32)
    for wrong in (
        (x[:, :38], dense, index, value, bias),
        (x, dense, index.to(torch.int32), value, bias),
        (x, dense, index[..., :4], value, bias),
        (x, dense[:2], index, value, bias),
        (x, dense, index, value, bias[:69]),
        (x.double(), dense, index, value, bias),
    ):
        with raises(ShapeError, **sparse_refusal(*wrong)):
            dense_sparse.linear_dense_sparse(*wrong)
    beyond = index.to(torch.int32)
    beyond[69, 2, 4] = 37
    with raises(ShapeError, op="linear_dense_sparse", index=[70, 3, 5], largest=37, atoms=37):
        dense_sparse.linear_dense_sparse(x, dense, beyond.to(torch.uint16), value, bias)
    for table in (torch.zeros(1), torch.zeros(2, 2), torch.zeros(4).double()):
        with raises(ShapeError, op="table_lookup", reason="operands", operands=operands(x=x, table=table)):
            table_lookup.table_lookup(x, table, 0.0, 1.0, True)
    with raises(ShapeError, op="table_lookup", entries=4, low=1.0, high=0.0):
        table_lookup.table_lookup(x, torch.zeros(4), 1.0, 0.0, True)
    found = operands(x=x.half(), table=torch.zeros(4))
    with raises(ShapeError, op="table_inverse_root", reason="operands", operands=found):
        table_lookup.table_inverse_root(x.half(), torch.zeros(4), 1.0, True)
    with raises(ShapeError, op="table_inverse_root", entries=4, step=0.0):
        table_lookup.table_inverse_root(x, torch.zeros(4), 0.0, True)
    with raises(KernelError, op="hadamard", devices={"x": "meta"}):
        hadamard.hadamard(torch.zeros(2, 8, device="meta"), 1.0)
    with pytest.raises(RuntimeError, match="hadamard"):
        hadamard.hadamard(torch.zeros(2, 8, requires_grad=True), 1.0)


@pytest.mark.parametrize("size", [0, 100, LARGE - 1, LARGE, 3 * LARGE + 5])
def test_memory_for_a_weight_begins_with_a_large_page_and_is_a_tensors(size):
    found = empty_bytes(size)
    assert found.dtype == torch.uint8 and found.shape == (size,) and found.is_contiguous()
    assert size < LARGE or not hasattr(mmap, "MADV_HUGEPAGE") or found.data_ptr() % LARGE == 0
    found.fill_(7)
    copied = copy.deepcopy(found)
    found[:1] = 3
    last = found[-10:]
    del found
    assert int(copied.sum()) == 7 * size and (size < 11 or int(last.sum()) == 70)


def test_a_system_without_large_pages_gives_memory_all_the_same(monkeypatch):
    def refuse(*_, **__):
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(large_pages.mmap, "mmap", refuse)
    found = empty_bytes(2 * LARGE)
    assert found.dtype == torch.uint8 and found.shape == (2 * LARGE,)
