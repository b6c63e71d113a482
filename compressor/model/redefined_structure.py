"""Computes the structure of a model after a step that reshapes it, from headers alone.

`plan` uses it to count bytes and to select the weights of later steps. The sweep then writes tensors of exactly these
shapes, and reads them again as an ordinary checkpoint (`compressor.engine.rewrite_sweep`).
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from compressor.errors import Because, CompressError, ModelError, PreflightError
from compressor.model.checkpoint import Checkpoint
from compressor.model.facts import Redefinition
from compressor.model.model_building import empty_on_meta, most_modules
from compressor.model.module_names import renumbered_after_removal
from compressor.model.probe_model import make_probe_model
from compressor.model.reshaped_class import class_for, stock_class
from compressor.model.structure import Structure, structure_of
from compressor.model.unused_tensors import without_announcements
from compressor.storage.safetensors_file import TensorInfo

# the exceptions of transformers for a config with numbers that it refuses, and for a model that can't be made from it
REFUSALS = (
    ValueError,
    TypeError,
    RuntimeError,
    ArithmeticError,
    AttributeError,
    LookupError,
    AssertionError,
    StrictDataclassError,
)


def parameter_shapes(structure: Structure) -> dict[str, tuple[int, ...]]:
    """Parameter -> shape; tied ones under each of their names."""
    return {name: tuple(p.shape) for name, p in structure.model.named_parameters(remove_duplicate=False)}


def redefined(structure: Structure, redefinition: Redefinition) -> Structure:
    """The structure of the reshaped model. Its tensors have shapes but no file yet.

    raises  ModelError if the model's class makes other shapes from that config
    """
    config = _config_after(structure, redefinition)
    if any(
        unused.is_carried for unused in structure.bindings.unused
    ):  # they belong to the model before this step, and are not copied
        config = without_announcements(config, structure.model.config)
    tensors: dict[str, TensorInfo] = {}
    held = structure.model.state_dict()
    for name in structure.bindings.sources:
        before = tuple(held[name].shape)
        shape = redefinition.shapes.get(name, before)
        if shape is not None:
            found = _tensor_infos(structure, name, before, shape)
            tensors |= {_renumbered(tensor, structure, redefinition): info for tensor, info in found.items()}
    for name, shape in redefinition.shapes.items():
        if name not in structure.bindings.sources and shape is not None:
            tensors[_renumbered(name, structure, redefinition)] = _info(structure, name, shape)
    if not config.get("tie_word_embeddings", True):  # then everything that shared a tensor has one of its own
        for name, origin in structure.bindings.tied.items():
            shape = redefinition.shapes.get(name) or redefinition.shapes.get(origin) or tuple(held[origin].shape)
            tensors.setdefault(_renumbered(name, structure, redefinition), _info(structure, name, shape))
    return _reclassed(structure, replace(structure.checkpoint, config=config, tensors=tensors))


def tensors_after(structure: Structure, redefinition: Redefinition) -> dict[str, tuple[str, ...]]:
    """Tensor of the model before a step -> the tensors after it that fill the same parameters; none if these are gone.

    Tensors that fill no parameter are not in it.
    """
    after: dict[str, dict[str, None]] = {}
    for name, sources in structure.bindings.sources.items():
        is_gone = redefinition.shapes.get(name, ()) is None
        for source in sources:
            names = after.setdefault(source.tensor, {})
            if not is_gone:
                held = name if name in structure.bindings.joined else source.tensor
                names[_renumbered(held, structure, redefinition)] = None
    return {tensor: tuple(names) for tensor, names in after.items()}


def with_token_gates(structure: Structure, redefinition: Redefinition) -> Structure:
    """The structure of a model whose config alone changes. Its tensors stay in their files."""
    return _reclassed(structure, replace(structure.checkpoint, config=_config_after(structure, redefinition)))


def _reclassed(structure: Structure, checkpoint: Checkpoint) -> Structure:
    """The structure of a checkpoint whose config may need another class of the same architecture."""
    config = _config(checkpoint.config)
    cls = class_for(stock_class(structure.model), config)
    return structure_of(checkpoint, cls, config, str(structure.dtype).partition(".")[2])


def _config_after(structure: Structure, redefinition: Redefinition) -> dict[str, Any]:
    """config.json of the model after a step."""
    config = {**copy.deepcopy(structure.checkpoint.config), **copy.deepcopy(redefinition.config)}
    config["dtype"] = str(structure.dtype).removeprefix("torch.")
    config.pop("torch_dtype", None)
    return config


def _renumbered(name: str, structure: Structure, redefinition: Redefinition) -> str:
    """The new name of a parameter or tensor of a block that stays, when the model has fewer blocks."""
    if redefinition.blocks is None:
        return name
    return renumbered_after_removal(name, structure.pieces.blocks_path.rpartition(".")[2], redefinition.blocks)


def is_splittable(structure: Structure, name: str) -> bool:
    """Whether a parameter is made up of checkpoint tensors in a way that `split_parameter` can undo."""
    sources, bindings = structure.bindings.sources.get(name, ()), structure.bindings
    is_whole = name not in bindings.rules
    return bool(sources) and (is_whole or (name not in bindings.joined and all(s.rows is not None for s in sources)))


def split_parameter(structure: Structure, name: str, value: Tensor) -> dict[str, Tensor]:
    """A parameter as the checkpoint tensors that fill it: the inverse of `weight_names.read_parameter`."""
    sources = structure.bindings.sources[name]
    if name not in structure.bindings.rules:
        return {sources[0].tensor: value}
    assert name not in structure.bindings.joined  # it has a tensor of its own now (`_tensor_infos`)
    parts = {}
    for source in sources:
        assert source.rows is not None  # joined by rows, or the model was refused (`weight_names.placed_rows`)
        parts[source.tensor] = value[source.expert, source.rows[0] : source.rows[1]]
    return parts


def _tensor_infos(
    structure: Structure, name: str, before: tuple[int, ...], shape: tuple[int, ...]
) -> dict[str, TensorInfo]:
    """The tensors that will fill a parameter whose shape changes."""
    infos: dict[str, TensorInfo] = {}
    if name in structure.bindings.joined:  # its own name is correct too, and then no rule must be inverted
        return {name: _info(structure, name, shape)}
    for source in structure.bindings.sources[name]:
        if name not in structure.bindings.rules:
            infos[source.tensor] = _info(structure, name, shape)
            continue
        assert source.rows is not None
        whole = source.rows == (0, before[1])
        rows = shape[1] if whole else source.rows[1] - source.rows[0]
        if not whole and shape[1] != before[1]:
            raise ModelError(
                "it is joined from several tensors along its rows, and the step changes the number of rows",
                where=name,
                hint="Leave slicegpt, vtrans and greedy_removal out; gptq, rtn and llm_int8 can be used.",
            )
        infos[source.tensor] = _info(structure, name, (rows, *shape[2:]))
    return infos


def _info(structure: Structure, name: str, shape: tuple[int, ...]) -> TensorInfo:
    """The tensor of a present or new parameter. A formerly tied one has the dtype of the tensor that it shared."""
    bindings = structure.bindings
    dtype = bindings.dtypes.get(bindings.tied.get(name, name), structure.dtype)
    return TensorInfo(Path(), dtype, tuple(shape), 0, math.prod(shape) * dtype.itemsize)


def _config(values: dict[str, Any]) -> PretrainedConfig:
    """The config from values of a config.json, where infinite numbers may be written as {"__float__": "Infinity"}."""
    values = PretrainedConfig._decode_special_floats(copy.deepcopy(values))
    return AutoConfig.for_model(values.pop("model_type"), **values)


def misfit(structure: Structure, redefinition: Redefinition) -> str | None:
    try:
        redefined(structure, redefinition)
    except (CompressError, *REFUSALS) as error:
        return Because(error.what, **error.data) if isinstance(error, CompressError) else _of_library(error)
    return None


def config_misfit(structure: Structure, changes: dict[str, Any]) -> str | None:
    try:
        _config({**structure.checkpoint.config, **changes})
    except REFUSALS as error:
        return _of_library(error)
    return None


def values_misfit(structure: Structure, values: dict[str, Any]) -> str | None:
    """Why a model of the structure's class can't be made from this config.json; None if it can."""
    try:
        config = _config(values)
        cls = class_for(stock_class(structure.model), config)
        empty_on_meta(cls, config, most_modules(structure.checkpoint), structure.dtype)
    except REFUSALS as error:
        return _of_library(error)
    return None


def class_misfit(structure: Structure, changes: dict[str, Any]) -> str | None:
    """Why the model's class can't be made with these values of config.json; None if it can. Tried with few blocks."""
    if (why := config_misfit(structure, changes)) is not None:
        return why
    shallow = structure.probes.whole.config.to_dict()
    try:
        make_probe_model(
            stock_class(structure.model), _config({**shallow, **changes}), torch.device("meta"), structure.dtype
        )
    except REFUSALS as error:
        return _of_library(error)
    return None


def _of_library(error: Exception) -> Because:
    message = _in_one_line(error)
    return Because(message, cause=message)


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def check_redefinition(
    structure: Structure, redefinition: Redefinition, where: str, rewrites: bool = True
) -> Structure:
    """The reshaped structure. raises PreflightError with the reason if the model's class can't have these shapes"""
    try:
        return redefined(structure, redefinition) if rewrites else with_token_gates(structure, redefinition)
    except (ModelError, *REFUSALS) as error:
        why = str(error) if isinstance(error, ModelError) else _in_one_line(error)
        raise PreflightError(
            f"{structure.architecture} can't be built with the shapes that this step makes ({why})",
            where=where,
            hint="Set another sparsity, target or orientation; docs/passes lists the models that each pass fits.",
            data={
                "model": structure.architecture,
                "because": error.data if isinstance(error, ModelError) else {"cause": why},
            },
        ) from error
