"""Says how much memory a measurement needs, so that what doesn't fit is measured part by part, or not at all."""

from __future__ import annotations

from pathlib import Path

from compressor.artifact.memory_needs import CHUNK_BYTES, INTERPRETER_BYTES, dense_bytes, speed_bytes
from compressor.data.samples import Samples
from compressor.evaluation.child_messages import QualityRequest
from compressor.evaluation.model_loading import read_stored_samples
from compressor.model.checkpoint import open_checkpoint
from compressor.model.model_class import config_of

LOGIT_BYTES = 10  # per logit of a batch: in 16 bits and while float32 copies of one model's are made
PREPARED_COPIES = 2  # kernels hold their own order of the codes while the stored ones are still there; measured
HIDDEN_SHARE = 0.1  # share of the memory that hidden states of both models may take before they are written to files


def whole_quality_bytes(request: QualityRequest) -> int:
    """Memory for measuring quality with both models in memory: the weights, and the logits of one batch."""
    directories = [Path(name) for name in (request["before"], request["after"]) if name is not None]
    held = sum(map(dense_bytes, directories))
    samples = read_stored_samples(request)
    longest = max(sample.numel() for sample in samples.inputs) if samples.is_text else 0
    vocabulary = (
        getattr(config_of(directories[-1], request["trust_remote_code"]).get_text_config(), "vocab_size", 0) or 0
    )
    logits = request["batch_size"] * longest * vocabulary * LOGIT_BYTES * len(directories)
    return INTERPRETER_BYTES + held + logits + (CHUNK_BYTES if logits else 0)


def model_speed_bytes(directory: Path, *, kernels: bool) -> float:
    """Memory for measuring the speed of a model, loaded by `compressor.load` with `kernels`, else by transformers."""
    return speed_bytes(PREPARED_COPIES * open_checkpoint(directory).nbytes if kernels else dense_bytes(directory))


def spills(request: QualityRequest, samples: Samples, limit: int) -> bool:
    """Whether the hidden states of all samples are too large for memory."""
    config = config_of(Path(request["after"]), request["trust_remote_code"]).get_text_config()
    width = getattr(config, "hidden_size", 0) or 0
    if not samples.is_text:
        return False
    models = 1 if request["before"] is None else 2
    return models * sum(sample.numel() for sample in samples.inputs) * width * 4 > HIDDEN_SHARE * limit
