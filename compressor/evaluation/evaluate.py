"""Measures a model before and after, on the same tokens, loaded as a user would load it, each in a fresh process.

Perplexity: samples of `length` tokens that don't overlap (stride = length), each read in one pass; the first
token of a sample has no context and is not scored. exp of the mean negative log likelihood over all scored tokens.
KL divergence: mean over positions of KL(before || after) of the next-token distributions, in nats. Top-1 agreement:
share of positions whose most likely token is the same. The interval is a 95 % bootstrap over samples, seeded.
`intervals` are what gates with a confidence are judged by: at that level, and paired: both sides read the same samples.

Layers that hold a range for their input, found on calibration data, are asked how many of the values they read while
quality is measured lie outside of it (`Layer.outside`).
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from compressor.artifact.loader import load
from compressor.artifact.manifest import read_manifest
from compressor.artifact.stock_loading import OFFLINE, load_stock, stock_works
from compressor.data.samples import Samples
from compressor.errors import ModelError
from compressor.evaluation.environment import peak_rss_bytes
from compressor.evaluation.kept_patches import kept_patches
from compressor.kernels.prepared.prepare import chosen_kernels
from compressor.model.attention import plain_options
from compressor.model.block_runner import output_of, without_cache
from compressor.model.checkpoint import Checkpoint, open_checkpoint
from compressor.model.model_class import class_of
from compressor.process.child import ask
from compressor.process.resources import ran_out
from compressor.storage.file_names import MANIFEST
from compressor.storage.safetensors_file import read_header

HERE = "compressor.evaluation.evaluate"
BOOTSTRAP_DRAWS = 1000
SCALES = re.compile("scale|zero_point|exponent|shape|g_idx|SCB|format|outlier|table|^bias")  # beside what is stored
PREFILL_TOKENS, DECODE_TOKENS, SPEED_RUNS = 128, 32, 5
SPEED_TOKENS = PREFILL_TOKENS + DECODE_TOKENS
SPEED_BATCH = 32  # samples at once, of a model that answers for samples
QUALITY = ("perplexity", "kl_divergence", "top1_agreement", "hidden_cosine", "accuracy")
DIRECTION = {
    "perplexity": "lower",
    "kl_divergence": "lower",
    "top1_agreement": "higher",
    "hidden_cosine": "higher",
    "accuracy": "higher",
}
UNIT = {
    "perplexity": "per token",
    "kl_divergence": "nats per token",
    "top1_agreement": "share of positions",
    "hidden_cosine": "mean cosine",
    "accuracy": "share of samples",
}


RATES = ("prefill_tokens_per_second", "decode_tokens_per_second", "samples_per_second")


@dataclass(frozen=True)
class Measured:
    """What an evaluation found.

    metrics     by name; one that can't be measured has `after: null` and a `reason`
    saturation  `layers`: name, values read and how many were outside; `reason` why layers are missing there, or null
    patches     of images, which a token pruner kept (`compressor.evaluation.kept_patches`); None without one
    kernels     what `compressor.load` multiplies stored forms by (`prepared.chosen_kernels`); None
                where speed was not measured
    """

    metrics: dict[str, Any] = field(default_factory=dict)
    speed: dict[str, Any] = field(default_factory=dict)
    saturation: dict[str, Any] = field(default_factory=lambda: uncounted("quality was not measured"))
    patches: dict[str, Any] | None = None
    kernels: list[dict[str, str]] | None = None


def evaluate(
    before: Path | None,
    after: Path,
    samples: Samples,
    settings: Any,
    scratch: Path,
    *,
    threads: int,
    seed: int,
    most_tokens: int | None = None,
    trust_remote_code: bool = False,
) -> Measured:
    """Quality, speed and saturation.

    before       source checkpoint; None measures `after` alone
    most_tokens  that the model takes at once, if they are less than `SPEED_TOKENS`
    raises  what `load_model` raises, and what `child.ask` does
    """
    tokens = scratch / "eval-samples.safetensors"
    save_file({f"{number:06d}": sample.contiguous() for number, sample in enumerate(samples.inputs)}, tokens)
    if samples.labels is not None:
        save_file({"labels": samples.labels}, scratch / "eval-labels.safetensors")
    common = {
        "tokens": str(tokens),
        "labels": str(scratch / "eval-labels.safetensors") if samples.labels is not None else None,
        "threads": threads,
        "batch_size": settings.batch_size,
        "seed": seed,
        "confidence": settings.confidence,
        "most_tokens": most_tokens,
        "trust_remote_code": trust_remote_code,
    }
    wanted = [name for name in settings.metrics if name in QUALITY]
    request = {"kind": "quality", "before": str(before) if before else None, "after": str(after), "metrics": wanted}
    quality = ask(HERE, {**common, **request}, "measures quality") if wanted else {}
    speed: dict[str, Any] = {}
    if {"speed", "memory"} & set(settings.metrics):
        answers = {
            side: ask(HERE, {**common, "kind": "speed", "model": str(path)}, f"measures the speed {side}")
            for side, path in (("before", before), ("after", after))
            if path is not None
        }
        for name in answers["after"]:
            speed[name] = {side: answer[name] for side, answer in answers.items()}
    kernels = None
    if "speed" in settings.metrics and (after / MANIFEST).is_file() and read_manifest(after)["weights"]:
        asked = {**common, "kind": "speed", "model": str(after), "kernels": True}
        found = ask(HERE, asked, "measures the speed of the kernels")
        kernels = found["kernels"]
        for name in (name for name in RATES if name in found):
            dense = {"before": speed[name]["before"]} if before is not None else {}
            speed[f"kernels_{name}"] = {**dense, "after": found[name]}
    return Measured(speed=speed, kernels=kernels, **quality)


def weight_sizes(checkpoint: Checkpoint, directory: Path, forms: dict[str, Any], plan: Any) -> dict[str, Any]:
    """Bytes of the weight files before and after, by class of tensor. Headers are counted in the totals."""
    files = sorted(directory.glob("*.safetensors"))
    structure = plan.structure
    table = _input_table(structure.model)
    embedded = {name for name, parameter in structure.model.named_parameters() if parameter is table}
    head = {weight.parameter for stage in structure.stages(structure.block_count + 1) for g in stage for weight in g}
    parameter = structure.bindings.parameter_of()
    classes = dict.fromkeys(("quantized", "scales", "embedding", "head", "norms", "dense", "other"), 0)
    matrices = {weight.tensor for _, weight in structure.weights() if weight.role != "embedding"}
    for file in files:
        for name, info in read_header(file).items():
            stem, _, suffix = name.rpartition(".")
            if stem in forms and suffix != "bias":
                kind = "scales" if SCALES.search(suffix) else "quantized"
            elif parameter.get(name) in embedded:
                kind = "embedding"
            elif parameter.get(name) in head:
                kind = "head"
            elif name in matrices:
                kind = "dense"
            else:
                kind = "norms" if "norm" in name.lower() or ".ln_" in name else "other"
            classes[kind] += info.nbytes
    before = checkpoint.weight_file_bytes
    after = sum(file.stat().st_size for file in files)
    parameters = sum(math.prod(info.shape) for info in checkpoint.tensors.values())
    return {
        "before_bytes": before,
        "after_bytes": after,
        "ratio": after / before,
        "bits_per_parameter": 8 * after / parameters,
        "by_class": classes,
        "predicted_bytes": plan.weight_bytes,
        "predicted_artifact_bytes": plan.artifact_bytes,
        "parameters": parameters,
    }


def _input_table(model: Any) -> Tensor | None:
    """The table that a model looks tokens up in; None where it has none, as of images."""
    try:
        return getattr(model.get_input_embeddings(), "weight", None)  # a ViT's is a module of modules
    except NotImplementedError:  # so transformers answers for SwiftFormer, a network of convolutions
        return None


def load_model(directory: Path, trust_remote_code: bool) -> Any:
    """A source checkpoint or an artifact through transformers, in its own dtype, in eval mode."""
    if (directory / MANIFEST).is_file():
        return load_stock(directory, read_manifest(directory))[0]
    checkpoint = open_checkpoint(directory, trust_remote_code=trust_remote_code)
    cls: Any = class_of(checkpoint, trust_remote_code)
    with stock_works(directory, ModelError):
        return cls.from_pretrained(directory, **OFFLINE, **plain_options(checkpoint.config)).eval()


def measure_quality(request: dict[str, Any]) -> dict[str, Any]:
    """`metrics` of both models on the same batches, one batch at a time, and `saturation` of the later one."""
    before = load_model(Path(request["before"]), request["trust_remote_code"]) if request["before"] else None
    after = load_model(Path(request["after"]), request["trust_remote_code"])
    labels = load_file(request["labels"])["labels"] if request["labels"] else None
    samples = _read_samples(request)
    counts = watch_ranges(after)
    totals: dict[str, list[Tensor]] = {}
    for numbers, stacked in samples.batches(request["batch_size"]):
        outputs: list[Any] = []
        for model in (before, after):
            if model is None:
                outputs.append(None)
                continue
            value = stacked if samples.is_text else stacked.to(after.dtype)
            directory = Path(request["before" if model is before else "after"])
            with torch.no_grad(), without_cache(model), stock_works(directory, ModelError):
                outputs.append(output_of(model(**{model.main_input_name: value})).float())
        wanted = None if labels is None else labels[numbers]
        if wanted is not None and outputs[1].dim() == 2 and int(wanted.max()) >= outputs[1].shape[1]:
            raise ModelError(
                f"the data has the label {int(wanted.max())}, the model's classes are 0 to {outputs[1].shape[1] - 1}",
                where=Path(request["after"]).name,
                hint="Use the data that the model was trained for.",
                data={"label": int(wanted.max()), "classes": outputs[1].shape[1]},
            )
        for key, value in _batch_sums(outputs[0], outputs[1], stacked, wanted, _is_causal(after)).items():
            totals.setdefault(key, []).append(value)
    joined = {key: torch.cat(values).double() for key, values in totals.items()}
    level = request.get("confidence")
    return {
        "metrics": {
            name: _metric(name, joined, request["seed"], before is not None, level) for name in request["metrics"]
        },
        "saturation": saturation(Path(request["after"]), after, counts),
        "patches": None if samples.is_text else kept_patches(after, samples.inputs),
    }


def watch_ranges(model: Any) -> dict[str, list[int]]:
    """Count from now on, by module: values read, and those outside the range it holds.

    Every module with a method `outside(x)` is asked (see `Layer.outside`); None says that it has no range.
    """
    counts: dict[str, list[int]] = {}

    def count(name: str, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        found = module.outside(x)
        if found is not None:
            seen = counts.setdefault(name, [0, 0])
            seen[0] += x.numel()
            seen[1] += int(found)

    for name, module in model.named_modules():
        if _says_outside(module):
            module.register_forward_pre_hook(
                lambda module, args, kwargs, name=name: count(name, module, args, kwargs), with_kwargs=True
            )
    return counts


def saturation(directory: Path, model: Any, counts: dict[str, list[int]]) -> dict[str, Any]:
    """The report's section, from what `watch_ranges` counted; a layer that stands for a weight has its name."""
    manifest = read_manifest(directory) if (directory / MANIFEST).is_file() else {"weights": {}}
    module_of = {name: entry["parameter"].removesuffix(".weight") for name, entry in manifest["weights"].items()}
    modules = dict(model.named_modules())
    silent = [name for name, module in module_of.items() if not _says_outside(modules.get(module))]
    reason = None
    if silent:
        reason = (
            f"{len(silent)} stored weights, such as {silent[0]}, run in the loader's own layers ({manifest['route']}), "
            "which don't say what lies outside a range"
        )
    elif not counts:
        reason = "no layer holds a range for its input"
    named = {module: name for name, module in module_of.items()}
    rows = [
        {"name": named.get(module, module), "values": values, "outside": outside}
        for module, (values, outside) in sorted(counts.items())
    ]
    return {"reason": reason, "layers": rows}


