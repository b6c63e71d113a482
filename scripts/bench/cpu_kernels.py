"""Compares the CPU kernels with this machine's limits and with other libraries, in one run.

    python scripts/bench/cpu_kernels.py [--output FILE] [--threads 1] [--peers llama.cpp=ENVIRONMENT]
    python scripts/bench/cpu_kernels.py --quick

Every row is y = x @ W.T with random float32 x (M, K) and W (N, K); quantizing activations is inside the timed region.
Copies of a weight are used in turn, at least 160 MB and the size of the last cache of each, so that they are read from
memory: between two uses of a copy, the copies of a dozen candidates are read. All candidates and the measurement of
memory bandwidth are called in turn, each warmed by other copies first, and medians are reported. "/ W4A8" is a time
divided by that of "ours W4A8 g64". "ours W4A8 g64" runs twice: the difference of the two is noise, and so is every
smaller difference.

Limits are measured in the same process with the same number of threads: memory bandwidth (ceilings.cpp), and the peaks
of int8 and float instructions. The int8 peak for the goals is that of vectors, also if the processor has tiles (AMX). A
row's fraction of the limit is of bandwidth for M < 16, and of the int8 peak above.

Peers: torch's dense matmul in float32 and bfloat16, its int4pack and int8pack, oneDNN's W8A8, bitsandbytes'
Linear8bitLt, and with --peers llama.cpp, from an environment of its own (peers/requirements-llama-cpp.txt). Each result
is compared with float64 before it is timed. --quick runs tiny shapes to test the script: its times mean nothing, no
goal is checked, and figures are written only to a file that --output names.

--decode adds tokens per second of a Llama of random weights and about 100 M parameters at 1 and 16 sequences: dense,
and with its blocks' linear layers in 4 bits, prepared with and without int8 inputs. Everything else is float32, or
bfloat16 where the name says so. The goal compares the faster ones.

Hadamard transforms, dense x sparse matmuls and lookup tables follow, compared with torch (kernel_operations.py).
"""

from __future__ import annotations

import compressor  # noqa: F401 isort: skip (before torch, whose threads then sleep while they wait)

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import kernel_decode
import kernel_operations
import kernel_peers
import result_file
import torch
from kernel_ceilings import PEAKS, Ceilings
from kernel_peers import Candidate, Shape
from rich.console import Console
from rich.table import Table

from compressor.evaluation.environment import cpu_name
from compressor.kernels import cpu
from compressor.kernels.ops import linear as ops
from compressor.kernels.prepared.dispatch import DYNAMIC_INT8, IntegerWeight

SHAPES = (Shape(4096, 4096), Shape(11008, 4096), Shape(4096, 11008))
ROWS = (1, 4, 16, 64, 256)
QUICK_SHAPES, QUICK_ROWS = (Shape(256, 256),), (1, 16)
ROTATION = 160_000_000
FEW = 3  # calls of candidates that are marked slow
LEAST = 7  # smallest number of calls of others: with four, a burst of another process changed the median
WARMING = 0.003  # seconds
BY_PEAK = 16  # rows of x from which arithmetic, not memory, is the limit


@dataclass
class Row:
    """One candidate at one shape; `seconds` is the median over `calls`.

    The read bandwidth is the larger of that of the same minutes and that of the beginning: reading alone, between the
    calls of matmuls, has been slower than the matmuls read.
    """

    shape: str
    rows: int
    name: str
    seconds: float
    calls: int
    gigabytes_per_second: float
    giga_operations_per_second: float
    of_read_bandwidth: float
    of_int8_peak: float
    error: float
    note: str


@dataclass
class Goal:
    """`measured` is the worst case; None if this run didn't measure it"""

    name: str
    wanted: str
    measured: float | None
    holds: bool | None
    where: str


def last_cache() -> int:
    """bytes of the largest cache

    raises RuntimeError if Linux doesn't say
    """
    found = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    if not found:
        raise RuntimeError("no cache sizes in /sys/devices/system/cpu/cpu0/cache: name one with --cache-mb")
    return max(int(size[:-1]) * units[size[-1]] if size[-1] in units else int(size) for size in found)


