"""Folds norms into their consumers, and proves that a residual stream can be rotated.

With the norms folded and all reads and writes of the stream rotated by one orthogonal matrix, the logits must stay the
same (Ashkboos et al. 2024, arXiv 2401.15024, theorem 1). If a read or write was missed, they change.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compressor.analysis.perturbation import TOLERANCE, Answer, InDouble, answering, size, unit
from compressor.errors import ModelError
from compressor.methods.rotation.rotation import center, fold_gain, fold_shift
from compressor.model.block_runner import Batch, Pieces, output_of
from compressor.model.norms import Norm, apply_norm
from compressor.model.probe_model import PROBE_SEED, example_batch
from compressor.model.residual_records import InputProjection, Residual, ResidualNorm, ResidualWrite

HINT = "Leave fuse_norms, rotate and slicegpt out for this model; gptq, rtn and llm_int8 don't need this."


def prove_invariance(probe: PreTrainedModel, path: str, residual: Residual) -> None:
    """Fold the norms, rotate all reads and writes of the stream, and compare the logits. Changes the probe model.

    raises  ModelError naming the first block whose stream is not the rotated one
    """
    pieces = Pieces(probe, path)
    batch = example_batch(probe, torch.device("cpu"))
    with InDouble(), torch.no_grad():
        expected, logits = _streams(pieces, batch), output_of(probe(**batch))
        generator = torch.Generator().manual_seed(PROBE_SEED + 1)
        mirrors = [unit(residual.width, generator) for _ in range(2)]
        for norm in residual.norms():
            fold_norm(probe, norm)
        if residual.kind == "layer":
            center_writes(probe, residual.writes())
        for write in residual.writes():
            parameter = probe.get_parameter(write.parameter)
            parameter.copy_(_rotated(parameter, write.axis, mirrors))
        for norm in residual.norms():
            for consumer in norm.consumers:
                parameter = probe.get_parameter(consumer.parameter)
                parameter.copy_(_rotated(parameter, consumer.axis, mirrors))
        gainless = {norm.module: gainless_norm(norm) for norm in residual.norms()}
        with answering({name: probe.get_submodule(name) for name in gainless}, gainless):
            streams, rotated_logits = _streams(pieces, batch), output_of(probe(**batch))
    for index, (before, after) in enumerate(zip(expected, streams)):
        wanted = center(before, -1) if residual.kind == "layer" else before
        if size(_rotated(wanted, -1, mirrors) - after) > TOLERANCE * size(wanted):
            raise ModelError(
                "rotating the residual stream changes its output: a layer that reads or writes it was not found",
                where=f"{path}.{index - 1}" if index else "embeddings",
                hint=HINT,
                data={"reason": "does-not-rotate"},
            )
    if size(rotated_logits - logits) > TOLERANCE * size(logits):
        raise ModelError(
            "rotating the residual stream changes the model's output: a layer that reads the stream was not found",
            where="output head",
            hint=HINT,
            data={"reason": "output-changes"},
        )


def gainless_norm(norm: ResidualNorm) -> Answer:
    """A folded norm as a function: x / sqrt(mean(x²) + eps)."""
    formula = norm.formula
    left = Norm("rms", 0.0, formula.eps, formula.width, has_weight=False, has_bias=False, divisor=formula.divisor)
    return lambda x: apply_norm(x, None, None, left)


def fold_norm(model: nn.Module, norm: ResidualNorm) -> None:
    """Move a norm's gain and shift into its consumers, in place. Computed in float64, rounded once to their dtype.

    The norm itself is not changed. Afterwards it must compute `gainless_norm`, and if it is a LayerNorm, the writes of
    the stream must be centred (`center_writes`).

    raises  ModelError if a consumer has no bias for the shift and can't get one
    """
    gain = norm.formula.offset + _double(model, f"{norm.module}.weight") if norm.formula.has_weight else None
    shift = _double(model, f"{norm.module}.bias") if norm.formula.has_bias else None
    for consumer in norm.consumers:
        parameter = model.get_parameter(consumer.parameter).data
        if shift is not None:  # before the gain: the shift is multiplied by the original weight
            bias = _bias_of(model, consumer)
            bias.copy_(bias.double() + fold_shift(parameter.double(), shift, consumer.axis))
        if gain is not None:
            parameter.copy_(fold_gain(parameter.double(), gain, consumer.axis))


def center_writes(model: nn.Module, writes: Iterable[ResidualWrite]) -> None:
    """Subtract from every write of a LayerNorm stream its mean over the width, in place."""
    for write in writes:
        parameter = model.get_parameter(write.parameter).data
        parameter.copy_(center(parameter.double(), write.axis))


def _double(model: nn.Module, name: str) -> Tensor:
    return model.get_parameter(name).data.double()


def _bias_of(model: nn.Module, consumer: InputProjection) -> Tensor:
    """The consumer's bias. A linear module without one gets a bias of zeros."""
    if consumer.bias is not None:
        return model.get_parameter(consumer.bias).data
    owner, _, leaf = consumer.parameter.rpartition(".")
    module = model.get_submodule(owner)
    if not isinstance(module, nn.Linear) or leaf != "weight":
        raise ModelError(
            "it has no bias and is not a linear layer, so the shift of its norm can't be folded into it",
            where=consumer.parameter,
            hint=HINT,
            data={"reason": "no-bias"},
        )
    if module.bias is None:
        zeros = torch.zeros(module.out_features, dtype=module.weight.dtype, device=module.weight.device)
        module.bias = nn.Parameter(zeros, requires_grad=False)
    return module.bias.data


def _streams(pieces: Pieces, batch: Batch) -> list[Tensor]:
    """The stream before the first block and after each."""
    hidden, calls = pieces.embeddings(batch)
    streams = [hidden]
    for index, call in enumerate(calls):
        streams.append(pieces.block(index, streams[-1], call))
    return streams


def _rotated(tensor: Tensor, axis: int, mirrors: list[Tensor]) -> Tensor:
    """Rotated along `axis` by the product of two reflections, which is orthogonal, dense and cheaper than a matrix."""
    rows = tensor.movedim(axis, -1)
    for mirror in mirrors:
        rows = rows - 2 * (rows @ mirror).unsqueeze(-1) * mirror
    return rows.movedim(-1, axis)
