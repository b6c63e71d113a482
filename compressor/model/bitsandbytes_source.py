"""Reads weights of bitsandbytes, which that library itself dequantizes: int8 with a scale for each row, or 4-bit codes.

Codes of 4 bits (nf4, fp4) are entries of a stored table, times a scale for each block of the flattened weight. The
scales may be quantized too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from compressor.errors import DependencyError
from compressor.model.quantized_weight import QuantizedWeight, Tensors, require, unsound
from compressor.storage.safetensors_file import read_bytes

STATE = ".quant_state.bitsandbytes__"  # between the weight's name and the name of its table
PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


def find_bitsandbytes(tensors: Tensors, _stated: Mapping[str, Any]) -> list[QuantizedWeight]:
    """The quantized weights.

    raises  ModelError for tensors that don't fit together, DependencyError without the package
    """
    found = [_int8(name.removesuffix(".SCB"), tensors) for name in tensors if name.endswith(".SCB")]
    found += [_four_bits(name, tensors) for name in tensors if STATE in name]
    if found and find_spec("bitsandbytes") is None:
        raise DependencyError(
            "the source is quantized by bitsandbytes, which dequantizes it and is not installed",
            where=found[0].tensor,
            hint="Run pip install bitsandbytes.",
        )
    return found


def _int8(module: str, tensors: Tensors) -> QuantizedWeight:
    """weight (out, in) int8 and SCB (out,) float32: the largest magnitude of each row."""
    require(tensors, module, ("weight",))
    members = {"weight": f"{module}.weight", "SCB": f"{module}.SCB"}
    codes, scale = tensors[members["weight"]], tensors[members["SCB"]]
    if codes.dtype != torch.int8 or len(codes.shape) != 2 or scale.shape != codes.shape[:1]:
        raise unsound(module, f"weight has shape {codes.shape} in {codes.stored_as}, and SCB has shape {scale.shape}")
    if (order := f"{module}.weight_format") in tensors:
        members["weight_format"] = order
        if bool(read_bytes(tensors[order]).any()):
            raise unsound(order, "is not 0: the codes are in the order of another processor")
    return QuantizedWeight(members["weight"], members, codes.shape, 8, "one scale per row", _dequantize_int8)


def _four_bits(name: str, tensors: Tensors) -> QuantizedWeight:
    """The weight of a `quant_state` tensor, which is JSON with the shape and the size of the blocks."""
    weight, _, table = name.partition(STATE)
    present = [part for part in PARTS if f"{weight}.{part}" in tensors]
    try:
        state = json.loads(bytes(read_bytes(tensors[name]).tolist()))
        shape, block = tuple(state["shape"]), state["blocksize"]
        values = torch.Size(shape).numel()
    except (ValueError, KeyError, TypeError) as error:
        raise unsound(name, f"is not the state of a quantized weight ({type(error).__name__}: {error})") from error
    codes = tensors.get(weight)
    if codes is None or 2 * codes.nbytes != values + values % 2 or not {"absmax", "quant_map"} <= set(present):
        raise unsound(weight, f"its codes, absmax or quant_map don't fit a weight of shape {shape}")
    members = {"weight": weight, **{part: f"{weight}.{part}" for part in present}}
    members[name.removeprefix(f"{weight}.")] = name
    return QuantizedWeight(weight, members, shape, 4, f"{table} in blocks of {block}", _dequantize_four_bits)


def _dequantize_int8(values: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    from bitsandbytes.functional import int8_vectorwise_dequant

    return int8_vectorwise_dequant(values["weight"], values["SCB"]).to(dtype)


def _dequantize_four_bits(values: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    from bitsandbytes.functional import QuantState, dequantize_4bit

    state = QuantState.from_dict({k: v for k, v in values.items() if k != "weight"}, device=torch.device("cpu"))
    return dequantize_4bit(values["weight"], state).to(dtype)
