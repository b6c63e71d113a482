"""Names the experts of a layer that a checkpoint stores together in one tensor.

Such a tensor (experts, rows, columns) is read as a whole while its experts stay dense. An expert in a quantization
format has tensors of its own, so it needs a name. If transformers has a rule that joins separate experts into this
parameter, the names are those of the rule, and stock loaders can join the experts. One expert may then be several
weights, such as gate and up projection. Otherwise the number of the expert is put into the name of the parameter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter

from compressor.model.checkpoint import Checkpoint
from compressor.model.weight_names import Renaming, Rule, Source, placed_rows
from compressor.storage.safetensors_file import TensorInfo


@dataclass(frozen=True)
class Slice:
    """One weight inside a tensor of all experts: its name, the expert, and its (start, stop) of the output rows."""

    name: str
    expert: int
    rows: tuple[int, int]


def expert_slices(
    tensor: str, parameter: str, block: str, transposed: bool, model: PreTrainedModel, checkpoint: Checkpoint
) -> tuple[Slice, ...]:
    """The weights in a tensor that fills a parameter (experts, rows, columns), expert by expert.

    block    path of the block of the model that has the parameter
    returns  nothing if the tensor's name doesn't tell the block, so that no name can be made for an expert
    """
    shape = model.get_parameter(parameter).shape
    outputs = shape[2] if transposed else shape[1]
    marker = ".".join(block.split(".")[-2:]) + "."  # such as layers.3.
    before, found, _ = tensor.partition(marker)
    if not found:
        return ()
    prefix, inner = before + marker, parameter.removeprefix(f"{block}.")
    if not transposed and (separate := _separate(prefix, inner, parameter, shape, model, checkpoint)):
        return separate
    owner, _, leaf = inner.removesuffix(".weight").rpartition(".")
    if inner.endswith(".weight"):
        return tuple(Slice(f"{prefix}{owner}.{leaf}.{n}", n, (0, outputs)) for n in range(shape[0]))
    return tuple(Slice(f"{prefix}{owner}.{n}.{leaf}", n, (0, outputs)) for n in range(shape[0]))


def _separate(
    prefix: str, inner: str, parameter: str, shape: torch.Size, model: PreTrainedModel, checkpoint: Checkpoint
) -> tuple[Slice, ...]:
    """The weights under the names of a rule of transformers that joins separate experts; nothing without a rule."""
    renaming = Renaming(model)
    for rule in renaming.converters:
        target, patterns = rule.target_patterns[0], rule.source_patterns
        is_joining = len(rule.target_patterns) == 1 and all("*" in p and p.endswith(".weight") for p in patterns)
        if not is_joining or not inner.endswith(target) or shape[1] % len(patterns):
            continue
        parent, rows = prefix + inner.removesuffix(target), shape[1] // len(patterns)
        slices = [
            (pattern, Slice(parent + pattern.replace("*", str(n)), n, (at * rows, (at + 1) * rows)))
            for n in range(shape[0])
            for at, pattern in enumerate(patterns)
        ]
        if all(renaming(piece.name) == (parameter, pattern) for pattern, piece in slices) and _joins(
            rule, parameter, slices, shape, model, checkpoint
        ):
            return tuple(replace(piece, name=piece.name.removesuffix(".weight")) for _, piece in slices)
    return ()


def _joins(
    rule: WeightConverter,
    parameter: str,
    slices: Sequence[tuple[str, Slice]],
    shape: torch.Size,
    model: PreTrainedModel,
    checkpoint: Checkpoint,
) -> bool:
    """Whether the rule puts tensors of these names exactly where the slices lie."""
    infos = {
        piece.name: TensorInfo(Path(), torch.float32, (piece.rows[1] - piece.rows[0], shape[2]), 0, 0)
        for _, piece in slices
    }
    parts = [Source(piece.name, pattern) for pattern, piece in slices]
    placed = placed_rows(Rule(rule, parameter), parts, shape, model, replace(checkpoint, tensors=infos))
    wanted = {(piece.name, piece.expert, piece.rows) for _, piece in slices}
    return placed is not None and {(source.tensor, source.expert, source.rows) for source in placed} == wanted
