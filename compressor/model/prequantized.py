"""Refuses a checkpoint that is quantized in a way that can't be read, as config.json, file names and headers show.

`quantized_source` reads the other ones. What it gives has nothing left that is refused here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from compressor.errors import ModelError
from compressor.model.checkpoint import Checkpoint
from compressor.model.quantized_source import SUPPORTED
from compressor.storage.file_names import QUANTIZATION_FILES
from compressor.storage.safetensors_file import TensorInfo

HINT = f"Start from the original 16-bit or 32-bit checkpoint, or from one that is quantized as {SUPPORTED}."
CONFIG_KEYS = ("quantization_config", "compression_config")
# last parts of tensor names that mark a quantized matrix of the module in the rest of the name
LEAVES = (
    *("qweight", "qzeros", "scales", "g_idx", "weight_packed", "weight_scale", "weight_scale_inv", "weight_scale_2"),
    *("weight_zero_point", "weight_shape", "weight_g_idx", "SCB", "weight_format", "absmax", "quant_map", "W_q"),
    *("weight_scales", "weight_blocks", "qscales", "_qdata", "_scale_and_zero"),
)
FLOATING = ("F64", "F32", "F16", "BF16")  # dtypes from which a floating parameter can be read


def refuse_stated(checkpoint: Checkpoint) -> None:
    """raises ModelError if config.json, or a file beside it, declares that the model is quantized, and it is not
    dequantized
    """
    sections = {"": checkpoint.config} | {
        f"{key}.": value for key, value in checkpoint.config.items() if isinstance(value, dict)
    }
    for prefix, section in sections.items():
        for key in CONFIG_KEYS:
            stated = section.get(key)
            if stated is not None and prefix.rstrip(".") not in CONFIG_KEYS:
                reported = {"reason": "config-key", "key": f"{prefix}{key}"}
                raise _refusal(f"config.json has {prefix}{key}", _method(stated), checkpoint, reported)
    for name in QUANTIZATION_FILES:
        if checkpoint.quantized is None and (checkpoint.directory / name).is_file():
            reported = {"reason": "config-file", "file": name}
            raise _refusal(f"{name} is in its directory", None, checkpoint, reported)


def refuse_codes(
    filled: Iterable[tuple[str, str]], unused: Iterable[str], modules: Iterable[str], checkpoint: Checkpoint
) -> None:
    """raises ModelError if tensors for floating parameters contain codes, or there are tensors of quantized weights

    filled   (tensor, the floating parameter that it fills)
    unused   tensors that fill no parameter
    modules  names of the model's modules in the checkpoint
    """
    codes = [
        (tensor, parameter) for tensor, parameter in filled if checkpoint.tensors[tensor].stored_as not in FLOATING
    ]
    if codes:
        tensor = codes[0][0]
        kind = _kind(checkpoint.tensors, tensor)
        what = f"{len(codes)} tensors contain {kind} in place of weights, such as {tensor}"
        stored_as = checkpoint.tensors[tensor].stored_as
        reported = {"reason": "codes", "tensors": len(codes), "stored_as": stored_as, "tensor": tensor}
        raise _refusal(what, None, checkpoint, reported)
    known = set(modules)
    beside = [name for name in unused if name.rpartition(".")[2] in LEAVES and name.rpartition(".")[0] in known]
    if beside:
        what = f"it has {len(beside)} tensors of quantized weights, such as {beside[0]}"
        reported = {"reason": "tensors-beside", "tensors": len(beside), "tensor": beside[0]}
        raise _refusal(what, None, checkpoint, reported)


def _kind(tensors: Mapping[str, TensorInfo], name: str) -> str:
    stored_as = tensors[name].stored_as
    return f"codes of {stored_as}" if stored_as.startswith(("F4", "F6", "F8")) else f"numbers of {stored_as}"


def _method(stated: Any) -> str | None:
    method = stated.get("quant_method") if isinstance(stated, dict) else None
    return method if isinstance(method, str) else "unknown method"


def _refusal(found: str, method: str | None, checkpoint: Checkpoint, data: dict[str, Any]) -> ModelError:
    message = f"the model is already quantized ({method})" if method else "the model is already quantized"
    data = {**data, "quantized": method or True}
    return ModelError(f"{message}: {found}", where=checkpoint.directory.name, hint=HINT, data=data)
