"""Reads weights of compressed-tensors, which that library itself dequantizes, one module at a time.

Config groups name modules exactly, by a pattern (`re:`) or by class, in this order of precedence. What is read here has
integer or float8 codes: `pack-quantized`, `naive-quantized`, `int-quantized` and `float-quantized`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from compressor.errors import ModelError
from compressor.model.quantized_weight import QuantizedWeight, Tensors, require, unsound
from compressor.storage.safetensors_file import read_bytes

FORMATS = ("pack-quantized", "naive-quantized", "int-quantized", "float-quantized")
# Parts of the config with which the dequantized weights alone are not the model, or are not stored.
OTHER_PARTS = ("sparsity_config", "transform_config")


def find_compressed(tensors: Tensors, stated: Mapping[str, Any]) -> list[QuantizedWeight]:
    """The quantized weights; none if some are in a format that isn't read.

    raises  ModelError for a config that the library refuses, and for tensors that don't fit together
    """
    if any(stated.get(part) for part in OTHER_PARTS) or any(name.endswith(".weight_g_idx") for name in tensors):
        return []
    config = _read_config(stated)
    found = []
    for module in [name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")]:
        scheme = _scheme(module, config)
        kind = getattr(scheme, "format", None) or config.format
        if scheme.weights is None or kind not in FORMATS:
            return []
        found.append(_weight(module, scheme, kind, tensors))
    return found


def is_weight_only(stated: Mapping[str, Any]) -> bool:
    """Whether no config group quantizes activations."""
    groups = stated.get("config_groups")
    return isinstance(groups, Mapping) and not any(group.get("input_activations") for group in groups.values())


def _weight(module: str, scheme: Any, kind: str, tensors: Tensors) -> QuantizedWeight:
    from compressed_tensors.compressors import BaseCompressor

    compressor = BaseCompressor.get_value_from_registry(kind)
    names = compressor.compression_param_names(scheme)
    require(tensors, module, names)
    args = scheme.weights
    codes = tensors[f"{module}.{names[0]}"].shape
    if kind != "pack-quantized":
        shape = codes
    else:
        stored = tensors[f"{module}.weight_shape"]
        shape = tuple(int(length) for length in read_bytes(stored).tolist()) if stored.shape == (2,) else ()
        if len(shape) != 2 or (shape[0], -(-shape[1] * args.num_bits // 32)) != tuple(codes):
            raise unsound(module, f"weight_shape is {shape}, and the codes of {args.num_bits} bits have shape {codes}")
    members = {name: f"{module}.{name}" for name in names}
    dequantize = partial(_dequantize, compressor=compressor, scheme=scheme)
    return QuantizedWeight(f"{module}.weight", members, shape, args.num_bits, _layout(args), dequantize)


def _dequantize(values: Mapping[str, Tensor], dtype: torch.dtype, compressor: Any, scheme: Any) -> Tensor:
    return compressor.decompress(dict(values), scheme)["weight"].to(dtype)


def _read_config(stated: Mapping[str, Any]) -> Any:
    """The library's own reading of `quantization_config`."""
    from transformers import CompressedTensorsConfig

    try:
        return CompressedTensorsConfig(**{k: v for k, v in stated.items() if k != "quant_method"}).quantization_config
    except Exception as error:  # any: it depends on the value
        message = f"compressed-tensors can't read quantization_config ({type(error).__name__}: {error})"
        raise ModelError(
            " ".join(message.split())[:600],
            where="config.json",
            hint="Download config.json again: hf download NAME.",
            data={"reason": "quantization-config", "cause": f"{type(error).__name__}: {error}"},
        ) from error


def _scheme(module: str, config: Any) -> Any:
    """The config group of a module. raises ModelError if none fits, or two in the same way with other formats"""
    groups = list(config.config_groups.values())
    named = [group for group in groups if module in group.targets]
    matched = [group for group in groups if any(_matches(target, module) for target in group.targets)]
    of_class = [group for group in groups if "Linear" in group.targets]
    for fitting in (named, matched, of_class):
        if fitting:
            return fitting[0]
    if len(groups) == 1:  # the checkpoint has other names than the modules
        return groups[0]
    raise unsound(module, "no config group of quantization_config names it")


def _matches(target: str, module: str) -> bool:
    return target.startswith("re:") and re.match(target.removeprefix("re:"), module) is not None


def _layout(args: Any) -> str:
    if args.strategy in ("group", "tensor_group"):
        return f"groups of {args.group_size}"
    if args.strategy == "block":
        return f"{args.block_structure[0]} x {args.block_structure[1]} blocks"
    return "one scale per tensor" if args.strategy == "tensor" else "one scale per row"
