"""The built library of CUDA kernels: of the package compress-model-cuda, or the file that COMPRESSOR_CUDA names.

COMPRESSOR_CUDA=nvrtc leaves the library out, so that the kernels are compiled by NVRTC.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
from functools import cache
from pathlib import Path

from compressor.errors import KernelError
from compressor.kernels.cuda.interface import ABI, SIGNATURES, Kernels

PACKAGE = "compressor_cuda"  # import name of compress-model-cuda
VARIABLE = "COMPRESSOR_CUDA"


def find() -> Path | str:
    """Where the library is, or why there is none.

    raises KernelError if COMPRESSOR_CUDA names a file that doesn't exist
    """
    named = os.environ.get(VARIABLE)
    if named == "nvrtc":
        return f"{VARIABLE} asks for nvrtc"
    if named is not None:
        if not Path(named).is_file():
            raise KernelError(f"{VARIABLE} is {named!r}, which is no file", where="environment", hint="Unset it.")
        return Path(named)
    if importlib.util.find_spec(PACKAGE) is None:
        return "compress-model-cuda is not installed"
    path = importlib.import_module(PACKAGE).LIBRARY
    return Path(path)


def load(path: Path, abi: int = ABI) -> Kernels:
    """The launchers of a library.

    raises KernelError if the file can't be loaded, or is of another release
    """
    hint = f"Install the compress-model-cuda of this release, or unset {VARIABLE}."
    try:
        found = ctypes.CDLL(str(path))
    except OSError as error:
        raise KernelError(f"the CUDA library doesn't load: {error}", where=str(path), hint=hint) from error
    if not hasattr(found, "compressor_cuda_abi"):
        raise KernelError("no library of CUDA kernels: it has no compressor_cuda_abi", where=str(path), hint=hint)
    if (version := found.compressor_cuda_abi()) != abi:
        what = "is the emulation for a CPU" if version == 0 else f"has ABI {version}"
        raise KernelError(f"the CUDA library {what}, ABI {abi} expected", where=str(path), hint=hint)
    functions = {}
    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(found, name)
        function.restype, function.argtypes = result, arguments
        functions[name] = function
    found.compressor_cuda_error.restype = ctypes.c_char_p
    return Kernels("cuda library", functions, lambda code: found.compressor_cuda_error(code).decode())


@cache
def library() -> Kernels | str:
    """The library of this installation, or why there is none."""
    path = find()
    return path if isinstance(path, str) else load(path)
