"""Which parameters share another's storage, as transformers' from_pretrained decides it.

The class and config.json say which may be tied. Two that both have a tensor are tied only if the tensors are equal; of
two that have one tensor between them, whichever has it gives it to the other.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Ties:
    """tied    parameter -> the one whose tensor fills it
    copies  of these the ones that have an equal tensor of their own, which isn't needed
    apart   parameters that config.json ties to another and that differ from it, so that they stay on their own
    owners  of these that have a tensor, the one that the class would rather see it under: tied -> that one
    """

    tied: dict[str, str]
    copies: tuple[str, ...]
    apart: tuple[str, ...]
    owners: dict[str, str]


def find_ties(model: PreTrainedModel, found: Collection[str], equal: Callable[[str, str], bool]) -> Ties:
    """Follow `PreTrainedModel.tie_weights`, pair by pair.

    found  parameters that have a tensor
    equal  (parameter, parameter) -> whether both hold the same values once loaded
    """
    pairs = list((getattr(model, "all_tied_weights_keys", None) or {}).items())
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
                continue  # nothing fills them, and whoever asks for every parameter says so
            source = backup
        tied[target] = tied.get(source, source)
        present.add(target)
    owners = {tied[source]: source for _, source in reversed(pairs) if source in tied}
    return Ties(tied, tuple(copies), tuple(apart), owners)


def part(model: PreTrainedModel, names: Collection[str]) -> None:
    """Give parameters that stay on their own a place of their own; on the meta device."""
    for name in names:
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        value = module._parameters[leaf]
        assert value is not None
        module._parameters[leaf] = nn.Parameter(value.detach().clone(), requires_grad=False)
        model.all_tied_weights_keys.pop(name, None)
