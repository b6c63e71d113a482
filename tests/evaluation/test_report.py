"""The report is valid, self-contained, and can be rendered again from report.json alone."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jsonschema
import junitparser
import pytest
import tiny
import torch
import yaml
from raising import raises

from compressor.artifact.findings import Findings
from compressor.cli.main import main
from compressor.errors import UsageError
from compressor.evaluation.compare import compare
from compressor.evaluation.render import human_bytes, render_comparison, render_html, render_junit, render_markdown
from compressor.evaluation.report import validate_report
from compressor.process.json_values import finite
from compressor.recipe.recipe import parse_recipe, read_recipe
from compressor.run import compress

ROOT = Path(__file__).parents[2]
SMALL = {"source": "random", "samples": 8, "length": 16}


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    model = tiny.save("llama", folder / "model", dtype=torch.bfloat16)
    tree = {
        "version": 1,
        "data": SMALL,
        "steps": [{"pass": "gptq", "group_size": 32, "bits": 3}],
        "eval": {"metrics": ["perplexity", "kl_divergence", "accuracy", "size"], "data": SMALL,
                 "gates": {"size_ratio": 0.9}},
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GITHUB_STEP_SUMMARY", str(folder / "summary.md"))
        compress(parse_recipe(yaml.safe_dump(tree).encode(), "report.yaml"), str(model), folder / "out")
    return folder / "out"


@pytest.fixture
def report(artifact):
    return json.loads((artifact / "report.json").read_text())


SECTIONS = (
    "tool",
    "recipe",
    "model",
    "route",
    "seeds",
    "data",
    "sizes",
    "ledger",
    "verification",
    "run",
    "environment",
)


def test_a_stock_loader_counts_no_saturation_and_the_report_says_so(report):
    assert report["saturation"]["layers"] == []
    assert "run in the loader's own layers (compressed-tensors)" in report["saturation"]["reason"]
    assert "were not counted: 14 stored weights" in render_markdown(report)


def test_functions_of_every_kind_are_told_with_what_their_tables_cost(report):
    common = {"entries": 256, "lookup": "linear"}
    all_params = {"activation": {"function": "silu"}, "norm": {"kind": "rms"}, "softmax": {}}
    rows = [
        {
            **{key: value for key, value in report["weights"][0].items() if "error" not in key},
            "name": role,
            "role": role,
        }
        | {"spec": {**common, **format_params}, "shape": [], "bits_per_parameter": None}
        | {"table_bound": 0.25, "table_range": [-1.0, 0.0]}
        for role, format_params in all_params.items()
    ]
    found = {**report, "weights": [*report["weights"], *rows]}
    validate_report(found)
    page, text = render_html(found), render_markdown(found)
    assert all(
        f"<td>{role}</td><td>{kind}</td>" in page for role, kind in zip(all_params, ("silu", "rms", "exp"), strict=True)
    )
    assert "3 functions read from tables" in page and "| norm | 1 | 256 | linear | 0.25 of the output |" in text


def test_saturation_is_reported_in_every_format(report):
    layers = [{"name": "a.q", "values": 200, "outside": 3}, {"name": "a.k", "values": 200, "outside": 0}]
    found = {**report, "saturation": {"reason": None, "layers": layers}}
    validate_report(found)
    assert "| a.q | 200 | 3 | 1.5 % |" in render_markdown(found) and "1 of 2 layers" in render_markdown(found)
    assert "3 of 400 values that 2 layers read" in render_html(found)


def test_it_satisfies_its_schema_and_a_changed_one_does_not(report):
    validate_report(report)
    for changed in (
        {"status": "splendid"},
        {"gates": [{**report["gates"][0], "passed": "yes"}]},
        {"metrics": {"perplexity": {**report["metrics"]["perplexity"], "direction": "sideways"}}},
        {"weights": [{key: value for key, value in report["weights"][0].items() if key != "form"}]},
        {"warnings": [{"code": "x"}]},
        *({section: {**report[section], "surprise": 1}} for section in SECTIONS),
    ):
        with pytest.raises(jsonschema.ValidationError):
            validate_report({**report, **changed})


def test_a_report_without_a_ledger_is_one_of_an_earlier_release(report):
    row = {"name": "mtp.fc.weight", "bytes": 8, "reason": "the class doesn't know it", "carried": True}
    earlier = {key: value for key, value in report.items() if key != "ledger"} | {"unused_tensors": [row]}
    validate_report(earlier)
    assert "tensors of the source" in render_markdown(report) and "Tensors of the source" in render_html(report)
    assert "tensors of the source" not in render_markdown(earlier) + render_html(earlier).lower()


def test_a_pass_may_add_values_of_its_own_to_its_rows_but_no_trees(report):
    row = report["weights"][0]
    validate_report({**report, "weights": [{**row, "rank": 8, "kept": [1, 2], "note": "x", "exact": None}]})
    with pytest.raises(jsonschema.ValidationError):
        validate_report({**report, "weights": [{**row, "tree": {"a": 1}}]})


def test_the_schema_in_the_docs_is_the_one_that_is_shipped():
    shipped = ROOT / "compressor" / "evaluation" / "report.schema.json"
    assert (ROOT / "docs" / "report.schema.json").read_bytes() == shipped.read_bytes()
    jsonschema.Draft202012Validator.check_schema(json.loads(shipped.read_text()))


def test_every_section_of_the_schema_is_explained_in_the_docs():
    page = (ROOT / "docs" / "report.md").read_text()
    definitions = json.loads((ROOT / "docs" / "report.schema.json").read_text())["$defs"]
    for kind in ("run_report", "evaluation"):
        missing = [key for key in definitions[kind]["properties"] if f"`{key}`" not in page]
        assert not missing, missing


def test_every_weight_is_told_of(report):
    told = {weight["name"] for weight in report["weights"]} | {row["name"] for row in report["skipped"]}
    assert len(report["weights"]) == 14 and "lm_head" in told
    for weight in report["weights"]:
        assert weight["output_error"] < weight["output_error_rtn"] * 1.05
        assert weight["calibration_tokens"] == 128 and weight["fallback"] is None
        assert weight["bits_per_parameter"] > 3


def test_sizes_add_up_to_the_file_and_were_predicted(report, artifact):
    sizes, weights = report["sizes"], artifact / "model.safetensors"
    assert sizes["after_bytes"] == weights.stat().st_size
    header = 8 + int.from_bytes(weights.read_bytes()[:8], "little")
    assert sum(sizes["by_class"].values()) + header == sizes["after_bytes"]
    assert abs(sizes["predicted_bytes"] / sizes["after_bytes"] - 1) < 0.02
    names = ("report.json", "report.md", "report.html", "junit.xml", "README.md", "compress_manifest.json")
    deployed = sum(f.stat().st_size for f in artifact.rglob("*") if f.is_file() and f.name not in names)
    assert abs(sizes["predicted_artifact_bytes"] / deployed - 1) < 0.05


def test_what_could_not_be_measured_is_a_warning(report):
    assert report["metrics"]["accuracy"]["after"] is None
    assert any(w["code"] == "not-measured" and w["where"] == "accuracy" for w in report["warnings"])


def test_it_holds_no_path_of_the_machine(artifact):
    for name in ("report.json", "report.md", "report.html", "README.md", "recipe.yaml", "compress_manifest.json"):
        assert str(Path(artifact).parent) not in (artifact / name).read_text(), name


def test_the_page_is_self_contained(report):
    page = render_html(report)
    assert len(page) < 3_000_000 and "<script" not in page
    assert page.count("<svg") == 3
    assert not re.search(r"""(?:src|href)=["']?https?:|url\((?!#)|@import""", page)


