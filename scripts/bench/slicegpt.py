"""Compares SliceGPT with simpler ways to a narrower model, and measures the time that a narrower model saves.

    python scripts/bench/slicegpt.py quality --model CHECKPOINT --calibration TEXT --test TEXT
    python scripts/bench/slicegpt.py speed --model llama:1024,4

`quality` is perplexity of a causal language model whose residual stream was narrowed, by method:

  magnitude      drop the channels of the residual stream with the smallest weights (`channel_weight`); no rotation
  energy         drop the channels with the least signal on the calibration text; no rotation
  random         rotate the stream by a random orthogonal matrix, then drop channels; mean of three seeds
  pca_global     SliceGPT with one rotation for the whole stream, from the covariances of all norms' inputs, summed
  pca_global_rms the same, each token divided by its root mean square first
  pca_per_site   SliceGPT as published (tests/support/slicegpt_reference.py): a rotation for each norm, matrices between

All except the last give a plain model of the same architecture, so at one width they have the same number of
parameters. A norm on a narrower stream divides by the root mean square over the original width (`narrow`). For the two
methods without a rotation the new width is tried too, and the better of both on calibration text is reported.
pca_per_site is measured at the same width, as in the paper, and at the largest width without more parameters
(pca_per_site_equal).

With --peer-source, a checkout of github.com/microsoft/TransformerCompression, its own code slices the same model with
the same tokens in an environment of its own, .venv-transformer-compression, made once from the requirements beside
scripts/bench/peers/transformer_compression.py, which says more; --peer-python names another.

`speed` compares seconds of prefill and of decoding one token, dense against narrowed, in turn in one process, with
the operations that were saved. Random weights are sufficient there, and `llama:HIDDEN,BLOCKS` makes some.
"""

from __future__ import annotations

import compressor  # noqa: F401 isort: skip (before torch, whose threads then sleep while they wait)

import argparse
import copy
import hashlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import result_file
import torch
import transformers
from random_models import is_random, random_llama
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from compressor.analysis.perturbation import answering
from compressor.analysis.residual_stream import residual_of
from compressor.analysis.rotation_proof import fold_norm
from compressor.evaluation.environment import cpu_name
from compressor.methods.rotation.rotation import Covariance, pca, random_orthogonal, rotate
from compressor.methods.rotation.sliced_shapes import (
    StreamShape,
    global_parameters,
    kept_width,
    per_sublayer_parameters,
    stream_shape,
    uniform_widths,
    widest_that_shrinks,
)
from compressor.model.block_runner import Pieces
from compressor.model.residual_records import Residual
from compressor.model.structure import find_blocks
from compressor.process.idle_threads import environment_of_user

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT / "tests" / "support"))
import slicegpt_reference as reference  # noqa: E402

RANDOM_SEEDS = (0, 1, 2)
ROUND_TO = 8
BATCH = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    quality_parser = commands.add_parser("quality")
    quality_parser.add_argument("--model", required=True, help="a checkpoint directory")
    quality_parser.add_argument("--calibration", type=Path, required=True, help="a text file")
    quality_parser.add_argument("--test", type=Path, required=True, help="another text file")
    quality_parser.add_argument("--samples", type=int, default=128, help="calibration sequences")
    quality_parser.add_argument("--test-samples", type=int, help="left out: all of the text")
    quality_parser.add_argument("--length", type=int, default=256)
    quality_parser.add_argument("--seed", type=int, default=0)
    quality_parser.add_argument("--peer-source", type=Path, help="checkout of microsoft/TransformerCompression")
    quality_parser.add_argument("--peer-python", type=Path, help="left out: made in .venv-transformer-compression")
    speed_parser = commands.add_parser("speed")
    speed_parser.add_argument("--model", default="llama:1024,4", help="a checkpoint, or llama:HIDDEN,BLOCKS (random)")
    speed_parser.add_argument("--prompt", type=int, default=512, help="tokens of the prefill")
    speed_parser.add_argument("--decode", type=int, default=16, help="tokens decoded after it")
    speed_parser.add_argument("--repeats", type=int, default=11)
    speed_parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    for subparser in (quality_parser, speed_parser):
        subparser.add_argument("--sparsity", type=float, nargs="+", default=[0.1, 0.2, 0.25, 0.3])
        subparser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
        result_file.add_output(subparser, f"slicegpt-{subparser.prog.split()[-1]}")
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)
    torch.set_grad_enabled(False)
    result = {
        "model": Path(settings.model).name,
        "cpu": cpu_name(),
        "threads": settings.threads,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        **(quality(settings) if settings.command == "quality" else speed(settings)),
    }
    result_file.write(result, settings.output)


