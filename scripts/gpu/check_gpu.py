"""Compiles the CUDA kernels by NVRTC, runs the correctness cases of the emulation on this machine's GPU, checks the
kernels as torch operations, then times them.

    scripts/check_gpu [--json out/gpu.json] [--checks-only]

Exit code 0: success. 4: a kernel gives wrong results, nothing is timed. 6: no GPU for the kernels, or no NVRTC. The
JSON has the device's name, every check, and one row for each shape and number of rows of x.

Times: a CUDA graph calls the kernel once for each of many copies of the weight, which take at least four times the L2
cache and 160 MB, so that weights come from memory; the median of replays over the number of copies. `call_seconds` is
the same with a launch from Python for each call. torch's dense float16 product is timed in the same way, in turn, and a
copy from device to device is the ceiling of bandwidth.
"""

from __future__ import annotations

import compressor  # noqa: F401 isort: skip (before torch, whose threads then sleep while they wait)

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT))  # cuda_ext is a folder beside the package, not part of it

import gpu_against_torch  # noqa: E402
import gpu_binding  # noqa: E402
import gpu_int8  # noqa: E402

from compressor.errors import CompressError  # noqa: E402
from compressor.kernels.cuda import devices  # noqa: E402
from compressor.kernels.cuda.interface import Kernels  # noqa: E402
from cuda_ext.cases import KERNELS, arrays, hadamard, w_a16  # noqa: E402

SEEDS = 3
SHAPES = ((8192, 8192), (4096, 4096), (11008, 4096), (4096, 11008))  # N, K
ROWS = (1, 4, 16, 64, 256, 4096)
HADAMARD_SIZES = (256, 1024, 4096, 8192, 32768, 3072, 5120, 14336, 36864)
GROUP_SIZE = 128
ROTATION_BYTES = 160_000_000
REPLAYS = 20
MARGIN = 256  # bytes of canary on both sides of an operand
MOST_OF_COPY = {8192: 1.05, 32768: 1.15}  # docs/kernels-cuda.md: times of a transform over a copy, by the longest rows
# docs/kernels-cuda.md: seconds for W4A16 8192 x 8192, by part of the device's name and rows of x
GOALS = {("H200", 1): 12.5e-6, ("H200", 64): 18e-6, ("H100", 1): 16e-6}


class NoGpu(Exception):
    """This machine can't run the kernels."""


class DeviceArray:
    """An array in the memory of a device, with canaries around it."""

    def __init__(self, array: NDArray, device: str):
        self._array = array
        self._bytes = torch.full((array.nbytes + 2 * MARGIN,), arrays.CANARY, dtype=torch.uint8, device=device)
        inner = self._bytes[MARGIN : MARGIN + array.nbytes]
        inner.copy_(torch.from_numpy(np.ascontiguousarray(array).reshape(-1).view(np.uint8)))
        self.address = self._bytes.data_ptr() + MARGIN

    def read(self) -> NDArray:
        """The array. raises AssertionError if memory around it was overwritten"""
        found = self._bytes.cpu().numpy()
        inside = found[MARGIN : MARGIN + self._array.nbytes]
        assert (found[:MARGIN] == arrays.CANARY).all(), "bytes before the array were overwritten"
        assert (found[MARGIN + inside.size :] == arrays.CANARY).all(), "bytes after the array were overwritten"
        return inside.view(self._array.dtype).reshape(self._array.shape)


