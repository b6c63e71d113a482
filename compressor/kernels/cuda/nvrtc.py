"""Compiles kernels with NVRTC to machine code (CUBIN) of one GPU, and caches it.

NVRTC is that of torch's CUDA wheel (nvidia-cuda-nvrtc), else the system's. Each source is compiled as one string that
includes device.h, without an include path. Cache: ~/.cache/compress-model/cuda (or in XDG_CACHE_HOME), one file for
each hash of source, target and NVRTC's version.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import hashlib
import importlib.util
import json
import os
import re
import tempfile
import warnings
from ctypes import byref, c_char_p, c_int, c_size_t, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from compressor.errors import KernelError

HINT = "Run pip install --force-reinstall nvidia-cuda-nvrtc, or load with kernels='reference'."
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Nvrtc:
    """The loaded library, its file and its version."""

    functions: ctypes.CDLL
    path: str
    version: tuple[int, int]


@dataclass(frozen=True)
class Code:
    """cubin  the machine code for the driver
    names  C++ name of a kernel -> its symbol
    """

    cubin: bytes
    names: dict[str, str]


def candidates() -> list[str]:
    """Files that may be NVRTC: those of nvidia's Python packages (torch's CUDA release first), then the system's."""
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(place) for place in (spec.submodule_search_locations or ())] if spec else []
    found = [
        path
        for folder in folders
        for inner in ("cu*/lib", "cuda_nvrtc/lib")
        for path in sorted(folder.glob(f"{inner}/libnvrtc.so.*"))
        if re.fullmatch(r"libnvrtc\.so\.\d+", path.name)
    ]
    wanted = (torch.version.cuda or "").partition(".")[0]
    found.sort(key=lambda path: path.suffix != f".{wanted}")
    of_system = ctypes.util.find_library("nvrtc")
    return [*dict.fromkeys(map(str, found)), *([of_system] if of_system else [])]


@cache
def nvrtc() -> Nvrtc | str:
    """NVRTC of this installation, or why there is none.

    raises  KernelError if it doesn't load
    """
    paths = candidates()
    if not paths:
        return "nvidia-cuda-nvrtc is not installed"
    return load(paths[0])


def load(path: str) -> Nvrtc:
    """raises KernelError"""
    try:
        functions = ctypes.CDLL(path)
    except OSError as error:
        data = {"reason": "not-loaded", "error": str(error)}
        raise KernelError(f"NVRTC doesn't load: {error}", where=path, hint=HINT, data=data) from error
    functions.nvrtcGetErrorString.restype = c_char_p
    major, minor = c_int(), c_int()
    _check(functions, functions.nvrtcVersion(byref(major), byref(minor)), path)
    return Nvrtc(functions, path, (major.value, minor.value))


def _check(functions: ctypes.CDLL, code: int, where: str) -> None:
    if code:
        text = functions.nvrtcGetErrorString(code).decode()
        raise KernelError(
            f"NVRTC: {text}", where=where, hint=HINT, data={"reason": "nvrtc", "code": code, "text": text}
        )


def targets(compiler: Nvrtc) -> set[int]:
    """Compute capabilities that NVRTC knows, as 10 * major + minor."""
    functions, count = compiler.functions, c_int()
    _check(functions, functions.nvrtcGetNumSupportedArchs(byref(count)), compiler.path)
    found = (c_int * count.value)()
    _check(functions, functions.nvrtcGetSupportedArchs(found), compiler.path)
    return set(found)


def target_of(capability: tuple[int, int]) -> str:
    """The target, such as sm_80 or sm_90a: from 9.0 on with the instructions of that GPU only."""
    return f"sm_{capability[0]}{capability[1]}" + ("a" if capability >= (9, 0) else "")


