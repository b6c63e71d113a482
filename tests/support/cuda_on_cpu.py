"""The binding of the CUDA kernels with the emulated library in place of a GPU's, tensors of the CPU, and stream 0."""

from __future__ import annotations

import re
import subprocess
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


def demangled(symbols):
    """symbol of a kernel -> "w_a16::decode<0, 1>"; what isn't of this form is left out"""
    done = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True)
    lines = [re.fullmatch(r"(?:void )?(\w+::.*)\(\w+::Arguments\)", line) for line in done.stdout.splitlines()]
    return {symbol: line[1] for symbol, line in zip(symbols, lines, strict=True) if line}


def kernels_in(library):
    """Name of every kernel of an emulated library -> its symbol"""
    listed = subprocess.run(["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True)
    symbols = [line.split()[-1] for line in listed.stdout.splitlines() if line.endswith("ArgumentsE")]
    return {name: symbol for symbol, name in demangled(symbols).items()}