@dataclass(frozen=True)
class DeviceMemory:
    """The memory of a GPU, or of the CPU, to test this script with the emulated kernels."""

    device: str
    # tensor cores may truncate a sum instead of rounding (Fasi, Higham, Mikaitis and Pranesh 2021,
    # "Numerical behavior of NVIDIA tensor cores"): twice the error
    products_unit: float = 2 * arrays.UNIT

    def place(self, array: NDArray) -> DeviceArray:
        return DeviceArray(array, self.device)

    def wait(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()


def require_gpu() -> torch.device:
    """The device. raises NoGpu with what is missing and what to do"""
    if not torch.version.cuda:
        raise NoGpu(f"torch {torch.__version__} is built without CUDA. Install a CUDA build of torch")
    if not torch.cuda.is_available():
        raise NoGpu("torch finds no CUDA device. Check `nvidia-smi` and the driver")
    return torch.device("cuda", 0)


def check(
    kernels: Kernels, memory: DeviceMemory, chosen: Mapping[str, Sequence[Any]], seeds: int
) -> list[dict[str, Any]]:
    """Run the chosen cases of each kernel with every seed. A wrong one doesn't stop the others."""
    found = []
    for kernel, case in ((name, case) for name, cases in chosen.items() for case in cases):
        for seed in range(seeds):
            problem = ""
            try:
                KERNELS[kernel].run(kernels, case, memory, seed)
            except AssertionError as error:
                problem = str(error)
            found.append({"kernel": kernel, "case": str(case), "seed": seed, "problem": problem})
    return found


def seconds_of(calls: Sequence[Callable[[], object]], graphed: bool) -> float:
    """Median time of one of the calls, which are made one after another, in a CUDA graph or from Python."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    if graphed:
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(stream):
            start.record()
            if graphed:
                graph.replay()
            else:
                for call in calls:
                    call()
            end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000 / len(calls))
    return statistics.median(times)


def copy_bytes_per_second() -> float:
    """Bytes read and written by a copy of 1 GiB from device to device."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds_of([lambda: target.copy_(source)], graphed=True)


def w4_a16_calls(kernels: Kernels, x: torch.Tensor, n: int) -> tuple[list[Callable[[], None]], int]:
    """One call for each copy of a random weight, and the bytes that a call has to read and write."""
    m, k = x.shape
    l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    copies = max(2, -(-max(ROTATION_BYTES, 4 * l2_bytes) // (n * k // 2)))
    groups = -(-k // GROUP_SIZE)
    scale = torch.rand(groups, n, device="cuda").mul_(0.02).half()
    zero_point = torch.randint(0, 16, (groups, n), device="cuda", dtype=torch.uint8)
    y = torch.empty(m, n, dtype=torch.float16, device="cuda")
    needed = w_a16.workspace_bytes(kernels, m, n, k)
    workspace = torch.empty(max(needed, 16), dtype=torch.uint8, device="cuda")
    launch = w_a16.launcher(kernels)

    def call_of(packed: torch.Tensor) -> Callable[[], None]:
        def call() -> None:
            code = launch(
                x.data_ptr(),
                packed.data_ptr(),
                scale.data_ptr(),
                zero_point.data_ptr(),
                0,
                y.data_ptr(),
                workspace.data_ptr(),
                needed,
                *(m, n, k, 4, GROUP_SIZE, arrays.FLOAT16, arrays.FLOAT16),
                torch.cuda.current_stream().cuda_stream,
            )
            if code:
                raise RuntimeError(f"compressor_w_a16 returned {code} for {m}x{n}x{k}")

        return call

    words = -(-n // 64) * -(-k // 64) * 512
    weights = [torch.randint(-(2**31), 2**31, (words,), device="cuda", dtype=torch.int32) for _ in range(copies)]
    moved = words * 4 + scale.nbytes + zero_point.nbytes + x.nbytes + y.nbytes
    return [call_of(packed) for packed in weights], moved


def time_shape(kernels: Kernels, m: int, n: int, k: int, copy_rate: float) -> dict[str, Any]:
    """One row of the benchmark: ours and torch's dense product, float16."""
    x = torch.randn(m, k, device="cuda").half()
    calls, moved = w4_a16_calls(kernels, x, n)
    dense_copies = max(2, -(-max(ROTATION_BYTES, 4 * torch.cuda.get_device_properties(0).L2_cache_size) // (2 * n * k)))
    dense = [torch.randn(n, k, device="cuda", dtype=torch.float16) for _ in range(dense_copies)]
    ours = seconds_of(calls, graphed=True)
    torch_seconds = seconds_of([partial(torch.nn.functional.linear, x, w) for w in dense], graphed=True)
    again = seconds_of(calls, graphed=True)
    return {
        "M": m,
        "N": n,
        "K": k,
        "seconds": ours,
        "seconds_again": again,  # the difference of these two is noise
        "call_seconds": seconds_of(calls, graphed=False),
        "torch_float16_seconds": torch_seconds,
        "gigabytes_per_second": moved / ours / 1e9,
        "of_copy_bandwidth": moved / ours / copy_rate,
        "tera_operations_per_second": 2 * m * n * k / ours / 1e12,
    }


def time_hadamard(n: int, kernels: Kernels) -> dict[str, Any]:
    """Rows of n float16 that take at least the rotation's bytes, against a copy of the same tensor."""
    l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    rows = -(-max(ROTATION_BYTES, 4 * l2_bytes) // (2 * n))
    x = torch.randn(rows, n, device="cuda").half()
    y = torch.empty_like(x)
    launch = hadamard.launcher(kernels)

    def call() -> None:
        stream = torch.cuda.current_stream().cuda_stream
        code = launch(x.data_ptr(), y.data_ptr(), rows, n, n**-0.5, arrays.FLOAT16, stream)
        if code:
            raise RuntimeError(f"compressor_hadamard returned {code} for {rows}x{n}")

    ours, copy = seconds_of([call], graphed=True), seconds_of([lambda: y.copy_(x)], graphed=True)
    return {"rows": rows, "n": n, "seconds": ours, "copy_seconds": copy, "of_copy": ours / copy}


def judge(rows: list[dict[str, Any]], device: str) -> list[dict[str, Any]]:
    """The goals that are set for this device."""
    return [
        {"goal": f"{name} W4A16 8192x8192, M = {m}", "seconds": limit, "measured": row["seconds"]}
        | {"holds": row["seconds"] <= limit}
        for (name, m), limit in GOALS.items()
        for row in rows
        if name in device and (row["M"], row["N"], row["K"]) == (m, 8192, 8192)
    ]


def judge_hadamard(rows: list[dict[str, Any]], device: str) -> list[dict[str, Any]]:
    found = []
    for row in rows if any(name in device for name in gpu_int8.GOAL_DEVICES) else ():
        most = next((limit for n, limit in MOST_OF_COPY.items() if row["n"] <= n), None)
        if most is not None:
            goal = {"goal": f"Hadamard {row['n']}, of a copy", "most": most, "measured": row["of_copy"]}
            found.append(goal | {"holds": row["of_copy"] <= most})
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=ROOT / "out" / "gpu.json")
    parser.add_argument("--checks-only", action="store_true", help="time nothing")
    arguments = parser.parse_args()
    try:
        found = require_gpu()
        kernels = devices.kernels_of(found)
    except NoGpu as error:
        print(f"error[missing-dependency]: {error}", file=sys.stderr)
        return 6
    except CompressError as error:
        print(f"error[{error.code_name}]: {error}", file=sys.stderr)
        return 4 if error.data.get("reason") == "self-test" else 6
    device, memory = torch.cuda.get_device_name(), DeviceMemory("cuda")
    checks = check(kernels, memory, {name: kernel.CASES for name, kernel in KERNELS.items()}, SEEDS)
    checks += check(kernels, memory, {name: kernel.LARGE_CASES for name, kernel in KERNELS.items()}, seeds=1)
    checks += [{"kernel": "torch operation", "seed": 0, **c} for c in gpu_binding.checks(found)]
    wrong = [c for c in checks if c["problem"]]
    record: dict[str, Any] = {
        "device": device,
        "capability": torch.cuda.get_device_capability(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "kernels": kernels.name,
        "checks": checks,
    }
    if not wrong and not arguments.checks_only:
        rate = copy_bytes_per_second()
        rows = [time_shape(kernels, m, n, k, rate) for n, k in SHAPES for m in ROWS]
        record["hadamard"] = [time_hadamard(n, kernels) for n in HADAMARD_SIZES]
        record["hadamard_goals"] = judge_hadamard(record["hadamard"], device)
        record["products"] = gpu_against_torch.product_rates(seconds_of)
        record["int8"] = gpu_int8.time_int8(kernels, seconds_of)
        record["int8_goals"] = gpu_int8.judge_int8(record["int8"], device)
        record["dense_sparse"] = gpu_against_torch.time_products(kernels, seconds_of)
        record["gptq_solve"] = gpu_against_torch.time_solver(kernels, seconds_of)
        record |= {"copy_bytes_per_second": rate, "rows": rows, "goals": judge(rows, device)}
        for row in rows:
            print("{M:5} x {N:5} x {K:5}".format(**row), f"{row['seconds'] * 1e6:9.1f} us", end="  ")
            print(f"{row['of_copy_bandwidth']:.2f} of copy, torch {row['torch_float16_seconds'] * 1e6:.1f} us")
        for row in record["hadamard"]:
            print(f"hadamard {row['n']:6} {row['of_copy']:.2f} of the time of a copy")
        for goal in record["hadamard_goals"]:
            verdict = "holds" if goal["holds"] else "missed"
            print(f"{goal['goal']}: {goal['measured']:.2f}, at most {goal['most']}, {verdict}")
        for name, operations in record["products"].items():
            print(f"{name}: {operations / 1e12:.0f} T operations a second")
        gpu_int8.print_int8(record["int8"], record["int8_goals"])
        for name in ("dense_sparse", "gptq_solve"):
            for row in record[name]:
                times = f"{row['seconds'] * 1e6:.1f} us, {row['call_seconds'] * 1e6:.1f} us from Python"
                print(
                    f"{name} {row.get('M', row.get('rows')):6} {times}, torch {row['torch_call_seconds'] * 1e6:.1f} us"
                )
        for goal in record["goals"]:
            verdict = "holds" if goal["holds"] else "missed"
            print(f"{goal['goal']}: {goal['measured'] * 1e6:.1f} of {goal['seconds'] * 1e6} us, {verdict}")
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    for c in wrong:
        print(f"error[verification-failed]: {c['kernel']}, {c['case']}: {c['problem']}", file=sys.stderr)
    print(f"{device}: {len(checks) - len(wrong)} of {len(checks)} checks are right. {arguments.json}")
    return 4 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
