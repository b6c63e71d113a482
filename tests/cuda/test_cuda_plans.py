"""Launch plans of the CUDA kernels in Python are what the launchers decide, recorded under emulation."""

from __future__ import annotations

import ctypes
import itertools
import shutil

import cuda_on_cpu
import pytest

from compressor.kernels.cuda import plans
from compressor.kernels.cuda.interface import BAD_CALL, SIGNATURES

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
RECORDER = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(ctypes.c_uint), ctypes.POINTER(ctypes.c_uint), ctypes.c_void_p,
    ctypes.c_size_t,
)  # fmt: skip


class Symbol(ctypes.Structure):
    """Dl_info of dladdr"""

    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("at", ctypes.c_void_p),
    )


@pytest.fixture
def launched(emulated):
    """Runs a launcher of the emulated library whose launches are left out: what it returned, and
    [symbol, grid, threads, bytes of the argument] of each."""
    kernels = cuda_on_cpu.emulated_kernels(emulated)
    library = ctypes.CDLL(emulated._name)
    found = []

    def record(kernel, grid, threads, argument, size):
        symbol = Symbol()
        assert ctypes.CDLL(None).dladdr(ctypes.c_void_p(kernel), ctypes.byref(symbol))
        found.append([symbol.name.decode(), tuple(grid[:3]), tuple(threads[:3]), ctypes.string_at(argument, size)])
        return 1

    recorder = RECORDER(record)

    def run(name, *arguments):
        found.clear()
        return kernels.functions[name](*arguments, 0), list(found)

    library.compressor_emulate_record(recorder)
    yield run
    library.compressor_emulate_record(None)


X, PACKED, SCALE, ZERO, BIAS, Y, WORK = range(4096, 4096 * 8, 4096)
SIZES = [  # M, N, K, group: each kernel, one slice and many, all edges of the choice
    *itertools.product((1, 8, 9, 16, 17, 32, 33, 64, 65, 300), (1, 64, 130, 4096), (8, 64, 520, 1024, 4096), (64, -1)),
    *((1, n, 64 * tiles, 64) for n in (64, 8192, 21846) for tiles in (7, 14, 15, 16, 17, 23, 24, 127, 128, 129)),
    (1, 65535 * 64, 64, 64), (4, 66000, 1 << 20, 128), (64, 8192, 28672, 128), (1, 64, 1 << 30, -1),
]  # fmt: skip


@needs_compiler
@pytest.mark.parametrize("bits", plans.BITS)
def test_a_plan_of_a_product_is_what_the_launcher_launches(launched, bits):
    names, compared = {}, 0
    for number, (m, n, k, group) in enumerate(SIZES):
        needed = plans.w_a16_workspace_bytes(m, n, k)
        rest = (needed, m, n, k, bits, group, number % 2, number % 3)
        arguments = (X, PACKED, SCALE, ZERO if number % 5 else 0, BIAS if number % 7 else 0, Y, WORK, *rest)
        code, found = launched("compressor_w_a16", *arguments)
        assert code == 0
        compared += compare(plans.w_a16(*arguments), found, names)
    assert compared > 400  # launches
    of_width = {name for name in plans.KERNELS["w_a16"] if f"<{bits}, " in name or "add_slices" in name}
    assert set(names.values()) == of_width and len(of_width) == 10


@needs_compiler
def test_a_plan_of_a_transform_is_what_the_launcher_launches(launched):
    names = {}
    sizes = [2**exponent for exponent in range(3, 16)]
    sizes += [m << exponent for m in (12, 20, 28, 36) for exponent in range(12) if plans.hadamard_factor(m << exponent)]
    for n, rows, kind in itertools.product(sizes, (1, 3, 1000), (0, 1, 2)):
        arguments = (X, Y, rows, n, 0.25 * n, kind)
        code, found = launched("compressor_hadamard", *arguments)
        assert code == 0
        assert compare(plans.hadamard(*arguments), found, names) == 1
    assert set(names.values()) == set(plans.KERNELS["hadamard"])


@needs_compiler
def test_a_plan_of_rounding_rows_is_what_the_launcher_launches(launched):
    names = {}
    for m, k, group, kind in itertools.product((1, 3, 70000), (8, 64, 200, 8192, 1 << 24), (-1, 64, 192), (0, 1, 2)):
        arguments = (X, PACKED, SCALE, WORK if kind else 0, m, k, group, kind)
        code, found = launched("compressor_quantize_rows", *arguments)
        assert code == 0
        assert compare(plans.quantize_rows(*arguments), found, names) == 1
    assert set(names.values()) == set(plans.KERNELS["quantize_rows"])


