"""Compares GPTQ's solve in the library and in torch, and the Hessian by halves and by one matmul, call by call.

    python scripts/bench/solver.py

`solve` is a whole solve of one matrix, of which the products for later columns are the same torch call in both;
`plain` compares ours with the loop of the GPTQ paper's algorithm 1 as its authors' code has it: blocks of 128 columns,
each column's update over the rest of its block. `columns` is the inner loop alone over the same number of columns.
Ratios are medians of torch over ours, and of halves over one product. `equal` is the share of codes that both gave
alike. A solve needs size^3 operations, nearly all of them in products, so it can't be faster than size^3 over the
machine's peak of float32: `ours_of_peak` is our share of that, `most_over_ours` what a solve at the peak would gain on
torch's, and `products_of_peak` the share of the peak at which the products for later columns run.
"""

from __future__ import annotations

import compressor  # noqa: F401 isort: skip (before torch, whose threads then sleep while they wait)

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import result_file
import torch
from kernel_ceilings import Ceilings

from compressor.evaluation.environment import cpu_name
from compressor.kernels.cpu import Library, library
from compressor.kernels.ops import gptq_solve
from compressor.kernels.ops.gptq_columns import Columns, round_columns
from compressor.kernels.ops.gptq_solve import round_compiled
from compressor.methods.quantization.hessian import Gram, inverse_factor
from compressor.passes import gptq


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096, help="inputs and outputs of the matrix")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    result_file.add_output(parser, "solver")
    settings = parser.parse_args()
    if not isinstance(library(), Library):
        parser.error(f"{library()}")
    result = {"cpu": cpu_name(), "torch": torch.__version__, "size": settings.size, "tokens": settings.tokens}
    result["rows"] = bench(settings.size, settings.tokens, settings.repeats, settings.threads)
    result_file.write(result, settings.output)


def bench(size: int, tokens: int, repeats: int, threads: list[int]) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, size, generator=generator) * torch.exp(torch.randn(size, generator=generator) / 2)
    weight = torch.randn(size, size, generator=generator)
    hessian = Gram.zeros(size, torch.float32, x.device).add(x).hessian()
    order = gptq.column_order(hessian.diagonal(), "static", 128)
    factor = inverse_factor(hessian[order][:, order], 0.01, 1.0, "benchmark")
    if factor is None:
        raise SystemExit("the benchmark's hessian has no factor; use more --tokens")
    upper, chosen = factor.upper, gptq.GPTQ(scale_search="minmax")

    def solve(ours: bool) -> torch.Tensor:
        with mock.patch.object(gptq_solve, "solves", lambda work: ours):
            return gptq.solve(weight, upper, hessian.diagonal(), order, chosen, 128, torch.bfloat16).codes

    groups = weight.view(size, size // 128, 128)
    grid = gptq.find_grid(groups, chosen.bits, chosen.symmetric, chosen.scale_search, torch.bfloat16, None)

    def plain() -> torch.Tensor:
        return plain_solve(weight[:, order], upper, grid.scale[:, order // 128], grid.low, grid.high)

    def products() -> None:
        for start in range(0, size - 128, 128):
            stop = start + 128
            work[stop:].addmm_(upper[start:stop, stop:].t(), errors[start:stop], alpha=-1)

    work, errors, codes = weight.clone(), torch.zeros_like(weight), torch.zeros_like(weight)
    scale, index = torch.ones(1, size), torch.zeros(gptq.SUB_BLOCK, dtype=torch.int64)

    def columns(ours: bool) -> None:
        for start in range(0, size, gptq.SUB_BLOCK):
            rows = slice(start, min(start + gptq.SUB_BLOCK, size))
            count = rows.stop - start
            part = Columns(work[rows], errors[rows], codes[rows], upper[rows, rows], index[:count], scale, None, -8, 7)
            (round_compiled if ours else round_columns)(part, 0, count)

    rows = []
    for count in threads:
        torch.set_num_threads(count)
        ceilings = Ceilings(count, 1 << 20, quick=False)
        ours = solve(True).view(size, size)
        equal = {"solve": float((ours == solve(False).view(size, size)).float().mean())}
        equal["plain"] = float((ours[:, order] == plain()).float().mean())
        for name, ours, theirs in (
            ("solve", lambda: solve(True), lambda: solve(False)),
            ("plain", lambda: solve(True), plain),
            ("columns", lambda: columns(True), lambda: columns(False)),
            ("hessian", lambda: Gram.zeros(size, torch.float32, x.device).add(x), lambda: x.T @ x),
        ):
            a, b = in_turns(ours, theirs, repeats, lambda: work.copy_(weight))
            row = {"what": name, "threads": count, "ours_s": a, "other_s": b, "other_over_ours": b / a}
            if name in equal:
                peak = max(ceilings.peak("float") for _ in range(3))
                row |= {"equal": equal[name], "float_peak": peak, "ours_of_peak": size**3 / a / peak}
                row |= {"most_over_ours": b / (size**3 / peak)}  # what a solve at the peak would gain on torch's
            if name == "solve":
                seconds, _ = in_turns(products, lambda: None, repeats, lambda: work.copy_(weight))
                row |= {"products_of_peak": size * size * (size - 128) / seconds / peak}
            rows.append(row | {"ours_over_other": a / b})
    return rows


def plain_solve(
    weight: torch.Tensor, upper: torch.Tensor, scale: torch.Tensor, low: int, high: int, block: int = 128
) -> torch.Tensor:
    """Codes (out, in) of weight (out, in) by the textbook loop; scale (out, in) of each column."""
    weight, codes = weight.clone(), torch.empty_like(weight)
    for start in range(0, weight.shape[1], block):
        stop = min(start + block, weight.shape[1])
        errors = torch.empty(len(weight), stop - start)
        part = weight[:, start:stop].clone()
        for i in range(stop - start):
            row = upper[start + i, start + i : stop]
            code = (part[:, i] / scale[:, start + i]).round().clamp(low, high)
            errors[:, i] = (part[:, i] - code * scale[:, start + i]) / row[0]
            part[:, i:] -= errors[:, i : i + 1] * row
            codes[:, start + i] = code
        weight[:, stop:] -= errors @ upper[start:stop, stop:]
    return codes


def in_turns(
    ours: Callable[[], Any], theirs: Callable[[], Any], repeats: int, prepare: Callable[[], Any]
) -> tuple[float, float]:
    """Median seconds of both, called alternately, without the first call of each and without `prepare`."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats + 1):
        for call, kept in zip((ours, theirs), times, strict=True):
            prepare()
            start = time.perf_counter()
            call()
            kept.append(time.perf_counter() - start)
    return statistics.median(times[0][1:]), statistics.median(times[1][1:])


if __name__ == "__main__":
    main()
