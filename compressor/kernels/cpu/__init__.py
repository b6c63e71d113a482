"""Loads the library of CPU kernels, compiled from the C++ sources beside this file, if the installation has it.

Instruction levels: scalar; avx2; avxvnni, which equals avx2 except for integer products; avx512vnni; and amx, which
equals avx512vnni except for products that are faster with tiles. All give the same bits. A processor may have a level
without having an earlier one. The best level of the processor is used, or the one in the environment variable
COMPRESSOR_CPU.

The library has no threads. It divides its work among those of torch, by torch's function torch_parallel_for.
"""

from __future__ import annotations

import ctypes
import importlib
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

from compressor.errors import KernelError

LEVELS = ("scalar", "avx2", "avxvnni", "avx512vnni", "amx")
ABI = 11
PARALLEL_FOR = "torch_parallel_for"  # of torch's stable ABI, torch/csrc/stable/c/shim.h
SET_THREADS = "omp_set_num_threads"  # of the OpenMP runtime that torch uses
RECORD = Path(__file__).parent.parent / "_cpu_build.txt"


@dataclass(frozen=True)
class Library:
    """functions          the compiled module; its functions are declared in ops.h
    level              index into LEVELS of the level in use
    has_torch_threads  whether it uses torch's threads; if not, only the calling thread
    """

    functions: ModuleType
    level: int
    has_torch_threads: bool = True

    @property
    def kernel(self) -> str:
        """Its name in a Choice."""
        return f"cpu library, {LEVELS[self.level]}" + ("" if self.has_torch_threads else ", one thread")


@cache
def library() -> Library | str:
    """The compiled library, or why it can't be used.

    raises  KernelError if COMPRESSOR_CPU names a level that this processor lacks, or the library is of another release
    """
    try:
        functions = importlib.import_module("compressor.kernels._cpu")
    except ImportError as error:
        record = RECORD.read_text().strip() if RECORD.is_file() else f"not built ({error})"
        return f"cpu library {record}"
    if functions.ABI != ABI:
        raise KernelError(
            f"the compiled CPU library has ABI {functions.ABI}, and this release needs {ABI}",
            where=str(functions.__file__),
            hint="Run pip install --force-reinstall compress-model, which compiles the library again.",
            data={"reason": "abi", "found": functions.ABI, "expected": ABI},
        )
    address = parallel_for_address()
    functions.use_parallel_for(address)
    functions.use_set_threads(_address(SET_THREADS))
    return Library(functions, _level(functions), bool(address))


def parallel_for_address() -> int:
    """The address of torch's function that divides a loop among its threads; 0 if there is none."""
    return _address(PARALLEL_FOR)


def _address(name: str) -> int:
    """The address of a function in torch or the libraries that it depends on; 0 if there is none."""
    try:
        found = getattr(ctypes.CDLL(torch._C.__file__), name)
    except (AttributeError, OSError):
        return 0
    return ctypes.cast(found, ctypes.c_void_p).value or 0


def required_library() -> Library:
    """The library. raises KernelError if it is not available"""
    found = library()
    if isinstance(found, str):
        raise KernelError(
            found,
            hint="Install a C++17 compiler (apt install g++), then run pip install --force-reinstall compress-model.",
        )
    return found


def levels_here(functions: ModuleType) -> list[int]:
    """Indices into LEVELS of this processor's levels, the best one last."""
    return [level for level in range(len(LEVELS)) if functions.has_level(level)]


def _level(functions: ModuleType) -> int:
    here = levels_here(functions)
    wanted = os.environ.get("COMPRESSOR_CPU")
    if wanted is None:
        return here[-1]
    known = [LEVELS[level] for level in here]
    if wanted not in known:
        raise KernelError(
            f"COMPRESSOR_CPU is {wanted!r}, this processor offers {', '.join(known)}",
            where="environment",
            hint=f"Unset COMPRESSOR_CPU, or set it to {known[-1]}.",
            data={"level": wanted, "known": known},
        )
    return LEVELS.index(wanted)
