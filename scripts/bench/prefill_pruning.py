"""Measures the time to the first token against agreement with the unchanged model, for prefill_pruning.

    python scripts/bench/prefill_pruning.py --model CHECKPOINT --test TEXT
    python scripts/bench/prefill_pruning.py --model llama:1024,8 --prompt 1024 --time-only --output FILE

Prompts are windows of the text; each is followed by `--tokens` tokens of the unchanged model (greedy). For each
schedule:

  agreement     share of prompts whose first token is the unchanged model's
  divergence    mean KL divergence of the first token's distribution from the unchanged model's, nats
  later         the same two over the tokens after the first, fed the unchanged model's tokens, with tokens coming back
                (revive) and without
  time          seconds of the prompt, as a ratio to the unchanged model in turn; median of ratios of neighbours
  operations    those of the blocks left, as a ratio

and the first two for dropping as many tokens at random (`random`), and for the tokens nearest to the end (`recent`).
"""

from __future__ import annotations

import compressor  # noqa: F401 isort: skip (before torch, whose threads then sleep while they wait)

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import result_file
import torch
import transformers
from random_models import hidden_and_blocks, is_random, random_llama
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from compressor.evaluation.environment import cpu_name
from compressor.layers.structural import lazy_block
from compressor.model.reshaped_class import reshaped_class
from compressor.model.structure import find_blocks

SCHEDULES = {"mild": (0.95, 0.85, 0.7), "default": (0.9, 0.7, 0.5), "strong": (0.7, 0.5, 0.3)}
DEPTHS = (0.25, 0.5, 0.75)
SINK = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a checkpoint, or llama:HIDDEN,BLOCKS (random, for time only)")
    parser.add_argument("--test", type=Path, help="a text file")
    parser.add_argument("--prompt", type=int, default=256, help="tokens")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=8, help="made after each prompt")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--time-only", action="store_true")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    result_file.add_output(parser, "prefill-pruning")
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)
    torch.set_grad_enabled(False)
    dense = load(settings.model)
    prompts = torch.randint(
        0, dense.config.vocab_size, (1, settings.prompt), generator=torch.Generator().manual_seed(0)
    )
    if not settings.time_only:
        prompts = windows(settings)
    found: dict[str, Any] = {
        "model": Path(settings.model).name,
        "prompt": settings.prompt,
        "prompts": len(prompts),
        "cpu": cpu_name(),
        "threads": settings.threads,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "schedules": {},
    }
    for name, shares in SCHEDULES.items():
        row: dict[str, Any] = {"keep": list(shares)}
        lazy = gated(dense, shares)
        row |= {
            "operations": operations(dense, shares, settings.prompt),
            "time": seconds(dense, lazy, prompts[:1], settings),
        }
        if not settings.time_only:
            row |= quality(dense, shares, prompts, settings.tokens)
        found["schedules"][name] = row
        print(name, json.dumps(row), flush=True)
    result_file.write(found, settings.output)


