"""Holds two loaded models to each other: every parameter and buffer, bit for bit, with its dtype, and what is tied."""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor, nn


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
