"""Traces a shallow probe model: which parameters are used in matmuls, and which of them read the same input.

The probe model has the same class and widths, but few blocks. It runs on the meta device. If an operation depends on
values, a narrow one (`narrow_probe`) runs with random weights on the CPU. Every matmul with a parameter is recorded
with the identity of its input. Weights that read the same tensor form a group.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import PretrainedConfig, PreTrainedModel

from compressor.errors import Because
from compressor.model.block_runner import Answer, Batch, Pieces, output_of
from compressor.model.narrow_probe import Probes
from compressor.model.observed_matmul import ObservedMatmul, ObservedMatmuls
from compressor.model.probe_model import Kind, example_batch, make_probe_model
from compressor.model.recorded_modules import recorded_inputs
from compressor.model.replaceable import watch_reads
from compressor.model.routing import ChoiceTrace

SMALL_BYTES = 1 << 26  # largest weights of a model that is run as a whole


@dataclass(frozen=True)
class Product:
    """One traced matmul inside a block (names relative to it) or in the output head (full names).

    routes  its output chooses experts, or is the one output of a gate in a block with experts
    """

    parameter: str
    transposed: bool
    fused_experts: bool
    export_formats: bool = False


@dataclass(frozen=True)
class Traced:
    """The results of one run of a probe model.

    groups      kind of block -> its matmuls, grouped by input, in forward order
    whole       kind of block -> parameters with several matrices that aren't multiplied one expert at a time -> how
                they are used
    answers     kind of block -> how it returns the hidden states
    head        matmuls of the output head
    after       modules outside the blocks that were used only after the last block
    embeddings  embedding modules that run before the first block
    read        kind of block (None: outside of the blocks) -> weights that other code reads (`watch_reads`)
    """

    groups: dict[Kind, tuple[tuple[Product, ...], ...]]
    whole: dict[Kind, dict[str, Because]]
    answers: dict[Kind, Answer]
    head: tuple[Product, ...]
    after: set[str]
    embeddings: tuple[Product, ...]
    read: dict[Kind | None, frozenset[str]]

    def at(self, kinds: Mapping[Kind, Kind]) -> Traced:
        """The same for a model of other widths. `kinds`: kind of its block -> kind of this model's block"""
        return replace(
            self,
            groups={kind: self.groups[own] for kind, own in kinds.items()},
            whole={kind: self.whole[own] for kind, own in kinds.items()},
            answers={kind: self.answers[own] for kind, own in kinds.items()},
            read={None: self.read[None], **{kind: self.read[own] for kind, own in kinds.items()}},
        )


def trace(probes: Probes) -> Traced:
    """Run a probe model once and record its matmuls.

    raises  whatever the model's code raises when its parts run one by one
    """
    whole, path = probes.whole, probes.pieces.blocks_path
    batch = example_batch(whole.empty, torch.device("meta"))
    for given in (batch, *_with_mask(batch)):
        try:
            return _trace_probe(whole.empty, path, whole.kinds, given)
        except (NotImplementedError, RuntimeError, TypeError, IndexError, ValueError, AttributeError):
            continue  # an operation depends on values, or the model can't run on the CPU either
    probe = probes.narrowest
    made = make_probe_model(type(probes.model), probe.config, torch.device("cpu"), probes.dtype, probe.empty)
    return _trace_probe(made, path, probe.kinds, example_batch(made, torch.device("cpu")))


def _with_mask(batch: Batch) -> Iterator[Batch]:
    """The same text, if it is one, with a mask of four dimensions, which transformers passes on to the attentions.

    Without a mask, decoders read the values of the positions to find packed texts.
    """
    if "input_ids" in batch:
        samples, tokens = batch["input_ids"].shape
        yield {**batch, "attention_mask": batch["input_ids"].new_ones(samples, 1, tokens, tokens, dtype=torch.bool)}


def run_whole(cls: type[PreTrainedModel], configs: Iterable[PretrainedConfig], dtype: torch.dtype) -> None:
    """Run a model of the first config with small enough random weights as a whole, as a user does.

    raises  ValueError if all of them are too large, and whatever the model's code raises
    """
    needed = 0
    for config in configs:
        needed = sum(p.nbytes for p in make_probe_model(cls, config, torch.device("meta"), dtype).parameters())
        if needed <= SMALL_BYTES:
            probe = make_probe_model(cls, config, torch.device("cpu"), dtype)
            with torch.no_grad(), checked(probe):
                check_output(output_of(probe(**example_batch(probe, torch.device("cpu")))))
            return
    raise ValueError(f"it needs {needed:,} bytes of weights")


def check_output(output: Tensor) -> None:
    """raises ValueError if the output of a model with random weights has NaN or Inf"""
    if not bool(torch.isfinite(output).all()):
        raise ValueError("its output with random weights is NaN or Inf")