def load(name: str) -> PreTrainedModel:
    if not is_random(name):
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
    hidden, _ = hidden_and_blocks(name)
    shape = {"intermediate_size": hidden * 8 // 3 // 64 * 64, "num_key_value_heads": hidden // 64}
    return random_llama(name, **shape, vocab_size=4096, max_position_embeddings=8192).eval()


def windows(settings: argparse.Namespace) -> Tensor:
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    ids = tokenizer(settings.test.read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
    count = len(ids) // settings.prompt
    chosen = torch.linspace(0, count - 1, min(settings.prompts, count)).long()
    return ids[: count * settings.prompt].view(count, -1)[chosen]


def gated(model: PreTrainedModel, shares: tuple[float, ...], revive: bool = True) -> PreTrainedModel:
    """A copy with gates, sharing the weights."""
    path = find_blocks(model)
    depth = len(model.get_submodule(path))
    keep = dict(zip((int(at * depth) for at in DEPTHS), shares))
    modules = {}
    for number in range(depth):
        format_params = {"number": number, "begin": min(keep), "last": number == depth - 1, "keep": keep.get(number)}
        format_params |= {"sink": SINK, "min_prompt": 16, "revive": revive}
        modules[f"{path}.{number}"] = {"form": "lazy_block", "spec": format_params, "shape": []}
    config = type(model.config)(**{**model.config.to_dict(), "compressed_modules": modules})
    made = reshaped_class(type(model))(config).eval()
    made.load_state_dict(model.state_dict(), assign=True)
    return made


def operations(model: PreTrainedModel, shares: tuple[float, ...], n: int) -> float:
    """Multiplications of all blocks for a prompt of n tokens, as a share of the unchanged model's."""
    config = model.config
    path = find_blocks(model)
    blocks = model.get_submodule(path)
    keep = dict(zip((int(at * len(blocks)) for at in DEPTHS), shares))
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    weights = sum(p.numel() for p in blocks[0].parameters() if p.dim() == 2)
    whole, left, tokens = 0, 0, n
    for number in range(len(blocks)):
        whole += n * weights + 2 * n * n * width
        left += tokens * weights + 2 * tokens * tokens * width
        if number in keep:
            left += tokens * width
            tokens = max(-int(-keep[number] * tokens // 1), SINK + 1)
    return left / whole


def seconds(
    dense: PreTrainedModel, lazy: PreTrainedModel, prompt: Tensor, settings: argparse.Namespace
) -> dict[str, float]:
    """Time of the prompt, in turn; the ratio of each pair of neighbours."""

    def once(model: PreTrainedModel) -> float:
        began = time.perf_counter()
        model(input_ids=prompt, use_cache=True, logits_to_keep=1)
        return time.perf_counter() - began

    for model in (dense, lazy):
        once(model)
    pairs = [(once(dense), once(lazy)) for _ in range(settings.repeats)]
    ratios = sorted(after / before for before, after in pairs)
    return {
        "ratio": statistics.median(ratios),
        "quartiles": [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]],
        "dense_seconds": statistics.median(before for before, _ in pairs),
    }


def quality(dense: PreTrainedModel, shares: tuple[float, ...], prompts: Tensor, tokens: int) -> dict[str, Any]:
    wanted = [run(dense, prompt, None, tokens) for prompt in prompts]
    found: dict[str, Any] = {}
    for name in ("attention", "random", "recent"):
        with choosing(name):
            rows = [run(gated(dense, shares), prompt, made, tokens) for prompt, (_, made) in zip(prompts, wanted)]
        found[name] = compared(wanted, rows, slice(0, 1))
        if name == "attention":
            found["later"] = compared(wanted, rows, slice(1, None))
            still = gated(dense, shares, revive=False)
            rows = [run(still, prompt, made, tokens) for prompt, (_, made) in zip(prompts, wanted)]
            found["later_without_revival"] = compared(wanted, rows, slice(1, None))
    return found


def run(model: PreTrainedModel, prompt: Tensor, made: Tensor | None, tokens: int) -> tuple[Tensor, Tensor]:
    """(log probabilities (tokens, vocabulary), the input tokens); its own tokens if `made` is None."""
    out = model(input_ids=prompt[None], use_cache=True, logits_to_keep=1)
    told, fed = [], []
    for number in range(tokens):
        told.append(out.logits[0, -1].double().log_softmax(-1))
        fed.append(told[-1].argmax() if made is None else made[number])
        if number < tokens - 1:
            name = "cache" if "cache" in out else "past_key_values"  # depends on the release of transformers
            out = model(input_ids=fed[-1].view(1, 1), use_cache=True, **{name: out[name]})
    return torch.stack(told), torch.stack(fed)


def compared(wanted: list[Any], found: list[Any], part: slice) -> dict[str, float]:
    pairs = [(p[part], q[part]) for (p, _), (q, _) in zip(wanted, found)]
    agree = torch.cat([p.argmax(-1) == q.argmax(-1) for p, q in pairs]).double().mean()
    divergence = torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in pairs]).mean()
    return {"agreement": float(agree), "divergence": float(divergence)}


class choosing:
    """Inside this context gates rank tokens by attention, at random, or by their distance to the end."""

    def __init__(self, by: str) -> None:
        self.by, self.own = by, lazy_block.LazyBlock._scores
        self.generator = torch.Generator().manual_seed(0)

    def __enter__(self) -> None:
        def scores(block: Any, state: Any, columns: Tensor, *seen: Any) -> Tensor:
            own = self.own(block, state, columns, *seen)
            if self.by == "random":
                return torch.rand(own.shape, generator=self.generator)
            return columns.float() if self.by == "recent" else own

        lazy_block.LazyBlock._scores = scores  # type: ignore[method-assign]

    def __exit__(self, *_: object) -> None:
        lazy_block.LazyBlock._scores = self.own  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
