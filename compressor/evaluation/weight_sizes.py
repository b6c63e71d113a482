"""Counts the bytes of the weight files before and after."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from compressor.engine.sweep import Outcome
from compressor.evaluation.sections import RunSizes
from compressor.storage.safetensors_file import read_header

SCALES = re.compile("scale|zero_point|exponent|shape|g_idx|SCB|format|outlier|table|^bias")  # tensors besides the codes


def weight_sizes(directory: Path, outcome: Outcome) -> RunSizes:
    """Bytes of the weight files before and after, by class of tensor. The totals include the headers.

    directory  the artifact that was written from `outcome`
    """
    files = sorted(directory.glob("*.safetensors"))
    structure, checkpoint = outcome.structure, outcome.plan.source.checkpoint
    table = _input_table(structure.model)
    embedded = {name for name, parameter in structure.model.named_parameters() if parameter is table}
    head = {weight.parameter for stage in structure.stages(structure.block_count + 1) for g in stage for weight in g}
    parameter = structure.bindings.parameter_of()
    classes = dict.fromkeys(("quantized", "scales", "embedding", "head", "norms", "dense", "other"), 0)
    matrices = {weight.tensor for _, weight in structure.weights() if weight.role != "embedding"}
    for file in files:
        for name, info in read_header(file).items():
            module, _, suffix = name.rpartition(".")
            if module in outcome.stored and suffix != "bias":
                kind = "scales" if SCALES.search(suffix) else "quantized"
            elif parameter.get(name) in embedded:
                kind = "embedding"
            elif parameter.get(name) in head:
                kind = "head"
            elif name in matrices:
                kind = "dense"
            else:
                kind = "norms" if "norm" in name.lower() or ".ln_" in name else "other"
            classes[kind] += info.nbytes
    before = checkpoint.weight_file_bytes
    after = sum(file.stat().st_size for file in files)
    parameters = sum(math.prod(info.shape) for info in checkpoint.tensors.values())
    return {
        "before_bytes": before,
        "after_bytes": after,
        "ratio": after / before,
        "bits_per_parameter": 8 * after / parameters,
        "by_class": classes,
        "predicted_bytes": outcome.plan.weight_bytes,
        "predicted_artifact_bytes": outcome.plan.artifact_bytes,
        "parameters": parameters,
    }


def _input_table(model: Any) -> Tensor | None:
    """The input embedding of a model; None if it has none, as a model of images."""
    try:
        return getattr(model.get_input_embeddings(), "weight", None)  # that of a ViT is a module without a weight
    except NotImplementedError:  # transformers raises it for SwiftFormer, a network of convolutions
        return None
