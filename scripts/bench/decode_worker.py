"""Runs one process of threads.py: a Llama of real widths and random weights that decodes on request.

    python -c "import compressor, decode_worker; decode_worker.main()" prepared|dense|write MODEL [DIR]

The order of imports matters: torch reads at its import how its threads wait.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from kernel_decode import PROMPT, Decoder, packed
from random_models import random_llama
from transformers import LlamaForCausalLM

from compressor.kernels.prepared.prepare import prepare
from compressor.model.model_files import demo_path

VOCABULARY = 2048


def model_of(name: str) -> LlamaForCausalLM:
    """A bfloat16 Llama with MLPs of four times the width."""
    hidden = int(name.removeprefix("llama:").partition(",")[0])
    shape = {"vocab_size": VOCABULARY, "intermediate_size": 4 * hidden, "eos_token_id": 0, "bos_token_id": 0}
    return random_llama(name, **shape).bfloat16().eval()


def write(model: LlamaForCausalLM, folder: Path) -> None:
    """A checkpoint to compress, with the tokenizer of the demo model."""
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_bytes((demo_path() / file).read_bytes())


@torch.no_grad()
def main() -> None:
    kind, name, *folder = sys.argv[1:]
    model = model_of(name)
    if kind == "write":
        return write(model, Path(*folder))
    if kind == "prepared":
        model = packed(model)
        prepare(model, activations="int8", strict=True)
    print(torch.get_num_threads(), flush=True)
    # sequences, most steps, seconds in which they begin -> seconds of each step, seconds that processors worked for one
    for line in sys.stdin:
        sequences, steps, longest = map(float, line.split())
        prompt = torch.randint(0, VOCABULARY, (int(sequences), PROMPT), generator=torch.Generator().manual_seed(1))
        decoder = Decoder(model, prompt)
        decoder.step()
        worked = time.process_time()
        spent = [decoder.step()]
        while len(spent) < steps and sum(spent) < longest:
            spent.append(decoder.step())
        print(json.dumps([spent, (time.process_time() - worked) / len(spent)]), flush=True)
    return None
