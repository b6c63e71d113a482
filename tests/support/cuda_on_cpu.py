"""The CUDA kernels on the CPU: compiled by g++ under the emulation header, launched by the plans and the driver's code
that a GPU has, with a driver whose kernels are the emulated ones. Tensors are the CPU's, and the stream is 0."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import compiled

from compressor.kernels.cuda import devices, driver, nvrtc, plans
from compressor.kernels.cuda.interface import Kernels

HERE = Path(__file__).parent
CUDA_EXT = HERE.parents[1] / "cuda_ext"
# no fma but those that are written out; -fno-gnu-unique keeps two libraries in one process apart
FLAGS = ["-std=c++17", "-fPIC", "-ffp-contract=off", "-fno-gnu-unique", "-Wall", "-Wno-unknown-pragmas"]
SHARED = ["-shared", "-fPIC"]
NAME = "nvrtc, emulated"


def offer(kernel: str) -> str:
    """C++ that makes a kernel known to the driver under its name."""
    argument = f"{kernel.partition('::')[0]}::Arguments"
    run = f"[](const void* given) {{ {kernel}(*(const {argument}*)given); }}"
    return f'emulate::Kernel("{kernel}", {run}, sizeof({argument}))'


def source_object(source: str, text: str, kernels: tuple[str, ...], level: str = "-O1") -> Path:
    """The object of a source that offers these kernels. `text` is what NVRTC is given of it.

    level  of optimization; -O0 takes half of the time to compile and computes the same
    """
    offers = ",\n".join(map(offer, kernels))
    whole = f"{text}\nstatic const emulate::Kernel offered[] = {{\n{offers}\n}};\n"
    return compiled.object_of(source, whole, [*FLAGS, level], [CUDA_EXT], system=system_headers())


@cache
def system_headers() -> list[str]:
    return compiled.system_headers(path.read_text() for path in sorted(CUDA_EXT.glob("*.h")))


def driver_object() -> Path:
    path = HERE / "emulated_driver.cpp"
    return compiled.object_of(path.stem, path.read_text(), [*FLAGS, "-O1"], [CUDA_EXT])


def library() -> Path:
    """The driver with every kernel of every source."""
    objects = [source_object(source, nvrtc.source_text(source), plans.KERNELS[source]) for source in plans.KERNELS]
    return compiled.linked("libcuda.so", [driver_object(), *objects], SHARED)


@dataclass(frozen=True)
class Emulated(Kernels):
    """The launchers over a driver of this file; `seed` fixes the order of threads in all launches to come."""

    seed: Callable[[int], None]


def code_of(source: str, kernels: tuple[str, ...]) -> nvrtc.Code:
    """What stands for machine code: the emulated driver finds a kernel by its C++ name."""
    return nvrtc.Code(b"code", {kernel: kernel for kernel in kernels})


def emulated_kernels(path: Path, code: Callable[[str, tuple[str, ...]], nvrtc.Code] = code_of) -> Emulated:
    opened = driver.open_driver(0, str(path))
    found = driver.compiled_kernels(opened, code, "emulated")
    return Emulated(found.name, found.functions, found.error_text, opened.functions.emulate_seed)


def use(monkeypatch, kernels: Kernels) -> None:
    """The CPU counts as a CUDA device that has these kernels."""
    monkeypatch.setattr(devices, "is_cuda", lambda device: device.type == "cpu")
    monkeypatch.setattr(devices, "stream_of", lambda device: 0)
    monkeypatch.setattr(devices, "current", lambda device: nullcontext())
    monkeypatch.setattr(devices, "kernels_on", lambda device: kernels)
