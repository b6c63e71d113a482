"""Classifies file names: weight files of any program, names that an artifact may have, and an artifact's own files."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

MANIFEST = "compress_manifest.json"
REPORT_FILES = ("report.json", "report.md", "report.html", "junit.xml")
CARD = "README.md"
RECIPE = "recipe.yaml"
# Files beside config.json that say how weights are quantized: of modelopt, AutoGPTQ and GPTQModel, AutoAWQ, quanto and
# torchao.
QUANTIZATION_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json", "quantization_config.json")
WEIGHT_SUFFIXES = {
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib"),  # torch, and pickles of any kind
    *(".h5", ".hdf5", ".keras", ".msgpack", ".ot", ".tflite", ".pb", ".pdparams"),  # TensorFlow, Flax, Rust, Paddle
    *(".onnx", ".onnx_data", ".gguf", ".ggml", ".mlmodel", ".engine", ".nemo", ".llamafile"),  # for deployment
}
INDEX = re.compile(r"\.(safetensors|bin|h5|msgpack)\.index(\.\w+)?\.json$")


def is_plain(name: str) -> bool:
    """Whether an artifact may have a file of this name, so that the manifest can list it and any system can write it.

    It has no control characters (a terminal or a report would interpret them), no backslash (a separator on Windows),
    and is valid UTF-8.
    """
    return not any(unicodedata.category(sign) in ("Cc", "Cs", "Zl", "Zp") or sign == "\\" for sign in name)


def is_weight_file(path: Path) -> bool:
    return path.suffix.lower() in WEIGHT_SUFFIXES


def is_weight_index(path: Path) -> bool:
    """Whether a file is an index that maps tensors to files."""
    return INDEX.search(path.name) is not None
