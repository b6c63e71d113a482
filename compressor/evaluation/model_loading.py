"""Loads what a measuring process reads: a model as a user would load it, and the samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from compressor.artifact.manifest import read_manifest
from compressor.artifact.stock_loading import OFFLINE, load_stock, stock_works
from compressor.data.samples import Samples
from compressor.errors import ModelError
from compressor.evaluation import child_messages
from compressor.model.attention import plain_options
from compressor.model.checkpoint import open_checkpoint
from compressor.model.model_class import class_of
from compressor.storage.file_names import MANIFEST


def load_model(directory: Path, trust_remote_code: bool) -> Any:
    """Load a source checkpoint or an artifact through transformers, in its own dtype, in eval mode."""
    if (directory / MANIFEST).is_file():
        return load_stock(directory, read_manifest(directory))[0]
    checkpoint = open_checkpoint(directory, trust_remote_code=trust_remote_code)
    cls: Any = class_of(checkpoint, trust_remote_code)
    with stock_works(directory, ModelError):
        return cls.from_pretrained(directory, **OFFLINE, **plain_options(checkpoint.config)).eval()


def is_causal(model: Any) -> bool:
    return model.can_generate() and model.main_input_name == "input_ids"


def read_stored_samples(request: child_messages.Samples) -> Samples:
    stored = load_file(request["tokens"])
    return Samples(tuple(stored[name] for name in sorted(stored)), "", "")
