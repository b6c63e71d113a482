"""Finds the functions of a model that a step may replace: activations, norms, and the softmax of attention.

They are found by running: a module is a norm or a known activation if it computes one, and attention is the module that
calls transformers' attention interface. Each function is a `Weight` of the role activation, norm or softmax.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compressor.errors import Because
from compressor.layers.block_attention import PRODUCTS
from compressor.model.activations import recognize
from compressor.model.block_runner import Pieces, output_of
from compressor.model.norms import Norm, describe_norm
from compressor.model.plain_attention import observed_plain_attention
from compressor.model.probe_model import Kind, example_batch, make_probe_model
from compressor.model.recorded_modules import recorded_inputs
from compressor.model.structure import Structure
from compressor.model.weights import Weight

ACTIVATIONS = ("transformers.activations", "torch.nn.modules.activation")  # where their classes are defined
# Bound for two orders of float32 sums of a small random model. Another formula differs by more than 0.01.
TOLERANCE = 1e-3


@dataclass
class Functions:
    """by_part  number of the part -> its functions, in the order of the model's modules
    refused  role -> why the model has no such function that can be replaced
    """

    by_part: dict[int, list[Weight]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def all(self) -> list[tuple[int, Weight]]:
        return [(part, function) for part in sorted(self.by_part) for function in self.by_part[part]]


def find_functions(structure: Structure) -> Functions:
    """Find them by running a shallow, narrow probe model with random weights on the CPU. The model itself is not run.

    Every quantization format of a norm divides by its width, so the norms of a narrower stream are refused.
    """
    found = Functions()
    outside, attention = _run_probe(structure, found.refused)
    prefix = structure.pieces.blocks_path + "."
    owners = {path: f"{path}.{PRODUCTS}" for path in attention}
    for path, module in structure.model.named_modules():
        norm = describe_norm(module)
        if norm is not None and norm.divisor is not None:
            found.refused.setdefault("norm", f"{path} divides by {norm.divisor} for {norm.width} values, being sliced")
            continue
        parts = path.removeprefix(prefix).split(".") if path.startswith(prefix) else []
        part = 1 + int(parts[0]) if parts else 0 if path in outside else structure.block_count + 1
        functions = [_function(structure, path, module, norm)]
        if path in owners:
            functions.append(_named(structure, owners[path], "softmax"))
        found.by_part.setdefault(part, []).extend(function for function in functions if function is not None)
    return found


def _function(structure: Structure, path: str, module: nn.Module, norm: Norm | None) -> Weight | None:
    """The function that a module computes, or None. `norm` is the result of describe_norm for it."""
    if next(module.children(), None) is not None:
        return None
    if type(module).__module__ in ACTIVATIONS and next(module.parameters(), None) is None:
        known = None if isinstance(module, (nn.Softmax, nn.LogSoftmax)) else recognize(module)
        return None if known is None else _named(structure, path, "activation", {"function": known})
    if norm is None:
        return None
    function = _named(structure, path, "norm", {"kind": norm.kind, "offset": norm.offset, "eps": norm.eps})
    sources = structure.bindings.sources
    if not norm.has_weight:
        return function
    tensor = sources[f"{path}.weight"][0].tensor
    bias = sources[f"{path}.bias"][0].tensor if norm.has_bias else None
    name = tensor.removesuffix(".weight")
    return Weight(name, tensor, path, (norm.width,), "norm", bias=bias, facts=function.facts)


def _named(structure: Structure, path: str, role: str, facts: dict[str, Any] | None = None) -> Weight:
    """A function without a tensor, with the name that the checkpoint would give it."""
    return Weight(_checkpoint_name(structure, path), "", path, (), role, facts=facts or {})


def _checkpoint_name(structure: Structure, path: str) -> str:
    """A module path in the names of the checkpoint, which may lack the model's prefix or have another one."""
    first = structure.pieces.blocks_path + "."
    for parameter, sources in structure.bindings.sources.items():
        tensor = sources[0].tensor
        if parameter.startswith(first) and tensor.endswith(parameter):
            return tensor.removesuffix(parameter) + path
        if parameter.startswith(first) and parameter.endswith(tensor):
            return path.removeprefix(parameter.removesuffix(tensor))
    return path


def _run_probe(structure: Structure, refused: dict[str, str]) -> tuple[set[str], list[str]]:
    """Modules outside the blocks that run before the first block, and paths of the model's attention modules."""
    narrow = structure.probes.narrowest
    probe = make_probe_model(type(structure.model), narrow.config, torch.device("cpu"), torch.float32, narrow.empty)
    batch = example_batch(probe, torch.device("cpu"))
    pieces = Pieces(probe, structure.pieces.blocks_path)
    inside = structure.pieces.blocks_path + "."
    outer = {name: module for name, module in probe.named_modules() if not name.startswith(inside)}
    with recorded_inputs(outer, lambda *_: None) as called:
        pieces.embeddings(batch)
    return {name for name, _ in called}, _attention_paths(structure, probe, narrow.kinds, batch, refused)


def _attention_paths(
    structure: Structure,
    probe: PreTrainedModel,
    kinds: Sequence[Kind],
    batch: dict[str, Tensor],
    refused: dict[str, str],
) -> list[str]:
    """kinds: of the blocks of the probe model"""
    probe.set_attn_implementation("eager")
    with torch.no_grad():
        own = output_of(probe(**batch)).float()
        with observed_plain_attention(probe) as observed:
            plain = output_of(probe(**batch)).float()
    seen = {id(call.module) for call in observed.calls}
    if not seen:
        refused["softmax"] = "its attention doesn't use transformers' AttentionInterface"
        return []
    difference = float((own - plain).abs().max())
    if not difference <= TOLERANCE * float(own.abs().max()):
        refused["softmax"] = Because(
            f"its attention is not the plain one: outputs differ by {difference:.3g}",
            reason="not-plain",
            difference=difference,
        )
        return []
    path = structure.pieces.blocks_path
    relative: dict[Kind, list[str]] = {}
    for name, module in probe.named_modules():
        if id(module) in seen and name.startswith(path + "."):
            number, _, inner = name.removeprefix(path + ".").partition(".")
            inside = relative.setdefault(kinds[int(number)], [])
            if inner not in inside:
                inside.append(inner)
    found = []
    for number, kind in enumerate(structure.kinds):
        found += [f"{path}.{number}.{inner}" for inner in relative.get(kind, [])]
    return found
