"""Calibration batches, and the functions that run them through one part of the model.

A part is the embeddings (0), a block (1 to n) or the output head (n + 1).
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, MutableSequence, MutableSet, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from compressor.data.samples import Samples
from compressor.engine.resumable_forward import Diverged, RecordedForward, run_on
from compressor.model.block_runner import Batch, Call
from compressor.model.probe_model import example_batch
from compressor.model.spill import SpillFolder, kept
from compressor.model.structure import Structure
from compressor.recipe.recipe import Step

BATCH_TOKENS = 4096  # calibration tokens per forward pass
IMAGE_TOKENS = 256  # an image counts as this many tokens
# What paused batches may keep, as a multiple of the hidden states that the sweep holds anyway. A batch that would
# exceed it stays at an earlier pause, or runs again from the block's input. A Llama block whose MLP is four times as
# wide keeps 5 times at its down projection, so that each matmul is computed once. That stays below llm-compressor's
# peak memory (docs/benchmarks.md).
RECORDED_SHARE = 5


@dataclass
class CalibrationBatch:
    """One batch and how far it has come.

    inputs    inputs of the model
    hidden    hidden states after the last part; mapped from a file if they are spilled
    calls     the other arguments that each block is called with
    recorded  the recorded forward of the block in which the batch is paused; None if it isn't paused
    spill     where hidden states lie that don't fit into memory; None: in memory
    """

    inputs: Batch
    hidden: Tensor
    calls: list[Call]
    recorded: RecordedForward | None = None
    spill: SpillFolder | None = None

    @classmethod
    def before_embeddings(cls, inputs: Batch, spill: SpillFolder | None = None) -> CalibrationBatch:
        return cls(inputs, torch.empty(0), [], spill=spill)

    @property
    def kept_bytes(self) -> int:
        return 0 if self.recorded is None else self.recorded.nbytes

    @property
    def may_keep_bytes(self) -> int:
        """What a pause of this batch may keep on average. Nothing if not even its hidden states fit into memory."""
        return RECORDED_SHARE * self.hidden.nbytes if self.spill is None else 0


def _hidden(batch: CalibrationBatch) -> Tensor:
    return kept(batch.__dict__["_hidden"])


def _set_hidden(batch: CalibrationBatch, value: Tensor) -> None:
    spill = batch.__dict__.get("spill")  # a batch that is being made has none yet
    batch.__dict__["_hidden"] = value if spill is None else spill.keep(value)


CalibrationBatch.hidden = property(_hidden, _set_hidden)  # type: ignore[assignment]


def stacked_samples(samples: Samples | None, steps: Sequence[Step]) -> Iterator[tuple[list[int], Tensor]]:
    """(sample numbers, samples) of each calibration batch; nothing if no step reads inputs."""
    if samples is not None and any(step.settings.traits.reads != "weights" for step in steps):
        tokens = samples.inputs[0].numel() if samples.is_text else IMAGE_TOKENS
        most = [step.settings.batch_samples for step in steps if step.settings.batch_samples is not None]
        yield from samples.batches(min([max(1, BATCH_TOKENS // tokens), *most]))


def calibration_batches(
    structure: Structure,
    device: torch.device,
    samples: Samples | None,
    steps: Sequence[Step],
    spill: SpillFolder | None = None,
) -> list[CalibrationBatch]:
    """Calibration batches before the embeddings; none if no step reads inputs."""
    name = structure.model.main_input_name
    batches = []
    for _, found in stacked_samples(samples, steps):
        value = found.to(structure.dtype) if found.is_floating_point() else found
        batches.append(CalibrationBatch.before_embeddings({name: value.to(device)}, spill))
    return batches


def batch_labels(samples: Samples | None, device: torch.device, step: Step) -> list[Tensor | None]:
    """Labels of each calibration batch; None if the data has no labels."""
    labels = None if samples is None else samples.labels
    batches = stacked_samples(samples, (step,))
    return [None if labels is None else labels[numbers].to(device) for numbers, _ in batches]


def verification_batch(structure: Structure, device: torch.device) -> Batch:
    """Fixed inputs of the verification batch. The written artifact must reproduce the logits of this batch."""
    return example_batch(structure.model, device, samples=2, tokens=32)


def embed(structure: Structure, batches: list[CalibrationBatch]) -> None:
    """Run every batch through the embeddings."""
    done: list[CalibrationBatch] = []
    for batch in batches:
        hidden, calls = structure.pieces.embeddings(batch.inputs)
        shared = next((s.calls for s in done if s.hidden.shape == hidden.shape and equal_calls(s.calls, calls)), calls)
        batch.hidden, batch.calls = hidden, shared
        done.append(batch)


def run_part(structure: Structure, part: int, batch: CalibrationBatch) -> Tensor:
    """Output of a block, or of the output head, for the batch's hidden states."""
    if part == structure.block_count + 1:
        return structure.pieces.output_head(batch.inputs, batch.hidden)
    return structure.pieces.block(part - 1, batch.hidden, batch.calls[part - 1])


def finish_part(structure: Structure, part: int, batch: CalibrationBatch) -> Tensor:
    """Output of a block or the output head, computed from the batch's pause. Its recorded forward is used up."""
    recorded, batch.recorded = batch.recorded, None
    is_block = 1 <= part <= structure.block_count
    if recorded is None or (is_block and holds_containers(batch.calls[part - 1])):
        return run_part(structure, part, batch)  # tensors that it stores for later blocks must be computed
    try:
        return run_on(recorded, {}, partial(run_part, structure, part, batch), lambda call: None)
    except Diverged:
        return run_part(structure, part, batch)


def equal_calls(first: list[Call], second: list[Call]) -> bool:
    """Whether the blocks get equal arguments, so that one copy of masks and positions serves many batches.

    Always False if a block may store something in its arguments, since that belongs to one batch.
    """
    if any(holds_containers(call) for calls in (first, second) for call in calls):
        return False
    flat = [tree_flatten([(call.args, call.kwargs) for call in calls])[0] for calls in (first, second)]
    if len(flat[0]) != len(flat[1]):
        return False
    for a, b in zip(*flat, strict=True):
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            if a.shape != b.shape or a.dtype != b.dtype or not torch.equal(a, b):
                return False
        elif a is not b and (type(a) is not type(b) or not isinstance(a, (int, float, str)) or a != b):
            return False
    return True


def holds_containers(call: Call) -> bool:
    """Whether a block gets an argument that it may store tensors in, as layers that share keys and values do."""
    return any(_is_container(value) for value in (*call.args, *call.kwargs.values()))


def _is_container(value: Any) -> bool:
    if isinstance(value, tuple):
        return any(_is_container(part) for part in value)
    return isinstance(value, (MutableMapping, MutableSequence, MutableSet))
