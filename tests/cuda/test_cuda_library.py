"""The built CUDA library: how it is found and what is refused, its own wheel, and what `doctor` says of both ways."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from compressor.cli.doctor import examine
from compressor.errors import KernelError
from compressor.kernels.cuda import devices, library
from compressor.kernels.cuda.interface import ABI

ROOT = Path(__file__).parents[2]


@pytest.fixture
def nothing_installed(monkeypatch):
    monkeypatch.delenv(library.VARIABLE, raising=False)
    monkeypatch.setattr(library.importlib.util, "find_spec", lambda name: None)


def test_without_the_package_there_is_a_reason(nothing_installed):
    assert library.find() == "compress-model-cuda is not installed"


def test_the_package_says_where_its_library_is(monkeypatch, tmp_path):
    monkeypatch.delenv(library.VARIABLE, raising=False)
    (tmp_path / "compressor_cuda.py").write_text("LIBRARY = '/somewhere/lib.so'\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "compressor_cuda", raising=False)
    assert library.find() == Path("/somewhere/lib.so")


def test_the_environment_names_another_file(nothing_installed, monkeypatch, tmp_path):
    monkeypatch.setenv(library.VARIABLE, str(tmp_path / "lib.so"))
    with pytest.raises(KernelError, match=r"COMPRESSOR_CUDA is '.*lib.so', which is no file"):
        library.find()
    (tmp_path / "lib.so").write_text("")
    assert library.find() == tmp_path / "lib.so"


def test_the_environment_can_leave_the_library_out(monkeypatch):
    monkeypatch.setenv(library.VARIABLE, "nvrtc")
    assert library.find() == "COMPRESSOR_CUDA asks for nvrtc"


def test_a_library_of_another_release_is_refused(emulated):
    path = Path(emulated._name)
    with pytest.raises(KernelError, match=f"is the emulation for a CPU, ABI {ABI} expected"):
        library.load(path)
    monkey = library.load(path, abi=0)
    assert monkey.name == "cuda library" and monkey.error_text(0) == "no error"


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
@pytest.mark.parametrize(
    "source, said",
    [
        (f'extern "C" int compressor_cuda_abi() {{ return {ABI + 1}; }}', f"has ABI {ABI + 1}, ABI {ABI} expected"),
        ("int nothing;", "it has no compressor_cuda_abi"),
    ],
)
def test_other_libraries_are_refused(tmp_path, source, said):
    (tmp_path / "other.cpp").write_text(source)
    subprocess.run(["g++", "-shared", "-fPIC", "other.cpp", "-o", "other.so"], check=True, cwd=tmp_path)
    with pytest.raises(KernelError, match=said):
        library.load(tmp_path / "other.so")


def test_a_file_that_isn_t_a_library_is_refused(tmp_path):
    (tmp_path / "lib.so").write_text("text")
    with pytest.raises(KernelError, match="the CUDA library doesn't load"):
        library.load(tmp_path / "lib.so")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_doctor_names_both_ways_and_what_is_missing(nothing_installed):
    found = examine()["kernels"]["cuda"]
    assert set(found) == {"cuda library", "nvrtc"}
    assert found["cuda library"] == "no CUDA device; compress-model-cuda is not installed"
    assert found["nvrtc"].startswith("no CUDA device; ")


def test_doctor_goes_on_where_a_way_fails(monkeypatch):
    def broken(device):
        raise KernelError("nvrtc, sm_80 fails its self-test")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(devices, "WAYS", {"cuda library": lambda device: "not installed", "nvrtc": broken})
    assert devices.report() == {
        "cuda library": "cuda:0: not installed; cuda:1: not installed",
        "nvrtc": "; ".join(f"cuda:{index}: nvrtc, sm_80 fails its self-test" for index in range(2)),
    }


def on_a_gpu(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    for way in (devices.library_on, devices.nvrtc_on):
        way.cache_clear()


def test_a_gpu_that_is_too_old_is_a_reason(monkeypatch, emulated):
    on_a_gpu(monkeypatch, (7, 5))
    device = torch.device("cuda", 0)
    monkeypatch.setattr(devices, "library", lambda: library.load(Path(emulated._name), abi=0))
    monkeypatch.setattr(devices.nvrtc, "nvrtc", lambda: devices.nvrtc.Nvrtc(None, "libnvrtc.so.13", (13, 0)))
    assert devices.library_on(device) == "compute capability 7.5, 8.0 is needed"
    assert devices.nvrtc_on(device) == "compute capability 7.5, 8.0 is needed"
    with pytest.raises(
        KernelError, match=r"no CUDA kernels on cuda:0: cuda library \(compute capability 7.5, .* nvrtc \("
    ):
        devices.kernels_of(device)
    on_a_gpu(monkeypatch, (8, 0))


def test_a_gpu_that_nvrtc_does_not_know_is_a_reason(monkeypatch):
    on_a_gpu(monkeypatch, (12, 0))
    monkeypatch.setattr(devices.nvrtc, "nvrtc", lambda: devices.nvrtc.Nvrtc(None, "libnvrtc.so.12", (12, 6)))
    monkeypatch.setattr(devices.nvrtc, "targets", lambda compiler: {80, 90})
    assert devices.nvrtc_on(torch.device("cuda", 0)) == "NVRTC 12.6 doesn't know sm_120a"
    on_a_gpu(monkeypatch, (8, 0))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_the_cuda_wheel_builds_and_holds_a_library_of_this_release(tmp_path):
    shutil.copytree(ROOT / "cuda_ext", tmp_path / "source", ignore=shutil.ignore_patterns("build", "*.egg-info"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*command, "-w", tmp_path, tmp_path / "source"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    wheel = next(tmp_path.glob("*.whl"))
    assert wheel.name.startswith("compress_model_cuda-") and "-py3-none-linux_" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    inside = {path.name for path in (tmp_path / "site" / "compressor_cuda").iterdir()}
    assert inside == {"__init__.py", "libcompressor_cuda.so", "libcompressor_cuda.json"}
    code = "from compressor.kernels.cuda.library import find, library; print(library().name, find(), sep='\\n')"
    environment = {"PYTHONPATH": f"{tmp_path / 'site'}:{ROOT}", "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split("\n")[:2] == ["cuda library", str(tmp_path / "site/compressor_cuda/libcompressor_cuda.so")]
