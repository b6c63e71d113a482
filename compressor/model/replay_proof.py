"""Proves that a model can be run block by block.

The embeddings, the blocks and the output head of a probe model with random weights run one after the other. They must
give the probe model's own logits bit for bit. If they don't, the model is refused before any work.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from compressor.errors import ModelError
from compressor.model.block_runner import Batch, Call, Pieces, hidden_of, output_of
from compressor.model.model_building import guarded
from compressor.model.narrow_probe import Probe
from compressor.model.probe_model import example_batch, make_probe_model
from compressor.model.recorded_modules import recorded_inputs, recorded_outputs
from compressor.model.remembered import remembered
from compressor.model.structure import Structure, run_small
from compressor.model.tracing import check_output, checked

HINT = "Choose another model; if transformers runs this one, report this message with its config.json."


def prove_by_replay(structure: Structure) -> Probe:
    """Run the parts of a shallow, narrow probe model one by one on the CPU, and check its logits bit for bit.

    returns  the probe that was run
    raises   ModelError naming the first block that differs
    """
    cls, pieces, checkpoint = type(structure.model), structure.pieces, structure.checkpoint

    def prove() -> Probe:
        narrow = structure.probes.narrowest
        probe = make_probe_model(cls, narrow.config, torch.device("cpu"), structure.dtype, narrow.empty)
        prove_equal(probe, pieces.blocks_path, example_batch(probe, torch.device("cpu")))
        return narrow

    run = partial(run_small, structure.probes)
    failed = "a probe model of it can't be run on the CPU"
    return guarded(
        lambda _config: remembered(("replay", structure.probes.key), prove),
        checkpoint,
        structure.model.config,
        cls.__name__,
        failed,
        retry=run,
    )


def prove_equal(model: PreTrainedModel, blocks_path: str, batch: Batch) -> None:
    """Compare the model's output on `batch` with that of embeddings -> blocks -> output head, each block run twice.

    raises  ModelError naming the first block that can't run alone, with the reason
    """
    pieces = Pieces(model, blocks_path)
    blocks, expected = _observe(model, pieces, batch)
    hidden, calls = pieces.embeddings(batch)
    for index, (call, seen) in enumerate(zip(calls, blocks, strict=True)):
        hidden = _run_alone(pieces, index, f"{blocks_path}.{index}", hidden, call, seen)
    if not torch.equal(pieces.output_head(batch, hidden), expected):
        raise ModelError(
            "the output differs when the blocks are run one by one, though every block agrees",
            where="output head",
            hint=HINT,
        )


@dataclass(frozen=True)
class ObservedBlock:
    """A block's call in the whole model, copied. given: its arguments beside the hidden states"""

    entered: Tensor
    given: list[Any]
    left: Tensor


def _observe(model: PreTrainedModel, pieces: Pieces, batch: Batch) -> tuple[list[ObservedBlock], Tensor]:
    """Run the whole model: what each of its blocks gets and gives, and its output.

    raises  ModelError unless every block is called once, with the hidden states first
    """
    blocks = dict(enumerate(pieces.blocks))
    try:
        with (
            recorded_inputs(blocks, _given) as entered,
            recorded_outputs(blocks, lambda output: hidden_of(output).clone()) as left,
            torch.no_grad(),
            checked(model),
        ):
            expected = output_of(model(**batch))
        check_output(expected)
    except (IndexError, KeyError) as error:  # a block called without hidden states
        raise ModelError(
            "the first argument of its blocks is not the hidden states", where=pieces.blocks_path, hint=HINT
        ) from error
    if len(entered) != len(pieces):
        raise ModelError(
            f"{len(entered)} block calls were seen for {len(pieces)} blocks",
            where=pieces.blocks_path,
            hint="Choose a model that runs every block once; models that skip or repeat blocks are not supported.",
            data={"calls": len(entered), "blocks": len(pieces)},
        )
    seen = zip(entered, left, strict=True)
    return [ObservedBlock(hidden, given, output) for (_, (hidden, given)), (_, output) in seen], expected


def _run_alone(pieces: Pieces, index: int, name: str, hidden: Tensor, call: Call, seen: ObservedBlock) -> Tensor:
    """The output of a block that runs alone, twice. raises ModelError unless it is what it was in the whole model"""
    if not torch.equal(hidden, seen.entered):
        raise ModelError("the input of this block differs when the blocks are run one by one", where=name, hint=HINT)
    is_passed_more = not _same_leaves(seen.given, _beside((hidden, *call.args), call.kwargs))
    left = pieces.block(index, hidden, call)
    if not torch.equal(hidden, seen.entered):
        raise ModelError(
            "this block changes its input in place, so it can't be run twice",
            where=name,
            hint=HINT,
            data={"reason": "writes-into-input"},
        )
    if not torch.equal(left, seen.left):
        raise ModelError(
            "earlier blocks pass this one more than hidden states, which can't be replayed"
            if is_passed_more
            else "the output of this block differs when the blocks are run one by one",
            where=name,
            hint=HINT,
            data={"reason": "passed-more" if is_passed_more else "output-differs"},
        )
    if not torch.equal(pieces.block(index, hidden, call), left):
        raise ModelError(
            "this block changes its arguments (such as a cache), so a second run of it gives other outputs",
            where=name,
            hint=HINT,
        )
    return left


def _given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, list[Any]]:
    """Copies of the hidden states that enter a block, and of its other arguments."""
    hidden = (args[0] if args else kwargs["hidden_states"]).clone()
    return hidden, [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in _beside(args, kwargs)]


def _beside(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The arguments of a block without the hidden states, flattened."""
    return tree_leaves((args[1:], {name: kwargs[name] for name in sorted(kwargs) if name != "hidden_states"}))


def _same_leaves(before: list[Any], after: list[Any]) -> bool:
    """Whether two calls have the same tensors. Other arguments are ignored."""
    if len(before) != len(after):
        return False
    pairs = [(a, b) for a, b in zip(before, after) if isinstance(a, Tensor) or isinstance(b, Tensor)]
    return all(isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b) for a, b in pairs)
