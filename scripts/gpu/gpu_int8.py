"""Times the CUDA kernels with dynamic activation quantization on a GPU; part of check_gpu.py, which describes timing.

W4A8 with groups of 128 and zero points, the rounding of x included, against torch's dense float16 product and
torch._int_mm, which has neither rounding nor scales. LLM.int8() with 8 outlier columns against torch's float16 and
bfloat16 products and, where it can be imported, bitsandbytes; that one waits for the GPU in each call, so both are
timed without a graph, too.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch

from compressor.kernels.cuda.interface import Kernels
from cuda_ext.cases import arrays, int8_outlier, quantize_rows, w_a8

SHAPES = ((8192, 8192), (4096, 4096))  # N, K
ROWS = (1, 16, 64, 256, 4096, 8192)
OUTLIER_ROWS = (1, 16, 256, 4096)
GROUP_SIZE = 128
OUTLIERS = 8
ROTATION_BYTES = 160_000_000
# docs/kernels-cuda.md
PREFILL_ROWS, PREFILL_TERA_OPERATIONS = 4096, 1200.0
BITSANDBYTES_TIMES = 10.0
GOAL_DEVICES = ("H100", "H200")

Calls = list[Callable[[], object]]
Timer = Callable[[Calls, bool], float]  # the calls, whether in a CUDA graph -> seconds of one of them


def stream() -> int:
    return torch.cuda.current_stream().cuda_stream


def require(name: str, code: int) -> None:
    if code:
        raise RuntimeError(f"{name} returned {code}")


def copies_of(weight_bytes: int) -> int:
    """Number of weights with which each is read from memory: four times the L2 cache, and at least two."""
    l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, -(-max(ROTATION_BYTES, 4 * l2_bytes) // weight_bytes))


def dense_calls(x: torch.Tensor, n: int) -> Calls:
    """torch's product, in x's type."""
    k = x.shape[1]
    weights = [torch.randn(n, k, device="cuda", dtype=x.dtype) for _ in range(copies_of(2 * n * k))]
    return [partial(torch.nn.functional.linear, x, w) for w in weights]


def int8_calls(m: int, n: int, k: int) -> Calls:
    """torch._int_mm, which takes more than 16 rows."""
    codes = torch.randint(-127, 128, (m, k), device="cuda", dtype=torch.int8)
    weights = [torch.randint(-127, 128, (n, k), device="cuda", dtype=torch.int8) for _ in range(copies_of(n * k))]
    return [partial(torch._int_mm, codes, w.t()) for w in weights]


def w4_a8_calls(kernels: Kernels, x: torch.Tensor, n: int) -> Calls:
    """Rounding and product, for each copy of a random weight."""
    m, k = x.shape
    groups = -(-k // GROUP_SIZE)
    scale = torch.rand(groups, n, device=x.device).mul_(0.02).half()
    zero_point = torch.randint(0, 16, (groups, n), device=x.device, dtype=torch.uint8)
    codes = torch.empty(m, -(-k // 64) * 64, dtype=torch.int8, device=x.device)
    x_scale = torch.empty(m, device=x.device)
    x_sum = torch.empty(m, groups, dtype=torch.int32, device=x.device)
    y = torch.empty(m, n, dtype=torch.float16, device=x.device)
    rows, multiply = quantize_rows.launcher(kernels), w_a8.launcher(kernels)

    def call_of(packed: torch.Tensor) -> Callable[[], object]:
        def call() -> None:  # addresses are taken in here, so that the tensors live as long as the call
            rounded = codes.data_ptr(), x_scale.data_ptr(), x_sum.data_ptr()
            require("quantize_rows", rows(x.data_ptr(), *rounded, m, k, GROUP_SIZE, arrays.FLOAT16, stream()))
            weight = packed.data_ptr(), scale.data_ptr(), zero_point.data_ptr()
            sizes = m, n, k, 4, GROUP_SIZE, arrays.FLOAT16, arrays.FLOAT16
            require("w_a8", multiply(*rounded, *weight, None, y.data_ptr(), *sizes, stream()))

        return call

    words = -(-n // 64) * -(-k // 64) * 512
    return [
        call_of(torch.randint(-(2**31), 2**31, (words,), device=x.device, dtype=torch.int32))
        for _ in range(copies_of(words * 4))
    ]


def outlier_calls(kernels: Kernels, x: torch.Tensor, n: int) -> Calls:
    """LLM.int8() with columns found by the threshold, for each copy of a random weight."""
    m, k = x.shape
    absmax = torch.rand(n, device=x.device)
    y = torch.empty(m, n, dtype=torch.float16, device=x.device)
    needed = int8_outlier.workspace_bytes(kernels, m, n, k)
    workspace = torch.empty(max(needed, 16), dtype=torch.uint8, device=x.device)
    launch = int8_outlier.launcher(kernels)

    def call_of(weight: torch.Tensor) -> Callable[[], object]:
        def call() -> None:
            operands = x.data_ptr(), weight.data_ptr(), absmax.data_ptr(), None, None, None, y.data_ptr()
            sizes = needed, m, n, k, 0, int8_outlier.THRESHOLD, arrays.FLOAT16
            require("int8_outlier", launch(*operands, workspace.data_ptr(), *sizes, stream()))

        return call

    return [
        call_of(torch.randint(-127, 128, (n, k), device=x.device, dtype=torch.int8)) for _ in range(copies_of(n * k))
    ]


def bitsandbytes_calls(x: torch.Tensor, n: int) -> Calls | None:
    """bitsandbytes' layer; None if it is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return None
    make = importlib.import_module("bitsandbytes").nn.Linear8bitLt
    k = x.shape[1]
    options = dict(bias=False, has_fp16_weights=False, threshold=int8_outlier.THRESHOLD)
    layers = [make(k, n, **options).cuda().eval() for _ in range(copies_of(n * k))]
    return [partial(layer, x) for layer in layers]


