"""Measures awq, alone and before gptq, on the demo model and on one with planted outlier features.

    python scripts/bench/awq.py --output FILE

The second model is the demo in which a few gains of each block's norms are larger by a factor and the weights that
read them are divided by it. It computes what the demo computes, but its weights are harder to round. Each row is one
run at 3 bits with groups of 64, with the perplexity and KL divergence of its report.
"""

from __future__ import annotations

import compressor  # isort: skip (before torch, whose threads then sleep while they wait)

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

import result_file
import torch
import yaml
from transformers import AutoModelForCausalLM, PreTrainedModel

from compressor.model.model_names import resolve_model
from compressor.recipe.recipe import parse_recipe

FEATURES, FACTOR = 4, 16.0  # of 128 gains of each norm, and how much larger they get
GRID = {"bits": 3, "group_size": 64}
STEPS: dict[str, list[dict[str, Any]]] = {
    "rtn": [{"pass": "rtn", **GRID}],
    "awq": [{"pass": "awq", **GRID}],
    "gptq": [{"pass": "gptq", **GRID}],
    "awq, gptq": [{"sweep": [{"pass": "awq", "rounding": "later", **GRID}, {"pass": "gptq", **GRID}]}],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result_file.add_output(parser, "awq")
    output = parser.parse_args().output
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        planted = Path(scratch) / "planted"
        save_planted(resolve_model("demo"), planted)
        for model in ("demo", str(planted)):
            for name, steps in STEPS.items():
                metrics = run(model, steps, Path(scratch) / "out")
                row = {"model": Path(model).name, "steps": name}
                row |= {key: metrics[key]["after"] for key in ("perplexity", "kl_divergence")}
                print(row, flush=True)
                rows.append(row)
    result_file.write({"rows": rows}, output)


def save_planted(source: Path, directory: Path) -> None:
    """The demo with outlier features, beside its tokenizer."""
    shutil.copytree(source, directory)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    plant(model, torch.Generator().manual_seed(0))
    model.to(torch.bfloat16).save_pretrained(directory)


@torch.no_grad()
def plant(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Multiply some gains of both norms of each block of a Llama, and divide the weights that read them."""
    for layer in model.get_submodule("model.layers").children():
        attention, mlp = layer.get_submodule("self_attn"), layer.get_submodule("mlp")
        readers = {
            "input_layernorm": [getattr(attention, f"{name}_proj") for name in "qkv"],
            "post_attention_layernorm": [mlp.get_submodule("gate_proj"), mlp.get_submodule("up_proj")],
        }
        for norm, weights in readers.items():
            gain = layer.get_submodule(norm).get_parameter("weight")
            factors = torch.ones_like(gain)
            factors[torch.randperm(len(gain), generator=generator)[:FEATURES]] = FACTOR
            gain.mul_(factors)
            for weight in weights:
                weight.weight.div_(factors)


def run(model: str, steps: list[dict[str, Any]], output: Path) -> dict[str, Any]:
    """The metrics of one run."""
    tree = {
        "version": 1,
        "name": "awq",
        "data": {"source": "stdlib", "samples": 128, "length": 512},
        "steps": steps,
        "eval": {"data": {"source": "stdlib", "split": "heldout", "samples": 64, "length": 512}},
        "report": {"html": False},
    }
    recipe = parse_recipe(yaml.safe_dump(tree).encode())
    return dict(compressor.compress(recipe, model, output, fresh=True)["metrics"])


if __name__ == "__main__":
    main()
