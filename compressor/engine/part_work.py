"""Counts the parts of a model and the calibration data, from which passes count their work and their memory."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from compressor.engine.calibration_batch import BATCH_TOKENS, IMAGE_TOKENS
from compressor.model.families import EXPERT_COUNT_KEYS
from compressor.model.mapped_tensors import expert_parameters
from compressor.model.structure import Structure
from compressor.model.weight_names import are_read_one_by_one
from compressor.model.weights import Group
from compressor.protocol import DataSize, PartWork, Work
from compressor.recipe.recipe import Recipe, Step

# Values that elementwise operations read for each output of a matmul, in norms, activations and residual additions.
PASSES_OVER_OUTPUTS = 4


def part_works(structure: Structure) -> list[PartWork]:
    """The work of each part of a model."""
    values = [0] * (structure.block_count + 2)
    for tensor, part in structure.part_by_tensor.items():
        values[part] += math.prod(structure.checkpoint.tensors[tensor].shape)
    return [
        PartWork(values[part], _outputs_of(structure, part), Work(stored=float(size)), _run_work(structure, part))
        for part, size in enumerate(part_bytes(structure))
    ]


def part_bytes(structure: Structure) -> list[int]:
    """Bytes of the tensors of each part."""
    found = [0] * (structure.block_count + 2)
    for tensor, part in structure.part_by_tensor.items():
        found[part] += structure.checkpoint.tensors[tensor].nbytes
    return found


@dataclass(frozen=True)
class Experts:
    """The experts of a model that can lie in a mapped file (`mapped_tensors.are_experts`), in bytes.

    parts     of each part
    at_once   the largest piece that is in memory at once: an expert's matrix, or a tensor that can only be read whole
    """

    parts: list[int]
    at_once: int


def mappable_experts(structure: Structure) -> Experts:
    """The experts of a model that can lie in a mapped file."""
    found, at_once, bindings = [0] * (structure.block_count + 2), 0, structure.bindings
    for part in range(1, structure.block_count + 1):
        for name in expert_parameters(structure.model, structure.parameters_of(part)):
            tensors = [structure.checkpoint.tensors[source.tensor] for source in bindings.sources[name]]
            size, shape = sum(tensor.nbytes for tensor in tensors), structure.model.get_parameter(name).shape
            found[part] += size
            at_once = max(at_once, size // shape[0] if are_read_one_by_one(name, bindings, tensors) else size)
    return Experts(found, at_once)


def _outputs_of(structure: Structure, part: int) -> int:
    """Values that a part gives for each token: those of its last matmul; 0 if it has none."""
    groups = [group for stage in structure.stages(part) for group in stage] if part else []
    return sum(weight.out_features for weight in groups[-1]) if groups else 0


def _run_work(structure: Structure, part: int) -> Work:
    """Of running one token through a part: its matmuls, and what is computed with their outputs."""
    products = outputs = 0.0
    for stage in structure.stages(part) if part else []:
        for group in stage:
            share = 1.0 if group.expert is None else _routed_share(structure)
            for weight in group:
                products += 2.0 * math.prod(weight.shape) * share
                outputs += weight.out_features * share
    return Work(products=products, values=PASSES_OVER_OUTPUTS * outputs)


def run_of(parts: Sequence[PartWork], tokens: int) -> Work:
    """Of running so many tokens through a model with these parts."""
    return sum((part.run for part in parts), Work()) * tokens


def tokens_of(group: Group, structure: Structure, tokens: int) -> int:
    """Of the calibration tokens those that reach a group: an expert gets its share of them."""
    return tokens if group.expert is None else round(tokens * _routed_share(structure))


def _routed_share(structure: Structure) -> float:
    """Share of the tokens that one expert gets if all get the same."""
    config = structure.model.config.get_text_config()
    experts = next((value for key in EXPERT_COUNT_KEYS if isinstance(value := getattr(config, key, None), int)), 1)
    return min(1.0, getattr(config, "num_experts_per_tok", experts) / max(experts, 1))


def chosen_groups(structure: Structure, part: int, chosen: Collection[str]) -> Iterator[Group]:
    """The groups of a part that have weights with these names, with only these weights."""
    for stage in structure.stages(part):
        for group in stage:
            if kept := tuple(weight for weight in group if weight.name in chosen):
                yield Group(kept)


def data_size(recipe: Recipe, steps: Sequence[Step], structure: Structure) -> DataSize:
    """The calibration data of steps."""
    if all(step.settings.traits.reads == "weights" for step in steps):
        return DataSize()
    samples, length = recipe.data.samples, sample_tokens(structure, recipe.data.length)
    most = [step.settings.batch_samples for step in steps if step.settings.batch_samples is not None]
    batch = min([max(1, BATCH_TOKENS // length), samples, *most])
    return DataSize(samples, samples * length, batch * length)


def sample_tokens(structure: Structure, length: int) -> int:
    """Tokens of a sample: text has the length of the recipe."""
    return length if structure.model.main_input_name == "input_ids" else IMAGE_TOKENS
