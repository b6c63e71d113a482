"""A checkpoint is read safely: everything damaged or unsafe ends in a ModelError that says so."""

from __future__ import annotations

import json
import shutil
import struct

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from raising import raises
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from compressor.engine.block_io import PartSource
from compressor.errors import ModelError, PassError, UsageError
from compressor.model.checkpoint import check_finite, open_checkpoint
from compressor.model.model_names import resolve_model
from compressor.model.structure import read_structure
from compressor.storage.safetensors_file import NAMES, Entry, header_bytes, read_bytes, read_header, write_file


@pytest.fixture
def model(tmp_path):
    return tiny.save("llama", tmp_path / "model", shard="20KB")


def entries(tensors):
    return [Entry(name, t.dtype, tuple(t.shape), lambda t=t: [t]) for name, t in tensors.items()]


def index_of(model):
    return json.loads((model / "model.safetensors.index.json").read_text())


def set_index(model, index):
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def refuse(directory, where, **data):
    with raises(ModelError, where=where, **data) as failure:
        open_checkpoint(directory)
    assert failure.value.exit_code == 5


def test_every_tensor_of_a_sharded_checkpoint_is_read_exactly(model):
    checkpoint = open_checkpoint(model)
    expected = {k: v for file in model.glob("*.safetensors") for k, v in load_file(file).items()}
    assert set(checkpoint.tensors) == set(expected)
    assert all(torch.equal(checkpoint.read(name), value) for name, value in expected.items())


def test_a_missing_shard_is_named(model):
    (model / "model-00002-of-00004.safetensors").unlink(missing_ok=True)
    victim = sorted(model.glob("*.safetensors"))[0]
    victim.unlink()
    refuse(model, victim.name, reason="missing-shard")


def test_a_truncated_shard_is_named(model):
    victim = sorted(model.glob("*.safetensors"))[0]
    victim.write_bytes(victim.read_bytes()[:-10])
    size = victim.stat().st_size
    refuse(model, victim.name, reason="wrong-size", end=size + 10, size=size)


def test_a_header_that_lies_about_offsets_is_refused(model):
    victim = sorted(model.glob("*.safetensors"))[0]
    content = victim.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    name = next(name for name in header if name != "__metadata__")
    begin, end = header[name]["data_offsets"]
    header[name]["data_offsets"] = [begin + 4, end + 4]
    text = json.dumps(header).encode()
    victim.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    refuse(model, victim.name, reason="gap", tensor=name)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", ".."])
def test_an_index_that_reaches_outside_is_refused(model, name):
    index = index_of(model)
    index["weight_map"] = dict.fromkeys(index["weight_map"], name)
    set_index(model, index)
    refuse(model, "model.safetensors.index.json", reason="no-plain-name", file=name)


def test_a_link_out_of_the_directory_is_refused(model, tmp_path):
    victim = sorted(model.glob("*.safetensors"))[0]
    outside = tmp_path / "outside.safetensors"
    victim.rename(outside)
    victim.symlink_to(outside)
    refuse(model, victim.name, reason="link-out")