def after_warming(call: Callable[[], float]) -> float:
    end = time.perf_counter() + WARMING
    while time.perf_counter() < end:
        call()
    return call()


def interleave(
    found: list[Candidate], ceilings: Ceilings, seconds: float, least: int
) -> tuple[list[list[float]], float]:
    """Times of each candidate, called in turn for this long, without the first ones; and the read bandwidth between
    them.

    Each round has another order, because reading memory leaves empty caches for the next candidate. Each candidate
    works for some milliseconds, copy after copy, before it is timed, as layer after layer in a model. Otherwise its
    code is read from memory and the memory's clock depends on the candidate before: one row took up to twice as long.
    """
    times: list[list[float]] = [[] for _ in found]
    order, shuffle = list(range(len(found) + 1)), random.Random(0).shuffle
    used = [0] * len(found)
    read, turn, end = [], 0, time.perf_counter() + seconds

    def timed(place: int) -> float:
        used[place] += 1
        return found[place].run(used[place] % found[place].copies)

    while turn <= least or time.perf_counter() < end:
        shuffle(order)
        for place in order:
            if place == len(found):
                read.append(after_warming(ceilings.read))
            elif not found[place].slow:
                times[place].append(after_warming(partial(timed, place)))
            elif turn <= FEW:
                times[place].append(timed(place))
        turn += 1
    return [spent[1:] for spent in times], statistics.median(read)


def measure(
    shape: Shape, rows: int, settings: argparse.Namespace, ceilings: Ceilings, limits: dict[str, float]
) -> list[Row]:
    with ExitStack() as stack:
        found = kernel_peers.candidates(shape, rows, settings.rotation, settings.threads, settings.llama, stack)
        times, read = interleave(found, ceilings, settings.seconds, 2 if settings.quick else LEAST)
    read, peak = max(read, limits["read bandwidth"]), limits["int8 peak"]
    result = []
    for candidate, spent in zip(found, times, strict=True):
        median = statistics.median(spent)
        speed, operations = candidate.bytes / median, 2 * rows * shape.out * shape.columns / median
        result.append(
            Row(
                str(shape), rows, candidate.name, median, len(spent), speed / 1e9, operations / 1e9, speed / read,
                operations / peak, candidate.error, candidate.note,
            )
        )  # fmt: skip
    return result


def median_time(call: Callable[[], Any], calls: int) -> float:
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def overhead(quick: bool) -> dict[str, float]:
    """Seconds of a 576x576 W4A8 matmul of one row: by prepared layers, through torch's registry, by the kernel, and the
    difference of layer and kernel.

    The cost of a call is that of the compiled function with no rows; it is subtracted from the kernel.
    """
    shape, group, calls = Shape(576, 576), 64, 200 if quick else 5000
    codes, scale, zero, _ = kernel_peers.integer_weight(shape, 4, group)
    layer = kernel_peers.prepared_layer(IntegerWeight(codes, scale, zero, 4, group), DYNAMIC_INT8, torch.float32)
    call, packed = layer.call, layer.packed
    x, y, found = torch.randn(1, shape.columns), torch.empty(1, shape.out), ops.cpu_library()
    arguments = (x, packed, None, None, shape.out, 4, group, ops.LAYOUT)

    def kernel(rows: int) -> int:
        return found.functions.linear_dynamic_int8(
            found.level, 1, x.data_ptr(), 0, packed.data_ptr(), packed.numel(), 0, 0, y.data_ptr(), rows, shape.out,
            shape.columns, 4, group,
        )  # fmt: skip

    if kernel(1):
        raise RuntimeError("the kernel refuses the shape that the operation takes")
    if not torch.equal(y, call(x)[0]):
        raise ArithmeticError("the kernel and the operation differ")
    whole = median_time(lambda: call(x)[0], calls)
    registry = median_time(lambda: torch.ops.compressor.linear_dynamic_int8(*arguments), calls)
    alone = median_time(lambda: kernel(1), calls) - median_time(lambda: kernel(0), calls)
    return {"operation": whole, "by registry": registry, "kernel": alone, "overhead": whole - alone}


