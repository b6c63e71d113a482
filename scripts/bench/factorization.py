"""Measures quality against bytes of dsformer, low_rank and gptq on one model.

    python scripts/bench/factorization.py --model CHECKPOINT --calibration DATA --test DATA --output FILE

Each point is a run of the pass on the matrices of all blocks; embeddings and output head stay. The artifact is loaded
as `compressor.load` does and measured in this process: perplexity of a causal model on packed text, accuracy of a
classifier on single samples (a .tsv with text and label), and for both the KL divergence from the dense model's
outputs. Points that FILE already has are kept. Bytes are those of the stored matrices only, without biases and
dense weights.

`bytes_saved` is the share of bytes that dsformer saves compared with low_rank of the same stored dtype at the same KL
divergence, on low_rank's curve of straight lines between its points on logarithmic scales.
"""

from __future__ import annotations

import compressor  # isort: skip (before torch, whose threads then sleep while they wait)

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import result_file
import torch
import transformers
import yaml
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from compressor.data.samples import Samples, load_samples
from compressor.evaluation.environment import cpu_name
from compressor.recipe.recipe import parse_recipe
from compressor.recipe.schema import EvalDataSettings
from compressor.run import compress
from compressor.storage.files import file_sha256

BATCH = 16
RATIOS = (0.25, 0.5, 0.15)
BITS = (4, 3, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a checkpoint directory: a causal model, or a classifier")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=256, help="calibration samples")
    parser.add_argument("--test-samples", type=int, default=2000)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ratios", type=float, nargs="*", default=RATIOS, help="of dsformer and low_rank")
    parser.add_argument("--values", nargs="*", default=["float16", "int8"], help="stored types of both")
    parser.add_argument("--bits", type=int, nargs="*", default=BITS, help="of gptq")
    parser.add_argument("--group-size", type=int, default=64, help="of gptq")
    parser.add_argument("--refine-steps", type=int, default=0, help="adds dsformer float16 refined by so many steps")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    result_file.add_output(parser, "factorization")
    measure(parser.parse_args())


def steps(settings: argparse.Namespace) -> Iterator[tuple[str, float, dict[str, Any]]]:
    """Method, its requested value, and its step of a recipe."""
    for bits in settings.bits:
        yield "gptq", bits, {"pass": "gptq", "bits": bits, "group_size": settings.group_size}
    for values in settings.values:
        for ratio in settings.ratios:
            for name in ("dsformer", "low_rank"):
                yield f"{name} {values}", ratio, {"pass": name, "ratio": ratio, "values": values}
    for ratio in settings.ratios if settings.refine_steps else ():
        more = {"refine_steps": settings.refine_steps}
        yield "dsformer float16 refined", ratio, {"pass": "dsformer", "ratio": ratio, **more}


def measure(settings: argparse.Namespace) -> None:
    torch.set_num_threads(settings.threads)
    torch.set_grad_enabled(False)
    causal = "CausalLM" in AutoConfig.from_pretrained(settings.model).architectures[0]
    kind = AutoModelForCausalLM if causal else AutoModelForSequenceClassification
    dense = kind.from_pretrained(settings.model, dtype=torch.float32).eval()
    shape = {"length": settings.length, "pack": causal, "seed": settings.seed}
    data = {"source": str(settings.calibration), "samples": settings.samples, **shape}
    test = {"source": str(settings.test), "samples": settings.test_samples, **shape}
    samples = load_samples(
        EvalDataSettings(**test), Path(settings.model), seed=settings.seed, vocabulary=dense.config.vocab_size
    )
    wanted = outputs(dense, samples)
    result: dict[str, Any] = {
        "model": Path(settings.model).name,
        "task": "perplexity" if causal else "accuracy",
        "cpu": cpu_name(),
        "threads": settings.threads,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "calibration_samples": settings.samples,
        "test_samples": len(samples.inputs),
        "length": settings.length,
        "seed": settings.seed,
        "sha256": {
            name: file_sha256(path)
            for name, path in (
                ("weights", Path(settings.model) / "model.safetensors"),
                ("calibration", settings.calibration),
                ("test", settings.test),
            )
        },
        "dense": quality(wanted, wanted, samples, causal),
        "rows": [],
    }
    if settings.output.exists():
        before = json.loads(settings.output.read_text())
        same = ("sha256", "calibration_samples", "test_samples", "length", "seed")
        if any(before[key] != result[key] for key in same):
            raise SystemExit(f"{settings.output} has points of another model, data or samples. Name another --output.")
        result["rows"] = before["rows"]
    done = {(row["method"], row["asked"]) for row in result["rows"]}
    for method, asked, step in steps(settings):
        if (method, asked) in done:
            continue
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as scratch:
            tree = {"version": 1, "name": "bench", "seed": settings.seed, "data": data, "steps": [step]}
            recipe = parse_recipe(yaml.safe_dump({**tree, "report": {"html": False}}).encode(), "bench.yaml")
            report = compress(recipe, settings.model, Path(scratch) / "out", measure=False)
            took = time.perf_counter() - began
            found = outputs(compressor.load(Path(scratch) / "out").eval(), samples)
        weights = report["weights"]
        stored = sum(row["bytes_after"] for row in weights)
        whole = sum(2 * math.prod(row["shape"]) for row in weights)
        row = {
            "method": method,
            "asked": asked,
            "bytes": stored,
            "share_of_16_bits": round(stored / whole, 4),
            **quality(found, wanted, samples, causal),
            "output_error": round(sum(row["output_error"] for row in weights) / len(weights), 5),
            "chosen_sparse": sum(row.get("chosen") == "sparse" for row in weights),
            "matrices": len(weights),
            "seconds": round(took, 1),
        }
        result["matrices_16_bit_bytes"] = whole
        result["rows"].append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
        result["bytes_saved"] = bytes_saved(result["rows"])
        result_file.write(result, settings.output)


def outputs(model: PreTrainedModel, samples: Samples) -> list[Tensor]:
    """Logits (tokens or 1, classes) of each sample."""
    name = model.main_input_name
    found: list[Tensor] = []
    for _, batch in samples.batches(BATCH):
        logits = model(**{name: batch}).logits
        found += list(logits[:, :-1] if logits.dim() == 3 else logits[:, None])
    return found


def quality(found: list[Tensor], wanted: list[Tensor], samples: Samples, causal: bool) -> dict[str, float]:
    order = [number for numbers, _ in samples.batches(BATCH) for number in numbers]
    divergence, loss, hits, count = 0.0, 0.0, 0, 0
    for number, mine, theirs in zip(order, found, wanted, strict=True):
        log, target = mine.log_softmax(-1), theirs.log_softmax(-1)
        divergence += float((target.exp() * (target - log)).sum())
        count += len(mine)
        if causal:
            loss -= float(log.gather(1, samples.inputs[number].flatten()[1:, None]).sum())
        else:
            hits += int(mine.argmax(-1) == samples.labels[number])
    measured = {"perplexity": round(math.exp(loss / count), 3)} if causal else {"accuracy": round(hits / count, 5)}
    return {**measured, "kl_divergence": round(divergence / count, 6)}


def bytes_saved(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each dsformer point: 1 - its bytes / low_rank's at the same KL divergence."""
    saved = []
    for row in rows:
        if not row["method"].startswith("dsformer"):
            continue
        rival = row["method"].replace("dsformer", "low_rank").removesuffix(" refined")
        curve = sorted((r["kl_divergence"], r["bytes"]) for r in rows if r["method"] == rival)
        for (low, more), (high, less) in pairwise(curve):
            if low <= row["kl_divergence"] <= high:
                share = math.log(row["kl_divergence"] / low) / math.log(high / low)
                same = math.exp((1 - share) * math.log(more) + share * math.log(less))
                saved.append(
                    {"method": row["method"], "asked": row["asked"], "bytes_saved": round(1 - row["bytes"] / same, 4)}
                )
    return saved


if __name__ == "__main__":
    main()
