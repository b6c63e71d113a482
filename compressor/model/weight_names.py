"""Maps the tensors of a checkpoint to the parameters of the model that they fill.

transformers renames tensors while loading and fuses some of them (a Mixtral expert's w1 and w3 become rows of one
`(experts, ...)` parameter), or splits one (a fused qkv projection). Users and files use checkpoint names, the running
model uses parameter names. `bind` applies transformers' own conversion rules, so that a model is loaded exactly as by
`from_pretrained`, but one block at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from compressor.errors import ModelError
from compressor.model.checkpoint import Checkpoint
from compressor.model.load_dtypes import held_dtypes
from compressor.model.mapped_tensors import Empty, in_memory
from compressor.model.prequantized import refuse_codes
from compressor.model.tying import Ties, find_ties
from compressor.model.unused_tensors import Unused, unused_tensor
from compressor.model.weights import Weight, part_of
from compressor.storage.safetensors_file import TensorInfo, same_bytes

ROWS_SHIFT = 32  # a numbered row is (source number << 32) + row number


@dataclass(frozen=True)
class Source:
    """One checkpoint tensor and the part of a parameter that it fills.

    expert   index along the parameter's first dimension; None if the tensor fills the parameter from its start
    rows     (start, stop) along the next dimension; None if it fills all of them
    """

    tensor: str
    pattern: str | None = None
    expert: int | None = None
    rows: tuple[int, int] | None = None


@dataclass(frozen=True)
class Rule:
    """A rule of transformers that makes parameters from tensors, and the first of these parameters."""

    converter: WeightConverter
    first: str


@dataclass(frozen=True)
class Bindings:
    """sources   parameter or buffer name -> the tensors that fill it
    rules       parameter name -> the rule that joins or splits tensors (absent for plain renames)
    tied        parameter name -> the parameter whose storage it shares
    apart       parameters that config.json ties although their tensors differ
    dtypes      name of a parameter or buffer with sources -> its dtype in transformers
    joined      parameter name -> why it can't be divided into tensors, so that it must stay unchanged
    unused      checkpoint tensors that fill no parameter
    owned       tensor -> the parameter under whose name the class prefers it, of those that share it
    """

    sources: dict[str, tuple[Source, ...]]
    rules: dict[str, Rule]
    tied: dict[str, str]
    apart: tuple[str, ...] = ()
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    joined: dict[str, str] = field(default_factory=dict)
    unused: tuple[Unused, ...] = ()
    owned: dict[str, str] = field(default_factory=dict)

    @cached_property
    def parameters_by_tensor(self) -> dict[str, str]:
        """Checkpoint tensor -> the parameter that it fills; the first one if a rule makes several of it."""
        names: dict[str, str] = {}
        for name, sources in self.sources.items():
            for source in sources:
                names.setdefault(source.tensor, name)
        return names

    def parameter_of(self) -> dict[str, str]:
        """Checkpoint tensor -> the parameter that it fills."""
        return self.parameters_by_tensor

    def dtype_of(self, tensor: str) -> torch.dtype:
        """The dtype to which transformers converts a checkpoint tensor before any rule."""
        name = self.parameters_by_tensor[tensor]
        return self.dtypes[self.rules[name].first if name in self.rules else name]


def bind(model: PreTrainedModel, checkpoint: Checkpoint, dtype: torch.dtype) -> Bindings:
    """Map every checkpoint tensor. `model` may be on the meta device; it was made with `dtype`.

    Only headers are read, except for two tensors that config.json ties if the checkpoint has both.

    raises  ModelError if a parameter has no tensor, a shape differs, or tensors contain codes instead of weights
    """
    renamed = Renaming(model)
    state = dict(model.state_dict())
    found: dict[str, list[Source]] = {}
    chosen: dict[str, WeightConverter] = {}
    unused: list[Unused] = []
    for key in sorted(checkpoint.tensors, key=dot_natural_key):
        target, pattern = renamed(key)
        if target not in state:
            unused.append(unused_tensor(key, checkpoint.tensors[key], renamed.reported(target, pattern), model))
            continue
        found.setdefault(target, []).append(Source(key, pattern))
        if pattern is not None:
            chosen[target] = renamed.by_pattern[pattern]
    _refuse_codes(model, state, found, unused, checkpoint)
    sources: dict[str, tuple[Source, ...]] = {}
    rules: dict[str, Rule] = {}
    joined: dict[str, str] = {}
    for target, parts in found.items():
        if target not in chosen:
            sources[target] = (_plain_source(target, parts, state[target].shape, checkpoint),)
            continue
        rule = Rule(chosen[target], target)
        made = _realized(rule, parts, state, model, checkpoint)
        placed = placed_rows(rule, parts, state[target].shape, model, checkpoint) if len(made) == 1 else None
        for name in made:
            sources[name] = placed or tuple(parts)
            rules[name] = rule
            if placed is None:
                joined[name] = (
                    f"shares {parts[0].tensor} with {len(made) - 1} other parameters"
                    if len(made) > 1
                    else f"is {parts[0].tensor} in another order"
                    if len(parts) == 1
                    else f"is joined from {len(parts)} tensors, such as {parts[0].tensor}, not row by row"
                )
    dtypes = {name: held for name, held in held_dtypes(model, dtype).items() if name in sources}
    known = Bindings(dict(sources), rules, {}, dtypes=dict(dtypes))
    ties = find_ties(model, sources, lambda one, other: _are_equal(one, other, known, model, checkpoint))
    for name in ties.copies:
        unused += [Unused(s.tensor, (name,), "copy", ties.tied[name]) for s in sources.pop(name)]
        dtypes.pop(name)
    _refuse_missing(model, sources, ties, checkpoint)
    owned = {
        sources[name][0].tensor: owner for name, owner in ties.owners.items() if name in sources and name not in rules
    }
    return Bindings(sources, rules, ties.tied, ties.apart, dtypes, joined, tuple(unused), owned)


class Renaming:
    """The renaming rules of transformers for one model. A call returns the parameter's name and the rule's pattern."""

    def __init__(self, model: PreTrainedModel) -> None:
        rules = get_model_conversion_mapping(model)
        self.renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self.converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self.by_pattern = {pattern: rule for rule in self.converters for pattern in rule.source_patterns}
        self.prefix = model.base_model_prefix
        self.state = model.state_dict()

    def __call__(self, key: str) -> tuple[str, str | None]:
        target, pattern = rename_source_key(key, self.renamings, self.converters, self.prefix, self.state)
        if target not in self.state and key in self.state:  # the name is already correct
            target, pattern = rename_source_key(key, [], [], self.prefix, self.state)
        return target, pattern

    def reported(self, target: str, pattern: str | None) -> tuple[str, ...]:
        """The names that transformers reports as unexpected for a tensor that fills no parameter."""
        if pattern is None:
            return (target,)
        patterns = self.by_pattern[pattern].target_patterns
        return tuple(target.replace(patterns[0], other) for other in patterns)


def read_parameter(name: str, bindings: Bindings, read: Callable[[str], Tensor], model: PreTrainedModel) -> Tensor:
    """The value of one parameter or buffer as transformers loads it. `read` takes checkpoint names.

    The tensors of experts that are joined row by row are read one after the other, so no second copy of them exists.
    """
    sources = bindings.sources[name]
    rule = bindings.rules.get(name)
    if rule is None:
        return read(sources[0].tensor)
    if all(source.rows is not None for source in sources):
        return _joined_rows(sources, read, model.get_parameter(name).shape, in_memory)
    tensors = [(source, read(source.tensor)) for source in sources]
    return _convert(rule, tensors, model)[name]


def read_experts_parameter(
    name: str,
    bindings: Bindings,
    read: Callable[[str], Tensor],
    read_experts: Callable[[str], Iterator[Tensor]],
    model: PreTrainedModel,
    empty: Empty,
) -> Tensor:
    """`read_parameter` for a parameter of all experts (experts, rows, columns), made by `empty`, expert by expert.

    read_experts  takes the checkpoint name of a tensor that fills the parameter alone; gives the matrices in it
    """
    sources, rule, parameter = bindings.sources[name], bindings.rules.get(name), model.get_parameter(name)
    if rule is not None and all(source.rows is not None for source in sources):
        return _joined_rows(sources, read, parameter.shape, lambda shape, _: empty(shape, bindings.dtypes[name]))
    value = empty(tuple(parameter.shape), bindings.dtypes[name])
    if len(sources) == 1 and (rule is None or only_transposes(rule)):
        return fill_experts(value, read_experts(sources[0].tensor))
    return value.copy_(read_parameter(name, bindings, read, model))  # such a rule takes all experts at once


def are_read_one_by_one(name: str, bindings: Bindings, tensors: Sequence[TensorInfo]) -> bool:
    """Whether `read_experts_parameter` reads one expert after the other from these tensors."""
    rule = bindings.rules.get(name)
    if rule is not None and all(source.rows is not None for source in bindings.sources[name]):
        return True
    return len(tensors) == 1 and tensors[0].decode is None and (rule is None or only_transposes(rule))


def fill_experts(value: Tensor, matrices: Iterable[Tensor]) -> Tensor:
    """Fill a parameter (experts, rows, columns) with the matrices of its experts."""
    for number, matrix in enumerate(matrices):
        value[number] = matrix
    return value


def only_transposes(rule: Rule) -> bool:
    """Whether a rule transposes the matrices of a tensor that lie otherwise than in the parameter, and nothing else.

    It leaves a tensor of the parameter's shape as it is.
    """
    return all(isinstance(op, Transpose) and op.check_dims for op in rule.converter.operations)


def read_matrix(weight: Weight, bindings: Bindings, read: Callable[[str], Tensor], model: PreTrainedModel) -> Tensor:
    """A weight as (out_features, in_features). `read` takes checkpoint names."""
    if weight.is_slice:
        return part_of(read_parameter(weight.parameter, bindings, read, model), weight)
    value = read(weight.tensor)
    return value.t() if weight.transposed else value


def _joined_rows(sources: tuple[Source, ...], read: Callable[[str], Tensor], shape: torch.Size, empty: Empty) -> Tensor:
    """A parameter (experts, rows, ...) of this shape, made by `empty`, whose rows the sources fill."""
    first = read(sources[0].tensor)
    value = empty(tuple(shape), first.dtype)
    for source in sources:
        assert source.rows is not None
        value[source.expert, source.rows[0] : source.rows[1]] = first if source is sources[0] else read(source.tensor)
    return value


def fill(module_name: str, tensor: Tensor | None, model: nn.Module) -> None:
    """Set a parameter or buffer by full name. None moves it to the meta device, which frees its memory."""
    path, _, leaf = module_name.rpartition(".")
    owner = model.get_submodule(path)
    table = owner._parameters if leaf in owner._parameters else owner._buffers
    current = table[leaf]
    if tensor is None:
        if current is not None:
            tensor = torch.empty_like(current, device="meta")
        else:
            return
    if table is owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor


def _convert(rule: Rule, tensors: Iterable[tuple[Source, Tensor]], model: PreTrainedModel) -> dict[str, Tensor]:
    """Every parameter that a rule makes from these tensors."""
    converter = copy.deepcopy(rule.converter)
    for source, tensor in tensors:
        converter.add_tensor(rule.first, source.tensor, source.pattern, tensor)  # type: ignore[arg-type]
    try:
        made: dict[str, Any] = converter.convert(rule.first, model=model, config=model.config)
    except Exception as error:  # transformers raises many kinds of exceptions; the cause is kept
        raise ModelError(
            f"transformers could not join {len(rule.converter.source_patterns)} kinds of tensors ({error})",
            where=rule.first,
            hint="Download config.json and the weights again from one revision: hf download NAME.",
            data={"reason": "not-joined", "kinds": len(rule.converter.source_patterns), "cause": str(error)},
        ) from error
    return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def _plain_source(target: str, parts: list[Source], shape: torch.Size, checkpoint: Checkpoint) -> Source:
    if len(parts) > 1:
        names = ", ".join(part.tensor for part in parts)
        raise ModelError(
            f"{len(parts)} tensors have values for it ({names})",
            where=target,
            hint="Remove all but one from the checkpoint.",
            data={"reason": "two-values", "tensors": [part.tensor for part in parts]},
        )
    _check_shape(parts[0].tensor, checkpoint.tensors[parts[0].tensor].shape, shape)
    return parts[0]


def _check_shape(where: str, found: Iterable[int], wanted: Iterable[int]) -> None:
    if tuple(found) != tuple(wanted):
        raise ModelError(
            f"the checkpoint has shape {tuple(found)}, config.json needs {tuple(wanted)}",
            where=where,
            hint="Download config.json and the weights again from one revision: hf download NAME.",
            data={"reason": "shape", "shape": list(found), "expected": list(wanted)},
        )


def _realized(
    rule: Rule, parts: list[Source], state: Mapping[str, Tensor], model: PreTrainedModel, checkpoint: Checkpoint
) -> list[str]:
    """The parameters that a rule makes, found with tensors without values. raises ModelError for a wrong shape"""
    shapes = [(part, checkpoint.tensors[part.tensor].shape) for part in parts]
    made = _convert(rule, [(part, torch.empty(shape, device="meta")) for part, shape in shapes], model)
    for name, value in made.items():
        if name not in state:
            raise ModelError(
                f"transformers loads it as {name}, which {type(model).__name__} doesn't have",
                where=parts[0].tensor,
                hint="Download config.json and the weights again from one revision: hf download NAME.",
                data={"reason": "no-parameter", "parameter": name},
            )
        _check_shape(name, value.shape, state[name].shape)
    return list(made)


def placed_rows(
    rule: Rule, parts: list[Source], shape: torch.Size, model: PreTrainedModel, checkpoint: Checkpoint
) -> tuple[Source, ...] | None:
    """The position of each tensor's rows in (experts, rows, ...), found by applying the rule to numbered rows.

    None if the rows are not kept together, or the rule does not move rows
    """
    numbered = []
    for number, part in enumerate(parts):
        size = checkpoint.tensors[part.tensor].shape[0] if checkpoint.tensors[part.tensor].shape else 0
        numbered.append((part, (torch.arange(size) + (number << ROWS_SHIFT)).reshape(size, 1)))
    try:
        placed = _convert(rule, numbered, model)[rule.first]
    except ModelError:  # the rule needs more than rows
        return None
    if placed.dim() != 3 or tuple(placed.shape[:2]) != tuple(shape[:2]):
        return None
    tags, length = placed[..., 0].flatten(), placed.shape[1]
    numbers, inner, place = tags >> ROWS_SHIFT, tags & ((1 << ROWS_SHIFT) - 1), torch.arange(len(tags))
    counts = torch.tensor([len(rows) for _, rows in numbered])
    if not bool(((numbers >= 0) & (numbers < len(parts))).all()) or not bool(counts.all()):
        return None
    first = torch.full((len(parts),), len(tags)).scatter_reduce(0, numbers, place, "amin")
    is_in_order = torch.equal(place, first[numbers] + inner)
    is_in_one_expert = bool((first % length + counts <= length).all())
    if not (is_in_order and is_in_one_expert and torch.equal(numbers.bincount(minlength=len(parts)), counts)):
        return None
    return tuple(
        Source(part.tensor, part.pattern, at // length, (at % length, at % length + count))
        for part, at, count in zip(parts, first.tolist(), counts.tolist())
    )


def _are_equal(one: str, other: str, known: Bindings, model: PreTrainedModel, checkpoint: Checkpoint) -> bool:
    """Whether two parameters have the same values after loading."""
    infos = [[checkpoint.tensors[source.tensor] for source in known.sources[name]] for name in (one, other)]
    if not all(info.file.is_file() for both in infos for info in both):
        return False  # a model that is only planned; equal tensors were found when its source was read
    is_plain = one not in known.rules and other not in known.rules and known.dtypes[one] == known.dtypes[other]
    if is_plain and same_bytes(infos[0][0], infos[1][0]):
        return True

    def read(tensor: str) -> Tensor:
        return checkpoint.read(tensor).to(known.dtype_of(tensor))

    return torch.equal(read_parameter(one, known, read, model), read_parameter(other, known, read, model))


def _refuse_codes(
    model: PreTrainedModel,
    state: Mapping[str, Tensor],
    found: Mapping[str, list[Source]],
    unused: list[Unused],
    checkpoint: Checkpoint,
) -> None:
    filled = [
        (part.tensor, target) for target, parts in found.items() if state[target].is_floating_point() for part in parts
    ]
    beside = [name for tensor in unused for name in tensor.reported]
    refuse_codes(filled, beside, (name for name, _ in model.named_modules()), checkpoint)


def _refuse_missing(
    model: PreTrainedModel, sources: Mapping[str, tuple[Source, ...]], ties: Ties, checkpoint: Checkpoint
) -> None:
    buffers = {name for name, _ in model.named_buffers()}
    filled = sources.keys() | ties.tied.keys() | buffers
    missing = [name for name in model.state_dict() if name not in filled]
    if missing:
        shown = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
        output = model.get_output_embeddings()
        is_output_head = output is not None and all(
            model.get_submodule(name.rpartition(".")[0]) is output for name in missing
        )
        raise ModelError(
            f"the checkpoint has no tensor for {shown}, so {type(model).__name__} would have random values there",
            where=str(checkpoint.directory.name),
            hint="Set tie_word_embeddings to true in config.json if the output head shares the embedding's weights."
            if is_output_head
            else "Correct `architectures` in config.json, or download the model again.",
            data={
                "reason": "missing-tensors",
                "names": missing,
                "is_output_head": is_output_head,
                "model": type(model).__name__,
            },
        )
