"""Reads a quantized checkpoint as the dequantized model, tensor by tensor.

`dequantized` gives a checkpoint in which each quantized weight is one dense tensor under the name that it has in a
checkpoint that isn't quantized. Such a tensor is dequantized each time when it is read, so there is never more than one
of them in memory. `config.json` has no `quantization_config` then. All code behind a Checkpoint works as with a dense
one. A checkpoint in another format stays as it is, and `prequantized` refuses it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from compressor.model.bitsandbytes_source import find_bitsandbytes
from compressor.model.checkpoint import Checkpoint, open_checkpoint
from compressor.model.compressed_tensors_source import find_compressed, is_weight_only
from compressor.model.fp8_source import find_fp8
from compressor.model.mxfp4_source import find_mxfp4
from compressor.model.packed_source import find_awq, find_gptq
from compressor.model.quantized_weight import Find, QuantizedWeight, quantization_of, unsound
from compressor.process.resources import ran_out
from compressor.storage.file_names import MANIFEST
from compressor.storage.safetensors_file import Entry, TensorInfo, read_bytes, read_pieces, write_file


class Format(NamedTuple):
    """name  as messages have it
    find  finds the quantized weights
    """

    name: str
    find: Find


FP8 = Format("fp8", find_fp8)
FORMATS: dict[str, Format] = {  # by `quant_method` of quantization_config
    "fp8": FP8,
    "fbgemm_fp8": FP8,
    "modelopt": FP8,
    "compressed-tensors": Format("compressed-tensors", find_compressed),
    "mxfp4": Format("mxfp4", find_mxfp4),
    "gptq": Format("gptq", find_gptq),
    "awq": Format("awq", find_awq),
    "bitsandbytes": Format("bitsandbytes", find_bitsandbytes),
}
SUPPORTED = ", ".join(dict.fromkeys(entry.name for entry in FORMATS.values()))
# Last parts of the names of tensors that only quantized activations, or a quantized cache, need.
OF_ACTIVATIONS = {
    *("input_scale", "input_scale_ub", "input_zero_point", "input_global_scale", "activation_scale", "qscale_act"),
    *("output_scale", "output_zero_point", "k_scale", "v_scale", "q_scale"),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CONFIG = "quantization_config"


def open_source(directory: Path, *, trust_remote_code: bool = False) -> Checkpoint:
    """The checkpoint that a run reads: dequantized if it is quantized. raises ModelError as `open_checkpoint` does"""
    return dequantized(open_checkpoint(directory, trust_remote_code=trust_remote_code))


def dequantized(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with dense tensors in place of the quantized ones. Only headers are read.

    returns  the checkpoint itself if no weight is quantized in a format of FORMATS
    raises   ModelError for quantized tensors that don't fit together
    """
    stated = checkpoint.config.get(CONFIG)
    method = _method(stated)
    if stated is None or method not in FORMATS or not _is_readable(checkpoint, method):
        return checkpoint
    weights = FORMATS[method].find(checkpoint.tensors, stated)
    if not weights:
        return checkpoint
    dtype = _dense_dtype(checkpoint.config)
    tensors = dict(checkpoint.tensors)
    unread = tuple(sorted(name for name in tensors if name.rpartition(".")[2] in OF_ACTIVATIONS))
    for name in unread:
        del tensors[name]
    for weight in weights:
        members = {member: tensors.pop(name) for member, name in weight.members.items()}
        tensors[weight.tensor] = _dense_info(weight, members, dtype)
    config = {key: value for key, value in checkpoint.config.items() if key != CONFIG}
    quantized = quantization_of(FORMATS[method].name, weights, unread)
    return replace(checkpoint, config=config, tensors=tensors, quantized=quantized)


def load_dequantized(
    cls: Any, checkpoint: Checkpoint, config: PretrainedConfig, scratch: Path | None, **options: Any
) -> PreTrainedModel:
    """The model of a dequantized checkpoint by stock `from_pretrained`, which reads dense tensors. No GPU is needed.

    scratch  an empty directory, to which the dense tensors are written first, for options that leave them on disk.
             None: each is dequantized when transformers asks for it
    options  of `from_pretrained`
    """
    if scratch is None:
        tensors = {name: _Lazy(info) for name, info in checkpoint.tensors.items()}
        model = cls.from_pretrained(None, config=config, state_dict=tensors, **options)
    else:
        entries = [
            Entry(name, info.dtype, info.shape, partial(read_pieces, info), info.small)
            for name, info in checkpoint.tensors.items()
        ]
        write_file(scratch / "model.safetensors", entries)
        (scratch / "config.json").write_text(json.dumps(checkpoint.config))
        model = cls.from_pretrained(scratch, config=config, **options)
    if model.can_generate() and (checkpoint.directory / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.directory, local_files_only=True)
    return model


class _Lazy:
    """Stands for a tensor that transformers reads by `[...]`, as a slice of a safetensors file."""

    def __init__(self, info: TensorInfo) -> None:
        self.info = info

    def __getitem__(self, _all: Any) -> Tensor:
        return read_bytes(self.info)


def _method(stated: Any) -> str | None:
    """The `quant_method`. Without one, codes are refused: nothing tells what their scales mean."""
    method = stated.get("quant_method") if isinstance(stated, Mapping) else None
    return method if isinstance(method, str) else None


def _is_readable(checkpoint: Checkpoint, method: str) -> bool:
    """Whether the dequantized weights are the whole model. Of artifacts of this package this is known for one format,
    since their evaluation as a baseline uses the stock loader, which quantizes activations too.
    """
    if not (checkpoint.directory / MANIFEST).is_file():
        return True
    return method == "compressed-tensors" and is_weight_only(checkpoint.config[CONFIG])


def _dense_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """The dtype of the dequantized weights: that of the model in config.json, else bfloat16."""
    for section in (config, config.get("text_config")):
        if isinstance(section, Mapping):
            stated = section.get("dtype", section.get("torch_dtype"))
            if isinstance(stated, str) and stated in DTYPES:
                return DTYPES[stated]
    return torch.bfloat16


def _dense_info(weight: QuantizedWeight, members: dict[str, TensorInfo], dtype: torch.dtype) -> TensorInfo:
    codes = next(iter(members.values()))
    nbytes = math.prod(weight.shape) * dtype.itemsize
    return TensorInfo(
        codes.file, dtype, weight.shape, codes.offset, nbytes, decode=partial(_decode, weight, members, dtype)
    )


def _decode(weight: QuantizedWeight, members: Mapping[str, TensorInfo], dtype: torch.dtype) -> Tensor:
    values = {name: read_bytes(info) for name, info in members.items()}
    try:
        value = weight.dequantize(values, dtype)
    except Exception as error:  # any: it depends on the library and the values
        if (lack := ran_out(error)) is not None:
            raise lack from error
        raise unsound(weight.tensor, f"can't be dequantized ({type(error).__name__}: {error})") from error
    assert value.dtype == dtype and tuple(value.shape) == weight.shape, weight.tensor
    return value
