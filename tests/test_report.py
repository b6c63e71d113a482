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

from compressor.compare import compare
from compressor.errors import UsageError
from compressor.recipe import parse_recipe
from compressor.report import (
    _without_folders,
    finite,
    human_bytes,
    render_html,
    render_junit,
    render_markdown,
    validate_report,
)
from compressor.run import compress

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


def test_it_satisfies_its_schema_and_a_changed_one_does_not(report):
    validate_report(report)
    with pytest.raises(jsonschema.ValidationError):
        validate_report({**report, "status": "splendid"})


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


def test_folders_of_data_files_stay_out_of_the_report():
    data = {"source": "/home/someone/notes.txt"}
    tree = {"version": 1, "data": data, "steps": [{"pass": "rtn"}], "eval": {"data": {"source": "dataset:/srv/x"}}}
    told = _without_folders(parse_recipe(yaml.safe_dump(tree).encode(), "r.yaml").resolved())
    assert told["data"]["source"] == "notes.txt" and told["eval"]["data"]["source"] == "dataset:x"
    assert _without_folders({**told, "data": {"source": "stdlib"}})["data"]["source"] == "stdlib"


def test_the_page_is_self_contained(report):
    page = render_html(report)
    assert len(page) < 3_000_000 and "<script" not in page
    assert page.count("<svg") == 3
    assert not re.search(r"""(?:src|href)=["']?https?:|url\((?!#)|@import""", page)


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
    assert (artifact.parent / "summary.md").read_text() == (artifact / "report.md").read_text()


def test_comparing_lines_up_reports_and_checkpoints(artifact):
    found = compare([artifact.parent / "model", artifact])
    sizes = found["rows"][0]["values"]
    assert sizes[0] > sizes[1] and len(found["weights"]) == 14
    with pytest.raises(UsageError, match="is not a report"):
        compare([artifact / "junit.xml", artifact])


def test_numbers_without_a_value_become_null():
    assert finite({"b": float("nan"), "a": [float("inf"), 1]}) == {"a": [None, 1], "b": None}
    assert human_bytes(3 * 2**20) == "3.00 MiB"
