"""Checks the values of config.json before a model is made from them, and names a wrong one in the error."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from compressor.errors import ModelError
from compressor.model.checkpoint import Checkpoint

DTYPES = ("float16", "bfloat16", "float32", "float64")  # dtypes in which transformers can make a model
# No model has larger sizes or counts than these: the largest known have 10^7 positions and 1536 experts.
LARGEST_SIZE, LARGEST_COUNT = 10**8, 10**6
SIZES = re.compile(r"size|dim|embd|inner|position|ctx|window|length|rank|channel|hidden")
FREE = re.compile(
    r"theta|token|_ids?$|seed|scal|factor|base|freq|version|eps"
)  # integers that are not a size or a count
HINT = "Correct the value in config.json, or download that file again."
Path = tuple[str, ...]  # of a key in config.json


def where_of(checkpoint: Checkpoint) -> str:
    """The name of a checkpoint's config.json in messages."""
    return f"{checkpoint.directory.name}/config.json"


def check_values(checkpoint: Checkpoint) -> None:
    """Check the keys of config.json that are read before the config class is known, and every count and size.

    raises  ModelError naming the key and its value
    """
    values, where = checkpoint.config, where_of(checkpoint)
    names = values.get("architectures")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise wrong_value("architectures", names, where, "a list of class names is needed")
    kind = values.get("model_type")
    if not isinstance(kind, str):
        if "model_type" not in values:
            raise ModelError(
                "has no `model_type`",
                where=where,
                hint='Add the type of the model, for example "model_type": "llama".',
                data={"reason": "no-model-type"},
            )
        raise wrong_value("model_type", kind, where, "the name of a model type is needed")
    for key in ("dtype", "torch_dtype"):
        stated = values.get(key)
        if stated is not None and stated not in DTYPES:
            raise wrong_value(key, stated, where, f"one of {', '.join(DTYPES)} is needed")
    quantized = values.get("quantization_config")
    if quantized is not None and not isinstance(quantized, dict):
        raise wrong_value("quantization_config", quantized, where, "a map is needed")
    whole, block_keys = _known_keys(kind)
    tensors = len(checkpoint.tensors)
    for path, value in leaves(values):
        key = path[-1]
        if type(value) is not int or FREE.search(key) or (len(path) == 1 and key not in whole):
            continue
        if key in block_keys and len(path) == 1 and not 1 <= value <= tensors:
            why = "at least 1 is needed" if value < 1 else f"the checkpoint has {tensors} tensors, too few for that"
            raise wrong_value(key, value, where, why)
        most = LARGEST_SIZE if SIZES.search(key) and key not in block_keys else LARGEST_COUNT
        if value > most:
            raise wrong_value(".".join(path), value, where, f"no model has more than {most:,}")


def _known_keys(kind: str) -> tuple[set[str], set[str]]:
    """Keys that the config class of a model type reads as integers, and those of them that count its blocks."""
    blocks = {"num_hidden_layers"}
    if kind not in CONFIG_MAPPING:
        return blocks | {"num_labels"}, blocks
    cls = CONFIG_MAPPING[kind]
    aliases = dict(getattr(cls, "attribute_map", {}))
    fields = dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()
    whole = {field.name for field in fields if field.type is int or int in get_args(field.type)}
    whole |= {alias for alias, target in aliases.items() if target in whole}
    blocks.add(aliases.get("num_hidden_layers", "num_hidden_layers"))
    return whole | blocks | {"num_labels"}, blocks


def leaves(values: Mapping[str, Any], prefix: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every key with its value, also in nested maps. A map comes after its entries."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, (*prefix, key))
        yield (*prefix, key), value


def value_at(values: Mapping[str, Any], path: Path) -> Any:
    node: Any = values
    for part in path:
        if not isinstance(node, Mapping) or part not in node:
            return None
        node = node[part]
    return node


def key_of(field: str, values: Mapping[str, Any], aliases: Mapping[str, str]) -> str | None:
    """The key of config.json that sets a field."""
    names = [field, *(alias for alias, target in aliases.items() if target == field)]
    return next((name for name in names if name in values), None)


def wrong_value(key: str, value: Any, where: str, needed: str) -> ModelError:
    reported = {"reason": "wrong-value", "keys": [key], "value": shown_value(value), "needed": needed}
    return ModelError(f"{key} is {shown_value(value)}; {needed}", where=where, hint=HINT, data=reported)


def shown_value(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 60 else text[:57] + "..."
