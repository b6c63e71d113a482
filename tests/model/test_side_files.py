"""Every file of a checkpoint goes into the artifact, unless a rule says why not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import TypeAdapter, ValidationError
from raising import raises

from compressor.artifact.manifest import FileName
from compressor.errors import ModelError
from compressor.model.side_files import (
    ADAPTER,
    GENERATE,
    HIDDEN,
    MODEL_CODE,
    NOT_UTF8,
    ODD_NAME,
    OTHER_WEIGHTS,
    OWN,
    WEIGHTS,
    find_side_files,
)


def write(directory: Path, *names: str, content: str = "{}") -> None:
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(content)


CARRIED = [
    "generation_config.json",
    "tokenizer.json",
    "vocab.txt",
    "qwen.tiktoken",
    "spiece.model",
    "chat_template.jinja",
    "additional_chat_templates/tool.jinja",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "audio_tokenizer_config.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "1_Pooling/config.json",
    "tokenization_my.py",
    "requirements.txt",
    "LICENSE",
    "assets/picture.png",
    "speaker_embeddings/one.npy",
    "mel_filters.npz",
    "a/b/c/settings.json",
    "sub/compress_manifest.json",
    "übersicht für alle.txt",
    "what.ever",
]
LEFT_OUT = {
    "model.safetensors": (WEIGHTS, "model.safetensors"),
    "consolidated.safetensors": (WEIGHTS, "consolidated.safetensors"),
    "pytorch_model.bin": (WEIGHTS, "pytorch_model.bin"),
    "tf_model.h5": (WEIGHTS, "tf_model.h5"),
    "flax_model.msgpack": (WEIGHTS, "flax_model.msgpack"),
    "model.gguf": (WEIGHTS, "model.gguf"),
    "training_args.bin": (WEIGHTS, "training_args.bin"),
    "optimizer.pt": (WEIGHTS, "optimizer.pt"),
    "model.safetensors.index.json": (WEIGHTS, "model.safetensors.index.json"),
    "pytorch_model.bin.index.json": (WEIGHTS, "pytorch_model.bin.index.json"),
    "model.safetensors.index.fp16.json": (WEIGHTS, "model.safetensors.index.fp16.json"),
    "onnx/model.onnx": (OTHER_WEIGHTS, "onnx/"),
    "openvino/openvino_model.bin": (OTHER_WEIGHTS, "openvino/"),
    "original/consolidated.00.pth": (OTHER_WEIGHTS, "original/"),
    "coreml/x.mlpackage/Data/weights/weight.bin": (OTHER_WEIGHTS, "coreml/"),
    "checkpoint-500/model.safetensors": (OTHER_WEIGHTS, "checkpoint-500/"),
    "README.md": (OWN, "README.md"),
    "recipe.yaml": (OWN, "recipe.yaml"),
    "config.json": (OWN, "config.json"),
    "compress_manifest.json": (OWN, "compress_manifest.json"),
    "report.json": (OWN, "report.json"),
    "modeling_compressed_llama.py": (OWN, "modeling_compressed_llama.py"),
    "adapter_config.json": (ADAPTER, "adapter_config.json"),
    "custom_generate/generate.py": (GENERATE, "custom_generate/"),
    "a\\b.txt": (ODD_NAME, "a\\\\b.txt"),
    "tab\t.txt": (ODD_NAME, "tab\\t.txt"),
    "new\nline/notes.txt": (ODD_NAME, "new\\nline/notes.txt"),
    "delete\x7f": (ODD_NAME, "delete\\x7f"),
    "terminal\x9b31m": (ODD_NAME, "terminal\\x9b31m"),
    "line\u2028": (ODD_NAME, "line\\u2028"),
    ".\t": (HIDDEN, ".\\t"),
    ".gitattributes": (HIDDEN, ".gitattributes"),
    ".git/config": (HIDDEN, ".git"),
    ".cache/huggingface/x": (HIDDEN, ".cache"),
}


@pytest.mark.parametrize("name", CARRIED)
def test_a_file_that_no_rule_names_is_carried(name, tmp_path):
    write(tmp_path, name)
    found = find_side_files(tmp_path, {})
    assert [path.as_posix() for path in found.carried] == [name] and not found.left_out
    assert TypeAdapter(FileName).validate_python(name) == name  # so the manifest that lists it can be read


@pytest.mark.parametrize("name", [name for name, (reason, _) in LEFT_OUT.items() if reason == ODD_NAME])
def test_a_name_that_the_manifest_refuses_is_not_carried_with_its_folder_either(name, tmp_path):
    write(tmp_path, f"1_Dense/{name}", "1_Dense/model.safetensors", "1_Dense/config.json")
    write(tmp_path, "modules.json", content='[{"path": "1_Dense"}]')
    found = find_side_files(tmp_path, {})
    assert [str(path) for path in found.carried] == ["1_Dense/config.json", "1_Dense/model.safetensors", "modules.json"]
    assert list(found.left_out) == [ODD_NAME]
    with pytest.raises(ValidationError):
        TypeAdapter(FileName).validate_python(name)


@pytest.mark.parametrize("name", LEFT_OUT)
def test_a_file_that_a_rule_names_is_left_out_with_the_reason(name, tmp_path):
    write(tmp_path, name)
    reason, shown = LEFT_OUT[name]
    assert find_side_files(tmp_path, {}).to_json() == {
        "carried": [],
        "left_out": [{"reason": reason, "files": [shown]}],
    }


@pytest.mark.parametrize(
    ("name", "reason", "shown"),
    [
        ("x\udcff.txt", NOT_UTF8, "x\\xff.txt"),
        ("f\udcff/x.txt", NOT_UTF8, "f\\xff/x.txt"),
        (".h\udcff", HIDDEN, ".h\\xff"),
    ],
    ids=["file", "folder", "hidden"],
)
def test_a_name_that_is_not_utf8_is_left_out_and_shown_so_that_it_can_be_written(name, reason, shown, tmp_path):
    write(tmp_path, name)
    assert find_side_files(tmp_path, {}).to_json()["left_out"] == [{"reason": reason, "files": [shown]}]


def test_a_folder_of_other_weights_is_left_out_as_a_whole(tmp_path):
    write(tmp_path, "onnx/model.onnx", "onnx/config.json", "onnx/deep/tokenizer.json")
    assert find_side_files(tmp_path, {}).left_out == {OTHER_WEIGHTS: ["onnx/"]}


def test_the_weights_of_another_module_of_sentence_transformers_are_carried(tmp_path):
    modules = [{"idx": 0, "path": "", "type": "Transformer"}, {"idx": 1, "path": "2_Dense", "type": "Dense"}]
    write(tmp_path, "modules.json", content=json.dumps(modules))
    write(tmp_path, "2_Dense/config.json", "2_Dense/pytorch_model.bin", "3_Other/model.safetensors")
    found = find_side_files(tmp_path, {})
    assert [path.as_posix() for path in found.carried] == [
        "2_Dense/config.json",
        "2_Dense/pytorch_model.bin",
        "modules.json",
    ]
    assert found.left_out == {OTHER_WEIGHTS: ["3_Other/"]}


@pytest.mark.parametrize("content", ["{", "3", "[3]", '[{"path": 3}]', '[{"path": "/"}, {}]', "[" * 10_000])
def test_a_modules_file_that_is_none_is_refused(content, tmp_path):
    write(tmp_path, "modules.json", content=content)
    with raises(ModelError, where="modules.json", reason="no-module-list"):
        find_side_files(tmp_path, {})


CONFIG = {
    "auto_map": {
        "AutoConfig": "configuration_x.C",
        "AutoModelForCausalLM": "modeling_x.M",
        "AutoProcessor": "processing_x.P",
        "AutoImageProcessor": "gone.G",
        "AutoVideoProcessor": "someone/else--video.V",
    }
}


def test_code_of_a_model_class_is_left_out_and_the_rest_is_carried(tmp_path):
    write(
        tmp_path,
        "modeling_x.py",
        content="from .configuration_x import C\nfrom .shared import s\nfrom .only import o\n",
    )
    write(tmp_path, "processing_x.py", content="from .shared import s\n")
    write(tmp_path, "tokenization_x.py", content="from .configuration_x import C\n")
    write(tmp_path, "configuration_x.py", "shared.py", "only.py", "apart.py", content="")
    write(tmp_path, "tokenizer_config.json", content='{"auto_map": {"AutoTokenizer": ["tokenization_x.T", null]}}')
    found = find_side_files(tmp_path, CONFIG)
    assert found.left_out == {MODEL_CODE: ["modeling_x.py", "only.py"]}
    assert {path.as_posix() for path in found.carried} == {
        "apart.py",
        "configuration_x.py",  # the tokenizer needs it
        "processing_x.py",
        "shared.py",
        "tokenization_x.py",
        "tokenizer_config.json",
    }
    assert found.auto_map == {"AutoProcessor": "processing_x.P", "AutoVideoProcessor": "someone/else--video.V"}


def test_a_link_that_leads_out_is_refused_and_one_that_is_left_out_is_not_opened(tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("x")
    model = tmp_path / "model"
    model.mkdir()
    (model / "pytorch_model.bin").symlink_to(outside)
    assert find_side_files(model, {}).left_out == {WEIGHTS: ["pytorch_model.bin"]}
    (model / "secret.txt").symlink_to(outside)
    with raises(ModelError, where="secret.txt", reason="link-out"):
        find_side_files(model, {})
