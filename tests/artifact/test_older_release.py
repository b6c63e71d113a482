"""Artifacts that release 0.1.0 wrote: they load, compute what they did, and their reports are read.

The three artifacts and the logits (of its reference kernels, for tokens 0 to 11) were written by 0.1.0 from `source`, a
random Llama of one block: `stock` by gptq, `formats` by bct, low_rank, dsformer and llm_int8, `sliced` by slicegpt with
an orientation per site.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from raising import raises
from safetensors.torch import load_file

import compressor
from compressor.artifact.verify import verify_in_child
from compressor.errors import ArtifactError
from compressor.evaluation.compare import compare, read_subject
from compressor.evaluation.model_loading import load_model
from compressor.evaluation.render import render_html, render_junit, render_markdown

FOLDER = Path(__file__).parent / "release_0_1_0"
ARTIFACTS = ("stock", "formats", "sliced")
TOKENS = torch.arange(12)[None]


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits.float()


@pytest.mark.parametrize("name", ARTIFACTS)
def test_it_loads_and_computes_what_it_did(name):
    expected = load_file(FOLDER / "logits.safetensors")[name]
    found = logits(compressor.load(FOLDER / name, kernels="reference"))
    assert (found - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("name", ARTIFACTS)
def test_evaluation_loads_it_without_its_modeling_file(name):
    """A modeling file of another release is never run: the one of this release reads the same tensors."""
    expected = load_file(FOLDER / "logits.safetensors")[name]
    found = logits(load_model(FOLDER / name, trust_remote_code=False))
    assert (found - expected).norm() <= 0.01 * expected.norm()  # products of bfloat16, summed in another order


@pytest.mark.parametrize("name", ARTIFACTS)
def test_its_report_is_read(name):
    report = read_subject(FOLDER / name)
    assert [weight["part"] for weight in report["weights"]] == [1] * len(report["weights"])
    for render in (render_html, render_markdown, render_junit):
        assert name in render(report)


def test_reports_of_two_releases_are_compared():
    found = compare([FOLDER / name for name in ARTIFACTS])
    assert [row["values"] for row in found["rows"] if row["name"] == "weight file bytes"] == [
        [(FOLDER / name / "model.safetensors").stat().st_size for name in ARTIFACTS]
    ]


def test_it_is_verified_against_its_source():
    found = verify_in_child(FOLDER / "stock", None, sealed=True, source=FOLDER / "source")
    assert not found.problems and found.max_logit_difference == 0.0 and found.source.tensors.weights == 7


@pytest.mark.parametrize("name", ["formats", "sliced"])
def test_a_modeling_file_of_another_release_is_not_run_to_verify_it(name):
    with raises(ArtifactError, where="modeling_compressed_llama.py", reason="changed-code"):
        verify_in_child(FOLDER / name, None, sealed=True)
