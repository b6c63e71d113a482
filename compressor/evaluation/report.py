"""report.json, and its Markdown, HTML and JUnit forms. Schema: report.schema.json, explained in docs/report.md.

There are two kinds: of a run, and of an evaluation alone (`compress-model eval --output`).

report.json is the truth; every other form is rendered from it alone and can be rendered again at any time.
Times, memory and speed are facts about one run and live under `run`; the rest is the same for every run of a recipe.
"""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import junitparser
import yaml

from compressor.artifact.modeling_file import VERSION
from compressor.artifact.stock_formats import FAMILIES
from compressor.engine.request import _summary_file
from compressor.recipe.schema import ReportSettings, bare_source

if TYPE_CHECKING:
    from compressor.data.samples import Samples
    from compressor.evaluation.evaluate import Measured

REPORT_VERSION = 1
HERE = Path(__file__).parent
WORST = 5
# what the verifying process could not find out before it stopped
NOT_VERIFIED: dict[str, Any] = {
    **dict.fromkeys(
        (
            "stock_load",
            "own_load",
            "max_logit_difference",
            "tolerance",
            "generated_tokens",
            "stock_layers",
            "source",
            "not_compared",
        )
    ),
    **{key: [] for key in ("missing", "unexpected", "mismatched", "notes")},
}


def build_report(
    *,
    source: str,
    plan: Any,
    fingerprint: dict[str, Any],
    lines: list[dict[str, Any]],
    sizes: dict[str, Any],
    measured: Measured,
    gates: list[dict[str, Any]],
    verification: dict[str, Any],
    calibration: Samples | None,
    held_out: Samples | None,
    run: dict[str, Any],
    environment: dict[str, Any],
) -> dict[str, Any]:
    """The whole report as JSON values: sorted keys, non-finite numbers as null.

    source  what the model is called
    plan    with the pinned recipe
    """
    structure, recipe = plan.structure, plan.recipe
    predicted = {row.name: row for row in plan.rows}
    weights = []
    for line in lines:
        for record in line["records"]:
            row = predicted[record["name"]]
            after = record["bytes_after"]  # what was stored; a pass that decides stores less than plan's upper bound
            bits = 8 * after / math.prod(record["shape"]) if len(record["shape"]) == 2 else None  # of functions
            size = {"bytes_before": row.bytes_before, "bytes_after": after, "bits_per_parameter": bits}
            weights.append({"fallback": None, **{k: v for k, v in record.items() if k != "seconds"}, **size})
    seconds = {record["name"]: record["seconds"] for line in lines for record in line["records"]}
    warnings = (
        list(plan.warnings)
        + [warning for line in lines for warning in line["warnings"]]
        + unmeasured_warnings(measured.metrics)
    )
    passed = all(gate["passed"] for gate in gates)
    status = "verification_failed" if verification["problems"] else "ok" if passed else "gate_failed"
    report = {
        "report_version": REPORT_VERSION,
        "tool": {"name": "compress-model", "version": VERSION},
        "status": status,
        "recipe": {"name": recipe.name, "sha256": recipe.sha256, "resolved": recipe.resolved()},
        "model": {
            "source": source,
            "sha256": fingerprint["model"],
            "architecture": structure.architecture,
            "parameters": sizes["parameters"],
            "blocks": structure.block_count,
            "dtype": str(structure.dtype).removeprefix("torch."),
            "license": structure.checkpoint.license,
            "side_files": structure.checkpoint.side_files.to_dict(),
        },
        "route": {"name": plan.route.name, "reason": plan.route.reason},
        "seeds": {
            "run": recipe.seed,
            "data": recipe.seed if recipe.data.seed is None else recipe.data.seed,
            "eval": recipe.seed if recipe.eval.data.seed is None else recipe.eval.data.seed,
        },
        "data": {"calibration": calibration and data_facts(calibration), "eval": held_out and data_facts(held_out)},
        "sizes": sizes,
        "metrics": measured.metrics,
        "saturation": measured.saturation,
        "patches": measured.patches,
        "gates": gates,
        "reshapes": [reshape.to_dict() for reshape in plan.reshapes],
        "steps": [
            {
                "index": number,
                "pass": step.name,
                "path": ".".join(map(str, step.path)),
                "matched": len(plan.selected[step.path]),
                "settings": step.settings.model_dump(mode="json", by_alias=True),
            }
            for number, step in enumerate(recipe.steps)
        ],
        "weights": weights,
        "skipped": list(plan.skipped),
        "unused_tensors": list(plan.unused),
        "warnings": warnings,
        "verification": {**NOT_VERIFIED, **verification},
        "kernels": [
            {
                "op": form,
                "chosen": "reference",
                "why": "speed was not measured; quality is that of stock transformers",
            }
            for form in sorted({record["form"] for line in lines for record in line["records"]} - {"dense"})
        ]
        if measured.kernels is None
        else measured.kernels,
        "run": {**run, "seconds_by_weight": seconds},
        "environment": environment,
    }
    return finite(report)


