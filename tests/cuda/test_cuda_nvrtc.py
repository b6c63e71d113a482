"""The second way to the CUDA kernels: NVRTC, its cache, the driver, as far as a CPU goes."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import re
import shutil
import threading
from pathlib import Path

import cuda_on_cpu
import pytest
import torch

from compressor.errors import KernelError
from compressor.kernels.cuda import driver, nvrtc, plans
from compressor.kernels.cuda.interface import BAD_CALL
from compressor.kernels.cuda.selftest import self_test
from cuda_ext import build

needs_nvrtc = pytest.mark.skipif(isinstance(nvrtc.nvrtc(), str), reason=f"{nvrtc.nvrtc()}")
CAPABILITIES = {"sm_80": (8, 0), "sm_90a": (9, 0), "sm_100a": (10, 0)}
X, Y = 4096, 8192  # addresses


@pytest.fixture(scope="module")
def fake_driver(tmp_path_factory):
    """A driver whose kernels are the emulated ones, and the machine code that stands for them: their symbols."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    path = tmp_path_factory.mktemp("driver") / "libcuda.so"
    build.build_emulated(path, [*build.SOURCES, Path(__file__).parents[1] / "support" / "emulated_driver.cpp"])
    return path, cuda_on_cpu.kernels_in(path)


def code_from(names):
    return lambda source, kernels: nvrtc.Code(b"code", {name: names[name] for name in kernels})


def test_compiled_kernels_pass_the_self_test_through_the_driver(fake_driver):
    path, names = fake_driver
    opened = driver.open_driver(0, str(path))
    kernels = driver.compiled_kernels(opened, code_from(names), "sm_90a")
    assert kernels.name == "nvrtc, sm_90a"
    assert set(self_test(kernels, torch.device("cpu"), 77).values()) == {"ok"}
    wanted = sum(len(of_source) for of_source in plans.KERNELS.values())
    assert opened.functions.test_handles_made() == wanted  # loaded once, not once a call
    opened.functions.test_last_stream.restype = ctypes.c_void_p
    assert opened.functions.test_last_stream() == 77
    assert opened.functions.test_contexts_set() >= 6  # by each launch: its thread may have none


def test_all_sources_are_compiled_at_once(fake_driver):
    path, names = fake_driver
    together = threading.Barrier(len(plans.KERNELS), timeout=30)  # breaks, and raises, if they come one by one
    asked = []

    def code_of(source, kernels):
        together.wait()
        asked.append(source)
        return code_from(names)(source, kernels)

    kernels = driver.compiled_kernels(driver.open_driver(0, str(path)), code_of, "sm_90a")
    for _ in range(2):
        assert kernels.functions["compressor_hadamard"](X, Y, 0, 8, 1.0, 0, 0) == 0
    assert sorted(asked) == sorted(plans.KERNELS)


def test_the_driver_s_errors_name_what_it_says(fake_driver):
    path, names = fake_driver
    with pytest.raises(KernelError, match=r"invalid device ordinal \(101\)"):
        driver.open_driver(3, str(path))
    with pytest.raises(KernelError, match="doesn't load"):
        driver.open_driver(0, "/nowhere/libcuda.so.1")
    opened = driver.open_driver(0, str(path))
    with pytest.raises(KernelError, match=r"named symbol not found \(500\)"):
        driver.load_code(opened, nvrtc.Code(b"code", {"kernel": "no_such_symbol"}))
    with pytest.raises(KernelError, match=r"an error \(200\)"):
        driver.load_code(opened, nvrtc.Code(b"", {}))
    broken = dataclasses.replace(opened, context=ctypes.c_void_p(5))
    kernels = driver.compiled_kernels(opened, code_from(names), "sm_80")
    assert kernels.functions["compressor_hadamard"](X, Y, 1, 44, 1.0, 0, 0) == BAD_CALL
    handle = driver.load_code(opened, code_from(names)("hadamard", plans.KERNELS["hadamard"]))
    planned = plans.hadamard(X, Y, 1, 8, 1.0, 0)[0]
    assert driver.launch(broken, handle[planned.kernel], planned, 0) == 201
    assert kernels.error_text(101) == "invalid device ordinal"


def test_a_source_is_one_string_without_includes():
    for path in build.SOURCES:
        text = nvrtc.source_text(path.stem)
        assert set(re.findall(r"^#include (.*)$", text, re.MULTILINE)) <= {'"emulate.h"', '"emulate_int8.h"'}
        assert text.count("enum Type {") == 1


@needs_nvrtc
@pytest.mark.slow
@pytest.mark.parametrize("target", CAPABILITIES)
@pytest.mark.parametrize("source", [path.stem for path in build.SOURCES])
def test_nvrtc_makes_machine_code_that_holds_every_kernel(emulated, source, target):
    text = nvrtc.source_text(source)
    spaces = set(re.findall(r"^namespace (\w+) {", text, re.MULTILINE))
    kernels = tuple(name for name in cuda_on_cpu.kernels_in(emulated._name) if name.partition("::")[0] in spaces)
    assert kernels and set(plans.KERNELS.get(source, kernels)) == set(kernels)
    code = nvrtc.compile_source(nvrtc.nvrtc(), source, text, kernels, target)
    assert code.cubin[:4] == b"\x7fELF" and set(code.names) == set(kernels)
    assert all(symbol.encode() in code.cubin for symbol in code.names.values())
    assert cuda_on_cpu.demangled(code.names.values()) == {symbol: name for name, symbol in code.names.items()}