def uncounted(reason: str) -> dict[str, Any]:
    """The section where nothing was counted."""
    return {"reason": reason, "layers": []}


def _says_outside(module: Any) -> bool:
    return callable(getattr(module, "outside", None))


def _batch_sums(
    before: Tensor | None, after: Tensor, inputs: Tensor, labels: Tensor | None, causal: bool
) -> dict[str, Tensor]:
    """Per sample (batch,): sums and counts that the metrics are made of."""
    result: dict[str, Tensor] = {}
    sides = {"before": before, "after": after}
    if causal:
        targets = inputs[:, 1:]
        result["count"] = torch.full((len(inputs),), float(targets.shape[1]))
        logs = {side: F.log_softmax(value[:, :-1], -1) for side, value in sides.items() if value is not None}
        for side, log in logs.items():
            result[f"nll_{side}"] = -log.gather(-1, targets.unsqueeze(-1)).squeeze(-1).double().sum(1)
        if before is not None:
            result["kl"] = (logs["before"].exp() * (logs["before"] - logs["after"])).sum(-1).double().sum(1)
            result["agree"] = (logs["before"].argmax(-1) == logs["after"].argmax(-1)).double().sum(1)
        return result
    if before is not None and before.shape != after.shape:  # tokens were pruned; pooled embeddings can be compared
        before, after = before.mean(1), after.mean(1)
        result["cosine"] = F.cosine_similarity(before, after, dim=-1)
        return result
    if before is not None:
        cosine = F.cosine_similarity(
            before.flatten(0, -2) if before.dim() == 3 else before,
            after.flatten(0, -2) if after.dim() == 3 else after,
            dim=-1,
        )
        result["cosine"] = cosine.view(len(inputs), -1).mean(1)
    if after.dim() == 2:
        if before is not None:
            logs = {side: F.log_softmax(value, -1) for side, value in (("before", before), ("after", after))}
            result["kl"] = (logs["before"].exp() * (logs["before"] - logs["after"])).sum(-1)
            result["agree"] = (before.argmax(-1) == after.argmax(-1)).double()
            result["count"] = torch.ones(len(inputs))
        if labels is not None:
            for side, value in sides.items():
                if value is not None:
                    result[f"right_{side}"] = (value.argmax(-1) == labels).double()
    return result


