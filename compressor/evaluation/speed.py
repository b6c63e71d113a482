"""Measures the speed of one model."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.artifact.loader import load
from compressor.artifact.speed_runs import (
    DECODE_RUNS,
    DECODE_TOKENS,
    PREFILL_TOKENS,
    SPEED_BATCH,
    SPEED_RUNS,
    SPEED_TOKENS,
)
from compressor.artifact.stock_loading import stock_works
from compressor.errors import ModelError
from compressor.evaluation.child_messages import SpeedAnswer, SpeedRequest
from compressor.evaluation.model_loading import is_causal, load_model, read_stored_samples
from compressor.kernels.prepared.prepare import chosen_kernels
from compressor.model.block_runner import without_cache
from compressor.process.memory import peak_rss_bytes
from compressor.process.resources import ran_out

RATES = ("prefill_tokens_per_second", "decode_tokens_per_second", "samples_per_second")


def measure_speed(request: SpeedRequest) -> SpeedAnswer:
    """Load time, prefill and decode rate (of an encoder: samples per second in batches of 32) and peak memory of one
    model. Rates are medians after a warm-up. The model is loaded by stock transformers, or with `kernels` by
    `compressor.load`.
    """
    began, directory = time.perf_counter(), Path(request["model"])
    with_kernels = request["kernels"]
    model: Any = (
        load(directory, check_hashes=False)
        if with_kernels
        else load_model(directory, request["trust_remote_code"], is_baseline=request["is_baseline"])
    )
    result: dict[str, float | None] = {"load_seconds": time.perf_counter() - began}
    samples = read_stored_samples(request)
    most = request["most_tokens"] or SPEED_TOKENS
    taken = min(PREFILL_TOKENS, most)
    sample = samples.inputs[0][:taken] if samples.is_text else samples.inputs[0].to(model.dtype)
    inputs = {model.main_input_name: sample.unsqueeze(0)}
    with torch.no_grad(), stock_works(directory, ModelError), _cache_if_any(model, inputs):
        model(**inputs)
        seconds = _median_seconds(lambda: model(**inputs), SPEED_RUNS)
        result["prefill_tokens_per_second"] = len(sample) / seconds if samples.is_text else None
        result["decode_tokens_per_second"] = None
        if is_causal(model) and most > DECODE_TOKENS:
            result["decode_tokens_per_second"] = _decode_rate(model, sample[: most - DECODE_TOKENS].unsqueeze(0))
        if not is_causal(model):
            many = {name: value.expand(SPEED_BATCH, *value.shape[1:]).contiguous() for name, value in inputs.items()}
            model(**many)
            result["samples_per_second"] = SPEED_BATCH / _median_seconds(lambda: model(**many), SPEED_RUNS)
    result["peak_rss_bytes"] = peak_rss_bytes()
    return {"values": result, "kernels": chosen_kernels(model) if with_kernels else None}


def _cache_if_any(model: Any, inputs: dict[str, Tensor]) -> AbstractContextManager[None]:
    """Prompts are read with a cache, as servers do, unless the model's class has no cache for its kinds of layers."""
    try:
        model(**inputs)
    except ValueError:  # transformers raises it, for example for a Jamba without attention
        return without_cache(model)
    return nullcontext()


def _decode_rate(model: Any, prompt: Tensor) -> float | None:
    """Tokens per second; None for a model that can't generate. `verify` checks whether it could before compression."""
    options = {
        "max_new_tokens": DECODE_TOKENS,
        "min_new_tokens": DECODE_TOKENS,
        "do_sample": False,
        "attention_mask": torch.ones_like(prompt),
    }
    try:
        model.generate(prompt, **options)
    except Exception as error:  # any: for example of a class without a cache for its kinds of layers
        if (lack := ran_out(error)) is not None:
            raise lack from error
        return None
    return DECODE_TOKENS / _median_seconds(lambda: model.generate(prompt, **options), DECODE_RUNS)


def _median_seconds(work: Callable[[], Any], runs: int) -> float:
    times = []
    for _ in range(runs):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return sorted(times)[runs // 2]
