"""Compares and renumbers names of modules and parameters, and reads tensors by name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # settings load without torch
    from torch import Tensor, nn


def is_inside(name: str, module: str) -> bool:
    """Whether `name` is that of the module, or of a module or parameter inside it."""
    return name == module or name.startswith(module + ".")


def with_prefix(name: str, old: str, new: str) -> str:
    """The same name with the prefix `new` in place of `old`, as in another block. Other names stay."""
    return new + name.removeprefix(old) if name.startswith(old) else name


def _block_place(name: str, blocks: str) -> re.Match[str] | None:
    """Where a name has the number of a block: group 2."""
    return re.search(rf"(^|\.){re.escape(blocks)}\.(\d+)\.", name)


def block_number(name: str, blocks: str) -> int | None:
    """The number of the block that has a parameter; None for one outside the blocks. blocks: path of the block list"""
    place = _block_place(name, blocks)
    return None if place is None else int(place[2])


def renumbered_after_removal(name: str, blocks: str, kept: Sequence[int]) -> str:
    """The new name of a parameter or tensor of a block that stays when others are removed. Other names stay.

    blocks  path of the block list, or its last name for tensors, whose names may begin otherwise than the parameters'
    kept    numbers of the blocks that stay, in order
    """
    place = _block_place(name, blocks)
    if place is None:
        return name
    return f"{name[: place.start(2)]}{kept.index(int(place[2]))}{name[place.end(2) :]}"


def tensor_named(model: nn.Module, name: str) -> Tensor:
    """A parameter or buffer of the model."""
    owner, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(owner), leaf)
