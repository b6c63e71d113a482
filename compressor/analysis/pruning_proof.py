"""Proves on a float64 probe model with random weights that the units that were found can be removed.

The probe model without some units (other ones in each block) must compute the same as with the inputs of the output
projections set to 0 there. The same holds without all units. The pruned model is made once by the modeling file, and
once by the model's own class with other numbers in its config. Units that neither of them can remove are refused.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compressor.analysis.perturbation import TOLERANCE, InDouble, size
from compressor.analysis.prunable_block import HINT
from compressor.errors import Because, CompressError, ModelError
from compressor.layers.structural.placing import reshape
from compressor.layers.structural.removed import Removed
from compressor.layers.structural.resized import Resized
from compressor.methods.pruning.pruned_parameters import narrowed
from compressor.methods.pruning.pruned_shapes import kept_slices, kept_units, removed_modules, resized_modules
from compressor.model.block_runner import Pieces, output_of
from compressor.model.class_changes import ModuleEntry
from compressor.model.facts import KINDS, PrunableModule, PruningDecision, UnitsInConfig
from compressor.model.families import FFN_WIDTH_KEYS
from compressor.model.module_names import renumbered_after_removal
from compressor.model.probe_model import PROBE_SEED, example_batch, make_probe_model
from compressor.model.redefined_structure import REFUSALS
from compressor.model.reshaped_class import is_reshaped

FORMATS = {Removed.format_name: Removed, Resized.format_name: Resized}

Refused = dict[tuple[int, str], tuple[str, Because]]  # (block, kind) -> where, and why


def prove_prunables(
    probe: PreTrainedModel, path: str, found: Sequence[PrunableModule], refused: Refused
) -> list[PrunableModule]:
    """The prunable modules that pass the proof, with the facts that it showed. The others are added to `refused`."""
    proven: list[PrunableModule] = []
    for kind in KINDS:
        prunables = [prunable for prunable in found if prunable.kind == kind]
        if not prunables:
            continue
        some = _drop_some(prunables)
        per_layer = _difference(probe, prunables, some, _pruned)
        config = _config_keys(probe, prunables)
        if config is not None and _difference(probe, prunables, some, partial(_of_stock_class, config)) is not None:
            config = None
        if per_layer is not None and config is None:
            refused |= {
                (prunable.block, kind): (
                    prunable.name,
                    Because(per_layer + _shared(prunable), reason="not-proven", shared=list(prunable.layout.shared)),
                )
                for prunable in prunables
            }
            continue
        stays = _difference(probe, prunables, _nothing(prunables), _pruned)
        for prunable in prunables:
            removal = None if stays else prunable.layout.removal
            layout = replace(prunable.layout, per_layer=per_layer, config=config, removal=removal, shared=())
            proven.append(replace(prunable, layout=layout))
    return _vanishing(probe, path, proven)


def _shared(prunable: PrunableModule) -> str:
    """A possible reason: matrices whose rows act on more than one unit, as before a norm over all heads."""
    names = ", ".join(prunable.layout.shared)
    return f"; rows of {names} act on more than one of them" if names else ""


def _vanishing(probe: PreTrainedModel, path: str, prunables: Sequence[PrunableModule]) -> list[PrunableModule]:
    """The same, in forward order, with `vanishes` set where a block without units can be removed."""
    pieces = Pieces(probe, path)
    batch = example_batch(probe, torch.device("cpu"))
    blocks: dict[int, list[PrunableModule]] = {index: [] for index in range(len(pieces))}
    for prunable in sorted(prunables, key=lambda prunable: (prunable.block, KINDS.index(prunable.kind))):
        blocks[prunable.block].append(prunable)
    empty = {index for index, here in blocks.items() if len(here) == len(KINDS)}
    with InDouble(), torch.no_grad():
        hidden, calls = pieces.embeddings(batch)
        for index in sorted(empty):
            with masked(probe, blocks[index], _nothing(blocks[index])):
                if not torch.equal(pieces.block(index, hidden, calls[index]), hidden):
                    empty.remove(index)
        if empty and len(pieces) > 1 and not _counts_on(probe, path, blocks[min(empty)]):
            empty = set()
    return [
        replace(prunable, layout=replace(prunable.layout, vanishes=index in empty))
        for index, here in blocks.items()
        for prunable in here
    ]


def _nothing(prunables: Sequence[PrunableModule]) -> PruningDecision:
    return {"sites": {prunable.name: [] for prunable in prunables}}


def _counts_on(probe: PreTrainedModel, path: str, prunables: Sequence[PrunableModule]) -> bool:
    """Whether the class can make a model without one block whose later blocks compute the same."""
    removed, count = prunables[0].block, len(Pieces(probe, path))
    text = probe.config.get_text_config()
    if is_reshaped(probe.config) or text is not probe.config:
        return False
    config = copy.deepcopy(probe.config)
    for key, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == count:
            setattr(config, key, [entry for index, entry in enumerate(value) if index != removed])
    config.num_hidden_layers = count - 1

    def shorter(*_: Any) -> PreTrainedModel:
        made = make_probe_model(type(probe), config, torch.device("cpu"), torch.float64)
        kept = [index for index in range(count) if index != removed]
        values = {}
        for name, value in probe.named_parameters(remove_duplicate=False):
            if not name.startswith(f"{path}.{removed}."):
                values[renumbered_after_removal(name, path, kept)] = value
        return _filled(made, values)

    return _difference(probe, prunables, _nothing(prunables), shorter) is None


def _filled(model: PreTrainedModel, values: Mapping[str, Tensor]) -> PreTrainedModel:
    """The model with these parameters, by name. raises ModelError if it has others"""
    shapes = {name: parameter.shape for name, parameter in model.named_parameters(remove_duplicate=False)}
    for name in sorted(shapes.keys() | values.keys()):
        if name not in shapes or name not in values or shapes[name] != values[name].shape:
            raise ModelError(
                f"{name} has another shape once heads or neurons are removed",
                where=type(model).__name__,
                hint=HINT,
                data={"reason": "other-shape", "parameter": name},
            )
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(values[name], requires_grad=False))
    return model


def _drop_some(prunables: Sequence[PrunableModule]) -> PruningDecision:
    """Drop the same number of units of every prunable module, but other units in each, some of them in the middle."""
    chosen = {}
    for number, prunable in enumerate(prunables):
        generator = torch.Generator().manual_seed(PROBE_SEED + number)
        order = torch.randperm(prunable.units, generator=generator).tolist()
        chosen[prunable.name] = sorted(order[: max(1, prunable.units - max(1, prunable.units // 4))])
    return {"sites": chosen}


def _difference(
    probe: PreTrainedModel,
    prunables: Sequence[PrunableModule],
    decision: PruningDecision,
    make: Callable[[PreTrainedModel, Sequence[PrunableModule], PruningDecision], PreTrainedModel],
) -> str | None:
    """How the pruned probe model differs from the masked one; None if it does not."""
    batch = example_batch(probe, torch.device("cpu"))
    share = "some" if any(decision["sites"].values()) else "all"
    with InDouble(), torch.no_grad():
        with masked(probe, prunables, decision):
            expected = output_of(probe(**batch))
        try:
            output = output_of(make(probe, prunables, decision)(**batch))
        except (CompressError, *REFUSALS) as error:
            return f"with {share} of them removed it can't run ({error})"
    if output.shape != expected.shape or not size(output - expected) <= TOLERANCE * size(expected):
        return f"with {share} of them removed it gives other outputs than with their inputs set to 0"
    return None


@contextmanager
def masked(model: nn.Module, prunables: Sequence[PrunableModule], decision: PruningDecision) -> Iterator[None]:
    """Set the inputs of output projections to 0 where units are removed. A pruned model must compute the same."""
    handles = []
    for prunable in prunables:
        removed = set(range(prunable.units)) - set(kept_units(prunable, decision))
        columns = torch.tensor([column for unit in removed for column in prunable.columns[unit]], dtype=torch.int64)
        hook = partial(_zeroed, columns)
        handles.append(model.get_submodule(prunable.output_projection).register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _zeroed(columns: Tensor, _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return args[0].index_fill(-1, columns, 0.0), *args[1:]


def _pruned(probe: PreTrainedModel, prunables: Sequence[PrunableModule], decision: PruningDecision) -> PreTrainedModel:
    """The pruned probe model as the modeling file would make it."""
    values = {name: parameter for name, parameter in probe.named_parameters(remove_duplicate=False)}
    kept = kept_slices({name: value.shape for name, value in values.items()}, prunables, decision, None)
    modules: dict[str, ModuleEntry] = {}
    for prunable in prunables:
        units = len(kept_units(prunable, decision))
        if not units:
            width = values[prunable.slices[0].parameter].shape[1 - prunable.slices[0].axis]
            modules |= removed_modules(prunable, width)
        elif units < prunable.units:
            modules |= resized_modules(prunable, units)
    made = copy.deepcopy(probe)
    narrow = {name: narrowed(values[name], axes) for name, axes in kept.items()}
    reshape(made, {name: value.shape for name, value in narrow.items()}, modules, FORMATS)
    for name, value in narrow.items():
        made.get_parameter(name).copy_(value)
    for prunable in prunables:
        if not kept_units(prunable, decision) and prunable.bias is not None:
            home = next(entry.path for entry in prunable.layout.removal or () if entry.adds)
            made.get_parameter(f"{home}.bias").copy_(values[prunable.bias])
    return made


def _config_keys(probe: PreTrainedModel, prunables: Sequence[PrunableModule]) -> UnitsInConfig | None:
    """Keys of config.json that may hold the number of units of every block. A proof decides whether they do."""
    if is_reshaped(probe.config) or len({prunable.units for prunable in prunables}) > 1:
        return None
    text = probe.config.get_text_config()
    if text is not probe.config:  # a config inside another
        return None
    held = vars(text)
    if prunables[0].kind == "ffn":
        names = [key for key in FFN_WIDTH_KEYS if key in held and held[key] in (prunables[0].units, None)]
        return UnitsInConfig({names[0]: 1}, {}) if names else None
    layout, names_of = prunables[0].layout, getattr(text, "attribute_map", {})
    per_unit = {names_of.get("num_attention_heads", "num_attention_heads"): layout.query_heads}
    key = names_of.get("num_key_value_heads", "num_key_value_heads")
    if key in held:
        per_unit[key] = 1
    return UnitsInConfig(per_unit, {"head_dim": layout.head_dim})


def _of_stock_class(
    keys: UnitsInConfig, probe: PreTrainedModel, prunables: Sequence[PrunableModule], decision: PruningDecision
) -> PreTrainedModel:
    """The pruned probe model as its own class makes it from a config."""
    units = len(kept_units(prunables[0], decision))
    config = copy.deepcopy(probe.config)
    for key, value in keys.of(units).items():
        setattr(config, key, value)
    made = make_probe_model(type(probe), config, torch.device("cpu"), torch.float64)
    values = dict(probe.named_parameters(remove_duplicate=False))
    kept = kept_slices({name: value.shape for name, value in values.items()}, prunables, decision, None)
    return _filled(made, {name: narrowed(value, kept.get(name, {})) for name, value in values.items()})