def finite(value: Any) -> Any:
    """The same tree with NaN and Inf as null, and keys sorted."""
    if isinstance(value, dict):
        return {key: finite(value[key]) for key in sorted(value)}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def unmeasured_warnings(metrics: dict[str, Any]) -> list[dict[str, str]]:
    """A warning for each metric that was asked for and has no value."""
    return [
        {"code": "not-measured", "where": name, "message": row.get("reason", "not a finite number")}
        for name, row in metrics.items()
        if row["after"] is None
    ]


def is_evaluation(report: dict[str, Any]) -> bool:
    return "evaluation_version" in report


def validate_report(report: dict[str, Any]) -> None:
    """raises jsonschema.ValidationError if the report isn't as its schema says"""
    import jsonschema

    schema = json.loads((HERE / "report.schema.json").read_text())
    kind = "evaluation" if is_evaluation(report) else "run_report"  # named, for an error that says what is wrong
    jsonschema.validate(report, {"$schema": schema["$schema"], "$ref": f"#/$defs/{kind}", "$defs": schema["$defs"]})


def write_reports(report: dict[str, Any], directory: Path, settings: ReportSettings) -> list[Path]:
    """report.json always; Markdown, HTML, JUnit and the GitHub summary as the recipe's `report` section says.

    An evaluation has no HTML form.
    """
    validate_report(report)
    written = {"report.json": json.dumps(report, indent=1, ensure_ascii=False) + "\n"}
    if settings.markdown:
        written["report.md"] = render_markdown(report)
    if settings.html and not is_evaluation(report):
        written["report.html"] = render_html(report)
    if settings.junit:
        written["junit.xml"] = render_junit(report)
    for name, text in written.items():
        (directory / name).write_text(text, encoding="utf-8")
    append_summary(report, settings)
    return [directory / name for name in written]


def append_summary(report: dict[str, Any], settings: ReportSettings) -> None:
    """The Markdown form at the end of the file that $GITHUB_STEP_SUMMARY names, if it names one."""
    if (summary := _summary_file(settings)) is not None:
        with summary.open("a", encoding="utf-8") as file:
            file.write(render_markdown(report) + "\n")


def render_markdown(report: dict[str, Any]) -> str:
    if is_evaluation(report):
        return _template("evaluation.md.j2", r=report)
    worst, outliers, tables = worst_weights(report), outlier_inputs(report), tabulated(report)
    return _template("report.md.j2", r=report, worst=worst, error_of=error_of, outliers=outliers, tables=tables)


def render_html(report: dict[str, Any]) -> str:
    """One self-contained page: inline SVG plots, no scripts, no requests."""
    plots, outliers, tables = _plots(report), outlier_inputs(report), tabulated(report)
    return _template("report.html.j2", r=report, error_of=error_of, plots=plots, outliers=outliers, tables=tables)


