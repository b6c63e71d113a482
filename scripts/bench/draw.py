"""Draws the plots of docs/benchmarks.md from the files of the benchmarks.

    python scripts/bench/draw.py kernels --files cpu-kernels-*.json --output docs/plots/cpu-kernels.svg
    python scripts/bench/draw.py quality --pruning FILES --slicing FILES --factorization FILE --output quality.svg
    python scripts/bench/draw.py threads --decoding FILE --solver FILES --output threads.svg

kernels  of cpu_kernels.py, a file for each processor: how many times as fast as a peer, over the rows of x
quality  of pruning.py on a classifier: accuracy over size; of slicegpt.py quality and factorization.py on a language
         model: perplexity over size
threads  of threads.py: a decoding step, median and range of the rounds; of solver.py, a file for each processor: a
         solve against others
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams.update({"svg.hashsalt": "compress-model", "svg.fonttype": "none", "font.size": 9})

import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import NullLocator, StrMethodFormatter  # noqa: E402

Result = dict[str, Any]
SHAPE = "4096x4096"
LEVELS = {"avx512vnni": "AVX-512 VNNI", "amx": "AMX", "avx2": "AVX2"}
KERNELS = {  # ours, theirs
    "W4A8, torch bfloat16": ("ours W4A8 g64", "torch bf16"),
    "W4A8, torch int4pack": ("ours W4A8 g64", "torch int4pack"),
    "W4A8, llama.cpp Q4_0": ("ours W4A8 g64", "llama.cpp q4_0"),
    "W8A8, oneDNN": ("ours W8A8", "oneDNN W8A8"),
    "W4A16, torch bfloat16": ("ours W4A16 g64", "torch bf16"),
}
SLICING = {
    "magnitude": "by magnitude, no rotation",
    "energy": "by signal, no rotation",
    "pca_global_rms": "slicegpt, one rotation",
    "pca_per_site": "slicegpt, one per norm",
    "peer_per_site": "TransformerCompression",
}
PRUNING = {"vtrans": "vtrans", "magnitude": "by magnitude", "random 0": "random"}
STEPS = {
    "default": "default",
    "one thread": "one thread",
    "torch first": "spinning threads",
    "dense bf16": "dense bfloat16",
}
SOLVER = {
    "columns": "columns, against torch's loop",
    "solve": "whole solve, against torch's path",
    "plain": "whole solve, against the authors' loop",
}


def plain_numbers(axis: Any, values: list[float]) -> None:
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_locator(NullLocator())
    axis.set_ticks(values)


def draw_kernels(results: list[Result]) -> Figure:
    figure, panels = plt.subplots(1, len(results), figsize=(3.4 * len(results), 3.4), sharey=True, squeeze=False)
    for axes, result in zip(panels[0], results, strict=True):
        times = {(row["name"], row["rows"]): row["seconds"] for row in result["rows"] if row["shape"] == SHAPE}
        rows = sorted({count for _, count in times})
        for name, (ours, theirs) in KERNELS.items():
            axes.plot(rows, [times[theirs, count] / times[ours, count] for count in rows], ".-", label=name)
        axes.axhline(1, color="grey", linewidth=0.8)
        axes.set(title=f"{result['cpu']}, {LEVELS[result['level']]}", xscale="log", yscale="log", xlabel="rows of x")
        plain_numbers(axes.xaxis, rows)
        plain_numbers(axes.yaxis, [0.25, 0.5, 1, 2, 4, 8, 16])
    panels[0][0].set_ylabel("times as fast as the peer")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def draw_curve(axes: Axes, points: list[Result], across: str, up: str, style: str, label: str) -> None:
    points = sorted(points, key=lambda row: row[across])
    axes.plot([row[across] / 1e6 for row in points], [row[up] for row in points], style, label=label)


def draw_quality(pruning: list[Result], slicing: list[Result], factorization: Result) -> Figure:
    figure, panels = plt.subplots(1, 3, figsize=(10.2, 3.4))
    rows = [row for result in pruning for row in result["rows"]]
    for color, (method, label) in enumerate(PRUNING.items()):
        for repaired in (True, False):
            points = [rows[0], *(row for row in rows if (row["method"], row.get("repaired")) == (method, repaired))]
            style, suffix = ("-", ", repaired") if repaired else (":", "")
            draw_curve(panels[0], points, "parameters", "accuracy", f"C{color}.{style}", label + suffix)
    panels[0].set(title="pruning", xlabel="parameters, millions", ylabel="accuracy, %")
    rows = [row for result in slicing for row in result["rows"]]
    for method, label in SLICING.items():
        points = [rows[0], *(row for row in rows if row["method"] == method)]
        draw_curve(panels[1], points, "parameters", "perplexity", ".-", label)
    panels[1].set(title="slicing", xlabel="parameters, millions", ylabel="perplexity", yscale="log")
    plain_numbers(panels[1].yaxis, [110, 150, 200, 300, 400])
    for method in dict.fromkeys(row["method"] for row in factorization["rows"]):
        points = [row for row in factorization["rows"] if row["method"] == method]
        draw_curve(panels[2], points, "bytes", "perplexity", ".-", method.removesuffix(" float16"))
    panels[2].axhline(factorization["dense"]["perplexity"], color="grey", linewidth=0.8, label="dense")
    panels[2].set(title="factorization", xlabel="stored matrices, MB", ylabel="perplexity", yscale="log")
    plain_numbers(panels[2].yaxis, [100, 110, 120, 130])
    for axes in panels:
        axes.legend(fontsize=7, frameon=False)
    return figure


def draw_threads(decoding: Result, solvers: list[Result]) -> Figure:
    figure, panels = plt.subplots(1, 3, figsize=(10.2, 3.2), width_ratios=[1, 1, 1.2])
    for axes, beside in zip(panels, (False, True), strict=False):
        found = {row["sequences"]: row["seconds"] for row in decoding["decoding"] if row["beside"] == beside}
        for at, (name, label) in enumerate(STEPS.items()):
            times = [[second * 1e3 for second in seconds[name]] for seconds in found.values()]
            middle = [statistics.median(rounds) for rounds in times]
            below = [center - min(rounds) for center, rounds in zip(middle, times, strict=True)]
            above = [max(rounds) - center for center, rounds in zip(middle, times, strict=True)]
            places = [place + (at - 1.5) / 5 for place in range(len(found))]
            axes.errorbar(places, middle, [below, above], fmt="o", markersize=4, label=label)
        axes.set(title="beside a busy neighbour" if beside else "alone", yscale="log", xlabel="sequences")
        axes.set_xticks(range(len(found)), [str(count) for count in found])
        axes.set_ylim(3, 500)
        axes.grid(axis="y", alpha=0.3)
        plain_numbers(axes.yaxis, [5, 10, 20, 50, 100, 200])
    panels[0].set_ylabel("ms of a decoding step")
    panels[0].legend(fontsize=7, frameon=False)
    axes = panels[2]
    for at, result in enumerate(solvers):
        for threads in (1, 2):
            ratios = {row["what"]: row["other_over_ours"] for row in result["rows"] if row["threads"] == threads}
            place = at * 2 + threads - 1
            axes.barh(
                [base + (1.5 - place) / 5 for base in range(len(SOLVER))],
                [ratios[what] for what in SOLVER],
                0.19,
                label=f"{result['cpu']}, {threads} thread{'s' if threads > 1 else ''}",
            )
    axes.set_yticks(range(len(SOLVER)), [label.replace(", ", ",\n") for label in SOLVER.values()])
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.set(title="GPTQ's solver", xlabel="times as fast", xlim=(0, 7.5))
    axes.legend(fontsize=7, frameon=False, loc="right")
    return figure


def read(paths: list[Path], names: list[str] | None = None) -> list[Result]:
    """names  of processors, one per file, if the names in the files don't distinguish them"""
    results = [json.loads(path.read_text()) for path in paths]
    for result, name in zip(results, names or []):
        result["cpu"] = name
    return results


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    kernels, quality, threads = (commands.add_parser(name) for name in ("kernels", "quality", "threads"))
    kernels.add_argument("--files", type=Path, nargs="+", required=True)
    quality.add_argument("--pruning", type=Path, nargs="+", required=True)
    quality.add_argument("--slicing", type=Path, nargs="+", required=True)
    quality.add_argument("--factorization", type=Path, required=True)
    threads.add_argument("--decoding", type=Path, required=True)
    threads.add_argument("--solver", type=Path, nargs="+", required=True)
    for command in (kernels, threads):
        command.add_argument(
            "--cpus", nargs="+", help="names of the processors, one for each file of --files, --solver"
        )
    for command in (kernels, quality, threads):
        command.add_argument("--output", type=Path, required=True, metavar="FILE", help="SVG")
    settings = parser.parse_args(arguments)
    plt.rcParams["figure.constrained_layout.use"] = True
    if settings.command == "kernels":
        figure = draw_kernels(read(settings.files, settings.cpus))
    elif settings.command == "quality":
        figure = draw_quality(read(settings.pruning), read(settings.slicing), *read([settings.factorization]))
    else:
        figure = draw_threads(*read([settings.decoding]), read(settings.solver, settings.cpus))
    settings.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(settings.output, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
