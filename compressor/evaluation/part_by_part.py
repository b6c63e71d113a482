"""Measures quality part by part, for models that are larger than memory.

Each model runs by the same loop: its embeddings, then block after block over all samples. Then both output heads run on
a few positions at a time, and their logits are compared and forgotten. In memory are one block, or both output heads,
and the hidden states of all samples, which lie in files if they don't fit. The loop is not that of `engine.walk`, which
fills the parts of a checkpoint: these models fill and empty their own modules when they run (`model.streamed`).

A model must be a plain stack of blocks. This is proven on a few tokens of the data: the model runs once as a whole,
with one block in memory at a time, and the loop must give the same output bit for bit. If the logits of a position
depend on other hidden states than that position's, the output head reads whole samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressor.data.samples import Samples
from compressor.engine.calibration_batch import equal_calls
from compressor.errors import CompressError
from compressor.evaluation.metrics import batch_sums, check_labels, chunk_positions, joined_sums, next_token_sums
from compressor.evaluation.model_loading import NotInParts, is_causal
from compressor.model.block_runner import Answer, Batch, Call, Pieces, output_of, without_cache
from compressor.model.recorded_modules import recorded_outputs
from compressor.model.spill import Spilled, SpillFolder, kept
from compressor.model.streamed import StreamedModel
from compressor.process.resources import ran_out

PROOF_TOKENS = 8
POSITION_UNITS = 8  # units in the last place that products of another shape may differ by


@dataclass
class Side:
    """One of the two models, and the hidden states of every batch after its last block.

    folder           where the hidden states lie; None: in memory
    before_blocks    module -> how often it runs before the blocks; its outputs don't matter to the output head
    is_positionwise  the output of a position depends on the hidden states of that position alone
    """

    streamed: StreamedModel
    pieces: Pieces
    folder: SpillFolder | None
    hidden: list[Tensor | Spilled]
    before_blocks: dict[str, int] = field(default_factory=dict)
    is_positionwise: bool = False

    @property
    def model(self) -> Any:
        return self.streamed.model

    def of(self, number: int) -> Tensor:
        """The hidden states of a batch."""
        return kept(self.hidden[number])

    def keep(self, number: int, value: Tensor) -> None:
        self.hidden[number] = value if self.folder is None else self.folder.keep(value)

    def output_head(self, inputs: Tensor, hidden: Tensor) -> Tensor:
        """The output of the model for these hidden states after the last block."""
        with self.streamed.blanking(self.before_blocks):
            return self.pieces.output_head({self.model.main_input_name: inputs}, hidden)


def sums_by_parts(
    before: StreamedModel | None,
    after: StreamedModel,
    samples: Samples,
    labels: Tensor | None,
    batch_size: int,
    spill: Path | None,
) -> dict[str, Tensor]:
    """The sums of `metrics.batch_sums`, over all samples in the order of the batches.

    before  the model that is compared with; None: only `after` is measured
    spill   folder for hidden states that don't fit into memory; None: they fit
    raises  NotInParts for a model that doesn't compute the same when it is run part by part; ModelError for a label
            beyond the model's classes
    """
    batches = list(samples.batches(batch_size))
    sides = []
    with ExitStack() as stack:
        for name, streamed in (("before", before), ("after", after)):
            if streamed is None:
                continue
            stack.enter_context(without_cache(streamed.model))
            folder = None if spill is None else SpillFolder(spill / name)
            inputs = [stacked if samples.is_text else stacked.to(streamed.model.dtype) for _, stacked in batches]
            with _naming_memory():
                sides.append(_run_blocks(streamed, inputs, folder))
        for side in sides:
            stack.enter_context(side.streamed.keeping())
        earlier, later = (sides[0] if before is not None else None), sides[-1]
        return joined_sums(
            _batch_sums(earlier, later, number, stacked, None if labels is None else labels[numbers])
            for number, (numbers, stacked) in enumerate(batches)
        )


@contextmanager
def _naming_memory() -> Iterator[None]:
    """raises NotInParts for any error of a model's own code, PassError if memory or disk ran out"""
    try:
        yield
    except (CompressError, NotInParts):
        raise
    except Exception as error:  # any: for example of code that reads a parameter while its module doesn't run
        if (lack := ran_out(error)) is not None:
            raise lack from error
        raise NotInParts(f"{type(error).__name__}: {str(error)[:300]}") from error


