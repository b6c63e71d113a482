"""The CPU library works on torch's threads: the same bits for any number of them, from wherever it is called."""

from __future__ import annotations

import ctypes
import multiprocessing
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from compressor.cli.doctor import examine
from compressor.kernels import cpu
from compressor.kernels.cpu import Library, library, parallel_for_address
from compressor.kernels.ops import linear as ops
from compressor.kernels.prepared.dispatch import IntegerWeight, choose

BUILT = isinstance(library(), Library)
pytestmark = pytest.mark.skipif(not BUILT, reason=f"{library()}")
ROWS, OUT, COLUMNS, GROUP = 3, 1000, 256, 64  # 16 tiles of outputs
PART = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)
PARALLEL_FOR = ctypes.CFUNCTYPE(
    ctypes.c_int32, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p
)


@pytest.fixture
def threads():
    """Sets torch's number of threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def use_parallel_for():
    """Gives the library another function than torch's for one test."""
    kept = []

    def use(function):
        kept.append(PARALLEL_FOR(function))
        library().functions.use_parallel_for(ctypes.cast(kept[-1], ctypes.c_void_p).value)

    yield use
    library().functions.use_parallel_for(parallel_for_address())


@pytest.fixture(scope="module")
def product():
    """A function of the number of threads: a product of 4 bits, NaN where nothing was written."""
    made = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, COLUMNS, generator=made)
    codes = torch.randint(0, 16, (OUT, COLUMNS), generator=made, dtype=torch.uint8)
    packed = ops.pack_weight(codes, torch.rand(OUT, COLUMNS // GROUP, generator=made), None, None, 4, GROUP, "cpu2")

    def multiply(count):
        y = torch.full((ROWS, OUT), torch.nan)
        found = library()
        error = found.functions.linear_dynamic_int8(
            found.level, count, x.data_ptr(), 0, packed.data_ptr(), packed.numel(), 0, 0, y.data_ptr(), ROWS, OUT,
            COLUMNS, 4, GROUP,
        )  # fmt: skip
        assert error == 0
        return y

    return multiply


def torch_parallel_for(count, body):
    """body(begin, end) on torch's threads, as its own operations and those of extensions run"""
    call = getattr(ctypes.CDLL(torch._C.__file__), cpu.PARALLEL_FOR)
    part = PART(lambda begin, end, _: body(begin, end))
    call.argtypes = [ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, PART, ctypes.c_void_p]
    assert call(0, count, 1, part, None) == 0


def test_any_number_of_threads_gives_the_same_bits(product, threads):
    expected = product(1)
    assert expected.isfinite().all()
    for there in (1, 2, 3, 7):
        threads(there)
        for wanted in (2, 3, 7):
            assert torch.equal(product(wanted), expected), (there, wanted)


@pytest.mark.parametrize("name", ["linear_dynamic_int8", "linear_weight_only", "linear_int8_outlier"])
def test_inputs_of_many_rows_are_rounded_by_several_threads_to_the_same_bits(name, threads, use_parallel_for):
    threads(3)
    made, columns = torch.Generator().manual_seed(0), 4096
    x = torch.randn(300, columns, generator=made).bfloat16()
    x[[0, 7, 299], [3, 9, 4095]] = torch.tensor([torch.inf, torch.nan, 20.0], dtype=torch.bfloat16)
    codes = torch.randint(0, 256, (8, columns), generator=made, dtype=torch.uint8)
    packed, scale = ops.pack_weight(codes, torch.rand(8, 1, generator=made), None, None, 8, -1, "cpu2"), torch.ones(8)
    teams = []

    def parallel_for(begin, end, grain, body, context):
        teams.append(end - begin)
        torch_parallel_for(end - begin, lambda first, last: PART(body)(first, last, context))
        return 0

    def multiply(count):
        use_parallel_for(parallel_for)  # and forget how late its threads came
        y, found = torch.full((len(x), 8), 7.0, dtype=torch.bfloat16), library()
        sizes = y.data_ptr(), len(x), 8, columns
        split = (scale.data_ptr(), 0, 0, 0, 0) if name == "linear_int8_outlier" else ()
        rest = (6.0,) if split else (8, columns)
        error = getattr(found.functions, name)(
            found.level, count, x.data_ptr(), 1, packed.data_ptr(), packed.numel(), *split, 0, 0, *sizes, *rest
        )
        assert error == 0
        return y.view(torch.int16)

    expected = multiply(1)
    assert not teams and torch.equal(multiply(3), expected)
    assert teams  # the product has one tile of outputs, which needs none


def test_several_of_torchs_threads_take_part(product, threads, use_parallel_for):
    threads(3)
    shared = []

    def parallel_for(begin, end, grain, body, context):
        def part(first, last):
            shared.append(threading.get_ident())
            together.wait(timeout=60)
            PART(body)(first, last, context)

        together = threading.Barrier(3)
        torch_parallel_for(end - begin, part)
        return 0

    use_parallel_for(parallel_for)
    assert torch.equal(product(3), product(1))
    assert len(set(shared)) == 3


def test_a_reserved_team_has_all_threads_for_the_library_alone(product, threads, use_parallel_for):
    threads(3)
    expected, sizes = product(1), []

    def parallel_for(begin, end, grain, body, context):
        sizes.append(torch.get_num_threads())
        PART(body)(begin, end, context)
        return 0

    use_parallel_for(parallel_for)
    try:
        assert library().functions.reserve_threads(3, 1) == 0
        assert torch.equal(product(3), expected)
        assert (sizes, torch.get_num_threads()) == ([3], 1)
    finally:
        library().functions.reserve_threads(0, 3)
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize("calls", [1, 2, 5])
def test_a_team_of_any_size_does_all_of_the_work(calls, product, use_parallel_for):
    def parallel_for(begin, end, grain, body, context):
        for _ in range(calls):
            PART(body)(begin, end, context)
        return 0

    expected = product(1)
    use_parallel_for(parallel_for)
    assert torch.equal(product(4), expected)


def test_what_torch_could_not_run_is_an_error(product, use_parallel_for):
    use_parallel_for(lambda *_: 1)
    with pytest.raises(RuntimeError, match="torch_parallel_for"):
        product(2)


def test_a_call_from_within_torchs_threads_runs_there(product, threads):
    threads(3)
    expected, found = product(1), [None] * 6

    def body(begin, end):
        for place in range(begin, end):
            found[place] = product(3)

    torch_parallel_for(len(found), body)
    assert all(torch.equal(y, expected) for y in found)


def test_many_threads_with_teams_of_their_own_may_call_at_once(product, threads):
    threads(2)
    expected, together = product(1), threading.Barrier(20)

    def call(_):
        together.wait(timeout=60)
        return product(2)

    with ThreadPoolExecutor(20) as pool:
        assert all(torch.equal(found, expected) for found in pool.map(call, range(20)))


def _child(queue, product, expected):
    """Here, where torch's threads are gone, and in a thread which has new ones."""
    queue.put(torch.equal(product(2), expected))
    other = threading.Thread(target=lambda: queue.put(torch.equal(product(2), expected)))
    other.start()
    other.join(30)


def test_a_forked_process_does_not_wait_for_threads_it_lost(product, threads):
    threads(2)
    expected = product(2)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_child, args=(queue, product, expected))
    child.start()
    assert [queue.get(timeout=30) for _ in range(2)] == [True, True]
    child.join(30)
    assert child.exitcode == 0


def test_a_torch_without_the_function_leaves_one_thread_and_this_is_told(product, threads, monkeypatch):
    expected = product(1)
    assert examine()["kernels"]["threads"] == "torch's (torch_parallel_for)"
    monkeypatch.setattr(cpu, "PARALLEL_FOR", "torch_has_no_such_function")
    library.cache_clear()
    threads(2)
    try:
        found = library()
        assert not found.has_torch_threads and torch.equal(product(2), expected)
        weight = IntegerWeight(torch.zeros(64, 64, dtype=torch.uint8), torch.ones(64, 1), None, 4, 64)
        monkeypatch.setattr("compressor.kernels.prepared.dispatch.tried_library", library)
        assert choose(weight, None).kernel.endswith(", one thread")
        assert examine()["kernels"]["threads"] == "one: torch has no torch_parallel_for"
    finally:
        monkeypatch.undo()
        library.cache_clear()
        library()