@needs_nvrtc
def test_nvrtc_s_own_words_are_in_the_error():
    compiler = nvrtc.nvrtc()
    with pytest.raises(KernelError, match=r"probe.cu, sm_80: NVRTC refuses the source:\n.*undefined"):
        nvrtc.compile_source(compiler, "probe", "__global__ void probe() { nothing(); }", ("probe",), "sm_80")


@needs_nvrtc
def test_nvrtc_knows_the_targets_that_are_asked_of_it():
    assert {10 * major + minor for major, minor in CAPABILITIES.values()} <= nvrtc.targets(nvrtc.nvrtc())


def test_targets_from_9_0_on_have_the_instructions_of_their_gpu():
    assert {target: nvrtc.target_of(capability) for target, capability in CAPABILITIES.items()} == {
        target: target for target in CAPABILITIES
    }
    assert nvrtc.target_of((8, 9)) == "sm_89" and nvrtc.target_of((12, 0)) == "sm_120a"


@pytest.fixture
def counted(monkeypatch, tmp_path):
    """A compiler that counts, with a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls = []

    def compiled(compiler, name, text, kernels, target):
        calls.append((name, target, compiler.version))
        return nvrtc.Code(b"\x7fELF\n" + text.encode(), {kernel: f"_Z{kernel}" for kernel in kernels})

    monkeypatch.setattr(nvrtc, "compile_source", compiled)
    return calls


COMPILER = nvrtc.Nvrtc(None, "libnvrtc.so.13", (13, 0))


def test_code_is_compiled_once_for_each_source_target_and_version(counted, tmp_path, monkeypatch):
    want = nvrtc.cached_code(COMPILER, "hadamard", ("a", "b"), "sm_80")
    assert nvrtc.cached_code(COMPILER, "hadamard", ("a", "b"), "sm_80") == want and len(counted) == 1
    others = [(COMPILER, ("a", "b"), "sm_90a"), (COMPILER, ("a",), "sm_80")]
    others += [(dataclasses.replace(COMPILER, version=(13, 1)), ("a", "b"), "sm_80")]
    for compiler, kernels, target in others:
        nvrtc.cached_code(compiler, "hadamard", kernels, target)
    assert len(counted) == 4
    monkeypatch.setattr(nvrtc, "source_text", lambda name: "another source")
    assert nvrtc.cached_code(COMPILER, "hadamard", ("a", "b"), "sm_80") != want and len(counted) == 5
    assert len(list((tmp_path / "compress-model" / "cuda").iterdir())) == 5  # and no temporary files


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b[:10], lambda b: b"", lambda b: b[:-1] + b"?"])
def test_a_damaged_file_of_the_cache_is_made_again(counted, tmp_path, damage):
    want = nvrtc.cached_code(COMPILER, "hadamard", ("a",), "sm_80")
    (path,) = (tmp_path / "compress-model" / "cuda").iterdir()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert nvrtc.cached_code(COMPILER, "hadamard", ("a",), "sm_80") == want and len(counted) == 2
    assert path.read_bytes() == whole and json.loads(whole.split(b"\n")[0])["names"] == {"a": "_Za"}


def test_a_cache_that_can_t_be_written_is_a_warning(counted, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="isn't kept"):
        assert nvrtc.cached_code(COMPILER, "hadamard", ("a",), "sm_80").names == {"a": "_Za"}


def test_nvrtc_of_torch_s_release_comes_first(tmp_path, monkeypatch):
    for place in ("cu13/lib/libnvrtc.so.13", "cuda_nvrtc/lib/libnvrtc.so.12", "cu13/lib/libnvrtc-builtins.so.13.0"):
        (tmp_path / "nvidia" / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "nvidia" / place).write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(nvrtc.ctypes.util, "find_library", lambda name: "libnvrtc.so")
    for version, first in (("12.8", "libnvrtc.so.12"), ("13.0", "libnvrtc.so.13"), (None, "libnvrtc.so.13")):
        monkeypatch.setattr(torch.version, "cuda", version)
        *found, of_system = nvrtc.candidates()
        ours = [Path(path).name for path in found if Path(path).is_relative_to(tmp_path)]  # there may be a real one
        assert ours[0] == first and len(ours) == 2 and of_system == "libnvrtc.so"


def test_a_file_that_isn_t_nvrtc_is_an_error(tmp_path):
    (tmp_path / "libnvrtc.so.13").write_text("no library")
    with pytest.raises(KernelError, match="NVRTC doesn't load"):
        nvrtc.load(str(tmp_path / "libnvrtc.so.13"))
