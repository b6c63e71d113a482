"""Gives the CUDA kernels of a device and its stream. Every difference between a GPU and the emulation is here."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import cache, partial

import torch

from compressor.errors import KernelError
from compressor.kernels.cuda import driver, nvrtc
from compressor.kernels.cuda.interface import LOWEST_CAPABILITY, Kernels
from compressor.kernels.cuda.selftest import self_test

NAME = "nvrtc"  # the name of these kernels in a list of choices


def is_cuda(device: torch.device) -> bool:
    return device.type == "cuda"


def stream_of(device: torch.device) -> int:
    """The handle of torch's current stream."""
    return torch.cuda.current_stream(device).cuda_stream


def current(device: torch.device) -> AbstractContextManager[object]:
    """Make the device the current one inside this context, for torch's allocations and launches."""
    return torch.cuda.device(device)


@cache
def kernels_on(device: torch.device) -> Kernels | str:
    """Kernels compiled for this device and tested on it, or the reason why there are none.

    raises  KernelError if they fail their self-test
    """
    compiler = nvrtc.nvrtc()
    if isinstance(compiler, str):
        return compiler
    capability = torch.cuda.get_device_capability(device)
    if capability < LOWEST_CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]}, 8.0 is needed"
    target = nvrtc.target_of(capability)
    if 10 * capability[0] + capability[1] not in nvrtc.targets(compiler):
        return f"NVRTC {'.'.join(map(str, compiler.version))} doesn't know {target}"
    index = torch.cuda.current_device() if device.index is None else device.index
    opened = driver.open_driver(index)
    code_of = partial(nvrtc.cached_code, compiler, target=target)
    return tried(driver.compiled_kernels(opened, code_of, target), device)


def tried(kernels: Kernels, device: torch.device) -> Kernels:
    """The kernels, if they pass their self-test. raises KernelError"""
    with current(device):
        outcome = self_test(kernels, device, stream_of(device))
    wrong = {name: message for name, message in outcome.items() if message != "ok"}
    if wrong:
        message = "; ".join(f"{name}: {text}" for name, text in wrong.items())
        raise KernelError(
            f"{kernels.name} fails its self-test on {device}: {message}",
            hint="Load with kernels='reference', and report this message with that of compress-model doctor --verbose.",
            data={"reason": "self-test", "kernels": kernels.name, "device": str(device), "wrong": wrong},
        )
    return kernels


def kernels_of(device: torch.device) -> Kernels:
    """The kernels for calls on this device.

    raises  KernelError with the reason if there are none
    """
    found = kernels_on(device)
    if isinstance(found, str):
        raise KernelError(
            f"no CUDA kernels on {device}: {found}",
            hint="Run pip install nvidia-cuda-nvrtc for the CUDA release of torch, or load with kernels='reference'.",
            data={"reason": "no-kernels", "device": str(device), "why": found},
        )
    return found


def report() -> dict[str, str]:
    """The result of the self-test on each GPU, or what is missing, for `doctor`. See docs/kernels-cuda.md."""
    if torch.cuda.is_available():
        devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
        found = "; ".join(f"{device}: {_outcome(device)}" for device in devices)
    else:
        compiler = nvrtc.nvrtc()
        version = compiler if isinstance(compiler, str) else f"NVRTC {'.'.join(map(str, compiler.version))}"
        found = f"no CUDA device; {version}"
    return {f"{NAME} (experimental)": found}


def _outcome(device: torch.device) -> str:
    try:
        found = kernels_on(device)
    except KernelError as error:  # doctor continues and reports it
        return str(error)
    return found if isinstance(found, str) else f"{found.name}, self-test ok"