INT8_SIZES = [  # M, N, K, group: all edges of the choice, narrow and wide groups, also those that K makes narrow
    *itertools.product(
        (1, 8, 9, 16, 17, 32, 33, 64, 65, 128, 129, 300), (1, 64, 65, 128, 129, 4096), (1, 64, 128, 200, 4096),
        (64, 128, 192, -1),
    ),
    (1, 65535 * 64, 64, 64), (300, 8192, 65792, -1), (3, 64, 1 << 24, 128), (3, 64, 128, 1 << 24),
]  # fmt: skip


@needs_compiler
@pytest.mark.parametrize("bits", [4, 8])
def test_a_plan_of_an_int8_product_is_what_the_launcher_launches(launched, bits):
    names = {}
    for number, (m, n, k, group) in enumerate(INT8_SIZES):
        zero, bias = ZERO if number % 5 else 0, BIAS if number % 7 else 0
        operands = (X, SCALE, WORK if zero else 0, PACKED, SCALE, zero, bias, Y)
        arguments = (*operands, m, n, k, bits, group, number % 3, number % 2 + 1)
        code, found = launched("compressor_w_a8", *arguments)
        assert code == 0 and compare(plans.w_a8(*arguments), found, names) == 1
    assert set(names.values()) == {name for name in plans.KERNELS["w_a8"] if f"<{bits}," in name}


@needs_compiler
def test_a_plan_of_llm_int8_is_what_the_launcher_launches(launched):
    names = {}
    sizes = itertools.product((1, 2, 64, 65, 2048, 2049, 5000), (1, 64, 65, 4096), (16, 64, 80, 2064, 65536))
    for number, ((m, n, k), (count, threshold)) in enumerate(
        itertools.product(sizes, ((0, 6.0), (0, 0.0), (0, 1e-60), (7, 0.0), (7, 6.0)))
    ):
        columns = (SCALE, ZERO) if count else (0, 0)
        needed = plans.int8_outlier_workspace_bytes(m, n, k)
        rest = (BIAS if number % 2 else 0, Y, WORK if needed else 0, needed, m, n, k, count, threshold, number % 3)
        arguments = (X, PACKED, SCALE, *columns, *rest)
        code, found = launched("compressor_int8_outlier", *arguments)
        assert code == 0 and compare(plans.int8_outlier(*arguments), found, names) == len(found) > 0
    assert set(names.values()) == set(plans.KERNELS["int8_outlier"])


FACTOR_SIZES = list(  # M, N; B; m, w, k: all edges of the choice
    itertools.product(
        (1, 2, 8, 9, 64, 65, 300), (1, 32, 33, 257, 4096), (1, 3), ((5, 8, 1), (130, 40, 21), (513, 264, 2))
    )
)


@needs_compiler
def test_a_plan_of_a_product_of_factors_is_what_the_launcher_launches(launched):
    names = {}
    for number, (m, n, blocks, factors) in enumerate(FACTOR_SIZES):
        shape = (m, n, blocks, *factors)
        needed = plans.dense_sparse_workspace_bytes(*shape)
        steps, bias = (SCALE, ZERO) if number % 3 else (0, 0), BIAS if number % 7 else 0
        arguments = (X, PACKED, steps[0], PACKED, steps[1], bias, Y, WORK, needed, *shape, number % 2)
        code, found = launched("compressor_dense_sparse", *arguments)
        assert code == 0 and compare(plans.dense_sparse(*arguments), found, names) == 2
    assert set(names.values()) == set(plans.KERNELS["dense_sparse"])


@needs_compiler
def test_a_plan_of_columns_is_what_the_launcher_launches(launched):
    names = {}
    for rows, (begin, stop, end), zero in itertools.product(
        (1, 64, 65, 11008), ((0, 32, 32), (7, 18, 32), (0, 128, 65536)), (ZERO, 0)
    ):
        arguments = (X, PACKED, SCALE, BIAS, SCALE, zero, WORK, rows, 3, begin, stop, end, -8.0, 7.0)
        code, found = launched("compressor_gptq_solve", *arguments)
        assert code == 0 and compare(plans.gptq_solve(*arguments), found, names) == 1
    assert set(names.values()) == set(plans.KERNELS["gptq_solve"])


