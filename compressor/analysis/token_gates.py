"""Finds by running a model where a token gate can be placed in each of its blocks. `token_gate` needs this.

A gate is placed after the attention residual and before the MLP. In a probe model with random weights, the attention
is the module that calls transformers' attention interface. The first later module whose output can be set to 0 while
the block's output still depends on the attention reads the residual stream, so the gate is placed before it. The output
of a later module either is the input of the next one, or the block's own code adds it to a tensor of all tokens. A
proof shows that nothing was missed: everything after attention works on one token at a time, so a gated block must give
the kept tokens the same outputs as the block itself.

Time: a few forward passes of a probe model. A narrow one runs first; one of the model's own widths runs only for a
model whose tokens can be pruned, which is an encoder and not large.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compressor.analysis.block_calls import ModuleCall, is_one_tensor, recorded_calls
from compressor.analysis.token_gate_proof import HINT, PADDED, prove_token_gates
from compressor.errors import ModelError
from compressor.layers.structural.observed_attention import register_watching, watching
from compressor.layers.structural.token_gate import attended
from compressor.model.block_runner import Batch, Call, Pieces
from compressor.model.facts import BlockTokens, LaterCall, TokenFacts
from compressor.model.module_names import is_inside
from compressor.model.observed_matmul import ObservedMatmul, ObservedMatmuls
from compressor.model.probe_model import Kind, example_batch, make_probe_model
from compressor.model.recorded_modules import recorded_inputs
from compressor.model.structure import Structure

CAUSAL_HINT = "Use prefill_pruning for a causal model; zero_tprune is for encoders."
TOKENS = 13  # length of the probe model's text
UNKNOWN = ("softcap", "position_bias", "s_aux", "sliding_window")  # arguments of attention that a gate can't compute


def find_token_gates(structure: Structure) -> TokenFacts:
    """The facts of a model that pruning tokens needs.

    raises  ModelError naming the block, or the model, and the reason
    """
    model, path = structure.model, structure.pieces.blocks_path
    _refuse_outputs(model)
    whole, narrow = structure.probes.whole, structure.probes.narrowest
    with torch.no_grad():
        for probe in (whole,) if narrow is whole else (narrow, whole):  # a refusal, as of a causal model, is quick
            made = make_probe_model(type(model), probe.config, torch.device("cpu"), torch.float32, probe.empty)
            facts = _find(structure, made, path, probe.kinds)
    return facts


def _find(structure: Structure, probe: PreTrainedModel, path: str, kinds: Sequence[Kind]) -> TokenFacts:
    """kinds: of the blocks of the probe model"""
    pieces = Pieces(probe, path)
    batch = _batch(probe)
    hidden, calls = pieces.embeddings(batch)
    if hidden.dim() != 3:
        raise ModelError(
            f"its blocks get a tensor of shape {tuple(hidden.shape)}; (batch, tokens, width) is needed",
            where=type(probe).__name__,
            hint=HINT,
            data={"reason": "no-tokens", "shape": list(hidden.shape)},
        )
    is_text = "input_ids" in batch
    patches = None if is_text else _patches(probe, hidden.shape[1])
    protect = (1, 1)
    if patches is not None:
        protect = (hidden.shape[1] - patches[0] * patches[1], 0)
    mask = _mask_argument(pieces, calls, hidden, batch)
    register_watching()
    found: dict[Kind, BlockTokens] = {}
    for index, (block, call) in enumerate(zip(pieces.blocks, calls)):
        if kinds[index] not in found:
            found[kinds[index]] = _of_block(block, hidden, call, mask, f"{path}.{index}")
        following = pieces.block(index, hidden, call)
        if following.shape != hidden.shape:
            raise ModelError(
                f"it returns {following.shape[1]} tokens for {hidden.shape[1]}",
                where=f"{path}.{index}",
                hint=HINT,
                data={"returned": following.shape[1], "tokens": hidden.shape[1]},
            )
        hidden = following
    everywhere = [found[kind] for kind in structure.kinds]
    tokens = None if is_text else hidden.shape[1]
    facts = TokenFacts(tokens, hidden.shape[2], protect, patches, tuple(everywhere), _outside(structure, patches))
    prove_token_gates(pieces, replace(facts, blocks=tuple(found[kind] for kind in kinds)), batch)
    return facts


def _refuse_outputs(model: PreTrainedModel) -> None:
    for key in ("output_attentions",):
        if getattr(model.config, key, False):
            raise ModelError(
                f"config.json sets {key}, whose tensors would have another size after each gate",
                where=type(model).__name__,
                hint=f"Set {key} to false in config.json.",
                data={"reason": "asks-for-output", "key": key},
            )


def _batch(probe: PreTrainedModel) -> Batch:
    """Two samples; the second has padding if they are text."""
    batch = example_batch(probe, torch.device("cpu"), samples=2, tokens=TOKENS)
    if "input_ids" in batch:
        mask = torch.ones_like(batch["input_ids"])
        mask[1, -PADDED:] = 0
        batch["attention_mask"] = mask
    return batch


def _patches(probe: PreTrainedModel, tokens: int) -> tuple[int, int]:
    """Rows and columns of the image's patches, its last tokens. raises ModelError if the tokens are not patches"""
    sizes = []
    for key in ("image_size", "patch_size"):
        value = getattr(probe.config, key, None)
        if value is None:
            raise ModelError(f"its config.json has no {key}", where=type(probe).__name__, hint=HINT, data={"key": key})
        sizes.append((value, value) if isinstance(value, int) else tuple(value))
    rows, columns = (side // patch for side, patch in zip(*sizes))
    if not 0 <= tokens - rows * columns <= 8:  # a class token, a distillation token and a few registers
        raise ModelError(
            f"its blocks get {tokens} tokens for {rows} x {columns} patches, so the tokens are not the patches",
            where=type(probe).__name__,
            hint=HINT,
            data={"reason": "tokens-not-patches", "tokens": tokens, "rows": rows, "columns": columns},
        )
    return rows, columns


def _arguments(block: nn.Module, hidden: Tensor, call: Call) -> dict[str, Any]:
    """The arguments of a block by name, without the stream."""
    signature_ = inspect.signature(block.forward)
    bound = signature_.bind(hidden, *call.args, **call.kwargs)
    found = dict(list(bound.arguments.items())[1:])
    for parameter in signature_.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            found |= found.pop(parameter.name, {})
    return found


def _mask_argument(pieces: Pieces, calls: list[Call], hidden: Tensor, batch: Batch) -> str | None:
    """Name of the argument that marks padding. raises ModelError for other arguments with values per token"""
    names = set()
    n = hidden.shape[1]
    for index, (block, call) in enumerate(zip(pieces.blocks, calls)):
        where = f"{pieces.blocks_path}.{index}"
        for name, value in _arguments(block, hidden, call).items():
            parts = [part for part in (value if isinstance(value, (tuple, list)) else [value]) if _is_of(part, n)]
            if not parts:
                continue
            if name != "attention_mask" or not isinstance(value, Tensor):
                raise ModelError(
                    f"its blocks get the argument {name}, whose values per token can't be reduced to the kept tokens",
                    where=where,
                    hint=HINT,
                    data={"reason": "argument-of-tokens", "argument": name},
                )
            wanted = batch.get("attention_mask", torch.ones(hidden.shape[:2])).bool()
            rows = value if value.dim() == 2 else value[:, :1]
            if not attended(value, len(hidden)).equal(wanted) or (value.dim() == 4 and not _same_rows(rows)):
                raise ModelError(
                    "its queries don't all see the same keys (causal attention, or a sliding window)",
                    where=where,
                    hint=CAUSAL_HINT,
                    data={"reason": "causal"},
                )
            names.add(name)
        if "attention_mask" in inspect.signature(block.forward).parameters:
            names.add("attention_mask")
    return "attention_mask" if names else None


def _is_of(value: Any, tokens: int) -> bool:
    return isinstance(value, Tensor) and tokens in value.shape


def _same_rows(mask: Tensor) -> bool:
    return bool((mask == mask[:, :, :1]).all())


def _of_block(block: nn.Module, hidden: Tensor, call: Call, mask: str | None, where: str) -> BlockTokens:
    attention, query = _attention(block, hidden, call, where)
    _refuse_order(block, hidden, call, where)
    with recorded_calls(block) as seen:
        output = block(hidden, *call.args, **call.kwargs)
    first = next((i for i, one in enumerate(seen) if is_inside(attention, one.name)), None)
    if first is None:
        raise ModelError("its attention is called by another module than the block", where=where, hint=HINT)
    at = next(
        (i for i in range(first + 1, len(seen)) if _reads_stream(block, hidden, call, seen[first], seen[i])), None
    )
    if at is None:
        raise ModelError(
            "no module after its attention reads the residual stream, so there is no place for a gate",
            where=where,
            hint=HINT,
        )
    behind = seen[at:]
    result = output[0] if isinstance(output, tuple) else output
    after: list[LaterCall] = []
    for number, one in enumerate(behind):
        entering = next((value for value in one.values if isinstance(value, Tensor)), None)
        if entering is None or entering.shape[:2] != hidden.shape[:2]:
            raise ModelError(
                "its input is not one vector per token, so it can't run on fewer tokens",
                where=f"{where}.{one.name}",
                hint=HINT,
            )
        given = one.output[0] if isinstance(one.output, tuple) else one.output
        goes_on = any(is_one_tensor(given, value) for other in behind[number + 1 :] for value in other.values)
        spread = not goes_on and not is_one_tensor(given, result)
        after.append(LaterCall(call=one.name, nth=one.nth, spread=spread))
    entries = _entries(block, hidden, call, {one.name for one in behind})
    return BlockTokens(
        attention, tuple(after), mask, entries[0], entries[1], query.shape[1] * query.shape[3], query.shape[1]
    )


def _attention(block: nn.Module, hidden: Tensor, call: Call, where: str) -> tuple[str, Tensor]:
    """The module that calls transformers' attention interface, and its queries."""
    attentions = {
        name: module
        for name, module in block.named_modules()
        if name and hasattr(getattr(module, "config", None), "_attn_implementation")
    }
    notes: dict[str, list[tuple[Tensor, Tensor, float]]] = {name: [] for name in attentions}
    with ExitStack() as stack:
        for name, module in attentions.items():
            stack.enter_context(watching(module, notes[name]))
        others = stack.enter_context(recorded_inputs(attentions, lambda _args, kwargs: kwargs))
        block(hidden, *call.args, **call.kwargs)
    used = [name for name, found in notes.items() if found]
    if len(used) != 1 or len(notes[used[0]]) != 1:
        raise ModelError(
            "its attention doesn't use transformers' attention interface, so its queries and keys can't be read"
            if not used
            else f"it has {len(used)} attentions, and a gate can follow only one",
            where=where,
            hint=HINT,
            data={"reason": "attentions", "count": len(used)},
        )
    query, key, _ = notes[used[0]][0]
    if query.dim() != 4 or query.shape[2] != hidden.shape[1] or key.shape[2] != hidden.shape[1]:
        raise ModelError(
            f"its attention gets queries {tuple(query.shape)} and keys {tuple(key.shape)} for {hidden.shape[1]} tokens",
            where=where,
            hint=HINT,
            data={"queries": list(query.shape), "keys": list(key.shape), "tokens": hidden.shape[1]},
        )
    for _, given in others:
        if strange := [name for name in UNKNOWN if given.get(name) is not None]:
            raise ModelError(
                f"its attention gets the argument {strange[0]}, which a token gate can't compute",
                where=where,
                hint=HINT,
                data={"argument": strange[0]},
            )
    return used[0], query


def _refuse_order(block: nn.Module, hidden: Tensor, call: Call, where: str) -> None:
    """raises ModelError for a causal model: all votes go to its first token, and generation needs every key"""
    changed = hidden.clone()  # in the first sample, which has no padding
    changed[0, -1] = changed[0, -1].flip(-1)  # not by a constant or a factor, which a norm would remove
    before, after = (_stream(block(x, *call.args, **call.kwargs)) for x in (hidden, changed))
    if torch.equal(before[0, 0], after[0, 0]):
        raise ModelError(
            "its first token doesn't see its last (causal attention, or a sliding window)",
            where=where,
            hint=CAUSAL_HINT,
            data={"reason": "causal"},
        )


def _reads_stream(block: nn.Module, hidden: Tensor, call: Call, attention: ModuleCall, candidate: ModuleCall) -> bool:
    """Whether the block's output depends on the attention also without this module."""
    outputs = []
    for other in (lambda x: x, lambda x: x.flip(-1)):  # not a multiple of x, which a norm would remove
        with _answering(block, attention, other), _answering(block, candidate, torch.zeros_like):
            outputs.append(_stream(block(hidden, *call.args, **call.kwargs)))
    return not torch.equal(*outputs)


@contextmanager
def _answering(block: nn.Module, call: ModuleCall, answer: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace the output of one call of a module by a function of it."""
    count = -1

    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        nonlocal count
        count += 1
        if count != call.nth:
            return None
        return (answer(output[0]), *output[1:]) if isinstance(output, tuple) else answer(output)

    handle = block.get_submodule(call.name).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _entries(block: nn.Module, hidden: Tensor, call: Call, after: set[str]) -> tuple[int, int]:
    """Number of entries of the matrices that multiply every token, before and after the gate."""
    found: list[ObservedMatmul] = []
    with ObservedMatmuls(dict(block.named_parameters()), found.append):
        block(hidden, *call.args, **call.kwargs)
    sizes = [0, 0]
    for seen in found:
        sizes[any(is_inside(seen.parameter, part) for part in after)] += seen.elements
    return sizes[0], sizes[1]


def _outside(structure: Structure, patches: tuple[int, int] | None) -> int:
    """Multiply-accumulates of a sample in the embeddings and the output head; they don't depend on dropped tokens.

    The output head's matrices multiply one token: models with an answer per token get no gate.
    """
    total = sum(weight.out_features * weight.in_features for weight in _head_weights(structure))
    if patches is not None:
        prefix = structure.pieces.blocks_path + "."
        kernels = [p for n, p in structure.model.named_parameters() if p.dim() == 4 and not n.startswith(prefix)]
        total += patches[0] * patches[1] * sum(kernel.numel() for kernel in kernels)
    return total


def _head_weights(structure: Structure) -> Iterator[Any]:
    for stage in structure.stages(structure.block_count + 1):
        for group in stage:
            yield from group


def _stream(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
