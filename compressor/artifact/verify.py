"""Loads an artifact in a new process, as a user would, and compares it with what was built and with its source.

Three models are loaded one after the other: the artifact by its stock loader, the artifact by `compressor.load`, and
the source by stock transformers (`against_source`), into which the artifact's stored layers are put. All three must
compute the same, and the same as the model in memory while the artifact was built.

Tolerance. Both loaders dequantize the same codes to the same weights in the same dtype. So logits may differ only by
the order of sums (other kernels, fused experts). One rounding step per block and one at the output head, each of half a
unit in the last place of the largest activation, gives the bound (blocks + 1) * eps(dtype) * max|logit|. A wrong code
or scale exceeds it; the differences seen so far are 0. Experts are compared one at a time, as they were calibrated,
because routing is discontinuous: the rounding of a fused expert kernel alone can send a token to another expert.

Memory. If these models don't fit into memory, each is loaded block by block while it runs (`streaming`). The stock
loader can't do this, so its part is taken by the code that it calls: the library of the stock format dequantizes each
weight.

Stock loaders with their own layers (bitsandbytes) compute other values than ours on purpose. No useful bound on the
logits follows from that, since a last bit can change an int8 code in a later layer. So they are compared layer by
layer, with the inputs that our model's layers read: every output must be within what `Family.forward` allows, and every
other tensor of the model must be bit-identical. The distance of their logits is reported and not judged. Our own loader
is judged as above.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers.utils import logging

from compressor.artifact import generation
from compressor.artifact.against_source import Print, Prints, ties_of
from compressor.artifact.files import compare_files
from compressor.artifact.findings import Findings, LayerComparison, Verification
from compressor.artifact.ledger_check import ledger_problems
from compressor.artifact.loader import load
from compressor.artifact.manifest import Manifest, read_manifest
from compressor.artifact.memory_needs import gibibytes, limit_bytes, map_large_experts, verification_bytes
from compressor.artifact.source_verification import LoadedArtifact, Room, SourceRequest, compare_with_source
from compressor.artifact.stock_formats import FAMILIES, check_loader
from compressor.artifact.stock_layers import Forward, compare_layers
from compressor.artifact.stock_loading import load_stock, stock_works
from compressor.artifact.streaming import StockDecompressor, load_streamed
from compressor.errors import Because
from compressor.model.block_runner import output_of, without_cache
from compressor.model.checkpoint import Checkpoint, is_finite, open_checkpoint
from compressor.model.half_products import quick_products
from compressor.model.mapped_tensors import MappedTensors
from compressor.model.probe_model import example_batch, use_eager_experts
from compressor.model.side_files import OWN_MODELING
from compressor.model.trusted_code import carried_code_problems
from compressor.process.child import ask
from compressor.process.memory import return_large_blocks
from compressor.storage.safetensors_file import read_pieces

OURS = "compressor.load"  # in messages
STOCK, STOCK_AGAIN, OWN, SOURCE = (
    "stock loader",
    "stock loader, second run",
    "own loader",
    "source with the artifact's layers",
)


class Request(TypedDict):
    """What the new process is asked for; see verify_in_child."""

    directory: str
    batch: str | None
    sealed: bool
    deep: bool
    source: str | None
    memory: int | None
    trust_remote_code: bool


@dataclass(frozen=True)
class Artifact:
    directory: Path
    manifest: Manifest
    checkpoint: Checkpoint

    @property
    def forward(self) -> Forward | None:
        """What layers of the stock loader should compute, if they compute their own matmul (`Family.forward`)."""
        family = FAMILIES.get(self.manifest["route"])
        return family.forward if family is not None else None


@dataclass
class StockRun:
    """Results of the artifact's stock loader, and what is compared with them later.

    model     kept if its layers are compared, otherwise None, so that its memory is free for the next model
    expected  the in-memory result, if the verification batch comes with it
    """

    model: Any
    inputs: dict[str, Any]
    expected: Tensor | None
    outputs: dict[str, Tensor]
    prints: dict[str, Print]
    ties: set[frozenset[str]]
    blocks: int
    eps: float
    can_generate: bool

    def reference(self, outputs: dict[str, Tensor]) -> Tensor:
        """The output with which all others are compared."""
        return self.expected if self.expected is not None else next(iter(outputs.values())).float()


def verify_in_child(
    directory: Path,
    batch: Path | None,
    *,
    sealed: bool,
    deep: bool = True,
    source: Path | None = None,
    memory: int | None = None,
    trust_remote_code: bool = False,
) -> Findings:
    """Run the checks in a new process and return its findings; `problems` is empty if the artifact is good.

    batch   safetensors with the verification batch and `output`, the in-memory result; None: compare only the loaders
    sealed  whether the manifest lists every file already
    source  directory of the checkpoint from which the artifact was made; None: `not_compared` reports its absence
    memory  bytes that the process may use; None: most of what is free. Models that don't fit are loaded in parts
    raises  what `verify` raises, and what `child.ask` raises
    """
    check_loader(read_manifest(directory)["route"])
    request: Request = {
        "directory": str(directory),
        "batch": str(batch) if batch else None,
        "sealed": sealed,
        "deep": deep,
        "source": str(source) if source else None,
        "memory": memory,
        "trust_remote_code": trust_remote_code,
    }
    return Findings.from_json(ask("compressor.artifact.verify", request, "verifies the artifact"))


def verify(
    directory: Path,
    batch: Path | None,
    *,
    sealed: bool,
    deep: bool,
    source: Path | None = None,
    memory: int | None = None,
    trust_remote_code: bool = False,
    source_limit: int | None = None,
) -> Findings:
    """Run all checks in this process. See verify_in_child.

    source_limit  see `SourceRequest.limit`
    """
    logging.disable_progress_bar()
    found = Findings()
    artifact = Artifact(directory, read_manifest(directory), open_checkpoint(directory))
    _check_files(artifact, sealed, found)
    found.problems += carried_code_problems(directory, source, trust_remote_code, OWN_MODELING)
    if deep and not found.problems:
        found.loaded = "whole" if _fits(artifact, source, memory) else "parts"
        if found.loaded == "parts":
            return_large_blocks()
            source_limit = 0
        folder = batch.parent if batch is not None else Path(tempfile.gettempdir())
        room = Room(limit_bytes(memory), MappedTensors(folder))
        original = SourceRequest(source, trust_remote_code, source_limit, room) if source is not None else None
        with quick_products(), room.mapped:
            _compare_models(artifact, batch, original, room, found)
    if not found.problems:
        found.problems += ledger_problems(artifact.manifest, artifact.checkpoint, source)
    return found


def _fits(artifact: Artifact, source: Path | None, memory: int | None) -> bool:
    """Whether all models fit into memory as a whole."""
    return verification_bytes(artifact.directory, source) <= limit_bytes(memory)


def _check_files(artifact: Artifact, sealed: bool, found: Findings) -> None:
    """Check that the files are as the manifest lists them, and that numbers are finite."""
    if sealed:
        problems, found.notes = compare_files(artifact.directory, artifact.manifest)
        found.problems += problems
    for name in artifact.checkpoint.tensors.keys() - artifact.manifest.get("carried", {}).keys():
        info = artifact.checkpoint.tensors[name]
        if info.dtype.is_floating_point and not all(map(is_finite, read_pieces(info))):
            found.problems.append(Because(f"{name} contains NaN or Inf", reason="not-finite", tensor=name))


def _compare_models(
    artifact: Artifact, batch: Path | None, source: SourceRequest | None, room: Room, found: Findings
) -> None:
    """Load the artifact both ways, then the source, and judge their outputs."""
    if found.loaded == "whole":
        stock = _run_stock(artifact, batch, found)
    else:
        stock = _run_stock_parts(artifact, batch, room, found)
    own, output = _run_own(artifact, stock.inputs, room, found)
    outputs = {**stock.outputs, OWN: output}
    _check_shapes(outputs, stock.reference(outputs), found)
    if found.problems:
        return
    if (forward := artifact.forward) is not None and stock.model is not None:
        outputs = {OWN: output}
        _compare_stock_layers(artifact, forward, stock, own, output, found)
    failure = None
    if stock.can_generate and "input_ids" in stock.inputs:
        tokens = generation.GENERATED_TOKENS if found.loaded == "whole" else generation.FEWEST_TOKENS
        found.generated_tokens, failure = generation.generate_tokens(own, stock.inputs, tokens)
    source_failure = None
    if source is None:
        found.not_compared = "the source was not available"
    else:
        loaded = LoadedArtifact(
            artifact.checkpoint, artifact.manifest, own, stock.prints, stock.ties, stock.inputs, output
        )
        answer = compare_with_source(source, loaded, generates=failure is None, found=found)
        source_failure = answer.failure
        outputs |= {} if answer.output is None else {SOURCE: answer.output}
    _judge_generation(failure, source_failure, found)
    _judge_outputs(outputs, stock, found)


def _run_stock(artifact: Artifact, batch: Path | None, found: Findings) -> StockRun:
    """Load the artifact by its stock loader, and run it twice."""
    model, info = load_stock(artifact.directory, artifact.manifest)
    found.stock_load = True
    _check_keys(artifact, info, found)
    return _stock_run(artifact, model, batch, (STOCK, STOCK_AGAIN), keeps=artifact.forward is not None)


def _run_stock_parts(artifact: Artifact, batch: Path | None, room: Room, found: Findings) -> StockRun:
    """Run the artifact with the stock class, block by block, dequantized as its stock loader would.

    Layers that compute their own matmul can't be loaded in parts. Then ours stand for them, which is noted.
    """
    checkpoint, manifest = artifact.checkpoint, artifact.manifest
    is_packed = manifest["route"] == "compressed-tensors"
    if artifact.forward is not None:
        needed = gibibytes(verification_bytes(artifact.directory, None))
        found.notes.append(f"the layers of {manifest['route']} were not run: that needs {needed} of memory")
    streamed = load_streamed(checkpoint, manifest, StockDecompressor.of(checkpoint) if is_packed else None)
    map_large_experts(streamed, room.mapped, room.limit)
    found.stock_load = True
    beside = manifest.get("carried", {}).keys()
    found.unexpected = sorted(unused.tensor for unused in streamed.unused if unused.tensor not in beside)
    if found.unexpected:
        message = f"{len(found.unexpected)} tensors fill nothing, such as {found.unexpected[0]}"
        found.problems.append(Because(message, reason="fills-nothing", tensors=found.unexpected))
    return _stock_run(artifact, streamed.model, batch, (STOCK,), keeps=False)


def _stock_run(artifact: Artifact, model: Any, batch: Path | None, runs: tuple[str, ...], *, keeps: bool) -> StockRun:
    """Run a model of the artifact, once for each of these names.

    keeps  its layers are compared later
    """
    use_eager_experts(model.config)
    with torch.no_grad(), without_cache(model), stock_works(artifact.directory):
        inputs = load_file(batch) if batch else example_batch(model, torch.device("cpu"), samples=2, tokens=32)
        expected = inputs.pop("output", None)
        prints = Prints.of(model, artifact.manifest)
        outputs = {name: output_of(model(**inputs)) for name in runs}
    return StockRun(
        model=model if keeps else None,
        inputs=inputs,
        expected=expected,
        outputs=outputs,
        prints=prints.all(),
        ties=ties_of(model),
        blocks=getattr(model.config.get_text_config(), "num_hidden_layers", 1),
        eps=torch.finfo(model.dtype).eps,
        can_generate=model.can_generate(),
    )


def _check_keys(artifact: Artifact, info: dict[str, Any], found: Findings) -> None:
    """Check what the stock loader reports about tensors, except carried tensors, which the model doesn't use."""
    carried = {name for reported in artifact.manifest.get("carried", {}).values() for name in reported}
    found.missing = sorted({str(name) for name in info["missing_keys"]})
    found.unexpected = sorted({str(name) for name in info["unexpected_keys"]} - carried)
    found.mismatched = sorted({str(name) for name in info["mismatched_keys"]})
    reported = {"missing": found.missing, "unexpected": found.unexpected, "mismatched": found.mismatched}
    for key, names in reported.items():
        if names:
            message = f"stock loading reports {len(names)} {key} tensors, such as {names[0]}"
            found.problems.append(Because(message, reason=f"{key}-tensors", tensors=names))


