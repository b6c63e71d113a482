"""The binding of the CUDA kernels with the emulated library in place of a GPU's, tensors of the CPU, and stream 0."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

from compressor.kernels.cuda import devices
from compressor.kernels.cuda.interface import Kernels
from compressor.kernels.cuda.library import load

EMULATION = 0  # the ABI that the emulation gives itself


def emulated_kernels(library) -> Kernels:
    """library: what the fixture `emulated` gives"""
    return load(Path(library._name), abi=EMULATION)


def use(monkeypatch, kernels: Kernels) -> None:
    """The CPU counts as a CUDA device that has these kernels."""
    monkeypatch.setattr(devices, "is_cuda", lambda device: device.type == "cpu")
    monkeypatch.setattr(devices, "stream_of", lambda device: 0)
    monkeypatch.setattr(devices, "current", lambda device: nullcontext())
    monkeypatch.setattr(devices, "WAYS", {"cuda library": lambda device: kernels, "nvrtc": lambda device: "not tried"})
