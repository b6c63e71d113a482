"""The CPU kernels: equal bits at all levels that multiply alike, within a derived bound of exact results."""

from __future__ import annotations

import dataclasses
import multiprocessing
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from guarded import guarded
from raising import raises
from torch import nn

from compressor.errors import KernelError, ShapeError
from compressor.kernels import cpu
from compressor.kernels.cpu import Library, levels_here, library
from compressor.kernels.ops import hadamard, int8_matmul
from compressor.kernels.ops import linear as ops
from compressor.kernels.ops.checks import operands
from compressor.kernels.ops.int8_split import round_rows
from compressor.kernels.prepared.prepare import prepare
from compressor.layers.int8_split_linear import Int8SplitLinear

BUILT = isinstance(library(), Library)
pytestmark = pytest.mark.skipif(not BUILT, reason=f"{library()}")
HERE = levels_here(library().functions) if BUILT else []
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
UNIT = 2.0**-24  # half a unit in the last place of float32
HALF_UNIT = {torch.float32: UNIT, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# rows, outputs, inputs, group: tails of tiles, rows and groups, single entries, whole rows, wide groups
SHAPES = [
    (1, 64, 64, 64), (3, 70, 192, 32), (17, 130, 328, 64), (9, 65, 320, -1), (2, 5, 13, 8), (2, 1, 13, -1),
    (33, 63, 1024, 128), (5, 8, 1, 8), (4, 64, 600, 296), (16, 64, 128, 128), (0, 3, 8, 8), (3, 0, 8, 8),
]  # fmt: skip


@dataclasses.dataclass
class Problem:
    x: torch.Tensor
    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor
    bias: torch.Tensor
    group: int
    bits: int

    @property
    def packed(self):
        return ops.pack_weight(self.codes, self.scale, self.zero_point, None, self.bits, self.group, "cpu2")

    @property
    def columns(self):
        width = self.codes.shape[1] if self.group == -1 else self.group
        return torch.arange(self.codes.shape[1]) // width

    def weight(self):
        return (self.codes.double() - self.zero_point.double()[:, self.columns]) * self.scale.double()[:, self.columns]

    def rest(self, bias=None):
        return self.packed, bias, None, len(self.codes), self.bits, self.group, "cpu2"


def problem(shape, bits, dtype=torch.float32, seed=0):
    rows, out, columns, group = shape
    made = torch.Generator().manual_seed(seed)
    groups = ops.groups_of(columns, group)
    return Problem(
        torch.randn(rows, columns, generator=made).to(dtype),
        torch.randint(0, 2**bits, (out, columns), generator=made, dtype=torch.uint8),
        (torch.rand(out, groups, generator=made) * 0.02 + 0.01).to(dtype),
        torch.randint(0, 2**bits, (out, groups), generator=made, dtype=torch.uint8),
        torch.randn(out, generator=made),
        group,
        bits,
    )


def at_level(monkeypatch, level, name, *arguments):
    """One op at one level of instructions."""
    monkeypatch.setattr(ops, "cpu_library", lambda: dataclasses.replace(library(), level=level))
    return ops._linear(name)(*arguments)


OPS = [(name, bits) for name in ("linear_weight_only", "linear_dynamic_int8") for bits in (2, 3, 4, 8)]


def in_floats(name, level, rows, dtype):
    """Whether these rows are multiplied in float32: where there is no VNNI, from so many on (weight_only.cpp)."""
    return name == "linear_weight_only" and level < 2 and rows >= (6 if dtype == torch.float32 else 12)


def assert_levels_agree(monkeypatch, name, case):
    """Levels that multiply alike give equal bits, and each way is within its bound."""
    rows, dtype = len(case.x), case.x.dtype
    results = {True: [], False: []}
    for level in HERE:
        way = in_floats(name, level, rows, dtype)
        results[way].append(at_level(monkeypatch, level, name, case.x, *case.rest()))
    for way, found in results.items():
        for y in found:
            assert y.dtype == dtype and torch.equal(y, found[0])
            exact, allowed = exact_and_allowed(name, case, way)
            assert ((y.double() - exact).abs() <= allowed).all()


def exact_and_allowed(name, case, floats):
    """The product in float64, and how far from it the op may be."""
    weight, groups = case.weight(), case.scale.shape[1]
    if name == "linear_dynamic_int8":  # integers are exact; an fma a group, the two scales: kernels.md, section 8
        codes, absmax = round_rows(case.x.float())
        x = codes.double() * (absmax / 127).double()[:, None]
        allowed = (groups + 3) * UNIT * (x.abs() @ weight.abs().t())
    elif floats:  # the weight, products of a chunk, the sums of chunks: float_product.h
        x = case.x.double()
        width = weight.shape[1] if case.group == -1 else case.group
        chunk = min(-(-width // 8) * 8, 128)
        allowed = (chunk + groups * -(-width // chunk) + 3) * UNIT * (x.abs() @ weight.abs().t())
    else:  # digits joined and a group added; inputs as multiples of a step: weight_only.cpp
        x, digits = case.x.double(), 4 if case.x.dtype == torch.float32 else 3
        largest = torch.zeros(len(x), groups).double()
        largest.scatter_reduce_(1, case.columns.expand(len(x), -1), x.abs(), "amax")
        by_group = torch.zeros(groups, len(weight)).double().index_add_(0, case.columns, weight.abs().t())
        allowed = (groups + 2 * digits + 2) * UNIT * (x.abs() @ weight.abs().t())
        allowed += 2.0 ** -(8 * digits - 2) * (largest.clamp(min=2.0**-96) @ by_group)
    exact = x @ weight.t()
    smallest = {torch.float16: 2.0**-25}.get(case.x.dtype, 2.0**-134)  # half of the smallest step of y
    return exact, allowed + HALF_UNIT[case.x.dtype] * (exact.abs() + allowed) + smallest


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name, bits", OPS)
def test_all_levels_give_the_same_bits_within_the_bound(name, bits, shape, monkeypatch):
    for dtype in DTYPES:
        assert_levels_agree(monkeypatch, name, problem(shape, bits, dtype))


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("rows", [4, 13])
def test_inputs_of_any_magnitude_stay_within_the_bound(rows, bits, dtype, monkeypatch):
    """Outliers beside small inputs in one group, whole groups of denormals, and all powers of two."""
    case = problem((rows, 70, 256, 32), bits, dtype)
    exponents = torch.arange(256) - 140.0
    case.x[0] = torch.exp2(exponents.clamp(max=110))
    case.x[1, ::7] *= 1e4
    case.x[2] *= 2.0**-130
    case.x[3, :32], case.x[3, 40] = 0, 1e-38
    assert_levels_agree(monkeypatch, "linear_weight_only", case)


@pytest.mark.parametrize("name, bits", OPS)
def test_rows_threads_and_strides_do_not_change_bits(name, bits):
    case = problem((21, 200, 320, 64), bits)
    run, rest = ops._linear(name), case.rest(case.bias)
    together = run(case.x, *rest)
    few = together
    if in_floats(name, library().level, 21, torch.float32):  # as 7 rows are, but not 1 or 3
        few = torch.cat([run(part, *rest) for part in case.x.split(3)])
    assert torch.equal(few, torch.cat([run(row, *rest) for row in case.x.split(1)]))
    assert torch.equal(together, torch.cat([run(part, *rest) for part in case.x.split(7)]))
    offset = torch.empty(case.x.numel() + 1)[1:].view_as(case.x).copy_(case.x)
    for other in (case.x.t().contiguous().t(), torch.cat([case.x, case.x], 1)[:, :320], offset):
        assert torch.equal(together, run(other, *rest))
    assert torch.equal(run(case.x[:1].expand(5, -1), *rest), few[:1].expand(5, -1))
    assert torch.equal(run(case.x.view(3, 7, 320), *rest).flatten(0, 1), together)
    functions, packed = library().functions, case.packed
    for threads in (1, 2, 5):
        y = torch.full((21, 200), torch.nan)
        x = case.x.contiguous()
        assert not getattr(functions, name)(
            library().level, threads, x.data_ptr(), 0, packed.data_ptr(), packed.numel(), case.bias.data_ptr(), 0,
            y.data_ptr(), 21, 200, 320, bits, 64,
        )  # fmt: skip
        assert torch.equal(y, together)


def row_by_row(run, x, *rest, times=1):
    """Each row in a call of its own, in which it stands so many times."""
    return torch.cat([run(row.expand(times, -1), *rest)[:1] for row in x.split(1)])


@pytest.mark.parametrize("rows", [257, 300, 517])
@pytest.mark.parametrize(
    "name, bits, group", [("linear_dynamic_int8", 4, 32), ("linear_dynamic_int8", 8, -1), ("linear_weight_only", 4, 32)]
)
def test_rows_beyond_one_share_have_the_bits_of_calls_row_by_row(name, bits, group, rows, monkeypatch):
    """Rows are multiplied in shares of 128 or 256 (int8_product.h); NaN in the first and the last stays there."""
    case = problem((rows, 70, 64, group), bits)
    broken = [5, rows - 1]
    case.x[broken, 3] = torch.nan
    kept = [row for row in range(rows) if row not in broken]
    for level in HERE:
        monkeypatch.setattr(ops, "cpu_library", lambda level=level: dataclasses.replace(library(), level=level))
        linear, rest = ops._linear(name), case.rest(case.bias)
        times = 6 if in_floats(name, level, rows, torch.float32) else 1  # or one row would be multiplied otherwise
        together, alone = linear(case.x, *rest), row_by_row(linear, case.x, *rest, times=times)
        assert together[broken].isnan().all() and torch.equal(together[kept], alone[kept])


@pytest.mark.parametrize("rows", [257, 300, 517])
def test_rows_of_llm_int8_beyond_one_share_have_the_bits_of_calls_row_by_row(rows, monkeypatch):
    made = torch.Generator().manual_seed(rows)
    layer = Int8SplitLinear.pack(torch.randn(70, 64, generator=made), 6.0, torch.float32, torch.tensor([3, 40]))
    packed, columns = ops.pack_int8_rows(layer.weight, layer.SCB), layer.outlier_columns.long()
    x, bias = torch.randn(rows, 64, generator=made), torch.randn(70, generator=made)
    x[:, 3] *= 30
    run, rest = ops.linear_int8_outlier, (packed, layer.SCB, columns, layer.outlier_weight, bias, 6.0)
    for level in HERE:
        monkeypatch.setattr(ops, "cpu_library", lambda level=level: dataclasses.replace(library(), level=level))
        assert torch.equal(run(x, *rest), row_by_row(run, x, *rest))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name, bits", OPS)
def test_a_permutation_is_the_product_with_permuted_columns(name, bits, dtype):
    case = problem((3, 70, 72, 32), bits, dtype)
    permutation = torch.randperm(72, generator=torch.Generator().manual_seed(bits))
    inverse = permutation.argsort()
    x, codes = case.x[:, inverse], case.codes[:, inverse]  # as the model has them
    packed = ops.pack_weight(codes, case.scale, case.zero_point, permutation, bits, case.group, "cpu2")
    assert torch.equal(packed, case.packed)
    linear = getattr(torch.ops.compressor, name)
    found = linear(x, packed, case.bias, permutation, 70, bits, case.group, "cpu2")
    assert torch.equal(found, linear(case.x, case.packed, case.bias, None, 70, bits, case.group, "cpu2"))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packing_is_undone_by_unpacking(shape, bits):
    case = problem(shape, bits)
    codes, scale, zero_point = ops.unpack_weight(case.packed, *case.codes.shape, bits, case.group, "cpu2")
    assert torch.equal(codes, case.codes) and torch.equal(scale, case.scale)
    assert torch.equal(zero_point, case.zero_point)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [6, 13])
@pytest.mark.parametrize("name, bits", [(name, bits) for name, bits in OPS if bits in (4, 8)])
def test_a_row_with_nan_or_inf_spoils_itself_alone(name, bits, rows, dtype, monkeypatch):
    case = problem((rows, 70, 64, 32), bits, dtype)
    kept = [row for row in range(rows) if row not in (1, 3, 4)]
    clean = {level: at_level(monkeypatch, level, name, case.x, *case.rest()) for level in HERE}
    for row, value in ((1, torch.nan), (3, torch.inf), (4, -torch.inf)):
        case.x[row, 7] = value
    for level in HERE:
        found = at_level(monkeypatch, level, name, case.x, *case.rest())
        assert not torch.isfinite(found[[1, 3, 4]]).any()
        assert torch.equal(found[kept], clean[level][kept])


def test_rows_of_zeros_and_of_denormals_give_zero_when_rounded(monkeypatch):
    case = problem((3, 64, 64, 64), 4)
    case.x[0], case.x[1] = 0.0, 1e-40
    for level in HERE:
        found = at_level(monkeypatch, level, "linear_dynamic_int8", case.x, *case.rest())
        assert (found[:2] == 0).all() and (found[2] != 0).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_rounded_as_the_reference_rounds_them(dtype):
    made = torch.Generator().manual_seed(3)
    x = torch.randn(9, 77, generator=made).to(dtype)
    x[2], x[3, 5], x[4, 6], x[5] = 0, torch.nan, torch.inf, x[5] * 1e-4
    codes, absmax = round_rows(x.float())
    for level in HERE:
        found, largest = torch.full((9, 77), 85, dtype=torch.int8), torch.full((9,), -1.0)
        x = x.contiguous()
        library().functions.quantize_rows(
            level, x.data_ptr(), ops.DTYPES[dtype], found.data_ptr(), largest.data_ptr(), 9, 77
        )
        assert torch.equal(found, codes) and torch.equal(largest.isnan(), absmax.isnan())
        assert torch.equal(largest.nan_to_num(), absmax.nan_to_num())


@pytest.mark.parametrize("name, bits", OPS)
def test_nothing_is_read_or_written_beyond_the_tensors(name, bits, monkeypatch):
    for shape in [(3, 70, 192, 32), (1, 65, 13, -1), (13, 33, 40, 8)]:
        for dtype in DTYPES:
            case = problem(shape, bits, dtype)
            rest = case.rest(case.bias)
            x, packed, bias = guarded(case.x), guarded(case.packed), guarded(case.bias)
            rows, out, columns, group = shape
            for level in HERE:
                expected = at_level(monkeypatch, level, name, case.x, *rest)
                y = guarded(torch.full_like(expected, torch.nan))
                assert not getattr(library().functions, name)(
                    level, 1, x.data_ptr(), ops.DTYPES[dtype], packed.data_ptr(), packed.numel(), bias.data_ptr(), 0,
                    y.data_ptr(), rows, out, columns, bits, ops.group_columns(columns, group),
                )  # fmt: skip
                assert torch.equal(y, expected)


def test_bad_calls_name_what_they_got():
    case = problem((2, 8, 64, 32), 4)
    packed, rest = case.packed, (None, None, 8, 4, 32, "cpu2")
    sizes = {"out": 8, "columns": 64, "bits": 4, "group_size": 32, "layout": "cpu2"}
    weight_only, packing = {"op": "linear_weight_only"}, operands(codes=case.codes, zero_point=None)
    with raises(ShapeError, **weight_only, reason="packed", **{**sizes, "columns": 63}, **operands(x=case.x[:, :63])):
        ops.linear_weight_only(case.x[:, :63], packed, *rest)
    with raises(ShapeError, **weight_only, reason="packed", **{**sizes, "out": 9}):
        ops.linear_weight_only(case.x, packed, None, None, 9, 4, 32, "cpu2")
    with raises(ShapeError, op="linear_dynamic_int8", reason="packed", **{**sizes, "group_size": 64}):
        ops.linear_dynamic_int8(case.x, packed, None, None, 8, 4, 64, "cpu2")
    with raises(ShapeError, **weight_only, reason="packed", bytes=100, **sizes):
        ops.linear_weight_only(case.x, packed[:100], *rest)
    with raises(ShapeError, **weight_only, bits=4, layout="mma1"):
        ops.linear_weight_only(case.x, packed, None, None, 8, 4, 32, "mma1")
    with raises(ShapeError, **weight_only, bits=4, layout="cpu2", **operands(x=case.x.double())):
        ops.linear_weight_only(case.x.double(), packed, *rest)
    with raises(ShapeError, op="linear_dynamic_int8", bits=2, layout="cpu2"):
        ops.linear_dynamic_int8(case.x, packed, None, None, 8, 2, 32, "cpu2")
    with raises(ShapeError, **weight_only, out=8, **operands(bias=torch.zeros(7))):
        ops.linear_weight_only(case.x, packed, torch.zeros(7), *rest[1:])
    with raises(ShapeError, **weight_only, reason="packed", bytes=packed.numel(), **sizes):
        ops.linear_weight_only(case.x, packed + 1, *rest)
    with raises(ShapeError, reason="no-layout", **{**sizes, "group_size": 12}):
        ops.pack_weight(case.codes, torch.rand(8, 6), None, None, 4, 12, "cpu2")
    with raises(ShapeError, code=15, bits=3):
        ops.pack_weight(case.codes | 15, case.scale, None, None, 3, 32, "cpu2")
    with raises(ShapeError, expected=[8, 2], **packing, **operands(scale=torch.zeros(8, 3))):
        ops.pack_weight(case.codes, torch.rand(8, 3), None, None, 4, 32, "cpu2")
    with pytest.raises(RuntimeError, match="linear_weight_only"):
        ops.linear_weight_only(case.x.requires_grad_(), packed, *rest)


@pytest.mark.parametrize("name, bits", OPS)
def test_ops_pass_the_checks_of_torch(name, bits):
    for dtype in DTYPES:
        case = problem((3, 70, 192, 32), bits, dtype)
        torch.library.opcheck(getattr(torch.ops.compressor, name).default, (case.x, *case.rest(case.bias)))
    pack = (case.codes, case.scale, case.zero_point, None, bits, 32, "cpu2")
    torch.library.opcheck(torch.ops.compressor.pack_weight.default, pack)
    torch.library.opcheck(torch.ops.compressor.unpack_weight.default, (case.packed, 70, 192, bits, 32, "cpu2"))


def test_many_threads_may_call_at_once():
    case = problem((4, 640, 4096, 64), 4)
    rest = case.rest()
    expected = ops.linear_weight_only(case.x, *rest)
    together = threading.Barrier(50)

    def call(_):
        together.wait(timeout=60)
        return ops.linear_weight_only(case.x, *rest)

    with ThreadPoolExecutor(50) as pool:
        results = list(pool.map(call, range(50)))
    assert all(torch.equal(found, expected) for found in results)


def _child(queue, x, rest):
    queue.put(torch.equal(_parallel(x, *rest), _parallel(x, *rest)))


def _parallel(x, packed, *rest):
    y = torch.full((len(x), rest[2]), torch.nan)
    library().functions.linear_weight_only(
        library().level, 2, x.data_ptr(), 0, packed.data_ptr(), packed.numel(), 0, 0, y.data_ptr(),
        len(x), rest[2], x.shape[1], rest[3], rest[4],
    )  # fmt: skip
    return y


def test_a_forked_process_starts_its_own_threads():
    case = problem((4, 256, 256, 64), 4)
    _parallel(case.x, *case.rest())
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_child, args=(queue, case.x, case.rest()))
    child.start()
    assert queue.get(timeout=30) is True
    child.join(30)
    assert child.exitcode == 0


def test_a_level_the_processor_lacks_is_refused(monkeypatch):
    library.cache_clear()
    monkeypatch.setenv("COMPRESSOR_CPU", "avx1024")
    with raises(KernelError, where="environment", level="avx1024") as failure:
        library()
    assert "scalar" in failure.value.data["known"]
    monkeypatch.setenv("COMPRESSOR_CPU", "scalar")
    assert library().level == 0
    monkeypatch.undo()
    library.cache_clear()


def test_a_processor_may_lack_a_level_below_its_best(monkeypatch):
    class Functions:  # of a library on a processor with AVX-512, without AVX-VNNI
        ABI = cpu.ABI

        @staticmethod
        def has_level(level: int) -> int:
            return int(cpu.LEVELS[level] in ("scalar", "avx2", "avx512vnni"))

        @staticmethod
        def use_parallel_for(address: int) -> int:
            return 0

        use_set_threads = use_parallel_for

    monkeypatch.setattr(cpu.importlib, "import_module", lambda name: Functions)
    monkeypatch.delenv("COMPRESSOR_CPU", raising=False)
    library.cache_clear()
    assert cpu.LEVELS[library().level] == "avx512vnni"
    monkeypatch.setenv("COMPRESSOR_CPU", "avxvnni")
    library.cache_clear()
    with raises(KernelError, where="environment", level="avxvnni", known=["scalar", "avx2", "avx512vnni"]):
        library()
    monkeypatch.undo()
    library.cache_clear()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [None, [3, 7, 40], []], ids=["dynamic", "calibrated", "none"])
def test_llm_int8_is_one_call_that_agrees_with_its_quantization_format(columns, dtype):
    made = torch.Generator().manual_seed(4)
    matrix = torch.randn(130, 77, generator=made)
    kept = None if columns is None else torch.tensor(columns, dtype=torch.int64)
    layer = Int8SplitLinear.pack(matrix, 6.0, dtype, kept)
    layer.bias = nn.Parameter(torch.randn(130, generator=made).to(dtype), requires_grad=False)
    x = torch.randn(2, 5, 77, generator=made)
    x[..., 5] *= 8
    x[0, 3, 11], x[1, 1, 1] = torch.inf, torch.nan
    x = x.to(dtype)
    expected, model = layer(x), nn.Sequential(layer)
    names = list(model.state_dict())
    assert prepare(model, strict=True)["0"].op == "linear_int8_outlier" and list(model.state_dict()) == names
    found = model(x)
    assert found.dtype == dtype and torch.equal(found.isnan(), expected.isnan())
    assert found[0, 3].isnan().all() and found[1, 1].isnan().all() and found[0, :3].isfinite().all()
    # products and the two scales in another order: a few float32 steps of the largest term, then one rounding
    step = 16 * UNIT * float((x.nan_to_num(0, 0, 0).abs().double() @ layer.matrix(torch.float64).abs().t()).max())
    difference = (found.double() - expected.double()).nan_to_num().abs()
    assert (difference <= step + 2 * HALF_UNIT[dtype] * expected.double().nan_to_num().abs()).all()
    for level in HERE:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ops, "cpu_library", lambda level=level: dataclasses.replace(library(), level=level))
            assert torch.equal(model(x).nan_to_num(), found.nan_to_num())
    if columns is not None:  # calibrated: a token's bits don't depend on its neighbours
        assert torch.equal(torch.cat([model(row) for row in x.split(1)]).nan_to_num(), found.nan_to_num())


def test_llm_int8_passes_the_checks_of_torch_and_refuses_bad_calls():
    layer = Int8SplitLinear.pack(torch.randn(70, 64), 6.0, torch.float32, torch.tensor([1, 9]))
    packed = ops.pack_int8_rows(layer.weight, layer.SCB)
    columns, weight = layer.outlier_columns.long(), layer.outlier_weight
    x = torch.randn(3, 64)
    for arguments in (
        (x, packed, layer.SCB, None, None, None, 6.0),
        (x, packed, layer.SCB, columns, weight, None, 0.0),
    ):
        torch.library.opcheck(torch.ops.compressor.linear_int8_outlier.default, arguments)
    found = operands(x=x, packed=packed, absmax=layer.SCB, columns=columns, weight=weight[:, :1])
    with raises(ShapeError, op="linear_int8_outlier", operands=found):
        ops.linear_int8_outlier(x, packed, layer.SCB, columns, weight[:, :1], None, 6.0)
    unlike = {"op": "linear_int8_outlier", "reason": "packed"}
    with raises(ShapeError, **unlike, out=70, columns=63, **operands(x=x[:, :63])):
        ops.linear_int8_outlier(x[:, :63], packed, layer.SCB, None, None, None, 6.0)
    with raises(ShapeError, **unlike, out=70, columns=64, **operands(x=x)):
        ops.linear_int8_outlier(x, packed, layer.SCB, columns + 60, weight, None, 6.0)


def small_weight(bits=4):
    made = torch.Generator().manual_seed(11)
    codes = torch.randint(0, 2**bits, (8, 64), generator=made, dtype=torch.uint8)
    return codes, torch.rand(8, 2, generator=made), torch.zeros(8, 2, dtype=torch.uint8)


META = torch.device("meta")
TWO_DEVICES = {"devices": ["cpu", "meta"]}
BAD_PACKING = {
    "a short permutation": (
        dict(permutation=torch.arange(8)),
        ShapeError,
        {"codes": [8, 64], **operands(permutation=torch.arange(8))},
    ),
    "a permutation of 32 bits": (
        dict(permutation=torch.arange(64).int()),
        ShapeError,
        {"codes": [8, 64], **operands(permutation=torch.arange(64).int())},
    ),
    "no groups": (dict(group_size=0), ShapeError, {"reason": "codes", "codes": [8, 64], "group_size": 0}),
    "one dimension": (
        dict(codes=torch.zeros(64, dtype=torch.uint8)),
        ShapeError,
        {"reason": "codes", "codes": [64], "group_size": 32},
    ),
    "a scale elsewhere": (dict(scale=torch.ones(8, 2, device=META)), KernelError, TWO_DEVICES),
    "zero points elsewhere": (dict(zero_point=torch.ones(8, 2, device=META).byte()), KernelError, TWO_DEVICES),
    "a permutation elsewhere": (dict(permutation=torch.arange(64, device=META)), KernelError, TWO_DEVICES),
}


@pytest.mark.parametrize("name", BAD_PACKING)
def test_packing_refuses_what_would_be_read_beyond_its_end(name):
    changes, kind, data = BAD_PACKING[name]
    codes, scale, zeros = small_weight()
    given = dict(codes=codes, scale=scale, zero_point=zeros, permutation=None, bits=4, group_size=32, layout="cpu2")
    with raises(kind, **data):
        ops.pack_weight(**{**given, **changes})


def test_llm_int8_refuses_operands_elsewhere_and_of_other_dimensions():
    layer = Int8SplitLinear.pack(torch.randn(70, 64), 6.0, torch.float32, torch.tensor([1, 9]))
    packed, columns = ops.pack_int8_rows(layer.weight, layer.SCB), layer.outlier_columns.long()
    given = [torch.randn(3, 64), packed, layer.SCB, columns, layer.outlier_weight]
    for at in (2, 3, 4):
        moved = [tensor.to(META) if at == n else tensor for n, tensor in enumerate(given)]
        with raises(KernelError, op="linear_int8_outlier", others=["cpu", "meta"]):
            ops.linear_int8_outlier(*moved, None, 0.0)
    for at, shape in ((2, (70, 1)), (2, ()), (3, (1, 2)), (3, ())):
        other = [tensor.flatten()[: 1 if shape == () else None].reshape(shape) if at == n else tensor
                 for n, tensor in enumerate(given)]  # fmt: skip
        found = operands(**dict(zip(("x", "packed", "absmax", "columns", "weight"), other)))
        with raises(ShapeError, op="linear_int8_outlier", operands=found):
            ops.linear_int8_outlier(*other, None, 0.0)


def test_results_lie_on_the_cpu_whatever_the_default_device_is():
    codes, scale, zeros = small_weight()
    x, a = torch.randn(3, 64), torch.ones(2, 64, dtype=torch.int8)
    with torch.device("meta"):
        hadamard._base.cache_clear()
        packed = ops.pack_weight(codes, scale, zeros, None, 4, 32, "cpu2")
        found = [
            *ops.unpack_weight(packed, 8, 64, 4, 32, "cpu2"),
            ops.linear_weight_only(x, packed, None, None, 8, 4, 32, "cpu2"),
            *int8_matmul.quantize_rows(x, 0.0, False), int8_matmul.int8_matmul(a, a), hadamard.hadamard(x[:, :48], 1.0),
        ]  # fmt: skip
    assert all(tensor.is_cpu for tensor in found) and torch.equal(found[0], codes) and torch.equal(found[1], scale)
    assert (found[6] == 64).all() and torch.equal(found[7], hadamard.hadamard(x[:, :48], 1.0))
    hadamard._base.cache_clear()


def test_a_packed_weight_is_unpacked_with_any_strides_and_refused_with_another_type():
    codes, scale, zeros = small_weight()
    packed = ops.pack_weight(codes, scale, zeros, None, 4, 32, "cpu2")
    strided = torch.stack([packed, packed], 1)[:, 0]
    assert torch.equal(ops.unpack_weight(strided, 8, 64, 4, 32, "cpu2")[0], codes)
    for other, group in ((packed.view(torch.int8), 32), (packed, 0)):
        found = {"bytes": packed.numel(), "dtype": str(other.dtype), "group_size": group}
        with raises(ShapeError, reason="packed", out=8, columns=64, **found):
            ops.unpack_weight(other, 8, 64, 4, group, "cpu2")
