"""Defines the quality metrics: sums over one batch, and the rows of the report that are computed from them.

- Perplexity: samples of `length` tokens that don't overlap (stride = length), each read in one forward. The first
  token of a sample has no context and is not scored. It is exp of the mean negative log likelihood over all scored
  tokens.
- KL divergence: mean over positions of KL(before || after) of the next-token distributions, in nats.
- Top-1 agreement: share of positions whose most likely token is the same.

The interval is a seeded 95 % bootstrap over samples. `intervals` decide gates with a confidence: they are at that
level, and paired, since both models read the same samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from compressor.artifact.memory_needs import CHUNK_BYTES
from compressor.errors import ModelError
from compressor.evaluation.sections import MetricRow
from compressor.methods.divergence import kl_divergence

BOOTSTRAP_DRAWS = 1000
BOTH_ENDS = (0.025, 0.975)  # quantiles of the 95 % interval
BYTES_PER_LOGIT = 28  # of both models: in 16 bits and in float32, their logarithms, and two working copies in float32


@dataclass(frozen=True)
class Metric:
    """How a metric is computed from sums over samples (`batch_sums`); {} stands for before or after.

    count  the sum is divided by this; None: by the number of samples
    """

    direction: str
    unit: str
    sums: str
    count: str | None
    finish: Callable[[float], float] = float

    @property
    def compares(self) -> bool:
        """Whether it is a distance between two models, without a value of each."""
        return "{}" not in self.sums

    def drawn(self, means: Tensor) -> Tensor:
        """Its values, from the means of bootstrap draws."""
        return means.exp() if self.finish is math.exp else means


METRICS = {
    "perplexity": Metric("lower", "per token", "nll_{}", "count", math.exp),
    "kl_divergence": Metric("lower", "nats per token", "kl", "count"),
    "top1_agreement": Metric("higher", "share of positions", "agree", "count"),
    "hidden_cosine": Metric("higher", "mean cosine", "cosine", None),
    "accuracy": Metric("higher", "share of samples", "right_{}", None),
}
QUALITY = tuple(METRICS)


def batch_sums(
    before: Tensor | None, after: Tensor, inputs: Tensor, labels: Tensor | None, causal: bool
) -> dict[str, Tensor]:
    """Sums and counts for each sample (batch,), from which the metrics are computed."""
    if causal:
        return _next_token_sums(before, after, inputs)
    if before is not None and before.shape != after.shape:  # tokens were pruned; only pooled embeddings can be compared
        return {"cosine": F.cosine_similarity(before.mean(1), after.mean(1), dim=-1)}
    result: dict[str, Tensor] = {}
    if before is not None:
        first, second = (value.flatten(0, -2) if value.dim() == 3 else value for value in (before, after))
        result["cosine"] = F.cosine_similarity(first, second, dim=-1).view(len(inputs), -1).mean(1)
    return result | (_class_sums(before, after, labels) if after.dim() == 2 else {})


def _next_token_sums(before: Tensor | None, after: Tensor, inputs: Tensor) -> dict[str, Tensor]:
    """Sums from logits for each position (batch, length, vocabulary)."""
    rows = range(len(inputs))
    earlier = [None if before is None else before[row, :-1] for row in rows]
    return joined_sums(next_token_sums(earlier[row], after[row, :-1], inputs[row, 1:]) for row in rows)


def next_token_sums(before: Tensor | None, after: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Sums over positions of one sample, each (1,).

    before, after  logits (positions, vocabulary) of any floating dtype; positions are read in chunks of CHUNK_BYTES
    targets        the tokens that follow the positions
    """
    chunk = chunk_positions(after.shape[-1])
    values: dict[str, list[Tensor]] = {"count": [torch.tensor([float(len(targets))])]}
    for start in range(0, max(1, len(targets)), chunk):  # a sample of one token has sums, too
        at = slice(start, start + chunk)
        sides = {"before": before, "after": after}
        logs = {side: F.log_softmax(value[at].float(), -1) for side, value in sides.items() if value is not None}
        for side, log in logs.items():
            values.setdefault(f"nll_{side}", []).append(-log.gather(-1, targets[at].unsqueeze(-1)).double().sum(0))
        if before is not None:
            first, second = logs["before"], logs["after"]
            values.setdefault("agree", []).append((first.argmax(-1) == second.argmax(-1)).double().sum(0, keepdim=True))
            values.setdefault("kl", []).append(kl_divergence(first, second).double().sum(0, keepdim=True))
    return {key: torch.stack(parts).sum(0) for key, parts in values.items()}


