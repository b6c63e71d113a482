"""Holds a model as it is read here to the one that transformers loads: every bit, dtype and tie."""

from __future__ import annotations

import json
from itertools import combinations

import torch
import transformers as hf
from torch import Tensor, nn

from compressor.model.checkpoint import open_checkpoint
from compressor.model.empty_model import bound_model
from compressor.model.model_class import config_and_class
from compressor.model.weight_names import fill, read_parameter


def read_whole(directory):
    """The model as our reader fills it, all of it at once."""
    checkpoint = open_checkpoint(directory)
    config, cls = config_and_class(checkpoint, False)
    checkpoint, model, bindings, _ = bound_model(checkpoint, cls, config)
    for name in bindings.sources:
        value = read_parameter(name, bindings, lambda t: checkpoint.read(t).to(bindings.dtype_of(t)), model)
        fill(name, value.to(bindings.dtypes[name]), model)
    for name, source in bindings.tied.items():
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner)._parameters[leaf] = model.get_parameter(source)
    return model


def stock(directory):
    """The model as transformers loads it, by the class that its config names."""
    name = json.loads((directory / "config.json").read_text())["architectures"][0]
    return getattr(hf, name).from_pretrained(directory)


def differences(one: nn.Module, other: nn.Module) -> list[str]:
    """Sentences about what `other` holds otherwise than `one`; empty when they are equal.

    Compared are names, shapes, dtypes and bits of parameters and buffers (also those that no checkpoint holds), and
    which parameters share storage. NaN equals NaN of the same bits.
    """
    mine, theirs = _tensors(one), _tensors(other)
    found = [f"{name} is missing" for name in sorted(mine.keys() - theirs.keys())]
    found += [f"{name} is more" for name in sorted(theirs.keys() - mine.keys())]
    for name in sorted(mine.keys() & theirs.keys()):
        first, second = mine[name], theirs[name]
        if (first.dtype, first.shape) != (second.dtype, second.shape):
            found.append(f"{name} is {_kind(second)}, not {_kind(first)}")
        elif first.is_meta or second.is_meta:
            found.append(f"{name} was filled with nothing")
        elif not torch.equal(_bits(first), _bits(second)):
            found.append(f"{name} has other values")
    for pair in sorted(_shared(one) ^ _shared(other)):
        found.append(f"{pair[0]} and {pair[1]} share storage in one of the two only")
    return found


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: tensor.detach() for name, tensor in named}


def _bits(tensor: Tensor) -> Tensor:
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8)


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _shared(model: nn.Module) -> set[tuple[str, str]]:
    by_place: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        by_place.setdefault(id(parameter), []).append(name)
    return {pair for names in by_place.values() for pair in combinations(sorted(names), 2)}
