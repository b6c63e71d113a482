"""The structure that a model will have once a step has reshaped it, from headers alone.

`plan` looks at it to count bytes and to select what later steps do; the sweep then writes tensors of exactly these
shapes, and reads them back as a checkpoint like any other (`compressor.engine.rewrite_sweep`).
"""

from __future__ import annotations

import copy
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from compressor.errors import Because, CompressError, ModelError, PreflightError
from compressor.model.checkpoint import Checkpoint
from compressor.model.facts import Remodel
from compressor.model.reshaped_class import class_for, stock_class
from compressor.model.structure import Structure, structure_of
from compressor.model.unused_tensors import without_announcements
from compressor.storage.safetensors_file import TensorInfo

# what transformers raises for a config whose numbers it doesn't take, and for a model that can't be made of one
REFUSALS = (ValueError, TypeError, RuntimeError, StrictDataclassError)


def parameter_shapes(structure: Structure) -> dict[str, tuple[int, ...]]:
    """Parameter -> shape, tied ones under each of their names."""
    return {name: tuple(p.shape) for name, p in structure.model.named_parameters(remove_duplicate=False)}


def remodelled(structure: Structure, remodel: Remodel) -> Structure:
    """The structure of the reshaped model; its tensors have shapes but lie nowhere.

    raises ModelError if the model's class makes other shapes of that config
    """
    config = _config_after(structure, remodel)
    if any(unused.is_carried for unused in structure.bindings.unused):  # they fit the model as it was, and stay behind
        config = without_announcements(config, structure.model.config)
    tensors: dict[str, TensorInfo] = {}
    held = structure.model.state_dict()
    for name in structure.bindings.sources:
        before = tuple(held[name].shape)
        shape = remodel.shapes.get(name, before)
        if shape is not None:
            found = _tensor_infos(structure, name, before, shape)
            tensors |= {renumbered(tensor, structure, remodel): info for tensor, info in found.items()}
    for name, shape in remodel.shapes.items():
        if name not in structure.bindings.sources and shape is not None:
            tensors[renumbered(name, structure, remodel)] = _info(structure, name, shape)
    if not config.get("tie_word_embeddings", True):  # what shared more than a table has a tensor of its own then
        for name, origin in structure.bindings.tied.items():
            shape = remodel.shapes.get(name) or remodel.shapes.get(origin) or tuple(held[origin].shape)
            tensors.setdefault(renumbered(name, structure, remodel), _info(structure, name, shape))
    return _reclassed(structure, replace(structure.checkpoint, config=config, tensors=tensors))


def regated(structure: Structure, remodel: Remodel) -> Structure:
    """The structure of a model of which only the config changes; its tensors lie where they did."""
    return _reclassed(structure, replace(structure.checkpoint, config=_config_after(structure, remodel)))


def _reclassed(structure: Structure, checkpoint: Checkpoint) -> Structure:
    """The structure of a checkpoint whose config may ask for another class of the same architecture."""
    config = _config(checkpoint.config)
    cls = class_for(stock_class(structure.model), config)
    return structure_of(checkpoint, cls, config, str(structure.dtype).partition(".")[2])


def _config_after(structure: Structure, remodel: Remodel) -> dict[str, Any]:
    """config.json of the model that a step makes."""
    config = {**copy.deepcopy(structure.checkpoint.config), **copy.deepcopy(remodel.config)}
    config["dtype"] = str(structure.dtype).removeprefix("torch.")
    config.pop("torch_dtype", None)
    return config


def renumbered(name: str, structure: Structure, remodel: Remodel) -> str:
    """A parameter or tensor of a block that stays, as it is called where fewer blocks are counted."""
    if remodel.blocks is None:
        return name
    place = re.search(rf"(^|\.){re.escape(structure.pieces.blocks_path.rpartition('.')[2])}\.(\d+)\.", name)
    if place is None:
        return name
    return f"{name[: place.start(2)]}{remodel.blocks.index(int(place[2]))}{name[place.end(2) :]}"


def split_parameter(structure: Structure, name: str, value: Tensor) -> dict[str, Tensor]:
    """A parameter as the checkpoint tensors that make it up: the inverse of `binding.read_parameter`."""
    sources = structure.bindings.sources[name]
    if name not in structure.bindings.rules:
        return {sources[0].tensor: value}
    assert name not in structure.bindings.joined  # it got a tensor of its own (`_tensor_infos`)
    parts = {}
    for source in sources:
        assert source.rows is not None  # joined by rows, or the model was refused (`binding._placed`)
        parts[source.tensor] = value[source.expert, source.rows[0] : source.rows[1]]
    return parts


def _tensor_infos(
    structure: Structure, name: str, before: tuple[int, ...], shape: tuple[int, ...]
) -> dict[str, TensorInfo]:
    """The tensors that will make up a parameter that had one shape and gets another."""
    infos: dict[str, TensorInfo] = {}
    if name in structure.bindings.joined:  # its own name is right too, and then no rule has to be undone
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
    """Of a parameter that is or comes to be; one that was tied is held as what it shared."""
    bindings = structure.bindings
    dtype = bindings.dtypes.get(bindings.tied.get(name, name), structure.dtype)
    return TensorInfo(Path(), dtype, tuple(shape), 0, math.prod(shape) * dtype.itemsize)


def _config(values: dict[str, Any]) -> PretrainedConfig:
    values = copy.deepcopy(values)
    return AutoConfig.for_model(values.pop("model_type"), **values)


def misfit(structure: Structure, remodel: Remodel) -> str | None:
    try:
        remodelled(structure, remodel)
    except (CompressError, *REFUSALS) as error:
        return Because(error.what, **error.data) if isinstance(error, CompressError) else _of_library(error)
    return None


def config_misfit(structure: Structure, changes: dict[str, Any]) -> str | None:
    try:
        _config({**structure.checkpoint.config, **changes})
    except REFUSALS as error:
        return _of_library(error)
    return None


def _of_library(error: Exception) -> Because:
    said = _in_one_line(error)
    return Because(said, cause=said)


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def check_remodel(structure: Structure, remodel: Remodel, where: str, rewrites: bool = True) -> Structure:
    """The reshaped structure. raises PreflightError saying what the model's class can't be"""
    try:
        return remodelled(structure, remodel) if rewrites else regated(structure, remodel)
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
