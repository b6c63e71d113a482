"""Measures how fast this machine does the kinds of work that passes count (`protocol.Work`), in about two seconds."""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import astuple
from functools import partial
from typing import Any

import torch

from compressor.methods.quantization.hessian import inverse_factor
from compressor.methods.quantization.uniform_grid import find_grid, quantize
from compressor.model.half_products import quick_products
from compressor.protocol.work import Work

SHARE_SECONDS = 0.2  # for each kind of work
PRODUCT_TOKENS, PRODUCT_WIDTH = 1024, 2048
FACTOR_WIDTH, SPECTRUM_WIDTH = 1024, 512
VALUES = 1 << 22  # more than a cache holds
FILE_BYTES = 1 << 25
SEARCHED_ROWS = 256


def measure_rates(dtype: torch.dtype, device: torch.device) -> Work:
    """Amount of each kind of work in a second, with the threads that torch has now.

    dtype  the model's, in which blocks run
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device=device, dtype=dtype)

    product = 2.0 * PRODUCT_TOKENS * PRODUCT_WIDTH**2
    x, weight = random(PRODUCT_TOKENS, PRODUCT_WIDTH), random(PRODUCT_WIDTH, PRODUCT_WIDTH)
    low_x, low_weight = x.to(dtype), weight.to(dtype)
    tall = random(2 * FACTOR_WIDTH, FACTOR_WIDTH)
    wide, wide_weight = x[: PRODUCT_TOKENS // 4].double(), weight.double()
    positive = tall.T @ tall
    symmetric = random(SPECTRUM_WIDTH, SPECTRUM_WIDTH, dtype=torch.float64)
    values = random(VALUES)
    grouped = random(SEARCHED_ROWS, PRODUCT_WIDTH // 128, 128)
    search = partial(find_grid, bits=4, symmetric=True, search="mse", stored=torch.bfloat16)
    return Work(
        products=product * _per_second(lambda: _product(low_x, low_weight), device),
        exact=product * _per_second(lambda: x @ weight, device),
        double=product / 4 * _per_second(lambda: wide @ wide_weight, device),
        factors=FACTOR_WIDTH * _per_second(partial(inverse_factor, positive, 0.01, 0.01, ""), device),
        spectra=SPECTRUM_WIDTH**3 * _per_second(lambda: torch.linalg.eigh(symmetric), device),
        searched=grouped.numel() * _per_second(lambda: quantize(grouped, search(grouped)), device),
        values=2 * VALUES * _per_second(lambda: values.mul(1.5).round_(), device),
        stored=2 * FILE_BYTES * _per_second(_write_and_read, device),
        hashed=FILE_BYTES * _per_second(lambda: hashlib.sha256(bytes(FILE_BYTES)).digest(), device),
        seconds=1.0,
    )


def seconds(work: Work, rates: Work) -> float:
    """How long the work takes, one kind after the other."""
    return sum(amount / rate for amount, rate in zip(astuple(work), astuple(rates), strict=True))


def _product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    with quick_products(x.dtype):
        return torch.nn.functional.linear(x, weight)


def _write_and_read() -> None:
    with tempfile.TemporaryFile() as file:
        file.write(bytes(FILE_BYTES))
        file.flush()
        os.fsync(file.fileno())
        file.seek(0)
        file.read()


def _per_second(work: Callable[[], Any], device: torch.device) -> float:
    """Repetitions in a second. The first one, which may set something up, isn't counted."""

    def run() -> None:
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    run()
    count, began = 0, time.perf_counter()
    while True:
        run()
        count += 1
        passed = time.perf_counter() - began
        if passed > SHARE_SECONDS:
            return count / passed
