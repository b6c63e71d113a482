"""Proves on a probe model that a token gate works at the place that was found in each block."""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compressor.errors import ModelError
from compressor.layers.structural.token_gate import TokenGate, noting_choices
from compressor.model.block_runner import Batch, Pieces, output_of
from compressor.model.facts import GateSettings, TokenFacts

PADDED = 3  # tokens of the second sample of a text that are padding
TOLERANCE = 1e-5  # relative, of float32
PROOF: GateSettings = {
    "keep": 0.5,
    "similar": 0.3,
    "partition": "sequential",
    "order": "ISI",
    "iterations": 5,
    "tolerance": 0.0,
    "filter": None,
    "heads": "rms",
    "seed": 0,
    "minimum": 4,
}


def prove_token_gates(pieces: Pieces, facts: TokenFacts, batch: Batch) -> None:
    """Check that gated blocks give kept tokens the same outputs, that the model runs, and that padding has no effect.

    raises  ModelError naming the block, or the model
    """
    probe = pieces.model
    hidden, calls = pieces.embeddings(batch)
    for index, block in enumerate(pieces.blocks):
        whole = pieces.block(index, hidden, calls[index])
        with TokenGate.wrapped(block, dict(facts.gate(index, [], PROOF))), noting_choices(block) as choices:
            fewer = pieces.block(index, hidden, calls[index])
        if not choices or not _are_of(fewer, whole, choices[0]):
            raise ModelError(
                "the tokens that are kept get other outputs once some are dropped after its attention",
                where=f"{pieces.blocks_path}.{index}",
                hint=HINT,
            )
        hidden = whole
    with ExitStack() as stack:
        for number, block in enumerate(pieces.blocks):
            format_params = facts.gate(number, [0.5] * number, PROOF)
            stack.enter_context(TokenGate.wrapped(block, dict(format_params)))
        try:
            output = output_of(probe(**batch))
        except (RuntimeError, ValueError, IndexError, AssertionError) as error:
            raise ModelError(
                f"its output head can't run with fewer tokens ({str(error)[:200]})",
                where=type(probe).__name__,
                hint=HINT,
                data={"reason": "head-needs-all", "cause": str(error)[:200]},
            ) from error
        _check_output(probe, output, hidden.shape[1])
        if "attention_mask" in batch and output.dim() == 2:
            alone = {name: value[1:, :-PADDED] for name, value in batch.items()}
            other = output_of(probe(**alone))
            if not torch.allclose(output[1:], other, rtol=0, atol=TOLERANCE * float(output.abs().max())):
                raise ModelError(
                    "the output of a sample changes with its padding", where=type(probe).__name__, hint=HINT
                )


def _check_output(probe: PreTrainedModel, output: Tensor, tokens: int) -> None:
    """Check that a base model returns fewer tokens, or an output head one answer for each sample."""
    has_head = probe.base_model is not probe
    if output.dim() != 2 and has_head:
        raise ModelError(
            f"its output head gives a tensor of shape {tuple(output.shape)}, one answer for each of {tokens} tokens",
            where=type(probe).__name__,
            hint="Use zero_tprune with a model that gives one answer per sample, or with its base model.",
            data={"reason": "answer-per-token", "shape": list(output.shape), "tokens": tokens},
        )


def _are_of(fewer: Tensor, whole: Tensor, chosen: Tensor) -> bool:
    """Whether (b, left, d) are the chosen (b, left) tokens of (b, n, d)."""
    wanted = whole.gather(1, chosen[:, :, None].expand(-1, -1, whole.shape[2]))
    return fewer.shape == wanted.shape and float((fewer - wanted).abs().max()) <= TOLERANCE * float(whole.abs().max())


HINT = "Leave zero_tprune out for this model; llm_int8 makes it faster without dropping tokens."
