"""Norms folded into their readers, and the proof that a residual stream can be rotated.

With the norms folded and everything that touches the stream rotated by one orthogonal matrix, the logits must stay
(Ashkboos et al. 2024, arXiv 2401.15024, theorem 1). One reader or writer that was missed, and they don't.
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
from compressor.model.residual_records import Reader, Residual, Tap, Writer

HINT = "Its residual stream can't be rotated."


def prove_invariance(probe: PreTrainedModel, path: str, residual: Residual) -> None:
    """Fold the norms, rotate everything that touches the stream, and ask for the same logits. Changes the probe model.

    raises  ModelError naming the first block whose stream is not the rotated one
    """
    pieces = Pieces(probe, path)
    batch = example_batch(probe, torch.device("cpu"))
    with InDouble(), torch.no_grad():
        expected, logits = _streams(pieces, batch), output_of(probe(**batch))
        generator = torch.Generator().manual_seed(PROBE_SEED + 1)
        mirrors = [unit(residual.width, generator) for _ in range(2)]
        for tap in residual.taps():
            fold_tap(probe, tap)
        if residual.kind == "layer":
            center_writers(probe, residual.writers())
        for writer in residual.writers():
            parameter = probe.get_parameter(writer.parameter)
            parameter.copy_(_rotated(parameter, writer.axis, mirrors))
        for tap in residual.taps():
            for reader in tap.readers:
                parameter = probe.get_parameter(reader.parameter)
                parameter.copy_(_rotated(parameter, reader.axis, mirrors))
        gainless = {tap.module: gainless_norm(tap) for tap in residual.taps()}
        with answering({name: probe.get_submodule(name) for name in gainless}, gainless):
            streams, rotated_logits = _streams(pieces, batch), output_of(probe(**batch))
    for index, (before, after) in enumerate(zip(expected, streams)):
        wanted = center(before, -1) if residual.kind == "layer" else before
        if size(_rotated(wanted, -1, mirrors) - after) > TOLERANCE * size(wanted):
            raise ModelError(
                "its residual stream doesn't turn with everything that was found to touch it",
                where=f"{path}.{index - 1}" if index else "stem",
                hint=HINT,
                data={"reason": "does-not-turn"},
            )
    if size(rotated_logits - logits) > TOLERANCE * size(logits):
        raise ModelError(
            "its output changes when its residual stream is turned",
            where="head",
            hint=HINT,
            data={"reason": "output-changes"},
        )


def gainless_norm(tap: Tap) -> Answer:
    """What is left of a folded norm, as a function: x / sqrt(mean(x²) + eps)."""
    norm = tap.norm
    left = Norm("rms", 0.0, norm.eps, norm.width, has_weight=False, has_bias=False, divisor=norm.divisor)
    return lambda x: apply_norm(x, None, None, left)


def fold_tap(model: nn.Module, tap: Tap) -> None:
    """Move a norm's gain and shift into its readers, in place; in float64, rounded once to their dtype.

    The norm itself is left as it is. From here on it has to compute `gainless_norm`, and where it was a LayerNorm, what
    the stream is made of has to be centred (`center_writers`).

    raises  ModelError if a reader has no bias to take a shift and can't be given one
    """
    gain = tap.norm.offset + _double(model, f"{tap.module}.weight") if tap.norm.has_weight else None
    shift = _double(model, f"{tap.module}.bias") if tap.norm.has_bias else None
    for reader in tap.readers:
        parameter = model.get_parameter(reader.parameter).data
        if shift is not None:  # before the gain: the shift is multiplied by the weight as it was
            bias = _bias_of(model, reader)
            bias.copy_(bias.double() + fold_shift(parameter.double(), shift, reader.axis))
        if gain is not None:
            parameter.copy_(fold_gain(parameter.double(), gain, reader.axis))


def center_writers(model: nn.Module, writers: Iterable[Writer]) -> None:
    """Take from everything that is added to a LayerNorm stream its mean over the width, in place."""
    for writer in writers:
        parameter = model.get_parameter(writer.parameter).data
        parameter.copy_(center(parameter.double(), writer.axis))


def _double(model: nn.Module, name: str) -> Tensor:
    return model.get_parameter(name).data.double()


def _bias_of(model: nn.Module, reader: Reader) -> Tensor:
    """The reader's bias; a linear module without one gets zeros."""
    if reader.bias is not None:
        return model.get_parameter(reader.bias).data
    owner, _, leaf = reader.parameter.rpartition(".")
    module = model.get_submodule(owner)
    if not isinstance(module, nn.Linear) or leaf != "weight":
        raise ModelError(
            "it has no bias that could take its norm's shift",
            where=reader.parameter,
            hint=HINT,
            data={"reason": "no-bias"},
        )
    if module.bias is None:
        zeros = torch.zeros(module.out_features, dtype=module.weight.dtype, device=module.weight.device)
        module.bias = nn.Parameter(zeros, requires_grad=False)
    return module.bias.data


def _streams(pieces: Pieces, batch: Batch) -> list[Tensor]:
    """The stream before the first block and after each."""
    hidden, calls = pieces.stem(batch)
    streams = [hidden]
    for index, call in enumerate(calls):
        streams.append(pieces.block(index, streams[-1], call))
    return streams


def _rotated(tensor: Tensor, axis: int, mirrors: list[Tensor]) -> Tensor:
    """Along `axis`, by the product of two reflections: dense, orthogonal, and cheaper than a matrix of that size."""
    rows = tensor.movedim(axis, -1)
    for mirror in mirrors:
        rows = rows - 2 * (rows @ mirror).unsqueeze(-1) * mirror
    return rows.movedim(-1, axis)
