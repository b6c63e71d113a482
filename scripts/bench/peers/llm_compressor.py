"""Runs llm-compressor's GPTQ on given tokens, in its own environment, and writes its time and memory.

    PEER_PYTHON scripts/bench/peers/llm_compressor.py --model DIR --tokens FILE --output DIR --report FILE \
        --bits 4 --group-size 128 --threads 2 [--observer memoryless_mse] [--batch-size 1] [--profile FILE]

A child of scripts/bench/gptq.py, which imports nothing of it and nothing of `compressor`. The token file is a
safetensors file with one tensor `input_ids`, (samples, length) int64; every row is used, unpadded and in order. All
settings that the command line does not name keep llm-compressor's own defaults: static activation order, block 128,
damping 0.01, min-max observer, batch size 1.

The report holds seconds per stage and the peak resident bytes of this process up to the end of each stage. The peak
never falls, so a stage that shows the previous stage's figure did not raise it.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any


class Stages:
    """Seconds and peak resident bytes of each stage, in the order they ended."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.peak_rss_bytes: dict[str, int] = {}
        self._started = time.perf_counter()

    def end(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = now - self._started
        self.peak_rss_bytes[name] = peak_rss_bytes()
        self._started = now


def peak_rss_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage: bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="One llm-compressor GPTQ run, timed.")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--report", type=Path, required=True)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--observer", help="weight observer; without it llm-compressor's default")
    parser.add_argument("--batch-size", type=int, default=1, help="calibration batch; 1 is llm-compressor's default")
    parser.add_argument(
        "--profile", type=Path, help="write cProfile statistics of the oneshot stage; slows it a little"
    )
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    stages = Stages()

    import datasets
    import torch

    torch.set_num_threads(arguments.threads)
    import compressed_tensors
    import llmcompressor
    import transformers
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from safetensors.torch import load_file

    stages.end("import")

    input_ids = load_file(arguments.tokens)["input_ids"]  # (samples, length) int64
    dataset = datasets.Dataset.from_dict(
        {"input_ids": input_ids.tolist(), "attention_mask": torch.ones_like(input_ids).tolist()}
    )
    stages.end("tokens")

    # `dtype="auto"` keeps the checkpoint's dtype, as our side does.
    model = transformers.AutoModelForCausalLM.from_pretrained(arguments.model, dtype="auto")
    stages.end("load")

    weights: dict[str, Any] = {
        "num_bits": arguments.bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": arguments.group_size,
    }
    if arguments.observer is not None:
        weights["observer"] = arguments.observer
    modifier = GPTQModifier(config_groups={"group_0": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head"])

    def compress() -> None:
        oneshot(
            model=model,
            dataset=dataset,
            recipe=modifier,
            num_calibration_samples=len(dataset),
            max_seq_length=input_ids.shape[1],
            shuffle_calibration_samples=False,
            batch_size=arguments.batch_size,
        )

    if arguments.profile is None:
        compress()
    else:
        import cProfile

        profiler = cProfile.Profile()
        profiler.runcall(compress)
        profiler.dump_stats(arguments.profile)
    stages.end("oneshot")

    model.save_pretrained(arguments.output, save_compressed=True)
    stages.end("save")

    scheme = next(m.quantization_scheme for m in model.modules() if getattr(m, "quantization_scheme", None) is not None)
    report = {
        "tool": "llm-compressor",
        "seconds": {**stages.seconds, "total": sum(stages.seconds.values())},
        "peak_rss_bytes": {**stages.peak_rss_bytes, "total": peak_rss_bytes()},
        "settings": {
            "bits": arguments.bits,
            "group_size": arguments.group_size,
            "threads": torch.get_num_threads(),
            "samples": input_ids.shape[0],
            "length": input_ids.shape[1],
            "batch_size": arguments.batch_size,
            "block_size": modifier.block_size,
            "dampening_frac": modifier.dampening_frac,
            "actorder": str(getattr(scheme.weights.actorder, "value", scheme.weights.actorder)),
            "observer": arguments.observer or "default",
        },
        "versions": {
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "compressed_tensors": compressed_tensors.__version__,
            "llmcompressor": llmcompressor.__version__,
        },
    }
    arguments.report.write_text(json.dumps(report, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
