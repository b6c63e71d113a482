"""Which CUDA kernels a device has, and its stream. All that differs between a GPU and the emulation is here."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache, partial

import torch

from compressor.errors import KernelError
from compressor.kernels.cuda import driver, nvrtc
from compressor.kernels.cuda.interface import LOWEST_CAPABILITY, Kernels
from compressor.kernels.cuda.library import find, library
from compressor.kernels.cuda.selftest import self_test


def is_cuda(device: torch.device) -> bool:
    return device.type == "cuda"


def stream_of(device: torch.device) -> int:
    """The handle of torch's current stream."""
    return torch.cuda.current_stream(device).cuda_stream


def current(device: torch.device) -> AbstractContextManager[object]:
    """Launches of the library go to the current device."""
    return torch.cuda.device(device)


@cache
def library_on(device: torch.device) -> Kernels | str:
    """The built library, tried on this device, or why not.

    raises KernelError if it is there and computes something wrong
    """
    found = library()
    if isinstance(found, str):
        return found
    return _too_old(device) or _tried(found, device)


@cache
def nvrtc_on(device: torch.device) -> Kernels | str:
    """Kernels compiled here for this device and tried on it, or why not; raises KernelError as library_on."""
    compiler = nvrtc.nvrtc()
    if isinstance(compiler, str):
        return compiler
    if (reason := _too_old(device)) is not None:
        return reason
    capability = torch.cuda.get_device_capability(device)
    target = nvrtc.target_of(capability)
    if 10 * capability[0] + capability[1] not in nvrtc.targets(compiler):
        return f"NVRTC {'.'.join(map(str, compiler.version))} doesn't know {target}"
    index = torch.cuda.current_device() if device.index is None else device.index
    opened = driver.open_driver(index)
    code_of = partial(nvrtc.cached_code, compiler, target=target)
    return _tried(driver.compiled_kernels(opened, code_of, target), device)


# in the order in which they are preferred
WAYS: dict[str, Callable[[torch.device], Kernels | str]] = {"cuda library": library_on, "nvrtc": nvrtc_on}


def _too_old(device: torch.device) -> str | None:
    capability = torch.cuda.get_device_capability(device)
    if capability >= LOWEST_CAPABILITY:
        return None
    return f"compute capability {capability[0]}.{capability[1]}, 8.0 is needed"


def _tried(kernels: Kernels, device: torch.device) -> Kernels:
    with current(device):
        outcome = self_test(kernels, device, stream_of(device))
    wrong = [f"{name}: {said}" for name, said in outcome.items() if said != "ok"]
    if wrong:
        raise KernelError(
            f"{kernels.name} fails its self-test on {device}: {'; '.join(wrong)}",
            hint="Don't use these kernels here: uninstall compress-model-cuda, or load with kernels='reference'.",
        )
    return kernels


def found_on(device: torch.device) -> Kernels | str:
    """The launchers that calls on this device use, or the reason for each way."""
    reasons = []
    for name, way in WAYS.items():
        found = way(device)
        if not isinstance(found, str):
            return found
        reasons.append(f"{name} ({found})")
    return " | ".join(reasons)


def kernels_of(device: torch.device) -> Kernels:
    """The launchers that calls on this device use.

    raises KernelError with the reason for each way
    """
    found = found_on(device)
    if isinstance(found, str):
        raise KernelError(f"no CUDA kernels on {device}: {found}", hint="Install compress-model-cuda.")
    return found


def report() -> dict[str, str]:
    """For `doctor`: each way, and the outcome of its self-test on each GPU."""
    if torch.cuda.is_available():
        devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
        return {name: "; ".join(f"{d}: {_outcome(way, d)}" for d in devices) for name, way in WAYS.items()}
    found, compiler = find(), nvrtc.nvrtc()
    version = compiler if isinstance(compiler, str) else f"NVRTC {'.'.join(map(str, compiler.version))}"
    return {name: f"no CUDA device; {text}" for name, text in zip(WAYS, (found, version))}


def _outcome(way: Callable[[torch.device], Kernels | str], device: torch.device) -> str:
    try:
        found = way(device)
    except KernelError as error:  # doctor goes on and says it
        return str(error)
    return found if isinstance(found, str) else f"{found.name}, self-test ok"