def packing(shape: Shape) -> float:
    """Seconds for a gigabyte of codes for `pack_weight`, one byte each."""
    codes, scale, zero, _ = kernel_peers.integer_weight(shape, 4, 64)
    call = partial(torch.ops.compressor.pack_weight, codes, scale, zero, None, 4, 64, ops.LAYOUT)
    return median_time(call, 5) / codes.numel() * 1e9


def noise(rows: list[Row]) -> float:
    """The largest relative difference between the two equal candidates."""
    times = {(row.shape, row.rows, row.name): row.seconds for row in rows}
    pairs = [(times[s, m, n], times[s, m, f"{n} again"]) for s, m, n in times if (s, m, f"{n} again") in times]
    return max(max(pair) / min(pair) - 1 for pair in pairs)


def goals(rows: list[Row], threads: int, extra: dict[str, float], decoding: dict[str, dict[str, float]]) -> list[Goal]:
    """The goals of docs/kernels.md for the CPU kernels, and the worst case of this run."""
    cases: dict[tuple[str, int], dict[str, Row]] = {}
    for row in rows:
        cases.setdefault((row.shape, row.rows), {})[row.name] = row

    def at_least(
        name: str,
        wanted: float,
        unit: str,
        value: Callable[[dict[str, Row]], float | None],
        which: Callable[[int], bool],
    ) -> Goal:
        values = [(value(found), f"{shape} M={m}") for (shape, m), found in cases.items() if which(m)]
        known = [(v, where) for v, where in values if v is not None]
        if not known:
            return Goal(name, f">= {wanted:g}{unit}", None, None, "not measured")
        worst, where = min(known)
        return Goal(name, f">= {wanted:g}{unit}", worst, worst >= wanted, where)

    def against(ours: str, *peers: str) -> Callable[[dict[str, Row]], float | None]:
        def ratio(found: dict[str, Row]) -> float | None:
            times = [found[peer].seconds for peer in peers if peer in found]
            return min(times) / found[ours].seconds if times and ours in found else None

        return ratio

    def of_read(ours: str) -> Callable[[dict[str, Row]], float | None]:
        return lambda found: found[ours].of_read_bandwidth if ours in found else None

    def of_peak(ours: str) -> Callable[[dict[str, Row]], float | None]:
        return lambda found: found[ours].of_int8_peak if ours in found else None

    def one(m: int) -> bool:
        return m == 1

    def many(m: int) -> bool:
        return m >= BY_PEAK

    def most(m: int) -> bool:
        return m >= 64

    share = 0.8 if threads == 1 else 0.9
    dense, w4, w8, llm = ("torch float32", "torch bf16"), "ours W4A8 g64", "ours W8A8", "ours LLM.int8"
    found = [
        at_least("W4A8 M=1, of read bandwidth", 0.85, "", of_read(w4), one),
        at_least("W4A8 M=1, against the faster dense", 5, "x", against(w4, *dense), one),
        at_least("W4A8 M=1, against int4pack", 1.8, "x", against(w4, "torch int4pack"), one),
        at_least("W4A8 M=1, against llama.cpp Q4_0", 1, "x", against(w4, "llama.cpp q4_0"), one),
        at_least("W4A8 g128 M>=16, of int8 peak", 0.85, "", of_peak("ours W4A8 g128"), many),
        at_least("W4A8 g64 M>=16, of int8 peak", 0.8, "", of_peak(w4), many),
        at_least("W4A8 M>=16, against bf16", 1.7, "x", against(w4, "torch bf16"), many),
        at_least("W4A8 M>=16, against llama.cpp Q4_0", 2.4, "x", against(w4, "llama.cpp q4_0"), many),
        at_least("W8A8 M=1, against oneDNN", 1.3, "x", against(w8, "oneDNN W8A8"), one),
        at_least("W8A8 M>=64, against oneDNN", 1, "x", against(w8, "oneDNN W8A8"), most),
        at_least("W4A16 M=1, of read bandwidth", share, "", of_read("ours W4A16 g64"), one),
        at_least("W4A16 M=1 of bf16 inputs, of read bandwidth", share, "", of_read("ours W4A16 g64, bf16 x"), one),
        at_least("LLM.int8 M=1, against bitsandbytes", 100, "x", against(llm, "bitsandbytes int8"), one),
        at_least("LLM.int8 M=64, against bitsandbytes", 15, "x", against(llm, "bitsandbytes int8"), lambda m: m == 64),
        at_least("LLM.int8 M=1, against bf16", 3, "x", against(llm, "torch bf16"), one),
    ]
    spent = extra["overhead"] * 1e6
    found.append(Goal("operation beyond its kernel, M=1", "<= 5 us", spent, spent <= 5, "576x576"))
    pack = extra["packing"]
    found.append(Goal("packing a GB of codes", "< 1 s", pack, pack < 1, "4 bits, g=64"))
    ratios = [
        (
            max(speeds["prepared W4A8"], speeds["prepared W4A8, bf16"])
            / max(speeds["dense float32"], speeds["dense bf16"]),
            f"{sequences} sequences",
        )
        for sequences, speeds in decoding.items()
    ]
    worst, where = min(ratios, default=(None, "not measured"))
    found.append(
        Goal(
            "decoding W4A8, against the faster dense", ">= 2.5x", worst, None if worst is None else worst >= 2.5, where
        )
    )
    return found


