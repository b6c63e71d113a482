"""Slices a Llama with microsoft/TransformerCompression, in its own environment, and scores the results.

    PYTHONPATH=CHECKOUT/src PEER_PYTHON scripts/bench/peers/transformer_compression.py --model DIR --tokens FILE \
        --report FILE --sparsity 0.2 0.3 --threads 2

A child of scripts/bench/slicegpt.py, which imports nothing of it and nothing of `compressor`. Written for commit
6b12cdee6ad51791d7c776b3a046bc408b9e77e9, which pins transformers 4.41 and knows only names of hub models, so the
model is passed to its adapter here. The token file is a safetensors file with `calibration` and `test`, both
(samples, length) int64. All else is its default: random orientation, damping 0.01, head not sliced.

Two things it does change an RMSNorm model before anything is sliced: it subtracts the mean of every row of the
embeddings, and its norms add 1e-5 whatever the config says. `peer_per_site` is the code as it is;
`peer_per_site_corrected` has its own embeddings and eps put back after its fusing step. Both are also scored at
sparsity 0, fused but not sliced.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file
from slicegpt import layernorm_fusion, rotate
from slicegpt.adapters.llama_adapter import LlamaModelAdapter
from slicegpt.modules import RMSN
from slicegpt.slicing_scheduler import ConstSlicingScheduler
from transformers import LlamaForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser(description="TransformerCompression at each sparsity.")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--report", type=Path, required=True)
    parser.add_argument("--sparsity", type=float, nargs="+", required=True)
    parser.add_argument("--round-to", type=int, default=8)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_grad_enabled(False)
    tokens = load_file(arguments.tokens)
    rows: list[dict[str, Any]] = []
    for method, corrected in (("peer_per_site", False), ("peer_per_site_corrected", True)):
        for sparsity in (0.0, *arguments.sparsity):
            adapter = fused(arguments.model, corrected)
            width = int((1 - sparsity) * adapter.hidden_size)
            width -= width % arguments.round_to
            began = time.perf_counter()
            if sparsity:
                slice_model(adapter, tokens["calibration"], width, arguments.batch)
            rows.append(
                {
                    "method": method if sparsity else method.replace("per_site", "fused"),
                    "sparsity": sparsity,
                    "width": width,
                    "parameters": sum(parameter.numel() for parameter in adapter.model.parameters()),
                    "perplexity": round(perplexity(adapter.model, tokens["test"], arguments.batch), 4),
                    "seconds": round(time.perf_counter() - began, 1),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "numpy": np.__version__}
    arguments.report.write_text(json.dumps({"versions": versions, "rows": rows}, indent=1) + "\n")


def fused(directory: Path, corrected: bool) -> LlamaModelAdapter:
    """The model in float32 with its norms folded by their code."""
    model = LlamaForCausalLM.from_pretrained(directory, torch_dtype=torch.float32, local_files_only=True).eval()
    model.config.torch_dtype = torch.float32
    table = model.get_input_embeddings().weight.detach().clone()
    adapter = LlamaModelAdapter(model)
    layernorm_fusion.replace_layers(adapter)
    layernorm_fusion.fuse_modules(adapter)
    if corrected:
        model.get_input_embeddings().weight.data = table
        for module in model.modules():
            if isinstance(module, RMSN):
                module.eps = model.config.rms_norm_eps
    return adapter


def slice_model(adapter: LlamaModelAdapter, calibration: torch.Tensor, width: int, batch: int) -> None:
    np.random.seed(0)  # their random orientation draws from numpy's global generator
    loader = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in calibration.split(batch)]
    rotate.rotate_and_slice(adapter, loader, ConstSlicingScheduler(width), final_orientation="random")


def perplexity(model: LlamaForCausalLM, tokens: torch.Tensor, batch: int) -> float:
    """exp of the mean negative log likelihood of each window's tokens but its first."""
    total = 0.0
    for ids in tokens.split(batch):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"))
    return math.exp(total / tokens[:, 1:].numel())


if __name__ == "__main__":
    main()
