"""Runs one process of threads.py or whole_model.py: a Llama of real widths and random weights that works on request.

    python -c "import compressor, model_worker; model_worker.main()" KIND MODEL [DIR]

The order of imports matters: torch reads at its import how its threads wait.

KIND is a model to ask: `prepared` (W4A8), `unfused` (the same with the forwards of transformers' modules),
`weight-only` (W4A16), `dense` (bfloat16), `dense32` (float32), or `unmultiplied`, which is `dense` with linear layers
that return zeros at once, so that only the work of transformers and torch beside them is left. Or it is something to
write to DIR: `write`, a checkpoint to compress, or `codes`, the integers of `prepared` for llama.cpp
(peers/llama_cpp_model.py).

A line of standard input is `TASK AMOUNT REPEATS SECONDS`: decode a step of AMOUNT sequences, prefill AMOUNT tokens, or
generate AMOUNT tokens, REPEATS times, or as often as it begins within SECONDS. The answer is a line of JSON: the
seconds of each, and the seconds that processors worked for one. The line `logits TOKEN ...` is answered by the logits
of the last one.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from kernel_decode import PROMPT, Decoder, packed
from random_models import random_llama
from torch import Tensor, nn
from transformers import DynamicCache, LlamaForCausalLM

from compressor.kernels.prepared.dispatch import IntegerWeight
from compressor.kernels.prepared.fused_forward import fused_forward
from compressor.kernels.prepared.prepare import prepare
from compressor.kernels.prepared.stock import adopt
from compressor.layers.packed_linear import PackedLinear
from compressor.model.model_files import demo_path

VOCABULARY = 2048  # the output head stays dense and should not dominate
GROUP = 128


class Unmultiplied(nn.Module):
    """A linear layer whose outputs are zeros that exist already."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.width, self.zeros = layer.out_features, dict[torch.Size, Tensor]()

    def forward(self, x: Tensor) -> Tensor:
        found = self.zeros.get(x.shape[:-1])
        if found is None:
            found = self.zeros[x.shape[:-1]] = x.new_zeros(*x.shape[:-1], self.width)
        return found


def model_of(name: str) -> LlamaForCausalLM:
    """A float32 Llama with MLPs of four times the width."""
    hidden = int(name.removeprefix("llama:").partition(",")[0])
    shape = {"vocab_size": VOCABULARY, "intermediate_size": 4 * hidden, "eos_token_id": 0, "bos_token_id": 0}
    return random_llama(name, **shape).eval()


def unmultiplied(model: LlamaForCausalLM) -> LlamaForCausalLM:
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, Unmultiplied(module))
    return model


def model_to_ask(kind: str, name: str) -> LlamaForCausalLM:
    model = model_of(name)
    if kind == "dense32":
        return model
    model = model.bfloat16()
    if kind == "unmultiplied":
        return unmultiplied(model)
    if kind in ("prepared", "unfused", "weight-only"):
        model = packed(model, GROUP)
        prepare(model, activations=None if kind == "weight-only" else "int8", strict=True)
        if kind == "unfused":
            for module in model.modules():
                if fused_forward(module) is not None:
                    del module.forward
    elif kind != "dense":
        raise ValueError(f"{kind!r} is no kind of model")
    return model


def write_checkpoint(model: LlamaForCausalLM, folder: Path) -> None:
    """A checkpoint to compress, with the tokenizer of the demo model."""
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_bytes((demo_path() / file).read_bytes())


def write_codes(model: LlamaForCausalLM, folder: Path) -> None:
    """config.json and tensors.npz: `NAME.codes` (out, in) uint8 where 8 is zero, `NAME.scale` (out, groups) float32,
    and all other tensors in float32."""
    found: dict[str, np.ndarray] = {}
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear) and (stored := adopt(module)) is not None:
            weight = stored.read(stored.tensors)
            assert isinstance(weight, IntegerWeight) and weight.zero_point is None
            found |= {f"{name}.codes": weight.codes.numpy(), f"{name}.scale": weight.scale.float().numpy()}
    others = {name: tensor.float().numpy() for name, tensor in model.named_parameters()}
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "tensors.npz", **found, **others)
    (folder / "config.json").write_text(json.dumps(model.config.to_dict()))


def prompt_of(sequences: int, tokens: int) -> Tensor:
    return torch.randint(1, VOCABULARY, (sequences, tokens), generator=torch.Generator().manual_seed(1))


def task(model: LlamaForCausalLM, name: str, amount: int) -> Callable[[], object]:
    """A function that does the task once; it is warm."""
    if name == "decode":
        decoder = Decoder(model, prompt_of(amount, PROMPT))
        decoder.step()
        return decoder.step
    if name == "prefill":
        prompt = prompt_of(1, amount)
        return lambda: model(input_ids=prompt, past_key_values=DynamicCache(config=model.config), logits_to_keep=1)
    if name == "generate":
        prompt = prompt_of(1, PROMPT)
        settings = {"max_new_tokens": amount, "min_new_tokens": amount, "do_sample": False, "pad_token_id": 0}
        return lambda: model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
    raise ValueError(f"{name!r} is no task")


def answer(model: LlamaForCausalLM, line: str) -> list[object]:
    name, *numbers = line.split()
    if name == "logits":
        return model(input_ids=torch.tensor([[*map(int, numbers)]])).logits[0, -1].float().tolist()
    amount, repeats, longest = map(float, numbers)
    run, spent = task(model, name, int(amount)), list[float]()
    worked = time.process_time()
    while not spent or (len(spent) < repeats and sum(spent) < longest):
        start = time.perf_counter()
        run()
        spent.append(time.perf_counter() - start)
    return [spent, (time.process_time() - worked) / len(spent)]


@torch.no_grad()
def main() -> None:
    kind, name, *folder = sys.argv[1:]
    if kind == "write":
        return write_checkpoint(model_of(name).bfloat16(), Path(*folder))
    if kind == "codes":
        return write_codes(packed(model_of(name).bfloat16(), GROUP), Path(*folder))
    model = model_to_ask(kind, name)
    print(torch.get_num_threads(), flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(model, line)), flush=True)
    return None