def time_w4_a8(kernels: Kernels, m: int, n: int, k: int, seconds_of: Timer) -> dict[str, Any]:
    x = torch.randn(m, k, device="cuda").half()
    calls = w4_a8_calls(kernels, x, n)
    ours = seconds_of(calls, True)
    dense = seconds_of(dense_calls(x, n), True)
    int_mm = seconds_of(int8_calls(m, n, k), True) if m > 16 else None
    again = seconds_of(calls, True)  # the difference to `seconds` is noise
    row = {"kernel": "w4_a8", "M": m, "N": n, "K": k, "seconds": ours, "seconds_again": again}
    row |= {"torch_float16_seconds": dense, "torch_int_mm_seconds": int_mm}
    return row | {"tera_operations_per_second": 2 * m * n * k / ours / 1e12}


def time_outlier(kernels: Kernels, m: int, n: int, k: int, seconds_of: Timer) -> dict[str, Any]:
    x = torch.randn(m, k, device="cuda").clamp_(-4, 4).half()
    x[:, :: k // OUTLIERS] = 20
    calls, theirs = outlier_calls(kernels, x, n), bitsandbytes_calls(x, n)
    ours = seconds_of(calls, True)
    half, bfloat16 = (seconds_of(dense_calls(x.to(kind), n), True) for kind in (torch.float16, torch.bfloat16))
    again = seconds_of(calls, True)
    row = {"kernel": "int8_outlier", "M": m, "N": n, "K": k, "seconds": ours, "seconds_again": again}
    row |= {"torch_float16_seconds": half, "torch_bfloat16_seconds": bfloat16}
    row |= {"call_seconds": seconds_of(calls, False)}
    return row | {"bitsandbytes_call_seconds": None if theirs is None else seconds_of(theirs, False)}


def time_int8(kernels: Kernels, seconds_of: Timer) -> list[dict[str, Any]]:
    """One row for each kernel, shape and number of rows."""
    rows = [time_w4_a8(kernels, m, n, k, seconds_of) for n, k in SHAPES for m in ROWS]
    return rows + [time_outlier(kernels, m, n, k, seconds_of) for n, k in SHAPES for m in OUTLIER_ROWS]


def judge_int8(rows: Iterable[dict[str, Any]], device: str) -> list[dict[str, Any]]:
    """The goals for this device: a measured value must be at least `least`."""
    goals: list[tuple[str, float, float]] = []
    for row in rows if any(name in device for name in GOAL_DEVICES) else ():
        shape = f"{row['M']} x {row['N']} x {row['K']}"
        if row["kernel"] == "w4_a8" and row["M"] >= PREFILL_ROWS:
            measured = row["tera_operations_per_second"]
            goals.append((f"W4A8 {shape}, TOPS", PREFILL_TERA_OPERATIONS, measured))
        if row["kernel"] == "int8_outlier" and row["M"] == 1:
            faster = row["torch_bfloat16_seconds"] / row["seconds"]
            goals.append((f"LLM.int8() {shape}, times bfloat16", 1.0, faster))
            if row["bitsandbytes_call_seconds"]:
                faster = row["bitsandbytes_call_seconds"] / row["call_seconds"]
                goals.append((f"LLM.int8() {shape}, times bitsandbytes", BITSANDBYTES_TIMES, faster))
    return [{"goal": g, "least": least, "measured": value, "holds": value >= least} for g, least, value in goals]


def print_int8(rows: Iterable[dict[str, Any]], goals: Iterable[dict[str, Any]]) -> None:
    for row in rows:
        print("{kernel:12} {M:5} x {N:5} x {K:5}".format(**row), f"{row['seconds'] * 1e6:9.1f} us", end="  ")
        print(f"torch float16 {row['torch_float16_seconds'] * 1e6:.1f} us")
    for goal in goals:
        verdict = "holds" if goal["holds"] else "missed"
        print(f"{goal['goal']}: {goal['measured']:.2f}, at least {goal['least']:g}, {verdict}")