# --- quality ----------------------------------------------------------------------------------------------------------


def quality(settings: argparse.Namespace) -> dict[str, Any]:
    model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    calibration = windows(settings.calibration, tokenizer, settings.length)
    order = torch.randperm(len(calibration), generator=torch.Generator().manual_seed(settings.seed))
    calibration = calibration[order[: settings.samples]]
    test = windows(settings.test, tokenizer, settings.length)
    if settings.test_samples:
        test = test[:: max(1, len(test) // settings.test_samples)][: settings.test_samples]  # spread over the text
    dense = model.num_parameters()
    untie(model)
    residual = residual_of(model, Pieces(model, find_blocks(model)))
    shape = stream_shape(residual, {name: list(p.shape) for name, p in model.named_parameters(remove_duplicate=False)})
    bases = find_bases(model, residual, calibration)
    rows = [row("dense", 0.0, shape.width, dense, perplexity(model, test))]
    print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    for sparsity in settings.sparsity:
        for found in measure(model, residual, shape, bases, sparsity, calibration, test):
            rows.append(found)
            print(json.dumps(found), file=sys.stderr, flush=True)
    result: dict[str, Any] = {
        "samples": len(calibration),
        "length": settings.length,
        "seed": settings.seed,
        "test_tokens": test.numel(),
        "sha256": {
            name: hashlib.sha256(path.read_bytes()).hexdigest()
            for name, path in (
                ("weights", Path(settings.model) / "model.safetensors"),
                ("calibration", settings.calibration),
                ("test", settings.test),
            )
        },
        "parameters": dense,
        "rows": rows,
    }
    if settings.peer_source:
        result["peer"] = run_peer(settings, calibration, test)
        rows += result["peer"].pop("rows")
    return result


def untie(model: PreTrainedModel) -> None:
    """Give a tied output head a matrix of its own, since it and the embedding are rotated differently."""
    head = model.get_output_embeddings()
    if head.weight is model.get_input_embeddings().weight:
        head.weight = torch.nn.Parameter(head.weight.clone())
        model.config.tie_word_embeddings = False


def measure(
    model: PreTrainedModel,
    residual: Residual,
    shape: StreamShape,
    bases: dict[str, list[Tensor]],
    sparsity: float,
    calibration: Tensor,
    test: Tensor,
) -> Iterator[dict[str, Any]]:
    """A row of each method at one sparsity."""
    width = kept_width(shape.width, sparsity, ROUND_TO)
    for method, choices in bases.items():
        found, counts = [], set()
        for basis in choices:
            candidates = [narrow(model, residual, basis[:, :width], shape.width)]
            if method in ("magnitude", "energy"):
                candidates.append(narrow(model, residual, basis[:, :width], width))
            best = min(candidates, key=lambda m: perplexity(m, calibration)) if candidates[1:] else candidates[0]
            found.append(perplexity(best, test))
            counts.add(best.num_parameters())
        if counts != {global_parameters(shape, width)}:
            raise AssertionError(f"{method}: {counts} parameters, not {global_parameters(shape, width)}")
        yield row(method, sparsity, width, counts.pop(), statistics.fmean(found))

    def count(narrower: int) -> int:
        return per_sublayer_parameters(shape, uniform_widths(shape, narrower))

    equal = widest_that_shrinks(count, global_parameters(shape, width) + 1, shape.width, ROUND_TO)
    for method, kept in (("pca_per_site", width), ("pca_per_site_equal", equal)):
        if kept is not None:
            sliced = slice_per_site(model, residual, calibration, kept)
            yield row(method, sparsity, kept, count(kept), perplexity(sliced, test))


def row(method: str, sparsity: float, width: int, parameters: int, found: float) -> dict[str, Any]:
    return {
        "method": method,
        "sparsity": sparsity,
        "width": width,
        "parameters": parameters,
        "perplexity": round(found, 4),
    }


def windows(path: Path, tokenizer: Any, length: int) -> Tensor:
    """(windows, length) int64: the text's tokens, divided without overlap, without the incomplete last window."""
    ids = tokenizer(path.read_text(encoding="utf-8"), return_tensors="pt", add_special_tokens=False).input_ids[0]
    return ids[: len(ids) // length * length].view(-1, length)


def perplexity(logits: Callable[..., Any], tokens: Tensor) -> float:
    """exp of the mean negative log likelihood of each window's tokens but its first."""
    total = 0.0
    for batch in tokens.split(BATCH):
        found = logits(input_ids=batch, use_cache=False).logits[:, :-1].float()
        total += float(torch.nn.functional.cross_entropy(found.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"))
    return math.exp(total / tokens[:, 1:].numel())


def find_bases(model: PreTrainedModel, residual: Residual, calibration: Tensor) -> dict[str, list[Tensor]]:
    """Of each method with one basis for the whole stream: orthogonal (D, D) float64, the columns to keep first."""
    width = residual.width
    raw, normalised = Covariance.zeros(width), Covariance.zeros(width)
    norms = {norm.module: model.get_submodule(norm.module) for norm in residual.norms()}
    for batch in calibration.split(BATCH):
        with answering(norms, {}) as calls:
            model(input_ids=batch, use_cache=False)
        for _, signal in calls:
            raw.add(signal)
            normalised.add(signal, normalised=True)

    def channels(score: Tensor) -> Tensor:
        return torch.eye(width, dtype=torch.float64)[:, score.argsort(descending=True, stable=True)]

    return {
        "magnitude": [channels(channel_weight(model, residual))],
        "energy": [channels(normalised.matrix.diagonal())],
        "random": [random_orthogonal(width, torch.Generator().manual_seed(seed)) for seed in RANDOM_SEEDS],
        "pca_global": [pca(raw.matrix)[1]],
        "pca_global_rms": [pca(normalised.matrix)[1]],
    }


def channel_weight(model: PreTrainedModel, residual: Residual) -> Tensor:
    """The weight of each channel of the stream, (D,) float64.

    It is the sum, over every matrix that reads or writes the stream, of the channel's share of that matrix's squared
    entries, with gains folded in. It is a share, so that no single matrix dominates. This is our choice, the plainest
    form of magnitude pruning.
    """
    folded = copy.deepcopy(model)
    for norm in residual.norms():
        fold_norm(folded, norm)
    edges = [*residual.writes(), *(consumer for norm in residual.norms() for consumer in norm.consumers)]
    score = torch.zeros(residual.width, dtype=torch.float64)
    for edge in edges:
        squares = folded.get_parameter(edge.parameter).double().square().movedim(edge.axis, 0).flatten(1).sum(1)
        score += squares / squares.sum()
    return score


def narrow(model: PreTrainedModel, residual: Residual, columns: Tensor, divisor: int) -> PreTrainedModel:
    """A model of the same architecture whose residual stream x is x @ columns.

    columns  (D, d) float64, orthonormal
    divisor  its norms compute x / sqrt(sum(x²) / divisor + eps); D is what makes d = D exact. The stock norm divides by
             d, so its gain is sqrt(divisor / d) and its eps is eps * divisor / d.
    """
    folded = copy.deepcopy(model)
    for norm in residual.norms():
        fold_norm(folded, norm)
    width = columns.shape[1]
    config = copy.deepcopy(model.config)
    config.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    config.hidden_size = width
    config.rms_norm_eps *= divisor / width
    config.tie_word_embeddings = False
    state = {name: parameter.double() for name, parameter in folded.state_dict().items()}
    for edge in [*residual.writes(), *(consumer for norm in residual.norms() for consumer in norm.consumers)]:
        state[edge.parameter] = rotate(state[edge.parameter], columns, edge.axis)
    for norm in residual.norms():
        state[f"{norm.module}.weight"] = torch.full((width,), (divisor / width) ** 0.5 - norm.formula.offset)
    narrowed = type(model)(config).to(model.dtype).eval()
    narrowed.load_state_dict(state)
    return narrowed


class PerSite:
    """The reference's sliced model in float32, called like a model."""

    def __init__(self, sliced: reference.Sliced) -> None:
        self.sliced = sliced
        sliced.pieces.model.float()
        self.shortcuts = [shortcut.float() for shortcut in sliced.shortcuts]

    def __call__(self, input_ids: Tensor, use_cache: bool) -> argparse.Namespace:
        pieces, residual = self.sliced.pieces, self.sliced.residual
        x, calls = pieces.embeddings({"input_ids": input_ids})
        for (site, branch), shortcut in zip(
            reference.all_sublayers(pieces, residual, calls), self.shortcuts, strict=True
        ):
            x = x @ shortcut + branch(reference.normed(x, residual.width, site.norms[0].formula.eps))
        head = pieces.model.get_output_embeddings()
        return argparse.Namespace(logits=head(reference.normed(x, residual.width, residual.end.formula.eps)))


def slice_per_site(model: PreTrainedModel, residual: Residual, calibration: Tensor, width: int) -> PerSite:
    double = copy.deepcopy(model).double()
    double.config.use_cache = False
    reference.fold(double, residual)
    widths = [width] * sum(map(len, residual.blocks)) + [residual.width]
    pieces = Pieces(double, find_blocks(double))
    return PerSite(reference.slice_model(pieces, residual, {"input_ids": calibration}, widths))


def run_peer(settings: argparse.Namespace, calibration: Tensor, test: Tensor) -> dict[str, Any]:
    """microsoft/TransformerCompression on the same model and tokens, scored by its own process."""
    python = settings.peer_python or peer_environment()
    with tempfile.TemporaryDirectory() as scratch:
        tokens, report = Path(scratch) / "tokens.safetensors", Path(scratch) / "report.json"
        save_file({"calibration": calibration.contiguous(), "test": test.contiguous()}, tokens)
        command = [python, HERE / "peers" / "transformer_compression.py", "--model", settings.model, "--tokens", tokens]
        command += ["--report", report, "--threads", settings.threads, "--batch", BATCH, "--round-to", ROUND_TO]
        command += ["--sparsity", *settings.sparsity]
        source = str((settings.peer_source / "src").resolve())
        child = {**environment_of_user(), "PYTHONPATH": source, "HF_HUB_OFFLINE": "1"}
        subprocess.run([str(part) for part in command], env=child, check=True)
        return json.loads(report.read_text())


def peer_environment() -> Path:
    """The interpreter of the peer's environment, made on first use."""
    home = ROOT / ".venv-transformer-compression"
    python = home / "bin" / "python"
    installed = home / ".installed"
    if not installed.exists():
        subprocess.run([sys.executable, "-m", "venv", home], check=True)
        requirements = HERE / "peers" / "requirements-transformer-compression.txt"
        subprocess.run([python, "-m", "pip", "install", "--quiet", "-r", requirements], check=True)
        installed.touch()
    return python


# --- speed ------------------------------------------------------------------------------------------------------------


def speed(settings: argparse.Namespace) -> dict[str, Any]:
    dtype = getattr(torch, settings.dtype)
    dense = speed_model(settings.model).to(dtype).eval()
    untie(dense)
    residual = residual_of(dense, Pieces(dense, find_blocks(dense)))
    width = residual.width
    basis = random_orthogonal(width, torch.Generator().manual_seed(0))  # the time doesn't depend on the basis
    models = {0.0: dense}
    for sparsity in settings.sparsity:
        models[sparsity] = narrow(dense, residual, basis[:, : kept_width(width, sparsity, ROUND_TO)], width)
    tokens = torch.randint(0, dense.config.vocab_size, (1, settings.prompt), generator=torch.Generator().manual_seed(0))
    seconds: dict[float, dict[str, list[float]]] = {sparsity: {"prefill": [], "decode": []} for sparsity in models}
    for number in range(settings.repeats + 1):
        for sparsity, model in models.items():  # in turn, so that other load on the machine affects all of them
            for stage, took in timed(model, tokens, settings.decode).items():
                if number:  # the first is warm-up
                    seconds[sparsity][stage].append(took)
    operations = {sparsity: count_operations(model, tokens) for sparsity, model in models.items()}
    rows = []
    for sparsity, model in models.items():
        found: dict[str, Any] = {
            "sparsity": sparsity,
            "width": model.config.hidden_size,
            "parameters": model.num_parameters(),
        }
        for stage in ("prefill", "decode"):
            own, whole = seconds[sparsity][stage], seconds[0.0][stage]
            found[stage] = {
                "seconds": statistics.median(own),
                "quartiles": statistics.quantiles(own, n=4)[::2],
                "operations": operations[sparsity][stage],
            }
            if sparsity:
                # of neighbouring measurements, which cancels most of the other load on the machine
                time_ratio = statistics.median(mine / theirs for mine, theirs in zip(own, whole, strict=True))
                ratio = operations[sparsity][stage] / operations[0.0][stage]
                found[stage] |= {
                    "time_ratio": round(time_ratio, 4),
                    "operations_ratio": round(ratio, 4),
                    "share_of_saving": round((1 - time_ratio) / (1 - ratio), 3),
                }
        rows.append(found)
        print(json.dumps(found), file=sys.stderr, flush=True)
    return {
        "dtype": settings.dtype,
        "prompt": settings.prompt,
        "decode": settings.decode,
        "repeats": settings.repeats,
        "rows": rows,
    }


def speed_model(name: str) -> PreTrainedModel:
    if not is_random(name):
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    return random_llama(name, vocab_size=4096)


def timed(model: PreTrainedModel, tokens: Tensor, decode: int) -> dict[str, float]:
    """Seconds of a prefill, and per token decoded after it."""
    began = time.perf_counter()
    cache = model(input_ids=tokens, use_cache=True, logits_to_keep=1).past_key_values
    prefilled = time.perf_counter()
    for number in range(decode):
        model(input_ids=tokens[:, number : number + 1], past_key_values=cache, use_cache=True)
    return {"prefill": prefilled - began, "decode": (time.perf_counter() - prefilled) / decode}


def count_operations(model: PreTrainedModel, tokens: Tensor) -> dict[str, int]:
    """Operations of all matrix products, attention's own included, counted on the meta device."""
    config = copy.deepcopy(model.config)
    config._attn_implementation = "eager"  # its products are plain ones, which the counter knows
    with torch.device("meta"):
        probe = type(model)(config).eval()
    tokens = tokens.to("meta")
    with FlopCounterMode(display=False) as prefill:
        cache = probe(input_ids=tokens, use_cache=True, logits_to_keep=1).past_key_values
    with FlopCounterMode(display=False) as decode:
        probe(input_ids=tokens[:, :1], past_key_values=cache, use_cache=True)
    return {"prefill": prefill.get_total_flops(), "decode": decode.get_total_flops()}


if __name__ == "__main__":
    main()
