"""Reads the stored weights of modules: of this package's layers, compressed-tensors and bitsandbytes.

These functions are not methods of the layers, since the source of a layer is copied into modeling files that use only
torch. All kinds of layers have the same names for their tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from compressor.kernels.ops.blocks import power_of_two, unpack_rows
from compressor.kernels.ops.pack_codes import unpack_codes
from compressor.kernels.ops.sparse_factors import unpack_index
from compressor.kernels.prepared.dispatch import FactorWeight, IntegerWeight, OutlierWeight, Weight

ReadWeight = Callable[[dict[str, Tensor]], Weight | str]


@dataclass(frozen=True)
class StoredWeight:
    """form     name of the format, or of the library of the module
    tensors  by their names in the module
    read     turns them into numbers, or gives the reason why no kernel can use them
    """

    format_name: str
    tensors: dict[str, Tensor] = field(repr=False)
    bias: nn.Parameter | None
    read: ReadWeight


def adopt(module: nn.Module) -> StoredWeight | None:
    """The stored weight of a module; None if it is not a quantized linear layer."""
    format_name = getattr(module, "format_name", None)
    if isinstance(format_name, str) and getattr(module, "stands_for", None) == "linear":
        layer: Any = module
        read = READ_WEIGHT.get(format_name)
        read_weight = partial(read, layer.format_params()) if read else partial(_none, format_name)
        return StoredWeight(format_name, layer.tensors(), getattr(layer, "bias", None), read_weight)
    if type(module).__name__ == "Linear8bitLt" and type(module).__module__.startswith("bitsandbytes"):
        return _of_bitsandbytes(module)
    scheme = getattr(module, "quantization_scheme", None)
    if scheme is None or not isinstance(module, nn.Linear) or scheme.weights is None:
        return None
    names = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")
    tensors = {name: getattr(module, name).data for name in names if getattr(module, name, None) is not None}
    return StoredWeight("compressed-tensors", tensors, module.bias, partial(_of_compressed_tensors, scheme))


def _packed(format_params: dict[str, Any], tensors: dict[str, Tensor]) -> IntegerWeight:
    """packed_linear, and `pack-quantized` of compressed-tensors"""
    bits, (out, columns) = format_params["bits"], tensors["weight_shape"].tolist()
    zero_point = None
    if not format_params["symmetric"]:
        zero_point = unpack_codes(tensors["weight_zero_point"].t().contiguous(), bits, out).t().contiguous()
    codes, index = unpack_codes(tensors["weight_packed"], bits, columns), tensors.get("weight_g_idx")
    if index is not None and bool((index < 0).all()):  # compressed-tensors' value for columns in their own order
        index = None
    return IntegerWeight(codes, tensors["weight_scale"], zero_point, bits, format_params["group_size"], index)


def _bytes(format_params: dict[str, Any], tensors: dict[str, Tensor]) -> IntegerWeight:
    """byte_linear, `naive-quantized` of compressed-tensors: signed bytes"""
    codes, zeros = ((tensors[name].to(torch.int16) + 128).to(torch.uint8) for name in ("weight", "weight_zero_point"))
    return IntegerWeight(codes, tensors["weight_scale"], zeros, 8, format_params["group_size"])


def _int8_rows(format_params: dict[str, Any], tensors: dict[str, Tensor]) -> OutlierWeight:
    """int8_split_linear, and the layers of bitsandbytes"""
    columns, weight = None, None
    if format_params["outliers"] == "calibrated":
        codes = tensors["weight"]
        columns = tensors.get("outlier_columns", codes.new_zeros(0)).long()
        weight = tensors.get("outlier_weight", codes.new_zeros(len(codes), 0, dtype=torch.float32))
    return OutlierWeight(tensors["weight"], tensors["SCB"], format_params["threshold"], columns, weight)


def _of_bitsandbytes(module: Any) -> StoredWeight:
    """Multiplied like int8_split_linear. `bitsandbytes_linear` describes the differences of bitsandbytes."""
    weight, scale = module.weight.data, getattr(module.weight, "SCB", None)
    scale = module.state.SCB if scale is None else scale
    if weight.dtype != torch.int8 or scale is None:
        return StoredWeight(
            "bitsandbytes", {}, module.bias, partial(_none, "a layer of bitsandbytes before it is quantized")
        )
    tensors = {"weight": weight, "SCB": scale, "weight_format": torch.zeros((), dtype=torch.uint8)}
    format_params = {"outliers": "dynamic", "threshold": float(module.state.threshold)}
    return StoredWeight("bitsandbytes", tensors, module.bias, partial(_int8_rows, format_params))


def _blocks(format_params: dict[str, Any], tensors: dict[str, Tensor]) -> IntegerWeight | str:
    """block_linear: a group is the part of a block in one row, with the block's scale; a power of two is exact"""
    if format_params.get("biased"):
        return "its bias is stored in blocks too"
    bits, (rows, width) = format_params["bits"], format_params["block"]
    packed = tensors["weight_packed"]
    columns = packed.shape[1] * 8 // bits - int(format_params.get("odd", False))
    signed = unpack_rows(packed, bits, columns).to(torch.int16)
    shift = format_params["scale"] == "shift"
    scale = power_of_two(tensors["weight_exponent"], torch.float32) if shift else tensors["weight_scale"].float()
    scale = scale.repeat_interleave(rows, 0)[: len(packed)].contiguous()
    codes = (signed + 2 ** (bits - 1)).to(torch.uint8)
    return IntegerWeight(codes, scale, None, bits, -1 if width >= columns else width)


def _factors(format_params: dict[str, Any], tensors: dict[str, Tensor]) -> FactorWeight:
    """sparse_factor_linear; it has scales only with int8"""
    atoms, values = tensors["weight_atoms"], tensors["weight_values"]
    out, blocks, k = values.shape
    index = unpack_index(tensors["weight_index"], out * blocks, format_params["atoms"], k).view(out, blocks, k)
    scales = tensors.get("weight_atom_scale"), tensors.get("weight_value_scale")
    return FactorWeight(atoms, values, index.to(torch.uint16), *scales)


def _none(format_name: str, tensors: dict[str, Tensor]) -> str:
    return f"no kernel takes {format_name}"


def _of_compressed_tensors(scheme: Any, tensors: dict[str, Tensor]) -> IntegerWeight | str:
    weights = scheme.weights
    if "weight_packed" not in tensors:
        return "compressed-tensors holds no packed codes; it drops them at the first call, so prepare the model before"
    if weights.type != "int" or weights.num_bits not in (2, 3, 4, 8) or scheme.input_activations is not None:
        return f"compressed-tensors scheme of {weights.num_bits} bits {weights.type}, or with activation quantization"
    groups, columns = tensors["weight_scale"].shape[1], int(tensors["weight_shape"][1])
    format_params = {"bits": int(weights.num_bits), "symmetric": weights.symmetric}
    return _packed({**format_params, "group_size": -1 if groups == 1 else columns // groups}, tensors)


READ_WEIGHT: dict[str, Callable[[dict[str, Any], dict[str, Tensor]], Weight | str]] = {
    "packed_linear": _packed,
    "block_linear": _blocks,
    "byte_linear": _bytes,
    "int8_split_linear": _int8_rows,
    "sparse_factor_linear": _factors,
}