def render_comparison(found: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """What `compare` found, as one self-contained page."""
    return _template("compare.html.j2", c=found, rows=rows)


def render_junit(report: dict[str, Any]) -> str:
    """One suite per artifact: a case per gate, and for a run one for the verification."""
    name = report["name"] if is_evaluation(report) else report["recipe"]["name"]
    suite = junitparser.TestSuite(f"compress-model {name} {report['model']['source']}")
    if not is_evaluation(report):
        case = junitparser.TestCase("verification", report["model"]["source"])
        if report["verification"]["problems"]:
            case.result = [junitparser.Error("; ".join(report["verification"]["problems"]))]
        suite.add_testcase(case)
    for gate in report["gates"]:
        case = junitparser.TestCase(gate["name"], report["model"]["source"])
        if not gate["passed"]:
            value = "not measured" if gate["value"] is None else f"value {gate['value']}"
            case.result = [junitparser.Failure(f"{value}, bound {gate['bound']}, interval {gate['interval']}")]
        suite.add_testcase(case)
    xml = junitparser.JUnitXml()
    xml.add_testsuite(suite)
    return xml.tostring().decode()


def write_card(report: dict[str, Any], checkpoint: Any, directory: Path) -> None:
    """The model card, README.md: front matter for the hub, and what was done, measured and should be known."""
    front = {
        **checkpoint.licence.front_matter(),
        "base_model": report["model"]["source"],
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "tags": [
            "compress-model",
            *([report["route"]["name"]] if report["route"]["name"] in FAMILIES else []),
        ],
    }
    text = _template("card.md.j2", r=report, front=yaml.safe_dump(front, sort_keys=False))
    (directory / "README.md").write_text(text, encoding="utf-8")


def human_bytes(value: float | None) -> str:
    if value is None:
        return "n/a"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024 or unit == "TiB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.2f} {unit}"
        value /= 1024
    raise AssertionError


def human(value: Any, digits: int = 4) -> str:
    if value is None:
        return "n/a"
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)


