"""Which files of an artifact matter, and which may be removed: only what this tool wrote."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from raising import raises

from compressor.artifact.files import check_files, compare_files, file_facts, matters, owned_files, remove_artifact
from compressor.artifact.manifest import read_manifest
from compressor.engine.request import check_request
from compressor.errors import ArtifactError, ModelError, UsageError
from compressor.recipe.recipe import parse_recipe
from compressor.storage.file_names import MANIFEST
from compressor.storage.journal import Journal, remove_work

FILES = {
    "model.safetensors": "weights",
    "config.json": "{}",
    "tokenizer.json": "{}",
    "1_Pooling/config.json": "{}",
    "README.md": "# A card",
    "LICENSE": "mine",
    "report.json": "{}",
    "recipe.yaml": "version: 1",
}
WEIGHT = {
    "form": "packed_linear",
    "spec": {"bits": 8},
    "name": "a.b",
    "tensor": "a.b.weight",
    "parameter": "a.b.weight",
    "shape": [4, 4],
    "role": "mlp",
    "transposed": False,
    "expert": None,
    "rows": None,
    "bias": None,
}


def manifest_of(directory: Path, **changes) -> dict:
    return {
        "format_version": 1,
        "tool": {"name": "compress-model", "version": "0"},
        "architecture": "LlamaForCausalLM",
        "route": "dense",
        "reason": "no weight changed its format",
        "source": {"name": "m", "sha256": "0" * 64},
        "weights": {"a.b": WEIGHT},
        "layers": {"packed_linear": "compressor"},
        "files": file_facts(directory),
        **changes,
    }


def write_manifest(directory: Path, **changes) -> None:
    (directory / MANIFEST).write_text(json.dumps(manifest_of(directory, **changes)))


@pytest.fixture
def artifact(tmp_path):
    directory = tmp_path / "artifact"
    for name, content in FILES.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(content)
    write_manifest(directory)
    return directory


def test_an_artifact_as_written_is_removed(artifact):
    remove_artifact(artifact)
    assert not artifact.exists()


ELSEWHERE = ["../thesis", "/abs", "a/../../thesis", "..", "./thesis", "a//b", "", ".", "a\\b", "a\n"]


def test_a_file_of_the_manifests_name_in_a_folder_is_listed_and_removed(artifact):
    (artifact / "sub").mkdir()
    (artifact / "sub" / MANIFEST).write_text("{}")
    assert "sub/compress_manifest.json" in compare_files(artifact, read_manifest(artifact))[1][0]
    write_manifest(artifact)
    assert compare_files(artifact, read_manifest(artifact)) == ([], [])
    remove_artifact(artifact)
    assert not artifact.exists()


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_manifest_that_lists_what_lies_elsewhere_removes_nothing(name, artifact, tmp_path):
    thesis = tmp_path / "thesis"
    thesis.write_text("precious")
    listed = str(thesis) if name == "/abs" else name
    write_manifest(artifact, files={**file_facts(artifact), listed: {"bytes": 8, "sha256": "0" * 64}})
    with raises(UsageError, where=artifact, reason="no-artifact"):
        remove_artifact(artifact)
    assert thesis.read_text() == "precious" and {*FILES} <= {*file_facts(artifact)}


def add_file(artifact, outside):
    (artifact / "notes.txt").write_text("mine")


def add_deep_file(artifact, outside):
    (artifact / ".git" / "objects").mkdir(parents=True)
    (artifact / ".git" / "objects" / "ab").write_text("mine")


def edit_card(artifact, outside):
    (artifact / "README.md").write_text("# My own words")


def replace_weights(artifact, outside):
    (artifact / "model.safetensors").write_text("other weights")


def edit_weights(artifact, outside):
    file = artifact / "model.safetensors"
    file.write_text(file.read_text().swapcase())


def link_listed_file(artifact, outside):
    (artifact / "config.json").unlink()
    (artifact / "config.json").symlink_to(outside / "config.json")


def link_listed_folder(artifact, outside):
    (artifact / "1_Pooling" / "config.json").unlink()
    (artifact / "1_Pooling").rmdir()
    (artifact / "1_Pooling").symlink_to(outside)


def link_folder(artifact, outside):
    (artifact / "data").symlink_to(outside)


def add_fifo(artifact, outside):
    os.mkfifo(artifact / "pipe")


def replace_by_fifo(artifact, outside):
    (artifact / "LICENSE").unlink()
    os.mkfifo(artifact / "LICENSE")


FOREIGN = [
    (add_file, "foreign-files", "notes.txt"),
    (add_deep_file, "foreign-files", ".git/objects/ab"),
    (edit_card, "changed-files", "README.md"),
    (replace_weights, "changed-files", "model.safetensors"),
    (edit_weights, "changed-files", "model.safetensors"),
    (link_listed_file, "foreign-files", "config.json"),
    (link_listed_folder, "foreign-files", "1_Pooling"),
    (link_folder, "foreign-files", "data"),
    (add_fifo, "foreign-files", "pipe"),
    (replace_by_fifo, "foreign-files", "LICENSE"),
]


@pytest.mark.parametrize(("change", "reason", "name"), FOREIGN, ids=[change.__name__ for change, *_ in FOREIGN])
def test_what_could_be_somebodys_only_copy_keeps_all(change, reason, name, artifact, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "config.json").write_text("{}")
    change(artifact, outside)
    before = sorted(artifact.rglob("*"))
    with raises(UsageError, where=artifact, reason=reason, names=[name]):
        remove_artifact(artifact)
    assert sorted(artifact.rglob("*")) == before and (outside / "config.json").read_text() == "{}"


def test_a_link_to_an_artifact_is_none(artifact, tmp_path):
    (tmp_path / "link").symlink_to(artifact)
    before = sorted(artifact.rglob("*"))
    with raises(UsageError, where=tmp_path / "link", reason="is-link"):
        remove_artifact(tmp_path / "link")
    assert sorted(artifact.rglob("*")) == before


@pytest.mark.parametrize("there", ["artifact", "nowhere"])
def test_a_link_where_a_rejected_result_would_go_is_refused_before_the_work(there, artifact, tmp_path):
    (tmp_path / "out.rejected").symlink_to(tmp_path / there)
    gated = parse_recipe(b"version: 1\nsteps: [{pass: rtn}]\neval: {gates: {size_ratio: 0.01}}\n")
    with raises(UsageError, where=tmp_path / "out.rejected", reason="is-link"):
        check_request(gated, tmp_path / "out", resume=False, fresh=False, measure=True)


def test_an_unfinished_removal_can_go_on(artifact):
    (artifact / "LICENSE").unlink()
    assert len(owned_files(artifact)) == len(FILES)  # with the manifest
    remove_artifact(artifact)


HARMLESS = [
    ".gitattributes",
    ".git/HEAD",
    ".cache/huggingface/.gitignore",
    "notes.txt",
    "picture.png",
    "sub/paper.pdf",
    "eval_results.json",
    "trainer_state.json",
    "LICENSE.md",
    "figures.html",
    "data.csv",
    "Makefile",
]
HARMFUL = [
    "model-00001-of-00002.safetensors",
    "pytorch_model.bin",
    "evil.py",
    "deep/evil.py",
    "lib.so",
    "custom_generate/generate.py",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "x.tiktoken",
    "chat_template.jinja",
    "preprocessor_config.json",
    "modules.json",
    "adapter_config.json",
    "model.safetensors.index.json",
    "2_Dense/config.json",
    "onnx/model.onnx",
]


@pytest.mark.parametrize("name", HARMLESS)
def test_a_file_that_no_loader_opens_may_lie_there(name, artifact):
    (artifact / name).parent.mkdir(parents=True, exist_ok=True)
    (artifact / name).write_text("x")
    assert check_files(artifact, read_manifest(artifact)) == []


@pytest.mark.parametrize("name", HARMFUL)
def test_a_file_that_a_loader_may_open_is_a_problem(name, artifact):
    (artifact / name).parent.mkdir(parents=True, exist_ok=True)
    (artifact / name).write_text("x")
    assert check_files(artifact, read_manifest(artifact)) == [f"{name} is not in the manifest"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("change", ["edited", "missing"])
def test_a_change_is_a_problem_where_loaders_look_and_else_a_note(name, change, artifact):
    if change == "edited":
        (artifact / name).write_text("changed")
    else:
        (artifact / name).unlink()
    problems, notes = compare_files(artifact, read_manifest(artifact))
    assert (problems, notes) == (([], notes) if not matters(name) else (problems, []))
    reason = "changed" if change == "edited" else "missing"
    assert [told.data for told in problems + notes] == [{"reason": reason, "file": name}]
    assert matters(name) == (name in ("model.safetensors", "config.json", "tokenizer.json", "1_Pooling/config.json"))


ACCOUNT = {"becomes": "copied", "how": "stays dense", "bytes": 4, "tensors": {"a": 4}}
BROKEN = {
    "format": {"format_version": 2},
    "architecture of a module": {"architecture": "modeling_utils"},
    "architecture of a function": {"architecture": "pipeline"},
    "architecture of a config": {"architecture": "LlamaConfig"},
    "architecture of an auto class": {"architecture": "AutoModel"},
    "architecture of the base class": {"architecture": "PreTrainedModel"},
    "architecture with dots": {"architecture": "os.system"},
    "architecture of a number": {"architecture": 3},
    "no files": {"files": None},
    "files as a list": {"files": ["config.json"]},
    "negative bytes": {"files": {"a": {"bytes": -1, "sha256": "0" * 64}}},
    "bytes as text": {"files": {"a": {"bytes": "1", "sha256": "0" * 64}}},
    "no hash": {"files": {"a": {"bytes": 1}}},
    "a short hash": {"files": {"a": {"bytes": 1, "sha256": "0"}}},
    "itself": {"files": {MANIFEST: {"bytes": 1, "sha256": "0" * 64}}},
    "weights as a list": {"weights": []},
    "a weight of another name": {"weights": {"other": WEIGHT}},
    "no form": {"weights": {"a.b": {**WEIGHT, "form": None}}},
    "a form that is a path": {"weights": {"a.b": {**WEIGHT, "form": "os:system"}}},
    "spec as text": {"weights": {"a.b": {**WEIGHT, "spec": "x"}}},
    "a huge shape": {"weights": {"a.b": {**WEIGHT, "shape": [2**62, 2**62]}}},
    "a negative shape": {"weights": {"a.b": {**WEIGHT, "shape": [-1, 4]}}},
    "a shape of text": {"weights": {"a.b": {**WEIGHT, "shape": ["4", "4"]}}},
    "a matrix of one dimension": {"weights": {"a.b": {**WEIGHT, "shape": [4]}}},
    "rows of three": {"weights": {"a.b": {**WEIGHT, "rows": [1, 2, 3]}}},
    "a parameter that is no path": {"weights": {"a.b": {**WEIGHT, "parameter": "a.__class__"}}},
    "a role that none has": {"weights": {"a.b": {**WEIGHT, "role": "x"}}},
    "an expert without rows": {"weights": {"a.b": {**WEIGHT, "expert": 1, "rows": None}}},
    "rows without an expert": {"weights": {"a.b": {**WEIGHT, "expert": None, "rows": [0, 4]}}},
    "rows that end before they begin": {"weights": {"a.b": {**WEIGHT, "expert": 1, "rows": [4, 4]}}},
    "layers as a list": {"layers": ["os"]},
    "a source without a name": {"source": {}},
    "a change without its step": {"source": {"name": "m", "sha256": "", "changes": [{"rewrites": True}]}},
    "carried as a list": {"carried": ["x"]},
    "a ledger that lacks bytes": {"ledger": {"source_bytes": 9, "accounts": [ACCOUNT]}},
    "an account that lacks bytes": {"ledger": {"source_bytes": 9, "accounts": [{**ACCOUNT, "bytes": 9}]}},
    "an account of what nobody knows": {"ledger": {"source_bytes": 4, "accounts": [{**ACCOUNT, "becomes": "x"}]}},
    "carried as null": {"carried": None},
    "carried that reports a number": {"carried": {"x": 5}},
    "carried that reports a list": {"carried": {"x": [[]]}},
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_manifest_that_says_what_none_of_ours_says_is_refused(kind, artifact):
    write_manifest(artifact, **BROKEN[kind])
    with pytest.raises(ArtifactError):
        read_manifest(artifact)


@pytest.mark.parametrize("content", ["", "{", "3", "[]", "[" * 100_000, "null", '{"format_version": 1}'])
def test_a_manifest_that_is_no_manifest_is_refused(content, artifact):
    (artifact / MANIFEST).write_text(content)
    with pytest.raises(ArtifactError):
        read_manifest(artifact)


def test_a_manifest_that_is_a_fifo_is_refused(artifact):
    (artifact / MANIFEST).unlink()
    os.mkfifo(artifact / MANIFEST)
    with raises(ModelError, where=MANIFEST, reason="no-regular-file", kind="a FIFO"):
        read_manifest(artifact)


@pytest.fixture
def work(tmp_path):
    journal = Journal.create(tmp_path / "out.work", {})
    journal.close()
    return tmp_path / "out.work"


def test_a_work_directory_is_removed(work):
    (work / "artifact").mkdir()
    (work / "artifact" / "config.json").write_text("{}")
    remove_work(work)
    assert not work.exists()


@pytest.mark.parametrize("place", ["artifact", "parts", "scratch", "lock", "journal.jsonl"])
def test_a_link_in_a_work_directory_is_refused_and_not_followed(place, work, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "thesis").write_text("precious")
    if (work / place).is_dir():
        (work / place).rmdir()
    else:
        (work / place).unlink(missing_ok=True)
    (work / place).symlink_to(outside / "thesis" if "." in place or place == "lock" else outside)
    with raises(UsageError, where=work, reason="foreign-files", names=[place]):
        remove_work(work)
    assert (outside / "thesis").read_text() == "precious" and (work / "run.json").exists()


def test_a_work_directory_that_is_a_link_is_refused(work, tmp_path):
    (tmp_path / "other.work").symlink_to(work)
    with pytest.raises(UsageError):
        remove_work(tmp_path / "other.work")
    assert (work / "run.json").exists()
