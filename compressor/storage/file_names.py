"""Names of files: which hold weights, whatever program wrote them, which an artifact may have and has of its own."""

from __future__ import annotations

import re
import unicodedata
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


def is_plain(name: str) -> bool:
    """Whether an artifact may hold a file of this name: the manifest lists it, and any system can write it as it is.

    No control characters, which a terminal or a report would obey, no backslash, which is a separator on Windows, and
    nothing that isn't text, as bytes that aren't UTF-8.
    """
    return not any(unicodedata.category(sign) in ("Cc", "Cs", "Zl", "Zp") or sign == "\\" for sign in name)


def is_weight_file(path: Path) -> bool:
    return path.suffix.lower() in WEIGHT_SUFFIXES


def is_weight_index(path: Path) -> bool:
    """Whether it says which file holds which tensor."""
    return INDEX.search(path.name) is not None