def worst_weights(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The weights with the largest relative output (or weight) error."""
    known = [weight for weight in report["weights"] if error_of(weight) is not None]
    return sorted(known, key=lambda weight: -(error_of(weight) or 0))[:WORST]


def error_of(weight: dict[str, Any]) -> float | None:
    return weight.get("output_error", weight.get("weight_error"))


def tabulated(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of functions that are read from tables."""
    return [weight for weight in report["weights"] if "table_bound" in weight]


def outlier_inputs(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of weights whose inputs' outlier features were counted, one for each input that weights share."""
    return [weight for weight in report["weights"] if weight.get("input") == weight["name"]]


def data_facts(samples: Samples) -> dict[str, Any]:
    """What a report says of the samples that were used."""
    source = bare_source(samples.source)
    return {
        "source": source if source.startswith("dataset:") else Path(source).name,
        "sha256": samples.sha256,
        "samples": len(samples.inputs),
        "tokens": samples.tokens,
        "distinct_tokens": samples.distinct_tokens,
        "digest": samples.digest,
        "part": samples.part,
    }


def _template(name: str, **values: Any) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE / "templates"),
        autoescape=name.endswith("html.j2"),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters.update(bytes=human_bytes, number=human)
    return environment.get_template(name).render(**values)


def _plots(report: dict[str, Any]) -> dict[str, str]:
    """Title -> SVG source. A plot without data is left out."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    style: Any = {
        "svg.hashsalt": "compress-model",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "axes.edgecolor": "#8a8f98",
        "text.color": "#8a8f98",
        "axes.labelcolor": "#8a8f98",
        "xtick.color": "#8a8f98",
        "ytick.color": "#8a8f98",
    }
    plots: dict[str, str] = {}
    with plt.rc_context(style):
        measured = [w for w in report["weights"] if error_of(w) is not None]
        if measured:
            figure, axes = plt.subplots(figsize=(10, 3.2))
            _draw_errors(axes, measured)
            plots["Relative output error of each weight"] = _svg(figure)
        if report.get("patches"):
            shown = report["patches"]["images"]
            figure, panels = plt.subplots(2, len(shown), figsize=(1.6 * len(shown), 3.4), squeeze=False)
            _draw_patches(panels, report["patches"])
            plots["Patches kept of sample images: brighter ones passed more gates"] = _svg(figure)
        if counted := outlier_inputs(report):
            figure, panels = plt.subplots(1, 3, figsize=(10, 2.8), layout="constrained")
            _draw_outliers(figure, panels, counted)
            plots["Outlier features of each input, on calibration data"] = _svg(figure)
        figure, axes = plt.subplots(figsize=(5, 2.6))
        _draw_bytes(axes, report["sizes"])
        plots["Bytes before and after"] = _svg(figure)
        if (row := report["metrics"].get("perplexity")) and row["before"] and row["after"]:
            figure, axes = plt.subplots(figsize=(5, 2.6))
            sizes = report["sizes"]
            for side, colour in (("before", "#8a8f98"), ("after", "#2f6feb")):
                axes.scatter([sizes[f"{side}_bytes"] / 2**20], [row[side]], s=60, color=colour)
                axes.annotate(
                    side, (sizes[f"{side}_bytes"] / 2**20, row[side]), xytext=(8, -3), textcoords="offset points"
                )
            axes.set(xlabel="weight files, MiB", ylabel="perplexity", xlim=(0, sizes["before_bytes"] / 2**20 * 1.2))
            axes.margins(y=0.4)
            plots["Quality against size"] = _svg(figure)
    return plots


def _draw_errors(axes: Any, weights: list[dict[str, Any]]) -> None:
    import matplotlib

    kinds = list(dict.fromkeys(weight["name"].rpartition(".")[2] for weight in weights))
    colours = matplotlib.colormaps["tab10"]
    for number, kind in enumerate(kinds):
        chosen = [weight for weight in weights if weight["name"].rpartition(".")[2] == kind]
        x = [weight["unit"] - 1 for weight in chosen]
        axes.plot(
            x, [error_of(weight) for weight in chosen], "o-", ms=4, lw=1.2, label=kind, color=colours(number % 10)
        )
        if all("output_error_rtn" in weight for weight in chosen):
            rounded = [weight["output_error_rtn"] for weight in chosen]
            axes.plot(x, rounded, ":", lw=1, color=colours(number % 10))
    axes.xaxis.get_major_locator().set_params(integer=True)
    dotted = any("output_error_rtn" in weight for weight in weights)
    label = "block (dotted: round to nearest on the same grid)" if dotted else "block"
    axes.set(xlabel=label, ylabel="relative error", ylim=(0, None))
    axes.legend(ncol=1, frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


def _draw_patches(panels: Any, patches: dict[str, Any]) -> None:
    """Each image as it is, and below it with its patches the darker, the earlier a gate dropped them."""
    import numpy

    for (above, below), shown in zip(panels.T, patches["images"], strict=True):
        pixels, survived = numpy.array(shown["pixels"]), numpy.array(shown["survived"])
        rows = numpy.arange(pixels.shape[0]) * survived.shape[0] // pixels.shape[0]
        columns = numpy.arange(pixels.shape[1]) * survived.shape[1] // pixels.shape[1]
        share = survived[numpy.ix_(rows, columns)] / patches["gates"]
        above.imshow(pixels, cmap="gray", vmin=0, vmax=255)
        below.imshow(numpy.ones_like(share), cmap="Blues", vmin=0, vmax=1)
        below.imshow(64 + 0.75 * pixels, cmap="gray", vmin=0, vmax=255, alpha=share)
        for axes in (above, below):
            axes.set_axis_off()


def _draw_outliers(figure: Any, panels: Any, inputs: list[dict[str, Any]]) -> None:
    import matplotlib

    kinds = list(dict.fromkeys(row["name"].rpartition(".")[2] for row in inputs))
    colours = matplotlib.colormaps["tab10"]
    for axes, key, factor, label in zip(
        panels,
        ("outlier_features", "outlier_token_share", "outlier_magnitude"),
        (1, 100, 1),
        ("outlier features", "tokens with one, %", "largest |x|"),
        strict=True,
    ):
        for number, kind in enumerate(kinds):
            chosen = [row for row in inputs if row["name"].rpartition(".")[2] == kind]
            values = [factor * row[key] for row in chosen]
            x = [row["unit"] - 1 for row in chosen]
            axes.plot(x, values, "o-", ms=4, lw=1.2, label=f"input of {kind}", color=colours(number % 10))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set(xlabel="block", ylabel=label, ylim=(0, None))
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncol=len(kinds), frameon=False, fontsize=8
    )


def _draw_bytes(axes: Any, sizes: dict[str, Any]) -> None:
    axes.barh(["before"], [sizes["before_bytes"] / 2**20], color="#8a8f98", height=0.5)
    left = 0.0
    import matplotlib

    colours = matplotlib.colormaps["tab10"]
    for number, (name, size) in enumerate((n, s) for n, s in sizes["by_class"].items() if s):
        axes.barh(["after"], [size / 2**20], left=left, color=colours(number % 10), height=0.5, label=name)
        left += size / 2**20
    axes.invert_yaxis()
    axes.set(xlabel="MiB")
    axes.legend(ncol=4, frameon=False, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.25))


def _svg(figure: Any) -> str:
    import matplotlib.pyplot as plt

    buffer = io.StringIO()
    figure.savefig(
        buffer, format="svg", bbox_inches="tight", transparent=True, metadata={"Date": None, "Creator": None}
    )
    plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]
