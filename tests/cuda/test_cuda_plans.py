"""Launch plans of the CUDA kernels: each kernel is chosen by some shape, and which calls are refused.

What the plans decide is right is shown by the kernels' cases, which run through them (test_cuda_emulation.py).
"""

from __future__ import annotations

import itertools
import shutil

import cuda_on_cpu
import pytest

from compressor.kernels.cuda import driver, plans
from compressor.kernels.cuda.interface import BAD_CALL

X, PACKED, SCALE, ZERO, BIAS, Y, WORK = range(4096, 4096 * 8, 4096)


def planned(plan, calls):
    """Every launch of the calls; none of them is refused."""
    found = [plan(*arguments) for arguments in calls]
    assert all(launches for launches in found)
    return [launch for launches in found for launch in launches]


def assert_all_are_chosen(source, launches):
    """Every kernel that is compiled is launched by one of these, and no other; grids are such as CUDA takes."""
    assert {launch.kernel for launch in launches} == set(plans.KERNELS[source])
    for launch in launches:
        x, y, z = launch.grid
        assert launch.source == source and 0 < x < 2**31 and 0 < y < 65536 and 0 < z < 65536
        assert launch.threads % 32 == 0 and 0 < launch.threads <= 1024


# M, N, K, group: each kernel, one slice and many, all edges of the choice
SIZES = [
    *itertools.product((1, 8, 9, 16, 17, 32, 33, 64, 65, 300), (1, 64, 130, 4096), (8, 64, 520, 1024, 4096), (64, -1)),
    *((1, n, 64 * tiles, 64) for n in (64, 8192, 21846) for tiles in (7, 14, 15, 16, 17, 23, 24, 127, 128, 129)),
    (1, 65535 * 64, 64, 64), (4, 66000, 1 << 20, 128), (64, 8192, 28672, 128), (1, 64, 1 << 30, -1),
]  # fmt: skip


def test_every_kernel_of_a_product_is_chosen_by_some_shape():
    calls = []
    for bits, kind, (m, n, k, group) in itertools.product(plans.BITS, (0, 1), SIZES):
        operands = (X, PACKED, SCALE, 0, 0, Y, WORK, plans.w_a16_workspace_bytes(m, n, k))
        calls.append((*operands, m, n, k, bits, group, kind, 2))
    assert_all_are_chosen("w_a16", planned(plans.w_a16, calls))


