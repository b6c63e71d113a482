"""Measures the quality of both models on the same batches."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from compressor.artifact.memory_needs import gibibytes, limit_bytes, map_large_experts
from compressor.artifact.stock_loading import stock_works
from compressor.errors import ModelError
from compressor.evaluation.child_messages import QualityAnswer, QualityRequest
from compressor.evaluation.kept_patches import kept_patches
from compressor.evaluation.memory import spills, whole_quality_bytes
from compressor.evaluation.metrics import batch_sums, check_labels, joined_sums, metric_row, unmeasured
from compressor.evaluation.model_loading import NotInParts, is_causal, load_model, load_parts, read_stored_samples
from compressor.evaluation.part_by_part import sums_by_parts
from compressor.evaluation.saturation import RangeCounts, saturation, uncounted
from compressor.evaluation.sections import MetricRow
from compressor.model.block_runner import output_of, without_cache
from compressor.model.half_products import quick_products
from compressor.model.mapped_tensors import MappedTensors
from compressor.process.memory import return_large_blocks


def measure_quality(request: QualityRequest) -> QualityAnswer:
    """`metrics` of both models on the same batches, and `saturation` of the compressed model.

    Both models run as a whole if they fit into the memory that the request allows, otherwise part by part. A model that
    fits in neither way has metrics without values, with the reason.
    """
    whole, limit = whole_quality_bytes(request), limit_bytes(request["memory"])
    reason = f"needs {gibibytes(whole)} of memory, {gibibytes(limit)} may be used"
    try:
        with quick_products():
            return _measure_whole(request) if whole <= limit else _measure_parts(request, limit)
    except NotInParts as error:
        return {
            "metrics": unmeasured(request["metrics"], f"{reason}, and it can't be measured in parts: {error}"),
            "saturation": uncounted("quality was not measured"),
            "patches": None,
            "measured": None,
        }


def _measure_whole(request: QualityRequest) -> QualityAnswer:
    source = Path(request["before"]) if request["before"] else None
    before = None if source is None else load_model(source, request["trust_remote_code"], is_baseline=True)
    after = load_model(Path(request["after"]), request["trust_remote_code"])
    labels = _labels(request)
    samples = read_stored_samples(request)
    counted = RangeCounts()
    counted.watch(after)

    def sums() -> Iterator[dict[str, Tensor]]:
        for numbers, stacked in samples.batches(request["batch_size"]):
            value = stacked if samples.is_text else stacked.to(after.dtype)
            earlier = None if source is None else _outputs(before, value, source)
            later = _outputs(after, value, Path(request["after"]))
            wanted = None if labels is None else labels[numbers]
            if wanted is not None:
                check_labels(wanted, later, Path(request["after"]).name)
            yield batch_sums(earlier, later, stacked, wanted, is_causal(after))

    return {
        "metrics": _metric_rows(request, joined_sums(sums())),
        "saturation": saturation(Path(request["after"]), counted),
        "patches": None if samples.is_text else kept_patches(after, samples.inputs),
        "measured": "whole",
    }


def _measure_parts(request: QualityRequest, limit: int) -> QualityAnswer:
    """raises NotInParts for a model that can't be run in parts"""
    source, directory = Path(request["before"]) if request["before"] else None, Path(request["after"])
    before = None if source is None else load_parts(source, request["trust_remote_code"], is_baseline=True)
    after = load_parts(directory, request["trust_remote_code"])
    samples, labels = read_stored_samples(request), _labels(request)
    counted = RangeCounts()
    counted.watch(after.model)
    after.placed.append(lambda unit: counted.watch(after.model.get_submodule(unit), unit + "."))
    return_large_blocks()
    folder = Path(request["tokens"]).parent
    mapped = MappedTensors(folder)
    for streamed in (before, after):
        if streamed is not None:
            map_large_experts(streamed, mapped, limit)
    with tempfile.TemporaryDirectory(dir=folder) as scratch, mapped:
        spill = Path(scratch) if spills(request, samples, limit) else None
        sums = sums_by_parts(before, after, samples, labels, request["batch_size"], spill)
    return {
        "metrics": _metric_rows(request, sums),
        "saturation": saturation(directory, counted),
        "patches": None if samples.is_text else kept_patches(after.model, samples.inputs),
        "measured": "parts",
    }


def _labels(request: QualityRequest) -> Tensor | None:
    return load_file(request["labels"])["labels"] if request["labels"] else None


def _metric_rows(request: QualityRequest, sums: dict[str, Tensor]) -> dict[str, MetricRow]:
    sums = {key: value.double() for key, value in sums.items()}
    has_before, level = request["before"] is not None, request["confidence"]
    return {name: metric_row(name, sums, request["seed"], has_before, level) for name in request["metrics"]}


def _outputs(model: Any, value: Tensor, directory: Path) -> Tensor:
    with torch.no_grad(), without_cache(model), stock_works(directory, ModelError):
        output = output_of(model(**{model.main_input_name: value}))
        return output if is_causal(model) else output.float()  # logits of tokens are converted a few at a time
