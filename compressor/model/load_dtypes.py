"""Gives the dtypes of a model's parameters as transformers' from_pretrained does.

A model has one dtype, that of config.json, but not every tensor has it: a class may make a parameter or buffer in a
dtype of its own (a router, rotary frequencies), and may name some that stay float32 in a 16-bit model
(`_keep_in_fp32_modules`, `_keep_in_fp32_modules_strict`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from transformers import PretrainedConfig, PreTrainedModel

from compressor.errors import ModelError
from compressor.model.checkpoint import Checkpoint
from compressor.model.tying import declared_ties

COMPUTED_IN = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def load_dtype(asked: str, config: PretrainedConfig, checkpoint: Checkpoint) -> torch.dtype:
    """The dtype of the whole model: `asked`, or for `source` that of dtype="auto".

    raises  ModelError for a dtype in which no model can be made
    """
    if asked != "source":
        found = getattr(torch, asked)
        assert isinstance(found, torch.dtype)  # the recipe accepts only these three
        return found
    stated = getattr(config, "dtype", None)
    if stated is None:
        stated = checkpoint.metadata.get("dtype")
    if stated is None:
        return _first_dtype(checkpoint)
    dtype = getattr(torch, stated, None) if isinstance(stated, str) else stated
    if dtype not in COMPUTED_IN:
        raise ModelError(
            f"dtype is {str(stated).removeprefix('torch.')}, in which no model can compute",
            where="config.json",
            hint='Set "dtype" to "float32", "bfloat16" or "float16".',
            data={"dtype": str(stated).removeprefix("torch.")},
        )
    return dtype


def held_dtypes(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Parameter or persistent buffer -> its dtype after a checkpoint's tensor has filled it.

    model  made with `dtype`, on any device
    """
    kept = list(model._get_dtype_plan(dtype))
    pattern = re.compile("|".join(name.replace("*", ".*") for name in kept)) if kept else None
    return {
        name: torch.float32 if pattern is not None and pattern.search(name) else tensor.dtype
        for name, tensor in model.state_dict().items()
    }


def hold(model: PreTrainedModel, dtypes: Mapping[str, torch.dtype]) -> None:
    """Convert these parameters and buffers to their dtypes, in place. Those that share storage still share it."""
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            if name in dtypes and tensor.dtype != dtypes[name]:
                tensor.data = tensor.data.to(dtypes[name])


def hold_as_loaded(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Convert an empty model that was made with `dtype` as if a checkpoint had filled all of it."""
    tied = declared_ties(model)
    hold(model, {name: held for name, held in held_dtypes(model, dtype).items() if name not in tied})


def _first_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype of the first floating tensor, by name, of the first file. transformers uses the same."""
    first = min(info.file for info in checkpoint.tensors.values())
    for name in sorted(name for name, info in checkpoint.tensors.items() if info.file == first):
        if checkpoint.tensors[name].dtype in COMPUTED_IN:
            return checkpoint.tensors[name].dtype
    return torch.float32