def compare(planned, found, names):
    """How many launches; a symbol's name is found out once."""
    if new := [symbol for symbol, *_ in found if symbol not in names]:
        names.update(cuda_on_cpu.demangled(new))
    assert [(p.kernel, p.grid, (p.threads, 1, 1), bytes(p.argument)) for p in planned] == [
        (names[symbol], *rest) for symbol, *rest in found
    ]
    return len(found)


@needs_compiler
def test_the_workspace_of_a_plan_is_the_launchers(emulated):
    reckon = cuda_on_cpu.emulated_kernels(emulated).functions["compressor_w_a16_workspace_bytes"]
    shapes = [*(size[:3] for size in SIZES), (0, 8, 64), (8, 0, 64), (-1, 8, 64), (1, 8, 0), (1, 8, 12), (1, -8, 64)]
    shapes += [(1, 8, (1 << 30) + 8), (1, 65535 * 64 + 1, 64)]
    assert all(plans.w_a16_workspace_bytes(*shape) == reckon(*shape) for shape in shapes)
    reckon = cuda_on_cpu.emulated_kernels(emulated).functions["compressor_int8_outlier_workspace_bytes"]
    shapes = [*itertools.product((-1, 0, 1, 2, 64, 65, 2049, 1 << 20), (-1, 0, 64, 65535 * 64 + 1), (0, 8, 16, 80))]
    shapes += [(70, 70, 65536), (70, 70, 65552), (1 << 20, 65535 * 64, 65536)]
    assert all(plans.int8_outlier_workspace_bytes(*shape) == reckon(*shape) for shape in shapes)
    reckon = cuda_on_cpu.emulated_kernels(emulated).functions["compressor_dense_sparse_workspace_bytes"]
    shapes = [(m, n, blocks, *factors) for m, n, blocks, factors in FACTOR_SIZES]
    shapes += [tuple((GOOD_FACTORS | change)[name] for name in FACTOR_SHAPE) for change in REFUSED_FACTORS]
    shapes += [(0, 8, 2, 9, 8, 1), (8, 0, 2, 9, 8, 1), (1 << 30, 65535 * 32, 65535, 4096, 8, 1)]
    assert all(plans.dense_sparse_workspace_bytes(*shape) == reckon(*shape) for shape in shapes)


GOOD = dict(x=X, packed=PACKED, scale=SCALE, zero_point=0, bias=0, y=Y, workspace=WORK, workspace_bytes=1 << 30)
GOOD |= dict(m=3, n=64, k=1024, bits=4, group_size=64, x_type=0, scale_type=0)
REFUSED = [
    dict(m=-1), dict(n=-8), dict(n=65535 * 64 + 1), dict(k=0), dict(k=12), dict(k=(1 << 30) + 8), dict(group_size=96),
    dict(bits=5), dict(group_size=32), dict(group_size=0), dict(group_size=-2), dict(x_type=2), dict(x_type=-1),
    dict(scale_type=3), dict(scale_type=-1), dict(x=0), dict(x=X + 2), dict(packed=0),
    dict(packed=PACKED + 8), dict(scale=0), dict(y=0),
    dict(workspace=0), dict(workspace=WORK + 2), dict(workspace_bytes=100),
]  # fmt: skip


@needs_compiler
@pytest.mark.parametrize("changes", REFUSED, ids=str)
def test_a_plan_refuses_what_the_launcher_refuses(launched, changes):
    arguments = (GOOD | changes).values()
    assert launched("compressor_w_a16", *arguments) == (BAD_CALL, [])
    assert plans.w_a16(*arguments) is None


# x, y, rows, n, scale, type
@needs_compiler
@pytest.mark.parametrize(
    "bad",
    [(X, Y, -1, 8, 1, 0), (X, Y, 1, 4, 1, 0), (X, Y, 1, 44, 1, 0), (X, Y, 1, 18, 1, 0), (X, Y, 1, 36 << 11, 1, 0),
     (X, Y, 1, 20 << 12, 1, 0),
     (X, Y, 1, 65536, 1, 0), (X, Y, 1, 8, 1, 3),
     (X, Y, (1 << 40) + 1, 8, 1, 0), (X, Y, 1 << 40, 32768, 1, 0), (X + 4, Y, 1, 8, 1, 0), (X, Y + 8, 1, 8, 1, 0),
     (0, Y, 1, 8, 1, 0), (X, 0, 1, 8, 1, 0)],
)  # fmt: skip
def test_a_plan_of_a_transform_refuses_what_the_launcher_refuses(launched, bad):
    assert launched("compressor_hadamard", *bad) == (BAD_CALL, [])
    assert plans.hadamard(*bad) is None