def _run_own(artifact: Artifact, inputs: dict[str, Any], room: Room, found: Findings) -> tuple[Any, Tensor]:
    """The artifact by `compressor.load`, and its output."""
    if found.loaded == "whole":
        own: Any = load(artifact.directory, check_hashes=False, kernels="reference")
    else:
        streamed = load_streamed(artifact.checkpoint, artifact.manifest)
        map_large_experts(streamed, room.mapped, room.limit)
        own = streamed.model
    found.own_load = True
    use_eager_experts(own.config)
    with torch.no_grad(), without_cache(own), stock_works(artifact.directory, who=OURS):
        return own, output_of(own(**inputs))


def _check_shapes(outputs: dict[str, Tensor], reference: Tensor, found: Findings) -> None:
    for name, value in outputs.items():
        if value.shape != reference.shape:
            message = f"{name}: outputs have shape {tuple(value.shape)}, but {tuple(reference.shape)} is expected"
            found.problems.append(
                Because(message, reason="other-shape", model=name, shape=[*value.shape], expected=[*reference.shape])
            )


def _compare_stock_layers(
    artifact: Artifact, forward: Forward, stock: StockRun, own: Any, output: Tensor, found: Findings
) -> None:
    """Compare the layers of a stock loader that compute their own matmul, then free its model."""
    with stock_works(artifact.directory, who="the comparison of its layers"):
        compared, largest, problems = compare_layers(stock.model, own, stock.inputs, artifact.manifest, forward)
    first, second = stock.outputs[STOCK], stock.outputs[STOCK_AGAIN]
    found.stock_layers = LayerComparison(compared, largest, float((first.float() - output.float()).abs().max()))
    found.problems += problems
    if not torch.equal(second, first):
        found.problems.append(Because(f"{STOCK}: a second run computes other outputs", reason="not-repeatable"))
    stock.model = None