def _metric(
    name: str, sums: dict[str, Tensor], seed: int, has_before: bool, confidence: float | None = None
) -> dict[str, Any]:
    """before, after, change_percent, 95 % interval of `after`; nulls with a reason if the model has no such thing.

    confidence  level of the `intervals` that gates are judged by; None leaves them out
    """
    needed = {
        "perplexity": ("nll_{}", "count"),
        "kl_divergence": ("kl", "count"),
        "top1_agreement": ("agree", "count"),
        "hidden_cosine": ("cosine", None),
        "accuracy": ("right_{}", None),
    }[name]
    row = _unmeasured(name)
    key = needed[0].format("after")
    if key not in sums:
        compares = needed[0] == key and name != "accuracy"
        row["reason"] = (
            "there is no baseline to compare with"
            if compares and not has_before
            else "this model, or the data without labels, has no such measure"
        )
        return row
    count = sums[needed[1]] if needed[1] else torch.ones_like(sums[key])
    finish = math.exp if name == "perplexity" else float
    row["after"] = _safe(finish, float(sums[key].sum() / count.sum()))
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(len(count), (BOOTSTRAP_DRAWS, len(count)), generator=generator)
    means = sums[key][draws].sum(1) / count[draws].sum(1)
    row["interval"] = [_safe(finish, float(means.quantile(q))) for q in (0.025, 0.975)]
    earlier = needed[0].format("before")
    if earlier != key and earlier in sums:
        row["before"] = _safe(finish, float(sums[earlier].sum() / count.sum()))
        if row["before"] and row["after"] is not None:
            row["change_percent"] = 100 * (row["after"] - row["before"]) / row["before"]
    if confidence is not None:
        after = means.exp() if name == "perplexity" else means
        drawn = {"value": after}
        if row["before"] is not None and row["after"] is not None:
            means = sums[earlier][draws].sum(1) / count[draws].sum(1)
            before = means.exp() if name == "perplexity" else means
            drawn |= {"increase_percent": 100 * (after / before - 1), "drop_points": 100 * (before - after)}
        tails = ((1 - confidence) / 2, (1 + confidence) / 2)
        row["intervals"] = {
            key: [_safe(float, float(values.quantile(q))) for q in tails] for key, values in drawn.items()
        }
    return row


