"""Describes the families of stock loaders: which weights each can read, and the `quantization_config` that it needs.

What stock loaders can read was found by loading (docs/format.md).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module

from compressor.errors import Because, DependencyError, values_of
from compressor.kernels.ops.bitsandbytes_linear import bitsandbytes_forward
from compressor.layers import find_layer
from compressor.layers.base import Layer, Stock
from compressor.model.stored_weight import StoredWeight
from compressor.model.weight_names import Renaming

STOCK_TENSORS_VERSION = "0.20.0"  # the compressed-tensors release with which the layout was checked
Described = tuple[StoredWeight, dict[str, Any]]  # a weight and the settings of its `Layer.stock`


@dataclass(frozen=True)
class Family:
    """A kind of stock loader.

    refuses  (weight name, why) for each weight that it can't read although the weight's format belongs to this family
    config   makes the `quantization_config` of config.json
    package  the package that loading needs in addition to this package's own; also the name of the extra
    forward  None: the loader dequantizes weights, so its model computes what ours does. Otherwise its layers compute
             the matmul, with their own rounding: (layer, x) -> the expected output for x, and the allowed difference
    """

    refuses: Callable[[Sequence[Described], PreTrainedModel], list[tuple[str, Because]]]
    config: Callable[[Sequence[Described], PreTrainedModel], dict[str, Any]]
    package: str | None = None
    forward: Callable[[Layer, Tensor], tuple[Tensor, Tensor]] | None = None


def stocks_of(formats: Sequence[StoredWeight]) -> list[tuple[StoredWeight, Stock | Because]]:
    """Each weight with the stock loader that reads its layer, or the reason why none does."""
    known: dict[tuple[str, str], Stock | Because] = {}
    for stored in formats:
        key = (stored.format_name, str(sorted_params(stored)))
        if key not in known:
            stock = find_layer(stored.format_name).stock(sorted_params(stored))
            if isinstance(stock, Stock) and stock.family not in FAMILIES:
                message = f"is stored for {stock.family}, but this release can't write a config for it"
                stock = Because(message, reason="unknown-loader", loader=stock.family)
            elif isinstance(stock, str):
                stock = Because(
                    stock, **{"reason": "no-stock-format", "format_name": stored.format_name, **values_of(stock)}
                )
            known[key] = stock
    return [(stored, known[stored.format_name, str(sorted_params(stored))]) for stored in formats]


def described_by(formats: Sequence[StoredWeight]) -> list[Described]:
    """The weights that stock loaders can read, with their settings."""
    return [(stored, stock.settings) for stored, stock in stocks_of(formats) if isinstance(stock, Stock)]


def _compressed_tensors_refuses(described: Sequence[Described], model: PreTrainedModel) -> list[tuple[str, Because]]:
    dense_experts = _some_experts_stay_dense([stored for stored, _ in described], model)
    renaming = Renaming(model)
    schemes = len({str(settings) for _, settings in described})
    refused = []
    for stored, settings in described:
        packed = settings["format"] == "pack-quantized"
        why = None
        if stored.weight.is_slice and renaming(f"{stored.weight.name}.weight")[1] is None:
            message = "is an expert, and stock loaders have no rule that joins separate experts of this class"
            why = Because(message, reason="no-joining-rule")
        elif stored.weight.transposed:
            why = Because("is a Conv1D, which compressed-tensors can't target", reason="conv1d")
        elif stored.weight.expert is not None and not (packed and settings["weights"]["symmetric"]):
            message = "is an expert, but of experts stock loaders read only packed symmetric codes"
            why = Because(message, reason="expert-codes")
        elif _has_packed_zeros(settings) and schemes > 1:
            message = (
                f"has packed zero points, which stock loaders read only if all weights share one scheme, not {schemes}"
            )
            why = Because(message, reason="packed-zeros", schemes=schemes)
        elif dense_experts:
            message = "is quantized while some experts stay dense, and stock loaders leave dense experts uninitialized"
            why = Because(message, reason="dense-experts")
        if why is not None:
            refused.append((stored.weight.name, why))
    return refused


def compressed_tensors_config(described: Sequence[Described], model: PreTrainedModel) -> dict[str, Any]:
    """The `quantization_config` of compressed-tensors: exact module names; every other Linear is ignored by name.

    Packed zero points can be read only by the loader that dequantizes weights while it loads them (`dequantize`).
    Without it, the loader keeps the packed tensors until the first forward pass.
    """
    groups: dict[str, Any] = {}
    by_settings: dict[tuple[Any, ...], list[Described]] = {}
    for stored_weight, settings in described:
        weights, expert = settings["weights"], stored_weight.weight.expert is not None
        key = (weights["num_bits"], weights["group_size"] or -1, expert, str(settings))
        by_settings.setdefault(key, []).append((stored_weight, settings))
    for number, ((_, _, expert, _), members) in enumerate(sorted(by_settings.items(), key=lambda item: item[0])):
        targets = sorted({module_of(stored_weight) for stored_weight, _ in members})
        if expert:  # experts are not modules of the running model; the loader needs a regex with "experts"
            targets = ["re:.*experts.*"]
        settings = members[0][1]
        activations = {key: settings.get(key) for key in ("input_activations", "output_activations")}
        groups[f"group_{number}"] = {"targets": targets, **settings, **activations}
    stored = {module_of(stored_weight) for stored_weight, _ in described}
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    formats = sorted({group["format"] for group in groups.values()})
    config = {
        "quant_method": "compressed-tensors",
        "format": formats[0] if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "ignore": [name for name in linears if name not in stored],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "version": STOCK_TENSORS_VERSION,
        "config_groups": groups,
    }
    if any(_has_packed_zeros(settings) for _, settings in described):
        config["dequantize"] = True
    return config


def _some_experts_stay_dense(formats: Sequence[StoredWeight], model: PreTrainedModel) -> bool:
    """Whether the loader would have to join dense experts, which it can't do once the model is quantized."""
    rules = [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightConverter)]
    joined = [re.compile(pattern) for rule in rules for pattern in rule.target_patterns]
    rows = {  # not joined: a class token, which has three dimensions too, and a depthwise convolution
        name: value.shape[0] * value.shape[1]
        for name, value in model.named_parameters()
        if value.dim() == 3 and min(value.shape[1:]) > 1 and any(pattern.search(name) for pattern in joined)
    }
    for stored in formats:
        if stored.weight.parameter in rows:
            rows[stored.weight.parameter] -= stored.weight.out_features
    return any(rows.values())


