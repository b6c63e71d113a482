"""Makes the config.json of an artifact."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel
from transformers.models.auto import auto_factory, modeling_auto

from compressor.artifact.export_format import ExportFormat
from compressor.artifact.modeling_file import custom_type, find_backbone
from compressor.artifact.stock_formats import FAMILIES, described_by, module_of, sorted_params
from compressor.errors import PreflightError
from compressor.model.class_changes import MODULES, SHAPES
from compressor.model.reshaped_class import is_reshaped, reshaping, stock_class
from compressor.model.stored_weight import StoredWeight


def artifact_config(
    source: dict[str, Any],
    export_format: ExportFormat,
    formats: Sequence[StoredWeight],
    model: PreTrainedModel,
    dtype: str,
    untied: bool,
) -> dict[str, Any]:
    """The artifact's config.json: the source's keys, and the keys that the export format needs."""
    config = copy.deepcopy(source)
    config.pop("torch_dtype", None)
    config["dtype"] = dtype
    if untied:
        config["tie_word_embeddings"] = False
    if export_format.name in FAMILIES:
        config["quantization_config"] = FAMILIES[export_format.name].config(described_by(formats), model)
        if export_format.dequantize:
            config["quantization_config"]["dequantize"] = True
    elif export_format.name == "custom":
        kind = custom_type(source["model_type"])
        config["model_type"] = kind
        config["architectures"] = [f"Compressed{type(model).__name__}"]
        if is_reshaped(config):
            config[SHAPES], config[MODULES] = reshaping(config)
        config["compressed_weights"] = dict(_custom_entry(stored) for stored in formats)
        config["auto_map"] = custom_auto_map(kind, model) | config.get("auto_map", {})
    return config


def _custom_entry(stored: StoredWeight) -> tuple[str, dict[str, Any]]:
    """The path of a stored layer in a custom artifact's model, and what the model needs to make it."""
    weight = stored.weight
    entry = {"form": stored.format_name, "spec": sorted_params(stored), "shape": list(weight.shape)}
    if weight.expert is None:
        return module_of(stored), entry
    assert weight.rows is not None
    owner, _, leaf = module_of(stored).rpartition(".")
    is_module = weight.parameter.endswith(".weight")  # of all experts of this kind; else its owner has several kinds
    last = weight.name.rpartition(".")[2]
    path = f"{owner}.{leaf}.{weight.expert}" if is_module else f"{owner}.{weight.expert}.{last}"
    place = {"parameter": weight.parameter, "expert": weight.expert, "rows": list(weight.rows)}
    return path, {**entry, **place, "transposed": weight.transposed}


def custom_auto_map(model_type: str, model: PreTrainedModel) -> dict[str, str]:
    """The `auto_map` of a custom artifact: Auto class -> class of its modeling file."""
    file = f"modeling_{model_type}"
    classes = {auto: f"{file}.Compressed{type(model).__name__}" for auto in auto_classes(model)}
    if (backbone := find_backbone(model)) is not None:
        classes["AutoModel"] = f"{file}.Compressed{backbone.__name__}"
    return {"AutoConfig": f"{file}.CompressedConfig"} | classes


def auto_classes(model: PreTrainedModel) -> list[str]:
    """The Auto classes with which transformers would load this architecture."""
    found = []
    for name in dir(modeling_auto):
        cls = getattr(modeling_auto, name)
        if not (isinstance(cls, type) and issubclass(cls, auto_factory._BaseAutoModelClass)):
            continue
        mapping = getattr(cls, "_model_mapping", None)
        classes = mapping.get(type(model.config), None) if mapping is not None else None
        if classes is not None and stock_class(model) in (classes if isinstance(classes, tuple) else (classes,)):
            found.append(name)
    if not found:
        raise PreflightError(
            "no Auto class loads this architecture",
            where=type(model).__name__,
            hint="Leave out steps whose weights need a modeling file; gptq and rtn are loaded without one.",
            data={"reason": "no-auto-class"},
        )
    return sorted(found)
