"""Which checkpoint tensors fill which module parameters, in the names each side uses.

transformers renames tensors while loading and fuses some of them (a Mixtral expert's w1 and w3 become rows of one
`(experts, ...)` parameter). Users and files know checkpoint names, the running model knows parameter names. `bind`
asks transformers' own conversion rules for the translation, so a model loads here exactly as `from_pretrained` does,
but one block at a time.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from compressor.checkpoint import Checkpoint
from compressor.errors import ModelError

ROWS_SHIFT = 32  # a probe row is (source number << 32) + row number


@dataclass(frozen=True)
class Source:
    """One checkpoint tensor and the part of a parameter that it fills.

    expert   index along the parameter's first dimension, None when the tensor fills the parameter from its start
    rows     (start, stop) along the next dimension, None when it fills all of them
    """

    tensor: str
    pattern: str | None = None
    expert: int | None = None
    rows: tuple[int, int] | None = None


@dataclass(frozen=True)
class Bindings:
    """sources   parameter or buffer name -> the tensors that fill it
    converters  parameter name -> transformers' rule that joins them (absent for plain renames)
    tied        parameter name -> the parameter whose storage it shares
    dropped     checkpoint tensors that the model does not have
    """

    sources: dict[str, tuple[Source, ...]]
    converters: dict[str, WeightConverter]
    tied: dict[str, str]
    dropped: tuple[str, ...]

    def parameter_of(self) -> dict[str, str]:
        """Checkpoint tensor -> parameter it goes to."""
        return {source.tensor: name for name, sources in self.sources.items() for source in sources}


def bind(model: PreTrainedModel, checkpoint: Checkpoint) -> Bindings:
    """Translate every checkpoint tensor. `model` may be on the meta device.

    raises ModelError when a parameter has no tensor, a shape differs, or tensors are fused in a way we can't split
    """
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    state = dict(model.state_dict())
    found: dict[str, list[Source]] = {}
    chosen: dict[str, WeightConverter] = {}
    dropped: list[str] = []
    for key in sorted(checkpoint.tensors, key=_natural):
        target, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if target not in state:
            dropped.append(key)
            continue
        found.setdefault(target, []).append(Source(key, pattern))
        if pattern is not None:
            chosen[target] = by_pattern[pattern]
    tied = _tied(model, found)
    _refuse_missing(model, found, tied, checkpoint)
    sources = {
        target: _placed(target, parts, chosen.get(target), state[target].shape, model, checkpoint)
        for target, parts in found.items()
    }
    ignored = [re.compile(p) for p in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    visible = tuple(key for key in dropped if not any(pattern.search(key) for pattern in ignored))
    return Bindings(sources, chosen, tied, visible)


def read_parameter(name: str, bindings: Bindings, read: Callable[[str], Tensor], model: PreTrainedModel) -> Tensor:
    """The value of one parameter or buffer as transformers would load it; `read` gets checkpoint names."""
    sources = bindings.sources[name]
    converter = bindings.converters.get(name)
    if converter is None:
        return read(sources[0].tensor)
    tensors = [(source, read(source.tensor)) for source in sources]
    return _convert(name, converter, tensors, model)


def fill(module_name: str, tensor: Tensor | None, model: nn.Module) -> None:
    """Set a parameter or buffer by full name; None puts it back on the meta device, freeing its memory."""
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


def _convert(
    name: str, converter: WeightConverter, tensors: Iterable[tuple[Source, Tensor]], model: PreTrainedModel
) -> Tensor:
    rule = copy.deepcopy(converter)
    for source, tensor in tensors:
        rule.add_tensor(name, source.tensor, source.pattern, tensor)  # type: ignore[arg-type]
    try:
        value: Any = rule.convert(name, model=model, config=model.config)[name]
    except Exception as error:  # transformers raises many kinds; the cause is kept
        raise ModelError(
            f"transformers could not join {len(rule.source_patterns)} kinds of tensors ({error})", where=name
        ) from error
    return value[0] if isinstance(value, list) else value


def _placed(
    target: str,
    parts: list[Source],
    converter: WeightConverter | None,
    shape: torch.Size,
    model: PreTrainedModel,
    checkpoint: Checkpoint,
) -> tuple[Source, ...]:
    """Find where each tensor lands by sending numbered rows through the same rule."""
    if converter is None:
        if len(parts) > 1:
            names = ", ".join(part.tensor for part in parts)
            raise ModelError(f"{len(parts)} tensors fill it ({names})", where=target, hint="Keep one of them.")
        found = tuple(checkpoint.tensors[parts[0].tensor].shape)
        if found != tuple(shape):
            raise ModelError(
                f"the checkpoint has shape {found}, config.json asks for {tuple(shape)}",
                where=parts[0].tensor,
                hint="The config and the weights are not of one model.",
            )
        return (parts[0],)
    probes = []
    for number, part in enumerate(parts):
        rows = checkpoint.tensors[part.tensor].shape[0]
        probes.append((part, (torch.arange(rows) + (number << ROWS_SHIFT)).reshape(rows, 1)))
    placed = _convert(target, converter, probes, model)
    refusal = ModelError(
        f"its {len(parts)} tensors are fused in a way that can't be split by rows",
        where=target,
        hint="This model family is not supported yet.",
    )
    if placed.dim() != 3 or tuple(placed.shape[:2]) != tuple(shape[:2]):
        raise refusal
    result = []
    for number, part in enumerate(parts):
        rows = checkpoint.tensors[part.tensor].shape[0]
        at = (placed[..., 0] >> ROWS_SHIFT == number).nonzero()
        if len(at) != rows or at[0, 0] != at[-1, 0]:
            raise refusal
        expert, start = int(at[0, 0]), int(at[0, 1])
        if not torch.equal(placed[expert, start : start + rows, 0] & ((1 << ROWS_SHIFT) - 1), torch.arange(rows)):
            raise refusal
        result.append(Source(part.tensor, part.pattern, expert, (start, start + rows)))
    return tuple(result)


def _tied(model: PreTrainedModel, found: dict[str, list[Source]]) -> dict[str, str]:
    """Parameters that share another's storage and have no tensor of their own."""
    keys = getattr(model, "all_tied_weights_keys", None) or {}
    tied = {}
    for target, source in keys.items():
        if target in found and source in found:
            continue
        if target in found:
            target, source = source, target
        if source in found:
            tied[target] = source
    return tied


def _refuse_missing(
    model: PreTrainedModel, found: dict[str, list[Source]], tied: dict[str, str], checkpoint: Checkpoint
) -> None:
    buffers = {name for name, _ in model.named_buffers()}
    missing = [name for name in model.state_dict() if name not in found and name not in tied and name not in buffers]
    if missing:
        shown = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
        raise ModelError(
            f"the checkpoint has no tensor for {shown}",
            where=str(checkpoint.directory.name),
            hint=f"{type(model).__name__} would start with random values there. Check `architectures` in config.json.",
        )


def _natural(key: str) -> list[tuple[int, int, str]]:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in key.split(".")]