def show(console: Console, rows: list[Row]) -> None:
    table = Table(title=f"{rows[0].shape}, M = {rows[0].rows}")
    for column in ("", "us", "GB/s", "GOP/s", "of ceiling", "/ W4A8", "error", "calls"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    base = next(row for row in rows if row.name == "ours W4A8 g64")
    for row in rows:
        part = row.of_int8_peak if row.rows >= BY_PEAK else row.of_read_bandwidth
        table.add_row(
            row.name, f"{row.seconds * 1e6:.0f}", f"{row.gigabytes_per_second:.1f}",
            f"{row.giga_operations_per_second:.0f}", f"{part:.2f}", f"{row.seconds / base.seconds:.2f}x",
            f"{row.error:.1e}", str(row.calls),
        )  # fmt: skip
    console.print(table)


def show_goals(console: Console, found: list[Goal]) -> None:
    table = Table(title="Goals, worst case of this run")
    for column in ("goal", "wanted", "measured", "holds", "where"):
        table.add_column(column)
    for goal in found:
        measured = "-" if goal.measured is None else f"{goal.measured:.2f}"
        holds = {None: "-", True: "yes", False: "no"}[goal.holds]
        table.add_row(goal.name, goal.wanted, measured, holds, goal.where)
    console.print(table)


def shape_of(text: str) -> Shape:
    out, _, columns = text.partition("x")
    if not (out.isdecimal() and columns.isdecimal() and int(out) % 128 == 0 and int(columns) % 128 == 0):
        raise argparse.ArgumentTypeError(f"{text!r} isn't OUTxIN, multiples of 128 for the peers' sake")
    return Shape(int(out), int(columns))


def peers_of(text: str) -> Path:
    name, _, path = text.partition("=")
    if name != "llama.cpp" or not path:
        raise argparse.ArgumentTypeError(f"{text!r} isn't llama.cpp=ENVIRONMENT")
    if not Path(path).is_dir():
        raise argparse.ArgumentTypeError(f"no directory {path}")
    return Path(path)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time the CPU kernels against ceilings and peers.")
    result_file.add_output(parser, "cpu-kernels")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=4, help="for each shape and M, shared by all candidates")
    parser.add_argument("--shapes", type=shape_of, nargs="+", metavar="OUTxIN", help="others than the usual")
    parser.add_argument("--rows", type=int, nargs="+", metavar="M", help="others than the usual")
    parser.add_argument("--peers", type=peers_of, metavar="llama.cpp=ENVIRONMENT")
    parser.add_argument(
        "--cache-mb", type=int, help="set the size of the last cache if the system reports none or a wrong one"
    )
    parser.add_argument("--decode", action="store_true", help="also decode with a small model, dense and prepared")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to see that all of it works")
    settings = parser.parse_args(arguments)
    if settings.threads < 1:
        parser.error(f"--threads {settings.threads}: at least 1 expected")
    if settings.rows and min(settings.rows) < 1:
        parser.error(f"--rows {min(settings.rows)}: at least 1 expected")
    return settings


