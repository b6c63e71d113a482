"""The CPU library is tried before its first use: each operation at each level, and a wrong one is refused."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from raising import raises
from torch import nn
from torch._subclasses import FakeTensorMode

from compressor.errors import KernelError
from compressor.kernels.cpu import LEVELS, Library, levels_here, library
from compressor.kernels.prepared import selftest
from compressor.kernels.prepared.prepare import prepare
from compressor.kernels.prepared.selftest import problems, self_test, tried_library
from compressor.layers.int8_split_linear import Int8SplitLinear

BUILT = isinstance(library(), Library)
pytestmark = pytest.mark.skipif(not BUILT, reason=f"{library()}")
PROBLEMS = problems() if BUILT else []
NOT_TRIED = {  # alike at every level
    "has_level",
    "has_bfloat16_products",
    "use_parallel_for",
    "use_set_threads",
    "reserve_threads",
    "packed_bytes",
    "pack_weight",
    "unpack_weight",
}
SHARED = {"linear_dynamic_int8_parts", "linear_weight_only_parts"}  # what runs the calls of one weight, too


@pytest.fixture(autouse=True)
def tried_anew():
    tried_library.cache_clear()
    yield
    tried_library.cache_clear()


def test_every_operation_is_sound_at_every_level():
    found = self_test()
    assert set(found.values()) == {"ok"}
    assert len(found) == len(PROBLEMS) * len(levels_here(library().functions))
    assert {name.rpartition(", ")[2] for name in found} == {LEVELS[i] for i in levels_here(library().functions)}


def test_no_function_of_the_library_is_left_out():
    tried = set()

    class Noting:
        def __getattr__(self, name):
            tried.add(name)
            return getattr(library().functions, name)

    for problem in PROBLEMS:
        assert problem.outcome(Noting(), library().level) == "ok"
    functions = {name for name in dir(library().functions) if not name.startswith("_") and name != "ABI"}
    assert tried == functions - NOT_TRIED - SHARED


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
def test_results_that_are_off_or_missing_are_told(problem):
    functions, level = library().functions, library().level
    _, result = problem.call(functions, level)
    for value in (torch.nan, 1.0):
        off = result.double().clone()
        off.view(-1)[-1] += value
        said = dataclasses.replace(problem, call=lambda *_, off=off: (0, off)).outcome(functions, level)
        assert said.startswith("error 0, off by ")
    refused = dataclasses.replace(problem, call=lambda *_: (-1, result)).outcome(functions, level)
    assert refused.startswith("error -1")


def test_a_library_that_computes_something_wrong_is_an_error_not_a_fallback(monkeypatch):
    functions = library().functions
    kept = {name: getattr(functions, name) for name in dir(functions) if not name.startswith("__")}
    unmoved = {"int8_matmul": lambda *arguments: 0}  # says that it multiplied, and didn't
    wrong = SimpleNamespace(**{**kept, **unmoved, "__file__": "there.so"})
    monkeypatch.setattr(selftest, "library", lambda: Library(wrong, library().level))
    monkeypatch.setattr(selftest.ops, "cpu_library", lambda: Library(wrong, library().level))
    model = nn.Sequential(Int8SplitLinear.pack(torch.randn(8, 16), 6.0, torch.float32, None))
    with raises(KernelError, where="there.so", reason="self-test") as raised:
        prepare(model)
    (name,) = raised.value.data["failed"]
    assert name.partition(",")[0] == "int8_matmul" and "COMPRESSOR_CPU" in raised.value.hint


def test_a_library_that_is_not_there_is_no_error(monkeypatch):
    monkeypatch.setattr(selftest, "library", lambda: "cpu library not built: no compiler")
    assert tried_library() == "cpu library not built: no compiler"


def test_who_asks_first_does_not_matter():
    with FakeTensorMode(), torch.device("meta"), torch.inference_mode():
        assert isinstance(tried_library(), Library)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_does_not_matter_and_stays(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        assert isinstance(tried_library(), Library) and torch.get_default_dtype() == dtype
    finally:
        torch.set_default_dtype(before)
