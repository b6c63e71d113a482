"""Finds the parameters that share storage, as transformers' from_pretrained does.

The class and config.json name the parameters that may be tied. If both of a pair have a tensor, they are tied only if
the tensors are equal. If only one of them has a tensor, it fills both.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Ties:
    """tied    parameter -> the one whose tensor fills it
    copies  those of them that have an equal tensor of their own, which isn't needed
    apart   parameters that config.json ties to another but whose tensor differs, so that they stay separate
    owners  tied parameter with a tensor -> the parameter under whose name the class prefers that tensor
    """

    tied: dict[str, str]
    copies: tuple[str, ...]
    apart: tuple[str, ...]
    owners: dict[str, str]


def declared_ties(model: PreTrainedModel) -> dict[str, str]:
    """Parameter -> the one that its class and config tie it to."""
    return getattr(model, "all_tied_weights_keys", None) or {}


def find_ties(model: PreTrainedModel, found: Collection[str], equal: Callable[[str, str], bool]) -> Ties:
    """Follow `PreTrainedModel.tie_weights`, pair by pair.

    found  parameters that have a tensor
    equal  (parameter, parameter) -> whether both have the same values after loading
    """
    pairs = list(declared_ties(model).items())
    present = set(found)
    tied: dict[str, str] = {}
    copies: list[str] = []
    apart: list[str] = []
    for number, (target, source) in enumerate(pairs):
        if source in present and target in present:
            source, target = tied.get(source, source), tied.get(target, target)
            if source == target:
                continue
            if not equal(source, target):
                apart.append(target)
                continue
            copies.append(target)
        elif target in present:
            target, source = source, target
        elif source not in present:
            backup = next((other for other, its in pairs[number + 1 :] if its == source and other in present), None)
            if backup is None:
                continue  # nothing fills them; code that needs every parameter reports it
            source = backup
        tied[target] = tied.get(source, source)
        present.add(target)
    owners = {tied[source]: source for _, source in reversed(pairs) if source in tied}
    return Ties(tied, tuple(copies), tuple(apart), owners)


def part(model: PreTrainedModel, names: Collection[str]) -> None:
    """Give parameters that stay separate a storage of their own, on the meta device."""
    for name in names:
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        value = module._parameters[leaf]
        assert value is not None
        module._parameters[leaf] = nn.Parameter(value.detach().clone(), requires_grad=False)
        model.all_tied_weights_keys.pop(name, None)
