"""Measures the quality of both models on the same batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from compressor.artifact.stock_loading import stock_works
from compressor.errors import ModelError
from compressor.evaluation.child_messages import QualityAnswer, QualityRequest
from compressor.evaluation.kept_patches import kept_patches
from compressor.evaluation.metrics import batch_sums, metric_row
from compressor.evaluation.model_loading import is_causal, load_model, read_stored_samples
from compressor.evaluation.saturation import saturation, watch_ranges
from compressor.model.block_runner import output_of, without_cache


def measure_quality(request: QualityRequest) -> QualityAnswer:
    """`metrics` of both models on the same batches, one batch at a time, and `saturation` of the compressed model."""
    source = Path(request["before"]) if request["before"] else None
    before = None if source is None else load_model(source, request["trust_remote_code"])
    after = load_model(Path(request["after"]), request["trust_remote_code"])
    labels = load_file(request["labels"])["labels"] if request["labels"] else None
    samples = read_stored_samples(request)
    counts = watch_ranges(after)
    totals: dict[str, list[Tensor]] = {}
    for numbers, stacked in samples.batches(request["batch_size"]):
        value = stacked if samples.is_text else stacked.to(after.dtype)
        earlier = None if source is None else _outputs(before, value, source)
        later = _outputs(after, value, Path(request["after"]))
        wanted = None if labels is None else labels[numbers]
        if wanted is not None:
            _check_labels(wanted, later, Path(request["after"]).name)
        for key, sums in batch_sums(earlier, later, stacked, wanted, is_causal(after)).items():
            totals.setdefault(key, []).append(sums)
    joined = {key: torch.cat(values).double() for key, values in totals.items()}
    level = request["confidence"]
    return {
        "metrics": {
            name: metric_row(name, joined, request["seed"], before is not None, level) for name in request["metrics"]
        },
        "saturation": saturation(Path(request["after"]), after, counts),
        "patches": None if samples.is_text else kept_patches(after, samples.inputs),
    }


def _outputs(model: Any, value: Tensor, directory: Path) -> Tensor:
    with torch.no_grad(), without_cache(model), stock_works(directory, ModelError):
        return output_of(model(**{model.main_input_name: value})).float()


def _check_labels(labels: Tensor, outputs: Tensor, where: str) -> None:
    """raises ModelError for a label beyond the model's classes"""
    if outputs.dim() != 2 or int(labels.max()) < outputs.shape[1]:
        return
    raise ModelError(
        f"the data has the label {int(labels.max())}, but the model's classes are 0 to {outputs.shape[1] - 1}",
        where=where,
        hint="Evaluate on data with the model's own classes, or leave accuracy out of eval.metrics.",
        data={"label": int(labels.max()), "classes": outputs.shape[1]},
    )