def joined_sums(parts: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The sums of all samples, in order."""
    found: dict[str, list[Tensor]] = {}
    for part in parts:
        for key, value in part.items():
            found.setdefault(key, []).append(value)
    return {key: torch.cat(values) for key, values in found.items()}


def chunk_positions(vocabulary: int) -> int:
    """Positions whose logits are compared at a time: those whose working copies take CHUNK_BYTES, at least one."""
    return max(1, CHUNK_BYTES // (BYTES_PER_LOGIT * vocabulary))


def _class_sums(before: Tensor | None, after: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
    """Sums from logits for each sample (batch, classes)."""
    result: dict[str, Tensor] = {}
    if before is not None:
        result["kl"] = kl_divergence(F.log_softmax(before, -1), F.log_softmax(after, -1))
        result["agree"] = (before.argmax(-1) == after.argmax(-1)).double()
        result["count"] = torch.ones(len(after))
    if labels is not None:
        for side, value in (("before", before), ("after", after)):
            if value is not None:
                result[f"right_{side}"] = (value.argmax(-1) == labels).double()
    return result


def check_labels(labels: Tensor, outputs: Tensor, where: str) -> None:
    """raises ModelError for a label beyond the model's classes"""
    if outputs.dim() != 2 or int(labels.max()) < outputs.shape[1]:
        return
    raise ModelError(
        f"the data has the label {int(labels.max())}, but the model's classes are 0 to {outputs.shape[1] - 1}",
        where=where,
        hint="Evaluate on data with the model's own classes, or leave accuracy out of eval.metrics.",
        data={"label": int(labels.max()), "classes": outputs.shape[1]},
    )


def metric_row(
    name: str, sums: dict[str, Tensor], seed: int, has_before: bool, confidence: float | None = None
) -> MetricRow:
    """before, after, change_percent, 95 % interval of `after`; nulls with a reason if the model has no such metric.

    confidence  level of the `intervals` that decide gates; None: no intervals
    """
    metric, row = METRICS[name], _unmeasured(name)
    key, earlier = metric.sums.format("after"), metric.sums.format("before")
    if key not in sums:
        row["reason"] = (
            "there is no baseline for a comparison"
            if metric.compares and not has_before
            else "this model, or data without labels, has no such metric"
        )
        return row
    count = sums[metric.count] if metric.count else torch.ones_like(sums[key])
    row["after"] = after = _finite(metric.finish, float(sums[key].sum() / count.sum()))
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(len(count), (BOOTSTRAP_DRAWS, len(count)), generator=generator)
    means = sums[key][draws].sum(1) / count[draws].sum(1)
    row["interval"] = [_finite(metric.finish, float(means.quantile(q))) for q in BOTH_ENDS]
    if earlier != key and earlier in sums:
        row["before"] = before = _finite(metric.finish, float(sums[earlier].sum() / count.sum()))
        if before and after is not None:
            row["change_percent"] = 100 * (after - before) / before
    if confidence is not None:
        is_paired = row["before"] is not None and after is not None
        earlier_means = sums[earlier][draws].sum(1) / count[draws].sum(1) if is_paired else None
        row["intervals"] = _gate_intervals(metric, earlier_means, means, confidence)
    return row


def _gate_intervals(
    metric: Metric, before_means: Tensor | None, after_means: Tensor, confidence: float
) -> dict[str, list[float | None]]:
    """Intervals at that level, of the value and, if both models have one, of its changes."""
    after = metric.drawn(after_means)
    drawn = {"value": after}
    if before_means is not None:
        before = metric.drawn(before_means)
        drawn |= {"increase_percent": 100 * (after / before - 1), "drop_points": 100 * (before - after)}
    tails = ((1 - confidence) / 2, (1 + confidence) / 2)
    return {name: [_finite(float, float(values.quantile(q))) for q in tails] for name, values in drawn.items()}


def unmeasured(names: Iterable[str], reason: str) -> dict[str, MetricRow]:
    """Rows of metrics that were asked for but not measured, for this reason."""
    return {name: {**_unmeasured(name), "reason": reason} for name in names if name in METRICS}


def _unmeasured(name: str) -> MetricRow:
    return {
        "before": None,
        "after": None,
        "change_percent": None,
        "interval": [None, None],
        "direction": METRICS[name].direction,
        "unit": METRICS[name].unit,
    }


def _finite(finish: Callable[[float], float], value: float) -> float | None:
    """`finish` of a value; None if that isn't finite."""
    try:
        result = finish(value)
    except OverflowError:
        return None
    return result if math.isfinite(result) else None
