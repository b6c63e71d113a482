"""Measures decoding with a Llama of random weights, dense and prepared, for cpu_kernels.py --decode."""

from __future__ import annotations

import copy
import statistics
import time

import torch
from random_models import random_llama
from torch import Tensor, nn
from transformers import DynamicCache, LlamaForCausalLM

from compressor.kernels.prepared.prepare import prepare
from compressor.layers.packed_linear import PackedLinear
from compressor.methods.quantization.uniform_grid import find_grid, quantize

MODEL, VOCABULARY = "llama:768,12", 8192  # 98 M parameters; the output head stays dense and should not dominate
QUICK_MODEL, QUICK_VOCABULARY = "llama:128,2", 64
GROUP, PROMPT = 64, 16
SEQUENCES = (1, 16)
# Logits of a prepared model against those of the same codes, dequantized: float32 rounding, or inputs in int8.
TOLERANCE = {"prepared W4A16": 1e-3, "prepared W4A8": 0.1, "prepared W4A8, bf16": 0.1}


class Decoder:
    """A model after its prompt. A step decodes one token per sequence."""

    def __init__(self, model: LlamaForCausalLM, prompt: Tensor) -> None:
        self.model, self.cache = model, DynamicCache(config=model.config)
        self.logits = self._forward(prompt)

    def _forward(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens, past_key_values=self.cache, use_cache=True).logits[:, -1]

    def step(self) -> float:
        start = time.perf_counter()
        self.logits = self._forward(self.logits.argmax(-1, keepdim=True))
        return time.perf_counter() - start


def rounded(linear: nn.Linear, group: int) -> PackedLinear:
    """The layer in 4 bits, rounded to nearest, in symmetric groups."""
    grouped = linear.weight.detach().float().unflatten(1, (-1, group))
    grid = find_grid(grouped, 4, True, "minmax", linear.weight.dtype)
    codes = quantize(grouped, grid).flatten(1).to(torch.int8)
    return PackedLinear.pack(codes, grid.scale, None, bits=4, group_size=group, symmetric=True)


def packed(model: LlamaForCausalLM, group: int) -> LlamaForCausalLM:
    """A copy with the linear layers of its blocks in 4 bits."""
    model = copy.deepcopy(model)
    for block in model.model.layers:
        for name, module in list(block.named_modules()):
            if isinstance(module, nn.Linear):
                owner, _, leaf = name.rpartition(".")
                setattr(block.get_submodule(owner), leaf, rounded(module, group))
    return model


def models(quick: bool) -> dict[str, LlamaForCausalLM]:
    """The models. raises ArithmeticError if the outputs of a prepared model differ from those of its codes"""
    name, vocabulary = (QUICK_MODEL, QUICK_VOCABULARY) if quick else (MODEL, VOCABULARY)
    dense = random_llama(name, vocab_size=vocabulary).eval()
    stored = packed(dense, GROUP)
    found = {"dense float32": dense, "dense bf16": copy.deepcopy(dense).bfloat16()}
    tokens = torch.randint(0, vocabulary, (2, PROMPT), generator=torch.Generator().manual_seed(0))
    wanted = stored(input_ids=tokens).logits.double()
    for key in TOLERANCE:
        model = copy.deepcopy(stored)
        if key.endswith("bf16"):  # all except the weights in 4 bits
            model = model.bfloat16()
        prepare(model, activations="int8" if "W4A8" in key else None, strict=True)
        error = float((model(input_ids=tokens).logits.double() - wanted).norm() / wanted.norm())
        if not error <= TOLERANCE[key]:
            raise ArithmeticError(f"{key}: logits differ by {error:.3g}, at most {TOLERANCE[key]} expected")
        found[key] = model
    return found


def decode(quick: bool) -> dict[str, dict[str, float]]:
    """Tokens per second by sequences and model. All models take each step in turn."""
    steps = 3 if quick else 48
    result = {}
    found = models(quick)
    for sequences in SEQUENCES:
        vocabulary = found["dense float32"].config.vocab_size
        prompt = torch.randint(0, vocabulary, (sequences, PROMPT), generator=torch.Generator().manual_seed(1))
        decoders = {name: Decoder(model, prompt) for name, model in found.items()}
        times: dict[str, list[float]] = {name: [] for name in decoders}
        for _ in range(steps):
            for name, decoder in decoders.items():
                times[name].append(decoder.step())
        result[str(sequences)] = {name: sequences / statistics.median(spent[1:]) for name, spent in times.items()}
    return result
