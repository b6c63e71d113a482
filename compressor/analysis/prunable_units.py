"""Finds the heads and neurons of a model that can be pruned by running a probe model, and proves it.

No model family is named anywhere. In a float64 probe model with random weights:

1. Attention is the module that calls transformers' attention interface. Its output is perturbed by another amount for
   each head. The first matmul whose input changes is the output projection, and the amount identifies the head of each
   column.
2. An MLP's output projection is a matmul whose input is computed column by column by a matrix of the same block.
3. A row of a matrix belongs to the unit whose columns of the output projection's input it can change. One gradient
   answers this for all rows and units: each unit's columns are weighted by a number of their own, and the gradient of
   a row that acts on one unit is that number times the unweighted gradient, along the whole row. A second set of
   numbers confirms it. So fused and interleaved projections, gates and grouped heads need no special case. A parameter
   that all heads share (a norm over head_dim) belongs to no unit and stays.
4. A proof shows that nothing was missed: the probe model without some units, and without all of them, must compute the
   same as with the output projection's input set to 0 there. The same is tried with the stock class and a config with
   fewer units.

The attributes of attention modules that count heads are found by making the model twice, once with twice the width and
twice the heads: an attribute that doubles counts heads.

The probe model is a narrow one (`lifting`). Time: some tens of forward and backward passes of each kind of block;
memory: the probe model in float64, with gradients.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from compressor.analysis.float64_probe import float64_probe_model
from compressor.analysis.lifted_units import lifted_prunable
from compressor.analysis.lifting import found_on_narrow
from compressor.analysis.perturbation import InDouble
from compressor.analysis.prunable_block import HINT, Finder
from compressor.analysis.pruning_proof import Refused, prove_prunables
from compressor.errors import Because, ModelError, values_of
from compressor.layers.structural.removed import Removed
from compressor.model.block_runner import Pieces
from compressor.model.facts import KINDS, PrunableModule
from compressor.model.module_names import with_prefix
from compressor.model.narrow_probe import Probe
from compressor.model.plain_attention import observed_plain_attention
from compressor.model.probe_model import Kind, example_batch, make_probe_model, signature
from compressor.model.redefined_structure import REFUSALS
from compressor.model.reshaped_class import MODULES, SHAPES, reshaping, stock_class
from compressor.model.structure import Structure
from compressor.model.tracing import Product


@dataclass(frozen=True)
class Seen:
    """What a probe model showed.

    prunables    prunable modules of its blocks
    refused  (block, kind) -> where and why, for blocks without a prunable module of the kind
    first    kind of block -> the first such block of the probe model
    """

    prunables: list[PrunableModule]
    refused: Refused
    first: dict[Kind, int]


def look(structure: Structure) -> Seen:
    """Run a probe model and collect what `find_prunable` reads."""
    model, pieces = structure.model, structure.pieces
    path = pieces.blocks_path
    groups = [structure.traced.groups[kind] for kind in structure.probes.whole.kinds]

    def find(probe: Probe) -> Seen:
        seen = _find_in_probe(float64_probe_model(model, pieces, probe), path, groups)
        return replace(seen, first={kind: probe.first_of(kind) for kind in probe.kinds})

    return found_on_narrow("prunable", structure.probes, find, partial(_lifted, path), _agree)


def find_prunable(
    structure: Structure, kinds: Sequence[str] = KINDS, seen: Seen | None = None
) -> tuple[PrunableModule, ...]:
    """The prunable modules of these kinds in every block, in forward order of the blocks.

    seen    the result of `look`, so that the probe model runs only once
    raises  ModelError naming the module and the reason, if a block has none of some kind. A sub-block that a `removed`
            layer has replaced is not expected
    """
    model, path = structure.model, structure.pieces.blocks_path
    seen = seen or look(structure)
    prunables = []
    for index, of in enumerate(structure.kinds):
        at = seen.first[of]
        for kind in kinds:
            here = [prunable for prunable in seen.prunables if prunable.block == at and prunable.kind == kind]
            prunables += [_renamed(prunable, f"{path}.{at}.", f"{path}.{index}.", index, model) for prunable in here]
            if not here and not _is_removed(model.config, f"{path}.{index}", kind):
                where, why = seen.refused[at, kind]
                raise ModelError(
                    f"its {kind} can't be pruned: {why}",
                    where=with_prefix(where, f"{path}.{at}", f"{path}.{index}"),
                    hint=f"Leave {kind} out of vtrans' `sites`; where the pass is greedy_removal, leave the pass out.",
                    data={"reason": "not-prunable", "kind": kind, "because": values_of(why)},
                )
    return tuple(prunables)


def _is_removed(config: PretrainedConfig, block: str, kind: str) -> bool:
    """Whether the sub-block of this kind was removed from a block."""
    return any(
        entry["form"] == Removed.format_name and name.startswith(block + ".") and (entry["spec"]["of"] == kind)
        for name, entry in reshaping(config)[1].items()
    )


def _find_in_probe(probe: PreTrainedModel, path: str, groups: Sequence[Sequence[Sequence[Product]]]) -> Seen:
    """groups: the matmuls of each block of the probe model"""
    refused: Refused = {}
    found: list[PrunableModule] = []
    attributes = _attributes_of_heads(stock_class(probe), probe.config, path)
    with InDouble(), observed_plain_attention(probe) as attention:
        pieces = Pieces(probe, path)
        hidden, calls = pieces.embeddings(example_batch(probe, torch.device("cpu")))
        firsts: dict[Kind, int] = {}
        for index, block in enumerate(pieces.blocks):
            kind = signature(probe.config, block, index)
            if kind in firsts:
                at = firsts[kind]
                old, new = f"{path}.{at}.", f"{path}.{index}."
                found += [_renamed(prunable, old, new, index, probe) for prunable in found if prunable.block == at]
                refused |= {
                    (index, k): (with_prefix(w, f"{path}.{at}", f"{path}.{index}"), y)
                    for (b, k), (w, y) in list(refused.items())
                    if b == at
                }
                continue
            firsts[kind] = index
            products = [product for group in groups[index] for product in group]
            finder = Finder(block, calls[index], hidden.shape, products, f"{path}.{index}", index, attention)
            for name in KINDS:
                try:
                    found += [finder.heads(attributes) if name == "heads" else finder.ffn()]
                except ModelError as error:
                    refused[index, name] = error.where or finder.where, Because(error.what, **error.data)
                except (
                    RuntimeError,
                    ValueError,
                    TypeError,
                    IndexError,
                    AttributeError,
                ) as error:  # the model's own code
                    message = f"it can't be run with its parts perturbed ({error})"
                    refused[index, name] = finder.where, Because(message, reason="fails", cause=str(error))
    return Seen(prove_prunables(probe, path, found, refused), refused, firsts)


# attributes of attention modules that count heads


def _attributes_of_heads(cls: type[PreTrainedModel], config: PretrainedConfig, path: str) -> dict[str, dict[str, int]]:
    """Module path inside a block -> the integer attributes that double with heads and width, with their values.

    cls     of transformers
    config  its shapes of a reshaped model are ignored
    """
    plain = copy.deepcopy(config)
    for key in (SHAPES, MODULES):
        if hasattr(plain, key):
            delattr(plain, key)
    wide = copy.deepcopy(plain)
    text = wide.get_text_config()
    values = vars(text)
    counts = {
        getattr(text, "attribute_map", {}).get(key, key) for key in ("num_attention_heads", "num_key_value_heads")
    }
    width = text.hidden_size
    for key, value in list(values.items()):
        if (
            isinstance(value, int)
            and not isinstance(value, bool)
            and (key in counts or (value == width and "head" not in key))
        ):
            setattr(text, key, 2 * value)
    try:
        models = [make_probe_model(cls, config, torch.device("meta"), torch.float32) for config in (plain, wide)]
    except (*REFUSALS, AttributeError) as error:
        raise ModelError(
            f"a model of twice the width and heads can't be built ({error})",
            where=cls.__name__,
            hint=HINT,
            data={"cause": str(error)},
        ) from error
    heads = (getattr(plain.get_text_config(), key, None) for key in ("num_key_value_heads", "num_attention_heads"))
    groups = next((count for count in heads if count), None)
    if groups is None:
        raise ModelError(
            "its config.json has no number of attention heads",
            where=cls.__name__,
            hint=HINT,
            data={"reason": "no-head-count"},
        )
    found: dict[str, dict[str, int]] = {}
    for name, module in models[0].get_submodule(path).named_modules():
        other = vars(models[1].get_submodule(f"{path}.{name}" if name else path))
        for attribute, value in vars(module).items():
            is_number = isinstance(value, int) and not isinstance(value, bool) and value > 0
            if is_number and other.get(attribute) == 2 * value and value % groups == 0:
                found.setdefault(name, {})[attribute] = value // groups
    return found


# what was found on a narrow probe model, for one of other widths


def _agree(lifted: Seen, found: Seen) -> bool:
    """Whether both have the same units. Reasons are the model's own messages, which name its widths."""

    def without_reasons(seen: Seen) -> tuple[Any, ...]:
        prunables = [
            replace(prunable, layout=replace(prunable.layout, per_layer=prunable.layout.per_layer and ""))
            for prunable in seen.prunables
        ]
        return prunables, {key: where for key, (where, _) in seen.refused.items()}, seen.first

    return without_reasons(lifted) == without_reasons(found)


