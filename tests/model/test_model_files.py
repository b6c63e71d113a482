"""Only regular files inside a directory are opened; nothing blocks and nothing leads out."""

from __future__ import annotations

import os
import socket

import pytest
import tiny
from raising import raises

from compressor.data.tokenizing import load_tokenizer
from compressor.errors import ModelError
from compressor.model import model_files
from compressor.model.checkpoint import open_checkpoint
from compressor.model.model_files import check_directory, regular_file
from compressor.model.structure import read_structure


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return tiny.save("llama", tmp_path_factory.mktemp("m") / "model", shard="20KB")


@pytest.fixture
def model(original, tmp_path):
    """The same files, linked: a test replaces some."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in original.iterdir():
        os.link(file, folder / file.name)
    return folder


def fifo(path):
    os.mkfifo(path)


def open_socket(path):
    server = socket.socket(socket.AF_UNIX)
    at = os.getcwd()
    os.chdir(path.parent)  # the path of a socket may be 107 bytes long
    try:
        server.bind(path.name)
    finally:
        os.chdir(at)
        server.close()


def folder(path):
    path.mkdir()


def link_out(path):
    target = path.parent.parent / "outside"
    target.write_text("{}")
    path.symlink_to(target)


def link_up(path):
    path.symlink_to(path.parent.parent)


def link_to_itself(path):
    path.symlink_to(path.name)


def link_to_nothing(path):
    path.symlink_to("nothing")


def link_to_device(path):
    path.symlink_to("/dev/zero")


FAULTS = [fifo, open_socket, link_out, link_up, link_to_itself, link_to_nothing, link_to_device]
SHARD = "model-00002-of-00007.safetensors"
NAMES = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "model.safetensors.index.json",
    SHARD,
    "README.md",
    "adapter_config.json",
    "chat_template.jinja",
    "report.json",
    "any.thing",
]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_is_none_is_refused_by_name_before_anything_is_opened(name, fault, model):
    (model / name).unlink(missing_ok=True)
    fault(model / name)
    with pytest.raises(ModelError) as failure:
        open_checkpoint(model)
    assert failure.value.where == name and failure.value.exit_code == 5


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", SHARD])
def test_a_folder_in_place_of_a_file_is_refused(name, model):
    (model / name).unlink(missing_ok=True)
    folder(model / name)
    with pytest.raises(ModelError):
        open_checkpoint(model)


@pytest.mark.parametrize("ask", [read_structure, load_tokenizer])
def test_transformers_never_gets_a_directory_with_a_fifo(ask, model):
    (model / "1_Pooling").mkdir()
    fifo(model / "1_Pooling" / "config.json")
    with raises(ModelError, where="1_Pooling/config.json", reason="no-regular-file", kind="a FIFO"):
        ask(model)


def test_links_inside_and_hidden_files_are_fine(model):
    (model / "tokenizer.json").write_text("{}")
    (model / "copy.json").symlink_to("tokenizer.json")
    fifo(model / ".fsmonitor")
    check_directory(model)
    assert regular_file(model, model / "copy.json").read_text() == "{}"


def test_a_directory_that_is_too_large_or_too_deep_is_none_of_a_model(model, monkeypatch):
    deep = model
    for number in range(model_files.MAX_DEPTH + 1):
        deep = deep / str(number)
        deep.mkdir()
    with raises(
        ModelError,
        where="/".join(map(str, range(model_files.MAX_DEPTH + 1))),
        reason="too-deep",
        limit=model_files.MAX_DEPTH,
    ):
        check_directory(model)
    monkeypatch.setattr(model_files, "MAX_ENTRIES", 3)
    with raises(ModelError, where=model, reason="too-many-files", limit=3):
        check_directory(model)
