"""Names of files: which hold weights, whatever program wrote them, and which an artifact has of its own."""

from __future__ import annotations

import re
from pathlib import Path

MANIFEST = "compress_manifest.json"
REPORT_FILES = ("report.json", "report.md", "report.html", "junit.xml")
CARD = "README.md"
RECIPE = "recipe.yaml"
WEIGHT_SUFFIXES = {
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib"),  # torch, and pickles of any kind
    *(".h5", ".hdf5", ".keras", ".msgpack", ".ot", ".tflite", ".pb", ".pdparams"),  # TensorFlow, Flax, Rust, Paddle
    *(".onnx", ".onnx_data", ".gguf", ".ggml", ".mlmodel", ".engine", ".nemo", ".llamafile"),  # for deployment
}
INDEX = re.compile(r"\.(safetensors|bin|h5|msgpack)\.index(\.\w+)?\.json$")


def is_weight_file(path: Path) -> bool:
    return path.suffix.lower() in WEIGHT_SUFFIXES


def is_weight_index(path: Path) -> bool:
    """Whether it says which file holds which tensor."""
    return INDEX.search(path.name) is not None