def main(arguments: list[str] | None = None) -> None:
    settings = parse_arguments(arguments)
    console = Console()
    console.width = max(100, console.width)
    cache = settings.cache_mb * 2**20 if settings.cache_mb else last_cache()
    settings.rotation = 0 if settings.quick else max(ROTATION, cache)
    shapes, counts = (QUICK_SHAPES, QUICK_ROWS) if settings.quick else (SHAPES, ROWS)
    shapes, counts = tuple(settings.shapes or shapes), tuple(settings.rows or counts)
    settings.seconds = 0.1 if settings.quick else settings.seconds
    before = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    try:
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            settings.llama = settings.peers and kernel_peers.build_llama_cpp(settings.peers, Path(folder))
            report = run(settings, shapes, counts, Ceilings(settings.threads, cache, settings.quick), console)
    finally:
        torch.set_num_threads(before)
    if not settings.quick or settings.output != result_file.default_path("cpu-kernels"):
        result_file.write(report, settings.output)


def run(
    settings: argparse.Namespace,
    shapes: tuple[Shape, ...],
    counts: tuple[int, ...],
    ceilings: Ceilings,
    console: Console,
) -> dict[str, Any]:
    level = cpu.LEVELS[ops.cpu_library().level]
    tries = range(1 if settings.quick else 9)
    limits = {
        "read bandwidth": statistics.median(ceilings.read() for _ in tries),
        "copy bandwidth": statistics.median(ceilings.copy() for _ in tries),
        "triad bandwidth": statistics.median(ceilings.triad() for _ in tries),
        **{f"{kind} peak": statistics.median(ceilings.peak(kind) for _ in tries) for kind in PEAKS},
        **kernel_peers.product_rates(settings.quick),
    }
    console.print(f"{cpu_name()}, {settings.threads} thread(s), {level}, torch {torch.__version__}")
    for name, limit in limits.items():
        console.print(f"{name}: {limit / 1e9:.1f} G/s" if limit else f"{name}: no such instruction")
    rows: list[Row] = []
    for shape in shapes:
        for count in counts:
            found = measure(shape, count, settings, ceilings, limits)
            show(console, found)
            rows += found
    extra = {**overhead(settings.quick), "packing": packing(shapes[0]), "noise": noise(rows)}
    console.print(f"noise: {extra['noise']:.1%}, the most that the same kernel differed from itself")
    console.print(
        f"576x576, M = 1: operation {extra['operation'] * 1e6:.1f} us (through the registry "
        f"{extra['by registry'] * 1e6:.1f} us), kernel {extra['kernel'] * 1e6:.1f} us, "
        f"beyond it {extra['overhead'] * 1e6:.1f} us"
    )
    others = kernel_operations.operations(settings.seconds / 2, settings.quick)
    for operation in others:
        ratios = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in operation.ratios.items())
        console.print(f"{operation.name}: {operation.seconds * 1e6:.0f} us; {ratios}")
    decoding = kernel_decode.decode(settings.quick) if settings.decode else {}
    for sequences, speeds in decoding.items():
        listed = ", ".join(f"{name} {speed:.1f}" for name, speed in speeds.items())
        console.print(f"tokens a second at {sequences} sequence(s): {listed}")
    judged = [] if settings.quick else goals(rows, settings.threads, extra, decoding)
    if judged:
        show_goals(console, judged)
    return {
        "cpu": cpu_name(),
        "threads": settings.threads,
        "level": level,
        "torch": torch.__version__,
        "ceilings": limits,
        "rows": [asdict(row) for row in rows],
        "extra": extra,
        "operations": [asdict(operation) for operation in others],
        "decoding": decoding,
        "goals": [asdict(goal) for goal in judged],
    }


if __name__ == "__main__":
    main()