def source_text(name: str) -> str:
    """A source as one string. In an installed package the sources are beside this file, in a checkout in cuda_ext."""
    folder = next(f for f in (HERE / "sources", HERE.parents[2] / "cuda_ext") if f.is_dir())
    taken: set[str] = set()

    def header(found: re.Match[str]) -> str:
        """Insert a header of this project once. Those of the emulation stay behind #else, where NVRTC ignores them."""
        name = found[1]
        if name.startswith("emulate"):
            return found[0]
        if name in taken:
            return ""
        taken.add(name)
        return inlined(folder / name)

    def inlined(path: Path) -> str:
        return re.sub(r'^#include "([^"]+)"$', header, path.read_text(), flags=re.MULTILINE)

    return inlined(folder / f"{name}.cu")


def compile_source(compiler: Nvrtc, name: str, text: str, kernels: tuple[str, ...], target: str) -> Code:
    """Machine code of `kernels`, C++ names in `text`, for `target`, such as "sm_90a".

    raises  KernelError with NVRTC's message
    """
    functions, program = compiler.functions, c_void_p()
    made = functions.nvrtcCreateProgram(byref(program), text.encode(), f"{name}.cu".encode(), 0, None, None)
    _check(functions, made, name)
    try:
        for kernel in kernels:
            _check(functions, functions.nvrtcAddNameExpression(program, kernel.encode()), kernel)
        options = (c_char_p * 2)(f"--gpu-architecture={target}".encode(), b"--std=c++17")
        if functions.nvrtcCompileProgram(program, 2, options):
            log, where = _log(functions, program), f"{name}.cu, {target}"
            data = {"reason": "source-refused", "log": log}
            raise KernelError(f"NVRTC refuses the source:\n{log}", where=where, hint=HINT, data=data)
        size = c_size_t()
        _check(functions, functions.nvrtcGetCUBINSize(program, byref(size)), name)
        cubin = ctypes.create_string_buffer(size.value)
        _check(functions, functions.nvrtcGetCUBIN(program, cubin), name)
        names, symbol = {}, c_char_p()
        for kernel in kernels:
            _check(functions, functions.nvrtcGetLoweredName(program, kernel.encode(), byref(symbol)), kernel)
            names[kernel] = (symbol.value or b"").decode()
        return Code(cubin.raw, names)
    finally:
        functions.nvrtcDestroyProgram(byref(program))


def _log(functions: ctypes.CDLL, program: c_void_p) -> str:
    size = c_size_t()
    functions.nvrtcGetProgramLogSize(program, byref(size))
    text = ctypes.create_string_buffer(max(1, size.value))
    functions.nvrtcGetProgramLog(program, text)
    return text.value.decode(errors="replace")


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "compress-model" / "cuda"


def cached_code(compiler: Nvrtc, name: str, kernels: tuple[str, ...], target: str) -> Code:
    """The result of compile_source for a source of this project, cached in a file. A damaged file is written again."""
    text = source_text(name)
    key = json.dumps([text, kernels, target, compiler.version])
    path = cache_folder() / f"{name}-{target}-{hashlib.sha256(key.encode()).hexdigest()[:32]}"
    kept = _read(path)
    if kept is None:
        kept = compile_source(compiler, name, text, kernels, target)
        try:
            _write(path, kept)
        except OSError as error:
            warnings.warn(f"compiled CUDA code isn't kept, each process compiles it again: {error}", stacklevel=2)
    return kept


def _read(path: Path) -> Code | None:
    """Read a cache file: one line of JSON with names and the hash of the code, then the code."""
    if not path.is_file():
        return None
    head, _, cubin = path.read_bytes().partition(b"\n")
    try:
        facts = json.loads(head)
    except ValueError:
        return None
    if not isinstance(facts, dict) or facts.get("sha256") != hashlib.sha256(cubin).hexdigest():
        return None
    return Code(cubin, facts["names"])


def _write(path: Path, code: Code) -> None:
    """Write a cache file under another name first, so that no other process reads an incomplete one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = json.dumps({"names": code.names, "sha256": hashlib.sha256(code.cubin).hexdigest()})
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(head.encode() + b"\n" + code.cubin)
    os.replace(file.name, path)