def unmeasured(names: Iterable[str], reason: str) -> dict[str, Any]:
    """Rows of metrics that were asked for, and for this reason not measured."""
    return {name: {**_unmeasured(name), "reason": reason} for name in names if name in QUALITY}


def _unmeasured(name: str) -> dict[str, Any]:
    return {
        "before": None,
        "after": None,
        "change_percent": None,
        "interval": [None, None],
        "direction": DIRECTION[name],
        "unit": UNIT[name],
    }


def _safe(finish: Any, value: float) -> float | None:
    try:
        result = finish(value)
    except OverflowError:
        return None
    return result if math.isfinite(result) else None


def measure_speed(request: dict[str, Any]) -> dict[str, Any]:
    """Load time, prefill and decode rate, of an encoder samples a second in batches of 32 (medians after a warm-up),
    and peak memory, of one model alone: as stock transformers loads it, or with `kernels` as `compressor.load` does.
    """
    began, directory = time.perf_counter(), Path(request["model"])
    model: Any
    if request.get("kernels"):
        model = load(directory, check_hashes=False)
    else:
        model = load_model(directory, request["trust_remote_code"])
    load_seconds = time.perf_counter() - began
    samples = _read_samples(request)
    result: dict[str, Any] = {"load_seconds": load_seconds}
    most = request["most_tokens"] or SPEED_TOKENS
    taken = min(PREFILL_TOKENS, most)
    sample = samples.inputs[0][:taken] if samples.is_text else samples.inputs[0].to(model.dtype)
    inputs = {model.main_input_name: sample.unsqueeze(0)}
    with torch.no_grad(), stock_works(directory, ModelError), _cache_if_any(model, inputs):
        model(**inputs)
        times = [_timed(lambda: model(**inputs)) for _ in range(SPEED_RUNS)]
        result["prefill_tokens_per_second"] = len(sample) / sorted(times)[SPEED_RUNS // 2] if samples.is_text else None
        result["decode_tokens_per_second"] = None
        if _is_causal(model) and most > DECODE_TOKENS:
            result["decode_tokens_per_second"] = _decode_rate(model, sample[: most - DECODE_TOKENS].unsqueeze(0))
        if not _is_causal(model):
            many = {name: value.expand(SPEED_BATCH, *value.shape[1:]).contiguous() for name, value in inputs.items()}
            model(**many)
            times = [_timed(lambda: model(**many)) for _ in range(SPEED_RUNS)]
            result["samples_per_second"] = SPEED_BATCH / sorted(times)[SPEED_RUNS // 2]
    result["peak_rss_bytes"] = peak_rss_bytes()
    if request.get("kernels"):
        result["kernels"] = chosen_kernels(model)
    return result


def _cache_if_any(model: Any, inputs: dict[str, Tensor]) -> AbstractContextManager[None]:
    """Prompts are read with a cache, as servers do, but by a class that has none for what it is made of."""
    try:
        model(**inputs)
    except ValueError:  # so transformers refuses: a Jamba without attention
        return without_cache(model)
    return nullcontext()


def _decode_rate(model: Any, prompt: Tensor) -> float | None:
    """Tokens a second; None for a model that can't generate, which `verify` tells apart from one that no longer can."""
    options = {
        "max_new_tokens": DECODE_TOKENS,
        "min_new_tokens": DECODE_TOKENS,
        "do_sample": False,
        "attention_mask": torch.ones_like(prompt),
    }
    try:
        model.generate(prompt, **options)
    except Exception as error:  # any: such as of a class without a cache for what it is made of
        if (lack := ran_out(error)) is not None:
            raise lack from error
        return None
    times = [_timed(lambda: model.generate(prompt, **options)) for _ in range(3)]
    return DECODE_TOKENS / sorted(times)[1]


def _timed(work: Any) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _is_causal(model: Any) -> bool:
    return model.can_generate() and model.main_input_name == "input_ids"


def _read_samples(request: dict[str, Any]) -> Samples:
    stored = load_file(request["tokens"])
    return Samples(tuple(stored[name] for name in sorted(stored)), "", "")


def main(request: dict[str, Any]) -> dict[str, Any]:
    """Answer `evaluate`, in a fresh process."""
    torch.set_num_threads(request["threads"])
    torch.manual_seed(request["seed"])
    return measure_quality(request) if request["kind"] == "quality" else measure_speed(request)


__all__ = ["evaluate", "load", "load_model", "measure_quality", "measure_speed", "weight_sizes"]
