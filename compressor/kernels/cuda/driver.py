"""Calls the CUDA driver to load code that NVRTC compiled, find a kernel, and launch it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from ctypes import addressof, byref, c_char_p, c_int, c_uint, c_void_p
from dataclasses import dataclass
from functools import cache, partial

from compressor.errors import KernelError
from compressor.kernels.cuda.interface import BAD_CALL, Kernels
from compressor.kernels.cuda.nvrtc import Code
from compressor.kernels.cuda.plans import KERNELS, PLANS, SIZES, Launch

FILE = "libcuda.so.1"
HINT = "Check the driver with nvidia-smi and update it, or load with kernels='reference'."


@dataclass(frozen=True)
class Driver:
    """The driver with a device's primary context, which torch uses too."""

    functions: ctypes.CDLL
    context: c_void_p


def open_driver(index: int, path: str = FILE) -> Driver:
    """raises KernelError"""
    try:
        functions = ctypes.CDLL(path)
    except OSError as error:
        data = {"reason": "no-driver", "error": str(error)}
        raise KernelError(f"the CUDA driver doesn't load: {error}", where=path, hint=HINT, data=data) from error
    device, context = c_int(), c_void_p()
    functions.cuLaunchKernel.argtypes = [c_void_p, *[c_uint] * 7, c_void_p, c_void_p, c_void_p]
    functions.cuCtxSetCurrent.argtypes = [c_void_p]
    _check(functions, functions.cuInit(0))
    _check(functions, functions.cuDeviceGet(byref(device), index))
    _check(functions, functions.cuDevicePrimaryCtxRetain(byref(context), device))
    return Driver(functions, context)


def error_text(functions: ctypes.CDLL, code: int) -> str:
    text = c_char_p()
    functions.cuGetErrorString(code, byref(text))
    return (text.value or b"unknown error").decode()


def _check(functions: ctypes.CDLL, code: int) -> None:
    if code:
        text = error_text(functions, code)
        raise KernelError(
            f"CUDA driver: {text} ({code})", hint=HINT, data={"reason": "driver", "code": code, "text": text}
        )


def load_code(driver: Driver, code: Code) -> dict[str, c_void_p]:
    """C++ name of each kernel -> its handle. Code stays loaded until the process ends.

    raises  KernelError if the driver refuses it, such as code of a newer CUDA release than the driver's
    """
    functions, module = driver.functions, c_void_p()
    _check(functions, functions.cuCtxSetCurrent(driver.context))
    _check(functions, functions.cuModuleLoadData(byref(module), code.cubin))
    handles = {}
    for name, symbol in code.names.items():
        handles[name] = c_void_p()
        _check(functions, functions.cuModuleGetFunction(byref(handles[name]), module, symbol.encode()))
    return handles


def launch(driver: Driver, handle: c_void_p, planned: Launch, stream: int) -> int:
    """Launch a kernel. Returns 0 or the driver's error, without waiting. The driver copies the argument."""
    functions = driver.functions
    arguments = (c_void_p * 1)(addressof(planned.argument))
    # a thread that has not used CUDA yet has no context
    code = functions.cuCtxSetCurrent(driver.context)
    return code or functions.cuLaunchKernel(
        handle, *planned.grid, planned.threads, 1, 1, 0, stream, ctypes.cast(arguments, c_void_p), None
    )


def compiled_kernels(driver: Driver, code_of: Callable[[str, tuple[str, ...]], Code], target: str) -> Kernels:
    """The launchers of all sources. They are compiled in parallel, since NVRTC releases the interpreter and the
    self-test needs all of them.

    code_of  source and the C++ names of its kernels -> machine code; called by several threads
    """
    with ThreadPoolExecutor(len(KERNELS)) as pool:
        codes = dict(zip(KERNELS, pool.map(code_of, KERNELS, KERNELS.values()), strict=True))

    @cache
    def handles(source: str) -> dict[str, c_void_p]:
        return load_code(driver, codes[source])

    def run(plan: Callable[..., list[Launch] | None], *arguments: int | float) -> int:
        planned = plan(*arguments[:-1])
        if planned is None:
            return BAD_CALL
        for one in planned:
            if code := launch(driver, handles(one.source)[one.kernel], one, int(arguments[-1])):
                return code
        return 0

    functions: dict[str, Callable[..., int]] = {name: partial(run, plan) for name, plan in PLANS.items()}
    return Kernels(f"nvrtc, {target}", {**functions, **SIZES}, lambda code: error_text(driver.functions, code))
