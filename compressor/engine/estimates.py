"""Predicts the tensors and bytes of a result, and the memory and disk of the run; checks that they are available."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from compressor.artifact.artifact_config import artifact_config
from compressor.artifact.export_format import ExportFormat
from compressor.artifact.memory_needs import CHUNK_BYTES, INTERPRETER_BYTES, limit_bytes, two_blocks_bytes
from compressor.artifact.modeling_file import modeling_source
from compressor.artifact.writer import Named, assign_shards, carried_tensors, untied_copies
from compressor.engine.calibration_batch import BATCH_TOKENS, RECORDED_SHARE
from compressor.engine.part_work import (
    Experts,
    chosen_groups,
    data_size,
    mappable_experts,
    part_bytes,
    part_works,
    sample_tokens,
    tokens_of,
)
from compressor.engine.plan_records import Findings, Formats, Reshape, Selected, Sizes
from compressor.errors import PreflightError
from compressor.layers import find_layer
from compressor.model.stored_weight import has_experts, replaced_tensors
from compressor.protocol import RewritePass, WeightPass
from compressor.storage.safetensors_file import header_bytes

if TYPE_CHECKING:
    from compressor.model.functions import Functions
    from compressor.model.stored_weight import StoredWeight
    from compressor.model.structure import Structure
    from compressor.recipe.recipe import Recipe
    from compressor.recipe.schema import LimitsSettings

BATCH_COPIES = 6  # tensors of the widest width that exist at once while a batch runs through a block; an estimate
SPARE_DISK_BYTES = 16 << 20
# Of the matrix of an expert, while it is read, dequantized in float32 and compared; of which one is in the mapped file.
EXPERT_COPIES = 8
MAPPED_COPIES = 3  # of the experts of a block on disk: as they are read back, as they were, and as they will be stored
CHILD_COPIES = 2  # the same for processes that evaluate and verify: a block of the source and one of the artifact
SOME_HASH = "f" * 64  # the data is not read here; every hash has this length


def stored_tensors(stored: StoredWeight, dtype: torch.dtype) -> Iterator[tuple[str, torch.dtype, tuple[int, ...], int]]:
    """Name, dtype, shape and bytes of each tensor of a weight in its format."""
    layer = find_layer(stored.format_name)
    for suffix, (kind, shape) in layer.planned(stored.weight.shape, stored.format_params, dtype).items():
        size = kind.itemsize
        for length in shape:
            size *= length
        yield f"{stored.weight.name}.{suffix}", kind, shape, size


def planned_tensors(
    structure: Structure, functions: Functions, stored: Mapping[str, StoredWeight], untied: bool
) -> list[Named]:
    """Every tensor of the result, in the order of the parts.

    stored  weight name -> the format it will be in; all other weights stay dense
    untied  whether the output head gets its own weight
    """
    replaced = replaced_tensors(stored.values(), structure.checkpoint)
    by_part: dict[int, list[Named]] = {}
    for tensor, part in structure.part_by_tensor.items():
        if tensor not in replaced:
            info = structure.checkpoint.tensors[tensor]
            kind = structure.bindings.dtype_of(tensor)
            size = info.nbytes // info.dtype.itemsize * kind.itemsize
            by_part.setdefault(part, []).append(Named(tensor, kind, info.shape, size))
    for part, weight in [*structure.weights(), *functions.all()]:
        if weight.name in stored:
            for name, kind, shape, size in stored_tensors(stored[weight.name], structure.dtype):
                by_part.setdefault(part, []).append(Named(name, kind, shape, size))
    tensors = [tensor for part in sorted(by_part) for tensor in sorted(by_part[part], key=lambda t: t.name)]
    by_name = {tensor.name: tensor for tensor in tensors}
    copies = untied_copies(structure, list(stored.values()), untied)
    tensors += [replace(by_name[tensor], name=name) for name, tensor in copies.items()]
    carried = carried_tensors(structure)
    return tensors + [Named(name, i.dtype, i.shape, i.nbytes, i.small) for name, i in carried.items()]


def predict_sizes(
    recipe: Recipe,
    structure: Structure,
    reshapes: Sequence[Reshape],
    selected: Selected,
    functions: Functions,
    formats: Formats,
    export_format: ExportFormat,
    untied: bool,
) -> Sizes:
    """Bytes of the artifact, and of the memory and disk that the run needs."""
    stored = {name: format_name for name, format_name in formats.formats.items() if name not in formats.counted_dense}
    weights = _weight_file_bytes(planned_tensors(structure, functions, stored, untied), recipe.export.shard_bytes)
    side = _side_file_bytes(recipe, structure, list(formats.formats.values()), export_format, untied)
    limit, experts = limit_bytes(recipe.limits.memory), mappable_experts(structure)
    sweep, spilled = _sweep_memory(recipe, structure, reshapes, selected), 0
    maps = sweep.held > limit and any(experts.parts) and _can_map_experts(recipe)
    if maps:
        sweep = _sweep_memory(recipe, structure, reshapes, selected, experts)
        spilled = MAPPED_COPIES * max(experts.parts) + _folded_inputs_bytes(recipe, structure, recipe.data.samples)
    spills = sweep.held + sweep.activations > limit
    peak = sweep.held + (0 if spills else sweep.activations)
    spilled += 2 * sweep.activations // (1 + RECORDED_SHARE) if spills else 0  # before and after a block
    children = _child_memory_bytes(recipe, structure, None)
    if any(experts.parts):  # dense in both models, as no layer stands for them
        parts = part_bytes(structure)
        children = max(children, two_blocks_bytes(parts[0] + parts[-1], max(parts[1:-1])))
    if children > limit and any(experts.parts):
        children = _child_memory_bytes(recipe, structure, experts)
        spilled = max(spilled, CHILD_COPIES * max(experts.parts))
    return Sizes(
        weight_bytes=weights,
        artifact_bytes=weights + side,
        peak_memory_bytes=max(peak, children),
        disk_bytes=weights * (len(recipe.sweeps) + 1) + side + spilled + SPARE_DISK_BYTES,
        spills=spills,
        maps_experts=maps,
    )


def _weight_file_bytes(tensors: list[Named], shard_bytes: int) -> int:
    """Bytes of all shards: their tensors and their headers."""
    by_name = {tensor.name: tensor for tensor in tensors}
    headers = sum(
        header_bytes((name, by_name[name].stored_as, by_name[name].shape) for name in names)
        for names in assign_shards(tensors, shard_bytes).values()
    )
    return sum(tensor.nbytes for tensor in tensors) + headers


def _side_file_bytes(
    recipe: Recipe, structure: Structure, formats: list[StoredWeight], export_format: ExportFormat, untied: bool
) -> int:
    """Bytes of config.json, recipe.yaml, the modeling file (if the export format has one) and files of the source."""
    config = artifact_config(
        structure.checkpoint.carried_config, export_format, formats, structure.model, "bfloat16", untied
    )
    pinned = recipe.pinned(SOME_HASH if recipe.reads_data else None, SOME_HASH)
    side = len(json.dumps(config, indent=2)) + len(pinned.to_yaml().encode())
    if export_format.name == "custom":
        side += len(
            modeling_source(structure.model, (stored.format_name for stored in formats), experts=has_experts(formats))
        )
    checkpoint = structure.checkpoint
    return side + sum((checkpoint.directory / path).stat().st_size for path in checkpoint.side_files.carried)


@dataclass(frozen=True)
class SweepMemory:
    """Peak memory of a sweep, in bytes.

    held         everything except the activations
    activations  hidden states of the calibration data, and what paused batches keep of a block
    """

    held: int
    activations: int


def _can_map_experts(recipe: Recipe) -> bool:
    """Whether all steps take one expert after the other."""
    return recipe.model.placement != "resident" and all(
        isinstance(step.settings, WeightPass) and not step.settings.keeps_block and not step.settings.traits.rescales
        for step in recipe.steps
    )


def _folded_inputs_bytes(recipe: Recipe, structure: Structure, samples: int) -> int:
    """Bytes of the inputs of all weights of a block for so many samples of calibration data."""
    if all(step.settings.traits.reads == "weights" for step in recipe.steps):
        return 0
    return _routed_bytes(structure, samples * sample_tokens(structure, recipe.data.length))


def _routed_bytes(structure: Structure, tokens: int) -> int:
    """Bytes of the inputs of all weights of a block for so many tokens, which have a row for each of their experts."""
    return structure.dtype.itemsize * max(
        (
            sum(tokens_of(g, structure, tokens) * g.in_features for stage in structure.stages(part) for g in stage)
            for part in range(1, structure.block_count + 1)
        ),
        default=0,
    )


def _sweep_memory(
    recipe: Recipe,
    structure: Structure,
    reshapes: Sequence[Reshape],
    selected: Selected,
    mapped: Experts | None = None,
) -> SweepMemory:
    """Interpreter, and the largest of these: embeddings and output head; a block twice with a batch and the working
    copies of a pass, beside the embeddings if these stay in memory; a part that a step rewrites.

    mapped  the experts that lie in a mapped file, of which few matrices are in memory; None: they are in memory
    """
    parts = part_bytes(structure)
    blocks = parts[1:-1]
    if mapped is not None:
        blocks = [size - experts for size, experts in zip(blocks, mapped.parts[1:-1], strict=True)]
    held = sum(blocks) if recipe.model.placement == "resident" else max(blocks)
    reads = {step.settings.traits.reads for step in recipe.steps}
    tokens = recipe.data.samples * recipe.data.length if reads != {"weights"} else 0
    streams = 1 + RECORDED_SHARE
    if "gradients" in reads:  # a few batches keep one per block, all keep the first and last
        streams = max(streams, 3)
    batch = _batch_bytes(structure, min(BATCH_TOKENS, max(tokens, 1)))
    resident = held if recipe.model.placement == "resident" else 0
    stay = resident or any(not isinstance(s.settings, WeightPass) or s.settings.decides for s in recipe.steps)
    in_blocks = (
        (parts[0] if stay else 0) + 2 * held + _working_bytes(recipe, structure, selected, in_blocks=True) + batch
    )
    if mapped is not None:
        most = min(recipe.data.samples, max(1, BATCH_TOKENS // max(1, recipe.data.length)))
        in_blocks += EXPERT_COPIES * mapped.at_once + _folded_inputs_bytes(recipe, structure, most)
    else:
        in_blocks += _folded_bytes(recipe, structure, selected)
    at_head = parts[0] + parts[-1] + _working_bytes(recipe, structure, selected, in_blocks=False) + resident
    rewriting = max((_rewriting_bytes(recipe, reshape) for reshape in reshapes), default=0)
    return SweepMemory(
        INTERPRETER_BYTES + max(in_blocks, at_head, rewriting),
        streams * tokens * _hidden_width(structure) * structure.dtype.itemsize,
    )


def _working_bytes(recipe: Recipe, structure: Structure, selected: Selected, *, in_blocks: bool) -> int:
    """The largest working copies of a step that stores weights, in the blocks or in embeddings and output head."""
    ends = (0, structure.block_count + 1)
    largest = 0
    for step in recipe.steps:
        if not isinstance(step.settings, WeightPass):
            continue
        data, chosen = data_size(recipe, [step], structure), {weight.name for weight in selected[step.path]}
        for part in range(1, structure.block_count + 1) if in_blocks else ends:
            for group in chosen_groups(structure, part, chosen):
                own = replace(data, tokens=tokens_of(group, structure, data.tokens))
                largest = max(largest, step.settings.memory(group.weights, own))
    return largest


def _folded_bytes(recipe: Recipe, structure: Structure, selected: Selected) -> int:
    """What a step folds of the experts of a layer (`WeightPass.folded`), except for one of them."""
    largest = 0
    for step in recipe.steps:
        if not isinstance(step.settings, WeightPass):
            continue
        data, chosen = data_size(recipe, [step], structure), {weight.name for weight in selected[step.path]}
        for part in range(1, structure.block_count + 1):
            for stage in structure.stages(part):
                sizes = [
                    step.settings.folded(kept, data)
                    for group in stage
                    if group.expert is not None and (kept := [weight for weight in group if weight.name in chosen])
                ]
                largest = max(largest, sum(sizes) - max(sizes, default=0))
    return largest


def _rewriting_bytes(recipe: Recipe, reshape: Reshape) -> int:
    """Memory of a step that rewrites the model, except for the interpreter and the activations."""
    step, before = reshape.step, reshape.before
    if not isinstance(step.settings, RewritePass):
        return 0
    data, parts = data_size(recipe, [step], before), part_bytes(before)
    held = sum(parts[1:-1]) if recipe.model.placement == "resident" else max(parts)
    working = step.settings.memory(reshape.facts, data, part_works(before))
    return parts[0] + held + working + _batch_bytes(before, min(BATCH_TOKENS, data.tokens))


def _child_memory_bytes(recipe: Recipe, structure: Structure, mapped: Experts | None) -> int:
    """Peak memory of the processes that evaluate and verify, if they load models part by part.

    A model that fits is loaded whole, which needs more; `compressor.artifact.memory_needs` decides.

    mapped  as in `_sweep_memory`
    """
    parts = part_bytes(structure)
    head = parts[-1] + (parts[0] if structure.bindings.tied else 0)  # a tied output head is filled, too
    block = max(parts[1:-1]) + _largest_bytes(structure)
    if mapped is not None:
        sizes = zip(parts[1:-1], mapped.parts[1:-1], strict=True)
        block = 2 * max(size - experts for size, experts in sizes) + EXPERT_COPIES * mapped.at_once
        block += _routed_bytes(structure, recipe.eval.batch_size * sample_tokens(structure, recipe.eval.data.length))
    batch = _batch_bytes(structure, recipe.eval.batch_size * recipe.eval.data.length)
    return INTERPRETER_BYTES + max(2 * head + CHUNK_BYTES, block + batch, parts[0] + block)


def _largest_bytes(structure: Structure) -> int:
    """Bytes of the largest tensor in a block, of which a second copy exists while it is read or dequantized."""
    return max(
        (
            structure.checkpoint.tensors[tensor].nbytes
            for tensor, part in structure.part_by_tensor.items()
            if 0 < part <= structure.block_count
        ),
        default=0,
    )


def _batch_bytes(structure: Structure, tokens: int) -> int:
    """Bytes that a batch of so many tokens needs while it runs through a block."""
    widest = max(
        (max(weight.shape) for part, weight in structure.weights() if 0 < part <= structure.block_count), default=0
    )
    return tokens * widest * BATCH_COPIES * structure.dtype.itemsize


def _hidden_width(structure: Structure) -> int:
    """Values per token between blocks. If the config has no such key: the widest input of a weight in a block."""
    stated = getattr(structure.model.config.get_text_config(), "hidden_size", None)
    if isinstance(stated, int):
        return stated
    return max((weight.shape[-1] for _, weight in structure.weights() if weight.role != "embedding"), default=0)


def check_limits(sizes: Sizes, limits: LimitsSettings, output: Path | None, findings: Findings) -> None:
    """Add a problem if there is not enough memory or disk."""
    available = limit_bytes(limits.memory)
    if sizes.peak_memory_bytes > available:
        findings.problems.append(
            PreflightError(
                f"about {sizes.peak_memory_bytes:,} bytes of memory are needed, {available:,} are available",
                where="memory",
                hint="Set a smaller data.samples or data.length, or use a machine with more memory.",
                data={"reason": "memory", "needed": sizes.peak_memory_bytes, "available": available},
            )
        )
    place = output if output is not None else Path.cwd()
    while not place.exists():
        place = place.parent
    free = limits.disk or shutil.disk_usage(place).free
    if sizes.disk_bytes > free:
        findings.problems.append(
            PreflightError(
                f"{sizes.disk_bytes:,} bytes of disk are needed, {free:,} are available",
                where=f"disk of {place}",
                hint="Free space on that disk, or choose an --output on another one.",
                data={"reason": "disk", "needed": sizes.disk_bytes, "available": free},
            )
        )