def _judge_generation(failure: str | None, source_failure: str | None, found: Findings) -> None:
    """Report that the artifact can't generate. It is no problem if the source fails in the same way."""
    if failure is not None and failure == source_failure:
        message = f"no tokens were generated, and the source can't generate either: {failure}"
        found.notes.append(Because(message, reason="source-cannot-generate", cause=failure))
    elif failure is not None:
        found.problems.append(Because(f"generate fails: {failure}", reason="cannot-generate", cause=failure))


def _judge_outputs(outputs: dict[str, Tensor], stock: StockRun, found: Findings) -> None:
    """Check that every output is finite and within the tolerance of the reference."""
    reference = stock.reference(outputs)
    tolerance = float((stock.blocks + 1) * stock.eps * reference.abs().max())
    differences = {name: float((value.float() - reference).abs().max()) for name, value in outputs.items()}
    found.tolerance, found.max_logit_difference = tolerance, max(differences.values())
    for name, difference in differences.items():
        if not bool(torch.isfinite(outputs[name]).all()):
            message = f"{name}: outputs contain NaN or Inf"
            found.problems.append(Because(message, reason="outputs-not-finite", model=name))
        elif not difference <= tolerance:  # NaN fails too
            message = f"{name}: outputs differ by {difference:.3g}, {tolerance:.3g} is allowed"
            values = {"reason": "outputs-differ", "model": name, "difference": difference, "allowed": tolerance}
            found.problems.append(Because(message, **values))


def main(request: Request) -> Verification:
    """Answer `verify_in_child`, in the new process."""
    batch = Path(request["batch"]) if request["batch"] else None
    found = verify(
        Path(request["directory"]),
        batch,
        sealed=request["sealed"],
        deep=request["deep"],
        source=Path(request["source"]) if request["source"] else None,
        memory=request["memory"],
        trust_remote_code=request["trust_remote_code"],
    )
    return found.to_json()