def test_slices_of_k_are_a_whole_number_of_tiles_and_none_is_empty():
    for m, n, k, _ in SIZES:
        tiles, (of_slice, slices) = -(-k // 64), plans._w_a16_slices(m, n, k)
        assert (slices - 1) * of_slice < tiles <= slices * of_slice
        assert slices == 1 or (m <= 64 and of_slice >= 8 and plans.w_a16_workspace_bytes(m, n, k) == 4 * slices * m * n)


def test_every_kernel_of_a_transform_is_chosen_by_some_size():
    sizes = [n for n in range(8, 40961) if plans.hadamard_factor(n)]
    calls = [(X, Y, rows, n, 1.0, kind) for n, rows, kind in itertools.product(sizes, (1, 1000), (0, 1, 2))]
    launches = planned(plans.hadamard, calls)
    assert_all_are_chosen("hadamard", launches)
    for launch, (*_, rows, n, _, _) in zip(launches, calls, strict=True):
        kernel, _, chunks = launch.kernel[:-1].rpartition(", ")
        run = int(kernel.partition("<")[2]) if "of_runs" in kernel else 8
        of_block = launch.threads * run * int(chunks)
        assert of_block % n == 0 and (launch.grid[0] - 1) * of_block < rows * n <= launch.grid[0] * of_block


def test_the_kernel_of_rounding_rows_is_chosen():
    sizes = itertools.product((1, 3, 70000), (8, 64, 200, 8192, 1 << 24), (-1, 64, 192), (0, 1, 2))
    assert_all_are_chosen("quantize_rows", planned(plans.quantize_rows, [(X, PACKED, SCALE, WORK, *s) for s in sizes]))


# M, N, K, group: all edges of the choice, narrow and wide groups, also those that K makes narrow
INT8_SIZES = [
    *itertools.product(
        (1, 8, 9, 16, 17, 32, 33, 64, 65, 128, 129, 300), (1, 64, 65, 128, 129, 4096), (1, 64, 128, 200, 4096),
        (64, 128, 192, -1),
    ),
    (1, 65535 * 64, 64, 64), (300, 8192, 65792, -1), (3, 64, 1 << 24, 128), (3, 64, 128, 1 << 24),
]  # fmt: skip


def test_every_kernel_of_an_int8_product_is_chosen_by_some_shape():
    operands = (X, SCALE, WORK, PACKED, SCALE, ZERO, BIAS, Y)
    calls = [(*operands, m, n, k, bits, group, 0, 1) for bits in (4, 8) for m, n, k, group in INT8_SIZES]
    launches = planned(plans.w_a8, calls)
    assert_all_are_chosen("w_a8", launches)
    for launch, (*_, k, _, group, _, _) in zip(launches, calls, strict=True):
        widest = min(-(-k // 64), -(-k // 64) if group == -1 else group // 64)
        assert launch.kernel.endswith("true>" if widest > 2 else "false>")  # int32 sums, or numbers below 2^22


def test_every_kernel_of_llm_int8_is_chosen_by_some_shape():
    calls = []
    sizes = itertools.product((1, 2, 64, 65, 2048, 2049, 5000), (1, 64, 65, 4096), (16, 64, 80, 2064, 65536))
    for (m, n, k), (count, threshold) in itertools.product(sizes, ((0, 6.0), (0, 0.0), (0, 1e-60), (7, 0.0))):
        columns = (SCALE, ZERO) if count else (0, 0)
        needed = plans.int8_outlier_workspace_bytes(m, n, k)
        calls.append((X, PACKED, SCALE, *columns, BIAS, Y, WORK, needed, m, n, k, count, threshold, 0))
        launches = plans.int8_outlier(*calls[-1])
        # no columns are looked for where none can be found; a threshold that float32 doesn't hold is 0
        assert len(launches) == (1 if m == 1 else 2 if not count and threshold < 1 else 3)
    assert_all_are_chosen("int8_outlier", planned(plans.int8_outlier, calls))


def test_every_kernel_of_factors_is_chosen_by_some_shape():
    calls = []
    factors = ((5, 8, 1), (130, 40, 21), (513, 264, 2))
    for m, n, blocks, of_block, kind in itertools.product(
        (1, 2, 8, 9, 64, 65, 300), (1, 32, 33, 257, 4096), (1, 3), factors, (0, 1)
    ):
        shape = (m, n, blocks, *of_block)
        needed = plans.dense_sparse_workspace_bytes(*shape)
        calls.append((X, PACKED, 0, PACKED, 0, BIAS, Y, WORK, needed, *shape, kind))
    assert_all_are_chosen("dense_sparse", planned(plans.dense_sparse, calls))


def test_the_kernel_of_columns_is_chosen():
    sizes = itertools.product((1, 64, 65, 11008), ((0, 32, 32), (7, 18, 32), (0, 128, 65536)), (ZERO, 0))
    calls = [(X, PACKED, SCALE, BIAS, SCALE, zero, WORK, rows, 3, *c, -8.0, 7.0) for rows, c, zero in sizes]
    assert_all_are_chosen("gptq_solve", planned(plans.gptq_solve, calls))


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_arguments_of_plans_have_the_size_of_the_kernels():
    opened = driver.open_driver(0, str(cuda_on_cpu.library()))
    structures = {
        "w_a16": plans.WA16Arguments, "quantize_rows": plans.QuantizeRowsArguments, "w_a8": plans.WA8Arguments,
        "int8_outlier": plans.Int8OutlierArguments, "dense_sparse": plans.DenseSparseArguments,
        "gptq_solve": plans.GptqSolveArguments, "hadamard": plans.HadamardArguments,
    }  # fmt: skip
    assert structures.keys() == plans.KERNELS.keys()
    for source, kernels in plans.KERNELS.items():
        for handle in driver.load_code(opened, cuda_on_cpu.code_of(source, kernels)).values():
            assert opened.functions.emulate_argument_bytes(handle) == plans.ctypes.sizeof(structures[source])


def test_bad_shapes_have_no_workspace():
    for shape in [(-1, 8, 64), (1, 8, 0), (1, 8, 12), (1, -8, 64), (1, 8, (1 << 30) + 8), (1, 65535 * 64 + 1, 64)]:
        assert plans.w_a16_workspace_bytes(*shape) == -1
    assert plans.w_a16_workspace_bytes(0, 8, 1024) == plans.w_a16_workspace_bytes(8, 0, 1024) == 0
    for shape in [(-1, 64, 64), (2, -1, 64), (2, 65535 * 64 + 1, 64), (2, 64, 0), (2, 64, 8), (70, 70, 65552)]:
        assert plans.int8_outlier_workspace_bytes(*shape) == -1
    # codes, the mask and that of one slice, steps
    assert plans.int8_outlier_workspace_bytes(2, 8, 64) == 2 * 64 + 2 * 2 * 4 + 2 * 4
    assert plans.w_a16_workspace_bytes(1, 8, 1024) == 64
    assert plans.dense_sparse_workspace_bytes(3, 40, 3, 12, 16, 4) == 8 * 3 * 12 * 4  # rows are rounded up to 8
    for change in REFUSED_FACTORS:
        assert plans.dense_sparse_workspace_bytes(*((GOOD_FACTORS | change)[name] for name in FACTOR_SHAPE)) == -1


GOOD = dict(x=X, packed=PACKED, scale=SCALE, zero_point=0, bias=0, y=Y, workspace=WORK, workspace_bytes=1 << 30)
GOOD |= dict(m=3, n=64, k=1024, bits=4, group_size=64, x_type=0, scale_type=0)
REFUSED = [
    dict(m=-1), dict(n=-8), dict(n=65535 * 64 + 1), dict(k=0), dict(k=12), dict(k=(1 << 30) + 8), dict(group_size=96),
    dict(bits=5), dict(bits=0), dict(bits=16), dict(group_size=32), dict(group_size=0), dict(group_size=-2),
    dict(x_type=2), dict(x_type=-1), dict(scale_type=3), dict(scale_type=-1), dict(x=0), dict(x=X + 2), dict(packed=0),
    dict(packed=PACKED + 8), dict(scale=0), dict(y=0),
    dict(workspace=0), dict(workspace=WORK + 2), dict(workspace_bytes=100),
]  # fmt: skip


@pytest.mark.parametrize("changes", REFUSED, ids=str)
def test_a_plan_refuses_what_no_kernel_takes(changes):
    assert plans.w_a16(*(GOOD | changes).values()) is None


# x, y, rows, n, scale, type
@pytest.mark.parametrize(
    "bad",
    [(X, Y, -1, 8, 1, 0), (X, Y, 1, 4, 1, 0),
     (X, Y, 1, 0, 1, 0), (X, Y, 1, -12, 1, 0), (X, Y, 1, 6, 1, 0), (X, Y, 1, 28 << 11, 1, 0),
     (X, Y, 1, 44, 1, 0), (X, Y, 1, 18, 1, 0), (X, Y, 1, 36 << 11, 1, 0),
     (X, Y, 1, 20 << 12, 1, 0),
     (X, Y, 1, 65536, 1, 0), (X, Y, 1, 8, 1, 3),
     (X, Y, (1 << 40) + 1, 8, 1, 0), (X, Y, 1 << 40, 32768, 1, 0), (X + 4, Y, 1, 8, 1, 0), (X, Y + 8, 1, 8, 1, 0),
     (0, Y, 1, 8, 1, 0), (X, 0, 1, 8, 1, 0)],
)  # fmt: skip
def test_a_plan_of_a_transform_refuses_what_no_kernel_takes(bad):
    assert plans.hadamard(*bad) is None


GOOD_ROWS = dict(x=X, codes=PACKED, scale=SCALE, sum=WORK, m=3, k=1024, group_size=64, type=0)
REFUSED_ROWS = [
    dict(m=-1), dict(k=0), dict(k=12), dict(k=(1 << 24) + 8), dict(type=3), dict(type=-1), dict(group_size=96),
    dict(group_size=32), dict(group_size=0), dict(group_size=-2), dict(group_size=(1 << 24) + 64), dict(x=0),
    dict(x=X + 2), dict(codes=0), dict(codes=PACKED + 8), dict(scale=0),
]  # fmt: skip


@pytest.mark.parametrize("changes", REFUSED_ROWS, ids=str)
def test_a_plan_of_rounding_rows_refuses_what_no_kernel_takes(changes):
    assert plans.quantize_rows(*(GOOD_ROWS | changes).values()) is None


GOOD_INT8 = dict(x=X, x_scale=SCALE, x_sum=WORK, packed=PACKED, scale=SCALE, zero_point=ZERO, bias=0, y=Y)
GOOD_INT8 |= dict(m=3, n=64, k=1024, bits=8, group_size=64, scale_type=0, y_type=0)
REFUSED_INT8 = [
    dict(m=-1), dict(n=-8), dict(n=65535 * 64 + 1), dict(k=0), dict(k=(1 << 24) + 1), dict(bits=3),
    dict(bits=2), dict(bits=16),
    dict(group_size=96), dict(group_size=32), dict(group_size=0), dict(group_size=-2),
    dict(group_size=(1 << 24) + 64), dict(k=65793, group_size=-1),
    dict(k=131072, bits=4, group_size=-1), dict(k=70000, group_size=65856), dict(scale_type=3), dict(scale_type=-1),
    dict(y_type=3), dict(y_type=-1), dict(x=0), dict(x=X + 8), dict(x_scale=0), dict(x_sum=0), dict(packed=0),
    dict(packed=PACKED + 4), dict(scale=0), dict(y=0),
]  # fmt: skip


@pytest.mark.parametrize("changes", REFUSED_INT8, ids=str)
def test_a_plan_of_an_int8_product_refuses_what_no_kernel_takes(changes):
    assert plans.w_a8(*(GOOD_INT8 | changes).values()) is None


GOOD_OUTLIER = dict(x=X, weight=PACKED, absmax=SCALE, columns=ZERO, column_weight=ZERO, bias=0, y=Y, workspace=WORK)
GOOD_OUTLIER |= dict(workspace_bytes=1 << 20, m=3, n=64, k=1024, column_count=7, threshold=0.0, type=0)
REFUSED_OUTLIER = [
    dict(m=-1), dict(n=-8), dict(n=65535 * 64 + 1), dict(k=0), dict(k=8), dict(k=65552), dict(type=3), dict(type=-1),
    dict(threshold=-1.0), dict(threshold=float("nan")), dict(column_count=-1), dict(column_count=1025),
    dict(columns=0), dict(column_weight=0), dict(columns=0, column_weight=0), dict(x=0), dict(x=X + 8), dict(weight=0),
    dict(weight=PACKED + 4), dict(absmax=0), dict(y=0), dict(workspace=0), dict(workspace=WORK + 8),
    dict(workspace_bytes=100),
]  # fmt: skip


@pytest.mark.parametrize("changes", REFUSED_OUTLIER, ids=str)
def test_a_plan_of_llm_int8_refuses_what_no_kernel_takes(changes):
    assert plans.int8_outlier(*(GOOD_OUTLIER | changes).values()) is None


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


@pytest.mark.parametrize("changes", [*REFUSED_FACTORS, *REFUSED_OPERANDS], ids=str)
def test_a_plan_of_factors_refuses_what_no_kernel_takes(changes):
    assert plans.dense_sparse(*(GOOD_FACTORS | changes).values()) is None


GOOD_COLUMNS = dict(work=X, errors=PACKED, codes=Y, upper=BIAS, scale=SCALE, zero=ZERO, group_of=WORK)
GOOD_COLUMNS |= dict(rows=66, groups=3, begin=2, stop=13, end=20, low=-8.0, high=7.0)
REFUSED_COLUMNS = [
    dict(rows=-1), dict(rows=2**31 - 1), dict(groups=0), dict(groups=-1), dict(begin=-1), dict(stop=1), dict(end=12),
    dict(end=65537), dict(begin=0, stop=129, end=200), dict(low=8.0), dict(low=float("nan")),
    *({name: address} for name in ("work", "errors", "codes", "upper", "scale", "group_of") for address in (0, X + 2)),
    dict(zero=ZERO + 2),
]  # fmt: skip


@pytest.mark.parametrize("changes", REFUSED_COLUMNS, ids=str)
def test_a_plan_of_columns_refuses_what_no_kernel_takes(changes):
    assert plans.gptq_solve(*(GOOD_COLUMNS | changes).values()) is None


def test_an_empty_call_launches_nothing():
    empty = (GOOD | dict(m=0, x=0, y=0)).values()
    assert plans.w_a16(*empty) == []
    no_rows = (GOOD_ROWS | dict(m=0, x=0, codes=0)).values()
    assert plans.quantize_rows(*no_rows) == []
    for nothing in (dict(m=0, x=0), dict(n=0, weight=0)):
        nothing = (GOOD_OUTLIER | nothing).values()
        assert plans.int8_outlier(*nothing) == []
    for nothing in (dict(m=0, x=0), dict(n=0, packed=0)):
        nothing = (GOOD_INT8 | nothing).values()
        assert plans.w_a8(*nothing) == []
    for nothing in (dict(rows=0, x=0), dict(n=0, entries=0)):
        nothing = (GOOD_FACTORS | nothing).values()
        assert plans.dense_sparse(*nothing) == []
    for nothing in (dict(rows=0, work=0), dict(stop=2, groups=0)):
        nothing = (GOOD_COLUMNS | nothing).values()
        assert plans.gptq_solve(*nothing) == []
    assert plans.hadamard(0, 0, 0, 8, 1, 0) == []


@pytest.mark.parametrize("name", plans.PLANS)
def test_a_launcher_returns_minus_one_where_its_plan_is_none(emulated, name):
    good = {
        "compressor_w_a16": GOOD | dict(m=-1), "compressor_quantize_rows": GOOD_ROWS | dict(m=-1),
        "compressor_w_a8": GOOD_INT8 | dict(m=-1), "compressor_int8_outlier": GOOD_OUTLIER | dict(m=-1),
        "compressor_dense_sparse": GOOD_FACTORS | dict(rows=-1), "compressor_gptq_solve": GOOD_COLUMNS | dict(rows=-1),
        "compressor_hadamard": dict(x=X, y=Y, rows=-1, n=8, scale=1.0, kind=0),
    }[name]  # fmt: skip
    assert emulated.functions[name](*good.values(), 0) == BAD_CALL
