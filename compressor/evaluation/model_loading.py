"""Loads what a measuring process reads: a model as a user would load it, and the samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from compressor._version import __version__
from compressor.artifact.manifest import read_manifest
from compressor.artifact.stock_loading import OFFLINE, load_stock, stock_works
from compressor.artifact.streaming import StockDecompressor, load_streamed
from compressor.data.samples import Samples
from compressor.errors import ModelError
from compressor.evaluation import child_messages
from compressor.model.attention import plain_options
from compressor.model.checkpoint import Checkpoint, open_checkpoint
from compressor.model.empty_model import bound_model
from compressor.model.load_dtypes import load_dtype
from compressor.model.model_class import class_of, config_and_class
from compressor.model.quantized_source import load_dequantized, open_source
from compressor.model.streamed import DenseFiller, StreamedModel
from compressor.model.structure import find_blocks
from compressor.storage.file_names import MANIFEST


class NotInParts(Exception):
    """A model can't be run part by part. The message says why."""


def load_model(directory: Path, trust_remote_code: bool, *, is_baseline: bool = False) -> Any:
    """Load a checkpoint or an artifact through transformers, in its own dtype, in eval mode.

    is_baseline  a quantized checkpoint is loaded dequantized, as the source of a run; else as transformers loads it
    """
    if (directory / MANIFEST).is_file():
        manifest = read_manifest(directory)
        return load_stock(directory, manifest, is_older=manifest["tool"]["version"] != __version__)[0]
    checkpoint = _opened(directory, trust_remote_code, is_baseline)
    cls: Any = class_of(checkpoint, trust_remote_code)
    with stock_works(directory, ModelError):
        if checkpoint.quantized is not None:
            config, _ = config_and_class(checkpoint, trust_remote_code)
            options: dict[str, Any] = {"dtype": load_dtype("source", config, checkpoint), **OFFLINE}
            options |= plain_options(checkpoint.config)
            return load_dequantized(cls, checkpoint, config, None, **options).eval()
        return cls.from_pretrained(directory, **OFFLINE, **plain_options(checkpoint.config)).eval()


def load_parts(directory: Path, trust_remote_code: bool, *, is_baseline: bool = False) -> StreamedModel:
    """The same model, whose blocks are in memory only while they run.

    Weights in a format of compressed-tensors are dequantized by that library. In other formats our own layers compute.
    raises  NotInParts if it has no list of blocks
    """
    try:
        if not (directory / MANIFEST).is_file():
            checkpoint = _opened(directory, trust_remote_code, is_baseline)
            config, cls = config_and_class(checkpoint, trust_remote_code)
            checkpoint, model, bindings, _ = bound_model(checkpoint, cls, config, cached=True)
            return StreamedModel(DenseFiller(checkpoint, model, bindings), find_blocks(model))
        checkpoint, manifest = open_checkpoint(directory), read_manifest(directory)
        is_packed = manifest["route"] == "compressed-tensors"
        return load_streamed(checkpoint, manifest, StockDecompressor.of(checkpoint) if is_packed else None)
    except ModelError as error:
        raise NotInParts(error.what) from error


def _opened(directory: Path, trust_remote_code: bool, is_baseline: bool) -> Checkpoint:
    """A checkpoint, dequantized if it is a quantized baseline."""
    opened = open_source if is_baseline else open_checkpoint
    return opened(directory, trust_remote_code=trust_remote_code)


def is_causal(model: Any) -> bool:
    return model.can_generate() and model.main_input_name == "input_ids"


def read_stored_samples(request: child_messages.Samples) -> Samples:
    stored = load_file(request["tokens"])
    return Samples(tuple(stored[name] for name in sorted(stored)), "", "")