def _run_blocks(streamed: StreamedModel, inputs: list[Tensor], folder: SpillFolder | None) -> Side:
    """Run all batches through the embeddings and the blocks. raises NotInParts"""
    pieces = Pieces(streamed.model, streamed.blocks_path)
    name = streamed.model.main_input_name
    proof = inputs[0][:1, :PROOF_TOKENS] if name == "input_ids" else inputs[0][:1]
    expected, pieces.answers = _run_whole(streamed.model, pieces.blocks, {name: proof})
    side = Side(streamed, pieces, folder, [torch.empty(0)] * (len(inputs) + 1))
    calls: list[list[Call]] = []
    with streamed.keeping():
        for number, value in enumerate((*inputs, proof)):
            streamed.begun.clear()
            hidden, found = pieces.embeddings({name: value})
            calls.append(next((known for known in calls[-1:] if equal_calls(known, found)), found))
            side.keep(number, hidden)
        side.before_blocks = dict(streamed.begun)
    for index in range(len(pieces)):
        with streamed.holding(f"{streamed.blocks_path}.{index}"):
            for number in range(len(inputs) + 1):
                side.keep(number, pieces.block(index, side.of(number), calls[number][index]))
    with streamed.keeping():
        last = side.of(len(inputs))
        if not torch.equal(side.output_head(proof, last), expected):
            side.before_blocks = {}  # an output head that reads the embeddings' outputs, too
            if not torch.equal(side.output_head(proof, last), expected):
                raise NotInParts("its output differs when the blocks are run one by one")
        side.is_positionwise = is_causal(side.model) and _is_positionwise(side, proof, last, expected)
    return side


def _is_positionwise(side: Side, inputs: Tensor, hidden: Tensor, output: Tensor) -> bool:
    """Whether the output head gives the second half of the positions the same output without the first half."""
    half = inputs.shape[1] // 2
    found = side.output_head(inputs[:, half:], hidden[:, half:])
    allowed = POSITION_UNITS * torch.finfo(output.dtype).eps * float(output.abs().max())
    return bool(((found - output[:, half:]).abs() <= allowed).all())  # NaN is not


def _run_whole(model: Any, blocks: list[nn.Module], batch: Batch) -> tuple[Tensor, list[Answer]]:
    """The model's output, and how each block returns the hidden states. raises NotInParts"""
    with recorded_outputs(dict(enumerate(blocks)), Answer.of) as answers, torch.no_grad():
        output = output_of(model(**batch))
    if len(answers) != len(blocks):
        raise NotInParts(f"{len(answers)} block calls were seen for {len(blocks)} blocks")
    return output, [answer for _, answer in answers]


def _batch_sums(
    before: Side | None, after: Side, number: int, inputs: Tensor, labels: Tensor | None
) -> dict[str, Tensor]:
    """The sums of one batch, from the outputs of a few positions or samples at a time."""
    states, later_states = None if before is None else before.of(number), after.of(number)
    found = []
    for row in range(len(inputs)):
        at = slice(row, row + 1)
        ids = inputs[at]
        first, second = None if states is None else states[at], later_states[at]
        if is_causal(after.model):
            found.append(_sample_sums(before, after, ids, first, second))
            continue
        value = ids if ids.dtype == torch.int64 else ids.to(after.model.dtype)
        earlier = None if before is None or first is None else before.output_head(value, first).float()
        later = after.output_head(value, second).float()
        if labels is not None:
            check_labels(labels[at], later, type(after.model).__name__)
        found.append(batch_sums(earlier, later, ids, None if labels is None else labels[at], causal=False))
    return joined_sums(found)


def _sample_sums(
    before: Side | None, after: Side, ids: Tensor, earlier: Tensor | None, later: Tensor
) -> dict[str, Tensor]:
    """The sums of one sample of a model that predicts tokens.

    ids             (1, length)
    earlier, later  hidden states of both models after their last blocks, (1, length, width)
    """
    last = ids.shape[1] - 1
    chunk = chunk_positions(after.model.config.get_text_config().vocab_size)
    if last == 0 or not all(side.is_positionwise for side in (before, after) if side is not None):
        chunk = ids.shape[1]
    total: dict[str, Tensor] = {}
    for start in range(0, max(1, last), chunk):
        stop = min(start + chunk, last)
        first = None if before is None or earlier is None else _logits(before, ids, earlier, start, stop, chunk)
        second = _logits(after, ids, later, start, stop, chunk)
        for key, value in next_token_sums(first, second, ids[0, start + 1 : stop + 1]).items():
            total[key] = total[key] + value if key in total else value
    return total


def _logits(side: Side, ids: Tensor, hidden: Tensor, start: int, stop: int, chunk: int) -> Tensor:
    """Logits (stop - start, vocabulary) of these positions."""
    if chunk == ids.shape[1]:
        return side.output_head(ids, hidden)[0, start:stop]
    return side.output_head(ids[:, start:stop], hidden[:, start:stop])[0]
