"""The library of CPU kernels, compiled from the C++ sources beside this file, if the installation has it.

Levels of instructions: scalar; avx2; avxvnni, which has the bodies of avx2 but for products of integers; avx512vnni;
and amx, which has those of avx512vnni but for products that tiles do faster. All give the same bits. A processor may
have one of them and not one before it. The best one of the processor is used, or the one that the environment
variable COMPRESSOR_CPU names.

It has no threads of its own: it shares its work out among those of torch, by torch's function torch_parallel_for.
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
ABI = 9
PARALLEL_FOR = "torch_parallel_for"  # of torch's stable ABI, torch/csrc/stable/c/shim.h
RECORD = Path(__file__).parent.parent / "_cpu_build.txt"


@dataclass(frozen=True)
class Library:
    """functions          the compiled module; its functions are declared in ops.h
    level              index into LEVELS of the instructions in use
    has_torch_threads  whether it works on torch's threads; if not, in the calling thread alone
    """

    functions: ModuleType
    level: int
    has_torch_threads: bool = True

    @property
    def kernel(self) -> str:
        """What a choice calls it."""
        return f"cpu library, {LEVELS[self.level]}" + ("" if self.has_torch_threads else ", one thread")


@cache
def library() -> Library | str:
    """The compiled library, or why it can't be used.

    raises KernelError if COMPRESSOR_CPU asks for what this processor lacks, or the library is of another release
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
        )
    address = parallel_for_address()
    functions.use_parallel_for(address)
    return Library(functions, _level(functions), bool(address))


def parallel_for_address() -> int:
    """Where torch's function lies in memory by which it shares out a loop among its threads; 0 if it has none."""
    try:
        found = getattr(ctypes.CDLL(torch._C.__file__), PARALLEL_FOR)  # looked up in what torch._C depends on, too
    except (AttributeError, OSError):
        return 0
    return ctypes.cast(found, ctypes.c_void_p).value or 0


def required_library() -> Library:
    """raises KernelError if it isn't there"""
    found = library()
    if isinstance(found, str):
        raise KernelError(
            found,
            hint="Install a C++17 compiler (apt install g++), then run pip install --force-reinstall compress-model.",
        )
    return found


def levels_here(functions: ModuleType) -> list[int]:
    """indices into LEVELS of what this processor has, the best one last"""
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
