"""Loads the source during the verification, and judges how far the artifact is from it.

`against_source` has the comparisons. This module decides which comparison the steps of the artifact allow.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.artifact import against_source, generation
from compressor.artifact.findings import Findings, SourceComparison
from compressor.artifact.manifest import Change, Manifest
from compressor.artifact.memory_needs import map_large_experts
from compressor.artifact.stock_loading import stock_works
from compressor.errors import Because, ModelError
from compressor.model.block_runner import output_of, without_cache
from compressor.model.checkpoint import Checkpoint
from compressor.model.mapped_tensors import MappedTensors
from compressor.model.probe_model import use_eager_experts
from compressor.model.quantized_source import open_source


@dataclass(frozen=True)
class Room:
    """The memory of the process, and mapped files for experts that don't fit into it.

    limit  bytes of memory that the process may use
    """

    limit: int
    mapped: MappedTensors


@dataclass(frozen=True)
class SourceRequest:
    """The checkpoint that an artifact is compared with.

    limit  bytes of memory that its model may take; None: most of the available memory
    """

    directory: Path
    trust_remote_code: bool
    limit: int | None
    room: Room


@dataclass(frozen=True)
class LoadedArtifact:
    """The loaded artifact.

    own     the model by `compressor.load`; its layers are put into the source's model
    prints  prints of the model by its stock loader, and `ties` of the same model (`against_source`)
    inputs  the inputs of all models
    output  output of `own`
    """

    checkpoint: Checkpoint
    manifest: Manifest
    own: Any
    prints: dict[str, against_source.Print]
    ties: set[frozenset[str]]
    inputs: dict[str, Any]
    output: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.checkpoint.config["dtype"])


@dataclass(frozen=True)
class SourceAnswer:
    """What the source's model computed.

    output   of the source's model with the artifact's layers in it, to be judged; None if they don't fit into it
    failure  why the source can't generate either, if that was tried
    """

    output: Tensor | None = None
    failure: str | None = None


def compare_with_source(
    request: SourceRequest, artifact: LoadedArtifact, *, generates: bool, found: Findings
) -> SourceAnswer:
    """Compare the artifact with the source, as in `against_source`. Results are added to `found`.

    generates  the artifact's model can generate; if it can't, the source is tried, too
    """
    changes, _ = against_source.read_changes(artifact.manifest)
    checkpoint = open_source(request.directory, trust_remote_code=request.trust_remote_code)
    if (reason := against_source.why_not_comparable(checkpoint)) is not None:
        found.not_compared = reason
        return SourceAnswer()
    offload = against_source.does_not_fit(checkpoint, artifact.dtype, request.limit)
    with ExitStack() as stack:
        source = _streamed_source(request, checkpoint, artifact) if offload else None
        if source is not None:
            place = "parts"
            found.notes.append("the source was read by this package, since transformers needs a whole block in memory")
        else:
            place, scratch = ("disk" if offload else "memory"), None
            if offload:
                scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="compress-model-")))
            stack.enter_context(stock_works(request.directory, ModelError))
            source = against_source.load_source(
                request.directory,
                checkpoint,
                artifact.dtype,
                trust_remote_code=request.trust_remote_code,
                offload=scratch,
            )
        use_eager_experts(source.config)
        with torch.no_grad(), without_cache(source):
            plain = output_of(source(**artifact.inputs))
        failure = None if generates else generation.generate_tokens(source, artifact.inputs)[1]
        distance = against_source.compare_outputs(artifact.output, plain)
        found.source = SourceComparison(place, distance)
        if not bool(torch.isfinite(plain).all()):
            message = "the source, loaded by stock transformers, gives NaN or Inf too: set model.dtype"
            found.problems.append(Because(message, reason="source-not-finite"))
        if any(change["rewrites"] for change in changes):
            reading = against_source.compare_reading(
                source, request.directory, artifact.dtype, request.trust_remote_code
            )
            found.problems += reading + _rewriting_problems(source, artifact, changes, distance)
            return SourceAnswer(failure=failure)
        return SourceAnswer(_compare_tensors(source, artifact, bool(changes), found), failure)


def _streamed_source(request: SourceRequest, checkpoint: Checkpoint, artifact: LoadedArtifact) -> Any | None:
    """The source's model, whose blocks are in memory while they run, if its experts have to lie in mapped files.

    None if a block fits into memory.
    """
    streamed = against_source.stream_source(checkpoint, artifact.dtype, trust_remote_code=request.trust_remote_code)
    is_mapped = map_large_experts(streamed, request.room.mapped, request.room.limit)
    return streamed.model if is_mapped else None


def _rewriting_problems(
    source: Any, artifact: LoadedArtifact, changes: list[Change], distance: float | None
) -> list[str]:
    """Steps that keep the function must keep the outputs. This is judged only if nothing else changed them."""
    if artifact.manifest["weights"] or not all(change["keeps_function"] for change in changes):
        return []
    blocks = getattr(source.config.get_text_config(), "num_hidden_layers", 1)
    allowed = against_source.ROUNDING_UNITS * (blocks + 1) * torch.finfo(artifact.dtype).eps
    if distance is not None and distance <= allowed:  # NaN fails too
        return []
    rewriting = ", ".join(change["pass"] for change in changes if change["rewrites"])
    message = (
        f"outputs have a relative distance of {distance} from the source's, {allowed:.3g} is allowed: "
        f"{rewriting} should keep them"
    )
    return [Because(message, reason="outputs-not-kept", distance=distance, allowed=allowed)]


def _compare_tensors(source: Any, artifact: LoadedArtifact, is_changed: bool, found: Findings) -> Tensor | None:
    """Compare all tensors. Returns the output of the source's model with the artifact's layers in it."""
    compared, problems = against_source.compare_tensors(
        source, artifact.own, artifact.dtype, artifact.prints, artifact.ties, artifact.manifest
    )
    assert found.source is not None
    found.source = replace(found.source, tensors=compared)
    found.problems += problems
    if is_changed or problems:
        return None
    who = "the source with its layers"
    with torch.no_grad(), without_cache(source), stock_works(artifact.checkpoint.directory, who=who):
        against_source.put_layers(source, artifact.own, artifact.manifest)
        return output_of(source(**artifact.inputs))
