"""Which files hold weights, by their names, whatever the program that wrote them."""

from __future__ import annotations

import re
from pathlib import Path

SUFFIXES = {
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib"),  # torch, and pickles of any kind
    *(".h5", ".hdf5", ".keras", ".msgpack", ".ot", ".tflite", ".pb", ".pdparams"),  # TensorFlow, Flax, Rust, Paddle
    *(".onnx", ".onnx_data", ".gguf", ".ggml", ".mlmodel", ".engine", ".nemo", ".llamafile"),  # for deployment
}
INDEX = re.compile(r"\.(safetensors|bin|h5|msgpack)\.index(\.\w+)?\.json$")


def is_weight_file(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES


def is_weight_index(path: Path) -> bool:
    """Whether it says which file holds which tensor."""
    return INDEX.search(path.name) is not None