def test_the_page_of_an_artifact_that_does_not_verify_says_so_first(report):
    found = Findings(problems=["own loader: outputs differ by 3"]).to_json()
    page = render_html({**report, "status": "verification_failed", "verification": found})
    assert page.index("does not verify") < page.index("outputs differ by 3") < page.index("<h2>Quality")


def test_rendering_again_gives_the_same_files(report, artifact):
    assert render_markdown(report) == (artifact / "report.md").read_text()
    assert render_html(report) == (artifact / "report.html").read_text()


def test_junit_has_a_case_for_the_verification_and_each_gate(report):
    suite = next(iter(junitparser.JUnitXml.fromstring(render_junit(report).encode())))
    assert [case.name for case in suite] == ["verification", "size_ratio"] and suite.failures == 0
    failed = {**report["gates"][0], "passed": False}
    suite = next(iter(junitparser.JUnitXml.fromstring(render_junit({**report, "gates": [failed]}).encode())))
    assert suite.failures == 1


def test_the_github_summary_is_the_markdown(artifact):
    assert (artifact.parent / "summary.md").read_text() == (artifact / "report.md").read_text() + "\n"


def test_a_summary_that_cannot_be_written_is_refused_before_any_work(artifact, tmp_path, monkeypatch):
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "gone" / "summary.md"))
    with raises(UsageError, where="$GITHUB_STEP_SUMMARY", reason="not-writable"):
        compress(read_recipe("rtn-w8"), "demo", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_comparing_lines_up_reports_and_checkpoints(artifact):
    found = compare([artifact.parent / "model", artifact])
    sizes = found["rows"][0]["values"]
    assert sizes[0] > sizes[1] and len(found["weights"]) == 14
    with raises(UsageError, where=artifact / "junit.xml", reason="no-report"):
        compare([artifact / "junit.xml", artifact])


def measured(artifact, folder, digest="same", **metrics):
    """The artifact's report with other figures, in a directory of its own."""
    told = json.loads((artifact / "report.json").read_text())
    for name, value in metrics.items():
        told["metrics"][name]["after"] = value
    if digest != "same":
        told["data"]["eval"]["digest"] = digest
    folder.mkdir()
    (folder / "report.json").write_text(json.dumps(told))
    return folder


def test_a_comparison_is_gated_on_the_last_against_the_first(artifact, tmp_path):
    first, last = (measured(artifact, tmp_path / name, perplexity=value) for name, value in (("a", 10.0), ("b", 10.5)))
    gates = {"perplexity_increase_percent": 4, "perplexity": 11, "size_ratio": 1, "accuracy_min": 0.1}
    rows = {row["name"]: row for row in compare([first, artifact, last], gates)["gates"]}
    assert rows["perplexity_increase_percent"]["value"] == pytest.approx(5)
    assert {name: row["passed"] for name, row in rows.items()} == {
        "perplexity_increase_percent": False, "perplexity": True, "size_ratio": True, "accuracy_min": False,
    }  # fmt: skip
    assert compare([artifact.parent / "model", artifact], {"size_ratio": 0.9})["gates"][0]["value"] < 0.9


def test_figures_of_different_samples_are_told_apart(artifact, tmp_path):
    other = measured(artifact, tmp_path / "other", digest="f" * 64)
    assert compare([artifact, other])["warnings"][0]["code"] == "other-samples"
    assert not compare([artifact, artifact])["warnings"]
    with raises(UsageError, reason="other-samples", gates=["perplexity_increase_percent"]):
        compare([artifact, other], {"perplexity_increase_percent": 1})


def test_a_report_of_a_later_version_is_refused_with_what_to_do(tmp_path):
    (tmp_path / "report.json").write_text('{"report_version": 9}')
    told = {"reason": "version", "key": "report_version", "version": "9"}
    with raises(UsageError, where=tmp_path / "report.json", **told):
        compare([tmp_path, tmp_path])


def test_a_comparison_goes_to_a_file_in_the_form_its_name_says(artifact, tmp_path, capsys):
    paths = [str(artifact.parent / "model"), str(artifact)]
    for name, sign in (("c.md", "| weight file bytes |"), ("c.html", "<td>weight file bytes</td>"), ("c.json", "{")):
        assert main(["compare", *paths, "--output", str(tmp_path / name)]) == 0
        assert sign in (tmp_path / name).read_text()
    assert main(["compare", *paths, "--output", str(tmp_path / "no" / "c.md")]) == 2
    assert main(["compare", *paths, "--fail-on", "size_ratio=0.01", "--format", "markdown"]) == 3
    shown = capsys.readouterr()
    assert "| gate size_ratio | bound 0.01 |" in shown.out and "error[gate-failed]" in shown.err
    assert main(["compare", *paths, "--fail-on", "size_ration=1"]) == 2


def test_a_page_that_compares_escapes_names(artifact):
    found = compare([artifact, artifact])
    page = render_comparison({**found, "subjects": ["<b>", "a & b"]}, found["rows"])
    assert "<b>" not in page and "&lt;b&gt;" in page


def test_numbers_without_a_value_become_null():
    assert finite({"b": float("nan"), "a": [float("inf"), 1]}) == {"a": [None, 1], "b": None}
    assert human_bytes(3 * 2**20) == "3.00 MiB"
