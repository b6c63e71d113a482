"""How the CUDA kernels come: NVRTC, its cache, the driver, as far as a CPU goes; and what `doctor` reports of them."""

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
from raising import raises

from compressor.cli.doctor import examine
from compressor.errors import KernelError
from compressor.kernels.cuda import devices, driver, nvrtc, plans
from compressor.kernels.cuda.interface import BAD_CALL
from compressor.kernels.cuda.selftest import self_test
from cuda_ext.cases import KERNELS

needs_nvrtc = pytest.mark.skipif(isinstance(nvrtc.nvrtc(), str), reason=f"{nvrtc.nvrtc()}")
CAPABILITIES = {"sm_80": (8, 0), "sm_90a": (9, 0), "sm_100a": (10, 0)}
X, Y = 4096, 8192  # addresses


@pytest.fixture
def fake_driver():
    """A driver whose kernels are the emulated ones."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    return cuda_on_cpu.library()


def test_compiled_kernels_pass_the_self_test_through_the_driver(fake_driver):
    opened = driver.open_driver(0, str(fake_driver))
    loaded = opened.functions.test_handles_made()
    kernels = driver.compiled_kernels(opened, cuda_on_cpu.code_of, "sm_90a")
    assert kernels.name == "nvrtc, sm_90a"
    assert set(self_test(kernels, torch.device("cpu"), 77).values()) == {"ok"}
    wanted = sum(len(of_source) for of_source in plans.KERNELS.values())
    assert opened.functions.test_handles_made() - loaded == wanted  # loaded once, not once a call
    opened.functions.test_last_stream.restype = ctypes.c_void_p
    assert opened.functions.test_last_stream() == 77
    assert opened.functions.test_contexts_set() >= 6  # by each launch: its thread may have none


def test_all_sources_are_compiled_at_once(fake_driver):
    together = threading.Barrier(len(plans.KERNELS), timeout=30)  # breaks, and raises, if they come one by one
    asked = []

    def code_of(source, kernels):
        together.wait()
        asked.append(source)
        return cuda_on_cpu.code_of(source, kernels)

    kernels = driver.compiled_kernels(driver.open_driver(0, str(fake_driver)), code_of, "sm_90a")
    for _ in range(2):
        assert kernels.functions["compressor_hadamard"](X, Y, 0, 8, 1.0, 0, 0) == 0
    assert sorted(asked) == sorted(plans.KERNELS)


def test_the_driver_s_errors_name_what_it_says(fake_driver):
    with raises(KernelError, reason="driver", code=101, text="invalid device ordinal"):
        driver.open_driver(3, str(fake_driver))
    with raises(KernelError, where="/nowhere/libcuda.so.1", reason="no-driver"):
        driver.open_driver(0, "/nowhere/libcuda.so.1")
    opened = driver.open_driver(0, str(fake_driver))
    with raises(KernelError, reason="driver", code=500, text="named symbol not found"):
        driver.load_code(opened, nvrtc.Code(b"code", {"kernel": "no_such_symbol"}))
    with raises(KernelError, reason="driver", code=200):
        driver.load_code(opened, nvrtc.Code(b"", {}))
    broken = dataclasses.replace(opened, context=ctypes.c_void_p(5))
    kernels = driver.compiled_kernels(opened, cuda_on_cpu.code_of, "sm_80")
    assert kernels.functions["compressor_hadamard"](X, Y, 1, 44, 1.0, 0, 0) == BAD_CALL
    handle = driver.load_code(opened, cuda_on_cpu.code_of("hadamard", plans.KERNELS["hadamard"]))
    planned = plans.hadamard(X, Y, 1, 8, 1.0, 0)[0]
    assert driver.launch(broken, handle[planned.kernel], planned, 0) == 201
    assert kernels.error_text(101) == "invalid device ordinal"


def test_a_source_is_one_string_without_includes():
    assert {path.stem for path in cuda_on_cpu.CUDA_EXT.glob("*.cu")} == set(plans.KERNELS) == set(KERNELS)
    for source in plans.KERNELS:
        text = nvrtc.source_text(source)
        assert set(re.findall(r"^#include (.*)$", text, re.MULTILINE)) <= {'"emulate.h"', '"emulate_int8.h"'}
        assert text.count("enum Type {") == 1


@needs_nvrtc
@pytest.mark.slow
@pytest.mark.parametrize("target", CAPABILITIES)
@pytest.mark.parametrize("source", plans.KERNELS)
def test_nvrtc_makes_machine_code_that_holds_every_kernel(source, target):
    kernels = plans.KERNELS[source]
    code = nvrtc.compile_source(nvrtc.nvrtc(), source, nvrtc.source_text(source), kernels, target)
    assert code.cubin[:4] == b"\x7fELF" and set(code.names) == set(kernels)
    assert all(symbol.encode() in code.cubin for symbol in code.names.values())


@needs_nvrtc
def test_nvrtc_s_own_words_are_in_the_error():
    compiler = nvrtc.nvrtc()
    with raises(KernelError, where="probe.cu, sm_80", reason="source-refused") as caught:
        nvrtc.compile_source(compiler, "probe", "__global__ void probe() { nothing(); }", ("probe",), "sm_80")
    assert "undefined" in caught.value.data["log"]


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
    with raises(KernelError, where=tmp_path / "libnvrtc.so.13", reason="not-loaded"):
        nvrtc.load(str(tmp_path / "libnvrtc.so.13"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_doctor_says_what_is_missing_and_that_the_kernels_are_experimental(monkeypatch):
    monkeypatch.setattr(nvrtc, "nvrtc", lambda: "nvidia-cuda-nvrtc is not installed")
    found = examine()["kernels"]["cuda"]
    assert found == {"nvrtc (experimental)": "no CUDA device; nvidia-cuda-nvrtc is not installed"}


def test_doctor_goes_on_where_the_kernels_fail(monkeypatch):
    def broken(device):
        raise KernelError("nvrtc, sm_80 fails its self-test")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(devices, "kernels_on", broken)
    (said,) = devices.report().values()
    assert said == "; ".join(f"cuda:{index}: nvrtc, sm_80 fails its self-test" for index in range(2))


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Gives torch a GPU of some compute capability, and NVRTC that knows two of them."""

    def use(capability):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(nvrtc, "nvrtc", lambda: nvrtc.Nvrtc(None, "libnvrtc.so.12", (12, 6)))
        monkeypatch.setattr(nvrtc, "targets", lambda compiler: {80, 90})
        devices.kernels_on.cache_clear()
        return torch.device("cuda", 0)

    yield use
    devices.kernels_on.cache_clear()


def test_a_gpu_that_is_too_old_is_a_reason(on_a_gpu):
    device = on_a_gpu((7, 5))
    why = "compute capability 7.5, 8.0 is needed"
    assert devices.kernels_on(device) == why
    with raises(KernelError, reason="no-kernels", device="cuda:0", why=why):
        devices.kernels_of(device)


def test_a_gpu_that_nvrtc_does_not_know_is_a_reason(on_a_gpu):
    assert devices.kernels_on(on_a_gpu((12, 0))) == "NVRTC 12.6 doesn't know sm_120a"