GOOD_ROWS = dict(x=X, codes=PACKED, scale=SCALE, sum=WORK, m=3, k=1024, group_size=64, type=0)
REFUSED_ROWS = [
    dict(m=-1), dict(k=0), dict(k=12), dict(k=(1 << 24) + 8), dict(type=3), dict(type=-1), dict(group_size=96),
    dict(group_size=32), dict(group_size=0), dict(group_size=-2), dict(group_size=(1 << 24) + 64), dict(x=0),
    dict(x=X + 2), dict(codes=0), dict(codes=PACKED + 8), dict(scale=0),
]  # fmt: skip


@needs_compiler
@pytest.mark.parametrize("changes", REFUSED_ROWS, ids=str)
def test_a_plan_of_rounding_rows_refuses_what_the_launcher_refuses(launched, changes):
    arguments = (GOOD_ROWS | changes).values()
    assert launched("compressor_quantize_rows", *arguments) == (BAD_CALL, [])
    assert plans.quantize_rows(*arguments) is None


GOOD_INT8 = dict(x=X, x_scale=SCALE, x_sum=WORK, packed=PACKED, scale=SCALE, zero_point=ZERO, bias=0, y=Y)
GOOD_INT8 |= dict(m=3, n=64, k=1024, bits=8, group_size=64, scale_type=0, y_type=0)
REFUSED_INT8 = [
    dict(m=-1), dict(n=-8), dict(n=65535 * 64 + 1), dict(k=0), dict(k=(1 << 24) + 1), dict(bits=3), dict(group_size=96),
    dict(group_size=0), dict(group_size=-2), dict(group_size=(1 << 24) + 64), dict(k=65793, group_size=-1),
    dict(k=131072, bits=4, group_size=-1), dict(k=70000, group_size=65856), dict(scale_type=3), dict(scale_type=-1),
    dict(y_type=3), dict(y_type=-1), dict(x=0), dict(x=X + 8), dict(x_scale=0), dict(x_sum=0), dict(packed=0),
    dict(packed=PACKED + 4), dict(scale=0), dict(y=0),
]  # fmt: skip


@needs_compiler
@pytest.mark.parametrize("changes", REFUSED_INT8, ids=str)
def test_a_plan_of_an_int8_product_refuses_what_the_launcher_refuses(launched, changes):
    arguments = (GOOD_INT8 | changes).values()
    assert launched("compressor_w_a8", *arguments) == (BAD_CALL, [])
    assert plans.w_a8(*arguments) is None


GOOD_OUTLIER = dict(x=X, weight=PACKED, absmax=SCALE, columns=ZERO, column_weight=ZERO, bias=0, y=Y, workspace=WORK)
GOOD_OUTLIER |= dict(workspace_bytes=1 << 20, m=3, n=64, k=1024, column_count=7, threshold=0.0, type=0)
REFUSED_OUTLIER = [
    dict(m=-1), dict(n=-8), dict(n=65535 * 64 + 1), dict(k=0), dict(k=8), dict(k=65552), dict(type=3), dict(type=-1),
    dict(threshold=-1.0), dict(threshold=float("nan")), dict(column_count=-1), dict(column_count=1025),
    dict(columns=0), dict(column_weight=0), dict(columns=0, column_weight=0), dict(x=0), dict(x=X + 8), dict(weight=0),
    dict(weight=PACKED + 4), dict(absmax=0), dict(y=0), dict(workspace=0), dict(workspace=WORK + 8),
    dict(workspace_bytes=100),
]  # fmt: skip


@needs_compiler
@pytest.mark.parametrize("changes", REFUSED_OUTLIER, ids=str)
def test_a_plan_of_llm_int8_refuses_what_the_launcher_refuses(launched, changes):
    arguments = (GOOD_OUTLIER | changes).values()
    assert launched("compressor_int8_outlier", *arguments) == (BAD_CALL, [])
    assert plans.int8_outlier(*arguments) is None