def _has_packed_zeros(settings: dict[str, Any]) -> bool:
    return settings["format"] == "pack-quantized" and not settings["weights"]["symmetric"]


def _bitsandbytes_refuses(described: Sequence[Described], model: PreTrainedModel) -> list[tuple[str, Because]]:
    """Weights that bitsandbytes can't read. Dense experts are allowed: this loader joins them in transformers 5.24."""
    thresholds = sorted({settings["threshold"] for _, settings in described})
    skipped = _dense_modules(described, model)
    modules = dict(model.named_modules())
    refused = []
    for stored, _ in described:
        module = modules[module_of(stored)]
        why = None
        if not _bitsandbytes_replaces(module):
            kind = type(module).__name__
            message = f"is a {kind}, but bitsandbytes replaces only plain Linear and Conv1D"
            why = Because(message, reason="other-module", module=kind)
        elif len(thresholds) > 1:
            message = (
                f"is in a model with the thresholds {thresholds}, but bitsandbytes has one threshold per checkpoint"
            )
            why = Because(message, reason="thresholds", thresholds=thresholds)
        elif not should_convert_module(module_of(stored), skipped):
            message = "has a name that bitsandbytes can't distinguish from the name of a dense module"
            why = Because(message, reason="ambiguous-name")
        if why is not None:
            refused.append((stored.weight.name, why))
    return refused


def bitsandbytes_config(described: Sequence[Described], model: PreTrainedModel) -> dict[str, Any]:
    """The `quantization_config` of 8-bit bitsandbytes. It names all dense modules that would otherwise be replaced."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_8bit": True,
        "load_in_4bit": False,
        "llm_int8_threshold": float(described[0][1]["threshold"]),  # bitsandbytes refuses an int
        "llm_int8_skip_modules": _dense_modules(described, model),
        "llm_int8_has_fp16_weight": False,
        "llm_int8_enable_fp32_cpu_offload": False,
    }


def _dense_modules(described: Sequence[Described], model: PreTrainedModel) -> list[str]:
    stored = {module_of(stored_weight) for stored_weight, _ in described}
    names = [name for name, module in model.named_modules() if _bitsandbytes_replaces(module)]
    return [name for name in names if name not in stored]


def _bitsandbytes_replaces(module: nn.Module) -> bool:
    return type(module) is nn.Linear or isinstance(module, Conv1D)


FAMILIES = {
    "compressed-tensors": Family(_compressed_tensors_refuses, compressed_tensors_config),
    "bitsandbytes": Family(
        _bitsandbytes_refuses, bitsandbytes_config, package="bitsandbytes", forward=bitsandbytes_forward
    ),
}


def check_loader(export_format: str) -> None:
    """raises DependencyError if loading an artifact in this export format needs a package that isn't installed"""
    package = FAMILIES[export_format].package if export_format in FAMILIES else None
    if package is not None and find_spec(package) is None:
        raise DependencyError(
            f"loading the format {export_format} needs the package {package}, which is not installed",
            where="export",
            hint=f"Run pip install compress-model[{package}], or set export.format: custom, which needs no package.",
            data={"route": export_format, "package": package},
        )


def module_of(stored: StoredWeight) -> str:
    """The module of the running model that a stored weight replaces."""
    return stored.weight.parameter.removesuffix(".weight")


def sorted_params(stored: StoredWeight) -> dict[str, Any]:
    """The format parameters with keys in one order, whether they come from a layer or from the journal."""
    return json.loads(json.dumps(stored.format_params, sort_keys=True))