def test_links_of_the_hugging_face_cache_are_followed(model, tmp_path):
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "abc", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(model.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert open_checkpoint(snapshot).architecture == "LlamaForCausalLM"


def test_an_index_and_shards_of_two_models_are_refused(model):
    index = index_of(model)
    name, file = next(iter(index["weight_map"].items()))
    del index["weight_map"][name]
    index["weight_map"]["no.such.tensor"] = file
    set_index(model, index)
    refuse(model, file, reason="lacks-tensors", count=1, first="no.such.tensor")


def test_pickles_are_refused_with_the_way_to_convert(tmp_path):
    tiny.save("llama", tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").rename(tmp_path / "m" / "pytorch_model.bin")
    refuse(tmp_path / "m", "m", reason="only-pickles", names=["pytorch_model.bin"])


def test_no_weights_no_config_and_no_directory_are_told_apart(tmp_path):
    (tmp_path / "a").mkdir()
    refuse(tmp_path / "a", "config.json", reason="missing")
    (tmp_path / "a" / "config.json").write_text("{}")
    refuse(tmp_path / "a", "a", reason="no-weights")
    (tmp_path / "a" / "config.json").write_text("{")
    refuse(tmp_path / "a", "config.json", reason="bad-json")
    refuse(tmp_path / "b", tmp_path / "b", reason="no-directory", found="nothing")
    with raises(ModelError, where=tmp_path / "nowhere", reason="no-model-name"):
        resolve_model(str(tmp_path / "nowhere"))


@pytest.fixture
def cache(model, tmp_path, monkeypatch):
    """A Hugging Face cache with a model of each kind of name."""
    hub = tmp_path / "hub"
    for name in ("gpt2tiny", "owner--name", "bert-base.un_cased"):
        snapshot = hub / f"models--{name}" / "snapshots" / ("a" * 40)
        snapshot.mkdir(parents=True)
        (hub / f"models--{name}" / "blobs").mkdir()
        (hub / f"models--{name}" / "refs").mkdir()
        (hub / f"models--{name}" / "refs" / "main").write_text("a" * 40)
        for number, file in enumerate(sorted(model.iterdir())):
            shutil.copy(file, hub / f"models--{name}" / "blobs" / str(number))
            (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    monkeypatch.chdir(tmp_path)
    return hub


@pytest.mark.parametrize("name", ["gpt2tiny", "owner/name", "bert-base.un_cased"])
def test_a_model_in_the_cache_is_found_by_its_name(name, cache):
    assert open_checkpoint(resolve_model(name)).architecture == "LlamaForCausalLM"


@pytest.mark.parametrize("name", ["gpt2", "owner/other", "a.b-c_d", "x" * 96])
def test_a_model_that_is_not_in_the_cache_is_told_how_to_get(name, cache):
    with raises(ModelError, where=name, reason="not-in-cache", name=name) as failure:
        resolve_model(name)
    assert f"hf download {name}" in failure.value.hint  # the command, not the words around it


BAD_NAMES = ["", " ", "../x", "models--gpt2tiny", "models--", "a/b/c", "a\\b", ".hidden", "a..b", "owner/", "-x",
             "name.git", "a\0b", "gpt2tiny/../x", "https://huggingface.co/gpt2", "x" * 5000, "ä", "a b"]  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_that_no_model_can_have_is_refused(name, cache):
    with pytest.raises(ModelError) as failure:
        resolve_model(name)
    assert failure.value.exit_code == 5 and len(str(failure.value)) < 500


def test_a_directory_goes_before_the_cache(cache, tmp_path):
    (tmp_path / "gpt2tiny").mkdir()
    assert resolve_model("gpt2tiny").name == "gpt2tiny" and "snapshots" not in str(resolve_model("gpt2tiny"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_weights_are_found_with_their_place(value, tmp_path):
    path = tiny.save("llama", tmp_path / "m")
    tensors = load_file(path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 5] = value
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with raises(ModelError, where=name, reason="not-finite", bad=1, values=2048, first=[3, 5]):
        PartSource(read_structure(path)).read(name)
    check_finite("fine", torch.ones(3))


@pytest.mark.parametrize(
    ("change", "where", "data"),
    [
        ({"architectures": ["NoSuchModel"]}, "m", {"reason": "unknown-architecture", "architecture": "NoSuchModel"}),
        ({"architectures": None}, "m", {"reason": "no-architecture"}),
        (
            {"architectures": ["Mine"], "auto_map": {"AutoModel": "m.Mine"}},
            "m",
            {"reason": "own-code", "architecture": "Mine", "files": ["m.py"]},
        ),
        ({"quantization_config": {"quant_method": "gptq"}}, "m", {"reason": "config-key", "quantized": "gptq"}),
        (
            {"model_type": "no-such-type"},
            "m/config.json",
            {"reason": "unknown-model-type", "model_type": "no-such-type"},
        ),
        (
            {"hidden_size": 64, "head_dim": 8},
            "lm_head.weight",
            {"reason": "shape", "shape": [96, 32], "expected": [96, 64]},
        ),
        ({"num_hidden_layers": 3}, "m", {"reason": "missing-tensors", "model": "LlamaForCausalLM"}),
    ],
)
def test_models_that_cannot_be_read_say_why(change, where, data, tmp_path):
    path = tiny.save("llama", tmp_path / "m")
    config = json.loads((path / "config.json").read_text()) | change
    (path / "config.json").write_text(json.dumps(config))
    with raises(ModelError, where=where, **data):
        read_structure(path)


HALF = "a\ud800b"
HALVES = {
    "a value": ("config.json", {"note": HALF}),
    "a key": ("config.json", {HALF: 1}),
    "a label": ("config.json", {"id2label": {"0": HALF}}),
    "where it came from": ("config.json", {"_name_or_path": HALF}),
    "the index": ("model.safetensors.index.json", {"metadata": {"note": HALF}}),
}


@pytest.mark.parametrize("case", HALVES)
def test_half_a_surrogate_pair_in_a_json_file_is_refused(case, model):
    name, change = HALVES[case]
    (model / name).write_text(json.dumps(json.loads((model / name).read_text()) | change))
    refuse(model, name, reason="bad-json", half=r"\ud800")


def test_half_a_surrogate_pair_in_the_name_of_a_tensor_is_refused(tmp_path):
    model = tiny.save("llama", tmp_path / "m")
    file = model / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].replace(b'"lm_head.weight"', b'"lm_h\\ud800.weight"')
    file.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    refuse(model, "model.safetensors", reason="bad-json", half=r"\ud800")


def test_both_halves_of_a_surrogate_pair_are_a_character(model):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "note": "\U0001f600"}))
    assert open_checkpoint(model).config["note"] == "\U0001f600"


def test_a_directory_whose_name_is_not_utf8_is_refused(model, tmp_path):
    named = tmp_path / "m\udcff"
    model.rename(named)
    with raises(UsageError, where=rf"{tmp_path}/m\xff", reason="not-utf-8"):
        open_checkpoint(named)


def test_files_are_written_as_the_library_writes_them(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "b.weight": torch.randn(3, 5, generator=generator).bfloat16(),
        "a.packed": torch.randint(0, 9, (7,), generator=generator, dtype=torch.int32),
        "c": torch.randn(2, 2, generator=generator),
        "empty": torch.zeros(0, 4),
        "flag": torch.tensor([True, False]),
        "long": torch.tensor([1, 2]),
    }
    write_file(tmp_path / "ours.safetensors", entries(tensors))
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    predicted = header_bytes((name, NAMES[t.dtype], tuple(t.shape)) for name, t in tensors.items())
    assert (tmp_path / "ours.safetensors").stat().st_size == size + predicted
    for name, info in read_header(tmp_path / "ours.safetensors").items():
        assert torch.equal(read_bytes(info), tensors[name])


def test_a_full_disk_is_a_pass_error_and_leaves_nothing(tmp_path):
    """A file-size limit stands for the full disk: the write fails in the middle."""
    import resource
    import signal

    tensors = {"big": torch.zeros(1 << 20)}
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, old[1]))
    try:
        with raises(PassError, where="x.safetensors", reason="disk-full", needed=4 << 20):
            write_file(tmp_path / "x.safetensors", entries(tensors))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert list(tmp_path.iterdir()) == []


def valid_file() -> bytes:
    text = (
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"I8","shape":[3],"data_offsets":[8,11]}}'
    )
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + bytes(11)


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=4), st.integers(-20, 20))
def test_whatever_the_header_reader_accepts_the_library_accepts(tmp_path_factory, changes, growth):
    content = bytearray(valid_file())
    for at, value in changes:
        content[at % len(content)] = value
    content = content[:growth] if growth < 0 else content + bytes(growth)
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    path.write_bytes(bytes(content))
    try:
        found = read_header(path)
    except ModelError:
        return
    try:
        with safe_open(path, framework="pt") as opened:
            assert set(opened.keys()) == set(found)
    except SafetensorError as error:
        pytest.fail(f"we accept what the library refuses: {error}")


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=120))
def test_random_bytes_end_in_a_model_error(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "noise.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError):
        read_header(path)