FACTOR_SHAPE = ("rows", "n", "blocks", "m", "w", "k")
GOOD_FACTORS = dict(x=X, atoms=PACKED, atom_step=0, entries=PACKED, step=0, bias=0, y=Y, workspace=WORK)
GOOD_FACTORS |= dict(workspace_bytes=1 << 30, rows=3, n=64, blocks=4, m=20, w=16, k=5, kind=0)
REFUSED_FACTORS = [
    dict(rows=-1), dict(rows=(1 << 30) + 1), dict(n=-8), dict(n=65535 * 32 + 1), dict(blocks=0), dict(blocks=65536),
    dict(m=0), dict(m=4097), dict(k=0), dict(k=21), dict(w=0), dict(w=12), dict(w=1 << 29), dict(blocks=65535, w=16392),
]  # fmt: skip
REFUSED_OPERANDS = [
    dict(kind=2), dict(kind=-1), dict(x=0), dict(x=X + 8), dict(atoms=0), dict(atoms=PACKED + 2), dict(entries=0),
    dict(y=0), dict(workspace=0), dict(workspace=WORK + 8), dict(workspace_bytes=100),
]  # fmt: skip


@needs_compiler
@pytest.mark.parametrize("changes", [*REFUSED_FACTORS, *REFUSED_OPERANDS], ids=str)
def test_a_plan_of_factors_refuses_what_the_launcher_refuses(launched, changes):
    arguments = (GOOD_FACTORS | changes).values()
    assert launched("compressor_dense_sparse", *arguments) == (BAD_CALL, [])
    assert plans.dense_sparse(*arguments) is None


GOOD_COLUMNS = dict(work=X, errors=PACKED, codes=Y, upper=BIAS, scale=SCALE, zero=ZERO, group_of=WORK)
GOOD_COLUMNS |= dict(rows=66, groups=3, begin=2, stop=13, end=20, low=-8.0, high=7.0)
REFUSED_COLUMNS = [
    dict(rows=-1), dict(rows=2**31 - 1), dict(groups=0), dict(groups=-1), dict(begin=-1), dict(stop=1), dict(end=12),
    dict(end=65537), dict(begin=0, stop=129, end=200), dict(low=8.0), dict(low=float("nan")),
    *({name: address} for name in ("work", "errors", "codes", "upper", "scale", "group_of") for address in (0, X + 2)),
    dict(zero=ZERO + 2),
]  # fmt: skip


@needs_compiler
@pytest.mark.parametrize("changes", REFUSED_COLUMNS, ids=str)
def test_a_plan_of_columns_refuses_what_the_launcher_refuses(launched, changes):
    arguments = (GOOD_COLUMNS | changes).values()
    assert launched("compressor_gptq_solve", *arguments) == (BAD_CALL, [])
    assert plans.gptq_solve(*arguments) is None


@needs_compiler
def test_an_empty_call_launches_nothing_either_way(launched):
    empty = (GOOD | dict(m=0, x=0, y=0)).values()
    assert launched("compressor_w_a16", *empty) == (0, []) and plans.w_a16(*empty) == []
    no_rows = (GOOD_ROWS | dict(m=0, x=0, codes=0)).values()
    assert launched("compressor_quantize_rows", *no_rows) == (0, []) and plans.quantize_rows(*no_rows) == []
    for nothing in (dict(m=0, x=0), dict(n=0, weight=0)):
        nothing = (GOOD_OUTLIER | nothing).values()
        assert launched("compressor_int8_outlier", *nothing) == (0, []) and plans.int8_outlier(*nothing) == []
    for nothing in (dict(m=0, x=0), dict(n=0, packed=0)):
        nothing = (GOOD_INT8 | nothing).values()
        assert launched("compressor_w_a8", *nothing) == (0, []) and plans.w_a8(*nothing) == []
    for nothing in (dict(rows=0, x=0), dict(n=0, entries=0)):
        nothing = (GOOD_FACTORS | nothing).values()
        assert launched("compressor_dense_sparse", *nothing) == (0, []) and plans.dense_sparse(*nothing) == []
    for nothing in (dict(rows=0, work=0), dict(stop=2, groups=0)):
        nothing = (GOOD_COLUMNS | nothing).values()
        assert launched("compressor_gptq_solve", *nothing) == (0, []) and plans.gptq_solve(*nothing) == []
    assert launched("compressor_hadamard", 0, 0, 0, 8, 1, 0) == (0, []) and plans.hadamard(0, 0, 0, 8, 1, 0) == []


def test_every_launcher_of_the_interface_has_a_plan():
    assert plans.PLANS.keys() | plans.SIZES.keys() == SIGNATURES.keys()