@contextmanager
def checked(model: nn.Module) -> Iterator[None]:
    """Inside this context, a module of the model that gives NaN raises ValueError. Later modules may hide NaN.

    Example: with torch 2.13 and AVX-512, attention over scores that are all NaN gives numbers.
    """

    def check(name: str, output: Any) -> None:
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and bool(leaf.isnan().any()):
                raise ValueError(f"with random weights {name or 'it'} gives NaN or Inf")

    handles = [
        module.register_forward_hook(lambda _m, _a, output, name=name: check(name, output))
        for name, module in model.named_modules()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _trace_probe(probe: PreTrainedModel, path: str, kinds: Sequence[Kind], batch: Batch) -> Traced:
    pieces = Pieces(probe, path)
    outer = {
        name: module
        for name, module in probe.named_modules()
        if any(True for _ in module.parameters(recurse=False)) and not name.startswith(path + ".")
    }
    with recorded_inputs(outer, lambda *_: None) as used:
        with watch_reads(probe) as embeddings_read:
            hidden, calls = pieces.embeddings(batch)
        before = {name for name, _ in used}
        groups: dict[Kind, tuple[tuple[Product, ...], ...]] = {}
        whole: dict[Kind, dict[str, Because]] = {}
        answers: dict[Kind, Answer] = {}
        read: dict[Kind | None, frozenset[str]] = {}
        for index, call in enumerate(calls):
            block = pieces.blocks[index]
            kind = kinds[index]
            with ChoiceTrace(dict(block.named_parameters())) as traced, watch_reads(block) as seen:
                hidden = pieces.block(index, hidden, call)
            if kind not in groups:
                read[kind] = frozenset(seen)
                groups[kind], whole[kind] = _grouped(traced, block), traced.whole
                answers[kind] = pieces.answers[index]
        found: list[ObservedMatmul] = []
        watched = {n: p for n, p in probe.named_parameters() if not n.startswith(path + ".")}
        with ObservedMatmuls(watched, found.append), watch_reads(probe) as seen:
            pieces.output_head(batch, hidden)
        read[None] = frozenset(_of_any_block(name, path) for name in embeddings_read | seen)
    head = [call for call in found if probe.get_parameter(call.parameter).dim() == 2]
    names = {id(p): n for n, p in probe.named_parameters(remove_duplicate=True)}
    products = []
    output = probe.get_output_embeddings()
    for found_call in head:
        name = found_call.parameter
        if output is not None and names[id(output.weight)] == names[id(probe.get_parameter(name))]:
            name = next(n for n, m in probe.named_modules() if m is output) + ".weight"
        product = Product(name, found_call.transposed, False)
        owner = name.rpartition(".")[0]
        if product not in products and owner not in before:
            products.append(product)
    # a subclass may scale, shift or mask its rows, which a layer that replaces nn.Embedding would not do
    looked_up = [name for name in dict(used) if name in before and type(probe.get_submodule(name)) is nn.Embedding]
    embeddings = tuple(Product(f"{name}.weight", False, False) for name in looked_up)
    return Traced(groups, whole, answers, tuple(products), {name for name, _ in used} - before, embeddings, read)


def _of_any_block(name: str, path: str) -> str:
    """A parameter's name, with a star in place of the number of its block."""
    inside = name.removeprefix(path + ".")
    return name if inside == name else f"{path}.*.{inside.partition('.')[2]}"


def _grouped(traced: ChoiceTrace, block: nn.Module) -> tuple[tuple[Product, ...], ...]:
    """Matmuls grouped by the identity of their input. Experts of one fused parameter form one entry."""
    groups: dict[Any, list[Product]] = {}
    numbers = itertools.count()
    seen: set[str] = set()
    parameters = dict(block.named_parameters())
    counts = traced.expert_counts | _list_lengths(block)
    for call in traced.calls:
        parameter = parameters[call.parameter]
        if call.parameter in seen or call.parameter in traced.whole:
            continue
        seen.add(call.parameter)
        fused = parameter.dim() == 3
        outputs = parameter.shape[-1] if call.transposed else parameter.shape[-2]
        export_formats = call.parameter in traced.chosen_by and outputs in counts
        export_formats = export_formats or (outputs == 1 and bool(traced.expert_counts))
        x = call.input
        key = next(numbers) if fused else (x.untyped_storage()._cdata, x.storage_offset(), x.numel(), x._version)
        product = Product(call.parameter, call.transposed, fused, export_formats and not fused)
        groups.setdefault(key, []).append(product)
    return tuple(tuple(group) for group in groups.values())


def _list_lengths(block: nn.Module) -> set[int]:
    """Lengths of the lists of equal modules in a block: experts that are modules are in such a list."""
    lists = (module for module in block.modules() if isinstance(module, nn.ModuleList) and len(module) > 1)
    return {len(members) for members in lists if len({type(member) for member in members}) == 1}
