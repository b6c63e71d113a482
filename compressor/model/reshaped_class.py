"""The class of a model whose config says that its parameters have other shapes than the architecture's own.

Such a class is a subclass of the stock one, of the same name, that reshapes each instance as it is made
(`placing`). So the model is read, run, cut down to a probe model and loaded like any other; its checkpoint
goes on naming the stock model type and architecture.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from compressor.errors import ModelError
from compressor.layers import find_layer
from compressor.layers.structural.placing import reshape

SHAPES, MODULES = "compressed_shapes", "compressed_modules"  # keys of config.json


def is_reshaped(config: PretrainedConfig | Mapping[str, Any]) -> bool:
    """Whether a config asks for other shapes or structural layers; a parsed config.json will do."""
    return any(reshaping(config))


def reshaping(config: PretrainedConfig | Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a config says of shapes and of structural layers.

    raises  ModelError for what isn't as `compressor.layers.structural.placing` has it
    """
    values = config if isinstance(config, Mapping) else vars(config)
    shapes, modules = (values.get(key) or {} for key in (SHAPES, MODULES))
    if not isinstance(shapes, dict) or not all(s is None or isinstance(s, list) for s in shapes.values()):
        raise ModelError("is not a map from parameters to shapes", where=f"config.json: {SHAPES}")
    if not isinstance(modules, dict) or not all(
        isinstance(entry, dict) and entry.keys() >= {"form", "spec", "shape"} for entry in modules.values()
    ):
        raise ModelError("is not a map from modules to form, spec and shape", where=f"config.json: {MODULES}")
    return shapes, modules


def structural_forms(config: PretrainedConfig | Mapping[str, Any]) -> list[str]:
    """Names of the structural forms in a config, sorted."""
    return sorted({entry["form"] for entry in reshaping(config)[1].values()})


def class_for(cls: type[PreTrainedModel], config: PretrainedConfig | Mapping[str, Any]) -> type[PreTrainedModel]:
    """The class that makes what a config describes: `cls` itself, or the reshaped one."""
    return reshaped_class(cls) if is_reshaped(config) else cls  # type: ignore[arg-type]


@cache
def reshaped_class(cls: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """A subclass of a stock class whose instances are reshaped as their config says."""

    def __init__(self: Any, config: PretrainedConfig, *args: Any, **kwargs: Any) -> None:
        cls.__init__(self, config, *args, **kwargs)
        shapes, modules = reshaping(config)
        reshape(self, shapes, modules, {form: find_layer(form) for form in structural_forms(config)})

    attributes = {"__init__": __init__, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (cls,), {**attributes, "stock": cls})


def stock_class(model: PreTrainedModel | type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The class of transformers that a model, or a reshaped class, comes from."""
    cls = model if isinstance(model, type) else type(model)
    return cls.__dict__.get("stock", cls)
