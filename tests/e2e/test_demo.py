"""The embedded demo model is a real language model within its bounds."""

from __future__ import annotations

import json
import math

import pytest
import torch
from data_settings import ask
from transformers import AutoModelForCausalLM

from compressor.data.samples import load_samples
from compressor.model.model_files import demo_path


def test_it_is_small_and_loads_with_plain_transformers():
    weights = demo_path() / "model.safetensors"
    assert weights.stat().st_size <= 4_000_000
    model = AutoModelForCausalLM.from_pretrained(demo_path())
    assert 1e6 <= sum(parameter.numel() for parameter in model.parameters()) <= 2e6
    assert model.dtype is torch.bfloat16
    assert model.config.num_key_value_heads < model.config.num_attention_heads


@pytest.mark.slow
def test_its_perplexity_is_at_most_a_twentieth_of_a_unigram_models():
    train = torch.stack(load_samples(ask(samples=300, length=512), demo_path(), seed=0, vocabulary=2048).inputs)
    settings = ask(split="heldout", samples=16, length=512)
    held_out = torch.stack(load_samples(settings, demo_path(), seed=0, vocabulary=2048).inputs)
    counts = torch.bincount(train.flatten(), minlength=2048).double() + 1
    unigram = math.exp(-(counts / counts.sum()).log()[held_out[:, 1:]].mean())
    model = AutoModelForCausalLM.from_pretrained(demo_path()).eval()
    with torch.no_grad():
        logits = model(input_ids=held_out).logits[:, :-1].float()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), held_out[:, 1:].flatten())
    assert math.exp(loss) <= unigram / 20


def test_the_training_log_tells_of_the_weights_that_are_shipped():
    import hashlib

    log = json.loads((demo_path() / "training_log.json").read_text())
    weights = hashlib.sha256((demo_path() / "model.safetensors").read_bytes()).hexdigest()
    assert log["weights_sha256"] == weights
    assert log["unigram_perplexity"] / log["heldout_perplexity"] >= 20