def _lifted(path: str, seen: Seen, narrow: Probe, wider: Probe) -> Seen:
    """raises Unliftable"""
    if not seen.prunables:
        return seen
    inside = _attributes_of_heads(stock_class(wider.empty), wider.config, path)
    attributes = {f"{path}.{name}": numbers for name, numbers in inside.items()}
    return replace(
        seen, prunables=[lifted_prunable(prunable, attributes, narrow, wider) for prunable in seen.prunables]
    )


# copies for every block of a kind


def _renamed(prunable: PrunableModule, old: str, new: str, block: int, model: PreTrainedModel) -> PrunableModule:
    """The same prunable module of another block: the prefix `old` of every name becomes `new`."""

    def name(full: str) -> str:
        return with_prefix(full, old, new)

    attributes = {name(path): numbers for path, numbers in prunable.layout.attributes.items()}
    removal = prunable.layout.removal
    if removal is not None:
        layers = [getattr(model.get_submodule(path), "layer_idx", None) for path in attributes] or [None]
        removal = tuple(
            replace(entry, path=name(entry.path), layer=None if entry.layer is None else layers[0]) for entry in removal
        )
    return replace(
        prunable,
        name=name(prunable.name),
        block=block,
        output_projection=name(prunable.output_projection),
        slices=tuple(replace(sliced, parameter=name(sliced.parameter)) for sliced in prunable.slices),
        bias=name(prunable.bias) if prunable.bias else None,
        layout=replace(prunable.layout, attributes=attributes, removal=removal),
    )
