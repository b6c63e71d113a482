"""Draws the plots of a report's page, as SVG source."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

from compressor.evaluation.sections import Patches, Report, RunSizes, WeightRow
from compressor.evaluation.weight_rows import error_of, outlier_inputs

GREY, BLUE = "#8a8f98", "#2f6feb"
STYLE: Any = {
    "svg.hashsalt": "compress-model",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "axes.edgecolor": GREY,
    "text.color": GREY,
    "axes.labelcolor": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
}


def draw_plots(report: Report) -> dict[str, str]:
    """Title -> SVG source. A plot without data is left out."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plots: dict[str, str] = {}
    with plt.rc_context(STYLE):
        if measured := [weight for weight in report["weights"] if error_of(weight) is not None]:
            plots["Relative output error of each weight"] = _svg(_draw_errors(measured))
        if patches := report.get("patches"):
            title = "Patches kept of sample images (brighter patches passed more gates)"
            plots[title] = _svg(_draw_patches(patches))
        if counted := outlier_inputs(report):
            plots["Outlier features of each input, on calibration data"] = _svg(_draw_outliers(counted))
        plots["Size of the weight files before and after"] = _svg(_draw_bytes(report["sizes"]))
        row = report["metrics"].get("perplexity")
        if row and (before := row["before"]) and (after := row["after"]):
            plots["Perplexity and size before and after"] = _svg(_draw_quality(before, after, report["sizes"]))
    return plots


def _draw_errors(weights: list[WeightRow]) -> Any:
    import matplotlib
    import matplotlib.pyplot as plt

    axes: Any
    figure, axes = plt.subplots(figsize=(10, 3.2))
    kinds = list(dict.fromkeys(weight["name"].rpartition(".")[2] for weight in weights))
    colours = matplotlib.colormaps["tab10"]
    for number, kind in enumerate(kinds):
        chosen = [weight for weight in weights if weight["name"].rpartition(".")[2] == kind]
        x = [weight["part"] - 1 for weight in chosen]
        axes.plot(
            x, [error_of(weight) for weight in chosen], "o-", ms=4, lw=1.2, label=kind, color=colours(number % 10)
        )
        if all("output_error_rtn" in weight for weight in chosen):
            rounded = [weight["output_error_rtn"] for weight in chosen]
            axes.plot(x, rounded, ":", lw=1, color=colours(number % 10))
    axes.xaxis.get_major_locator().set_params(integer=True)
    dotted = any("output_error_rtn" in weight for weight in weights)
    label = "block (dotted: round-to-nearest on the same grid)" if dotted else "block"
    axes.set(xlabel=label, ylabel="relative error", ylim=(0, None))
    axes.legend(ncol=1, frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _draw_patches(patches: Patches) -> Any:
    """Each image unchanged, and below it with its patches, darker the earlier a gate dropped them."""
    import matplotlib.pyplot as plt
    import numpy

    images = patches["images"]
    figure, panels = plt.subplots(2, len(images), figsize=(1.6 * len(images), 3.4), squeeze=False)
    for (above, below), shown in zip(panels.T, images, strict=True):
        pixels, survived = numpy.array(shown["pixels"]), numpy.array(shown["survived"])
        rows = numpy.arange(pixels.shape[0]) * survived.shape[0] // pixels.shape[0]
        columns = numpy.arange(pixels.shape[1]) * survived.shape[1] // pixels.shape[1]
        share = survived[numpy.ix_(rows, columns)] / patches["gates"]
        above.imshow(pixels, cmap="gray", vmin=0, vmax=255)
        below.imshow(numpy.ones_like(share), cmap="Blues", vmin=0, vmax=1)
        below.imshow(64 + 0.75 * pixels, cmap="gray", vmin=0, vmax=255, alpha=share)
        for axes in (above, below):
            axes.set_axis_off()
    return figure


def _draw_outliers(inputs: list[WeightRow]) -> Any:
    import matplotlib
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 3, figsize=(10, 2.8), layout="constrained")
    kinds = list(dict.fromkeys(row["name"].rpartition(".")[2] for row in inputs))
    colours = matplotlib.colormaps["tab10"]
    value_of: Callable[[WeightRow], float]
    for axes, value_of, label in zip(
        panels,
        (
            lambda row: row["outlier_features"],
            lambda row: 100 * row["outlier_token_share"],
            lambda row: row["outlier_magnitude"],
        ),
        ("outlier features", "tokens with one, %", "largest |x|"),
        strict=True,
    ):
        for number, kind in enumerate(kinds):
            chosen = [row for row in inputs if row["name"].rpartition(".")[2] == kind]
            values = [value_of(row) for row in chosen]
            x = [row["part"] - 1 for row in chosen]
            axes.plot(x, values, "o-", ms=4, lw=1.2, label=f"input of {kind}", color=colours(number % 10))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set(xlabel="block", ylabel=label, ylim=(0, None))
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncol=len(kinds), frameon=False, fontsize=8
    )
    return figure


def _draw_bytes(sizes: RunSizes) -> Any:
    import matplotlib
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 2.6))
    axes.barh(["before"], [sizes["before_bytes"] / 2**20], color=GREY, height=0.5)
    left = 0.0
    colours = matplotlib.colormaps["tab10"]
    for number, (name, size) in enumerate((n, s) for n, s in sizes["by_class"].items() if s):
        axes.barh(["after"], [size / 2**20], left=left, color=colours(number % 10), height=0.5, label=name)
        left += size / 2**20
    axes.invert_yaxis()
    axes.set(xlabel="MiB")
    axes.legend(ncol=4, frameon=False, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.25))
    return figure


def _draw_quality(before: float, after: float, sizes: RunSizes) -> Any:
    """Perplexity and size."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 2.6))
    for side, size, value, colour in (
        ("before", sizes["before_bytes"], before, GREY),
        ("after", sizes["after_bytes"], after, BLUE),
    ):
        at = (size / 2**20, value)
        axes.scatter([at[0]], [at[1]], s=60, color=colour)
        axes.annotate(side, at, xytext=(8, -3), textcoords="offset points")
    axes.set(xlabel="weight files, MiB", ylabel="perplexity", xlim=(0, sizes["before_bytes"] / 2**20 * 1.2))
    axes.margins(y=0.4)
    return figure


def _svg(figure: Any) -> str:
    import matplotlib.pyplot as plt

    buffer = io.StringIO()
    figure.savefig(
        buffer, format="svg", bbox_inches="tight", transparent=True, metadata={"Date": None, "Creator": None}
    )
    plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]
