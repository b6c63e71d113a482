"""Compares the masks of vtrans with magnitude and random pruning, at equal sizes, with and without the repair.

    scripts/bench/pruning.py --model MODEL --calibrate train.txt --test test.txt
    scripts/bench/pruning.py --model MODEL --calibrate train.tsv --test test.tsv

A .tsv with columns text and label is measured by accuracy, any other text by perplexity. Every row is an artifact that
`compress` wrote with the same pass, vtrans; the methods differ only in the scores of units:

    magnitude  mean square of all entries that are removed with a unit
    random     random numbers; each seed has a row of its own
"""

from __future__ import annotations

import compressor  # noqa: F401 isort: skip (before torch, whose threads then sleep while they wait)

import argparse
import json
import math
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import result_file
import torch
import transformers
import yaml
from pydantic import Field
from torch import Tensor

from compressor import load
from compressor.data.samples import Samples, load_samples
from compressor.evaluation.model_loading import load_model
from compressor.model.facts import Decision, PrunableModule
from compressor.passes.vtrans import VTrans
from compressor.protocol import RunnableModel
from compressor.recipe.recipe import Recipe, Step, parse_recipe
from compressor.run import compress

METHODS = ("vtrans", "magnitude", "random 0", "random 1")


class Ranked(VTrans):
    """The same pass with untrained scores, or with a given decision."""

    title: ClassVar[str] = "Baselines"
    ranking: Literal["magnitude", "random", "given"] = "magnitude"
    draw: int = 0
    given: dict[str, Any] = Field(default_factory=dict)

    def choose(self, model: RunnableModel) -> Decision:
        if self.ranking == "given":
            return self.given
        prunables = self._prunable(model.facts)
        scores = magnitudes(model, prunables) if self.ranking == "magnitude" else random_scores(prunables, self.draw)
        return self.decided(model, prunables, self._size(model.facts, prunables), scores, {}, {})


def magnitudes(model: RunnableModel, prunables: Sequence[PrunableModule]) -> dict[str, list[float]]:
    """Mean square of the entries that are removed with each unit, relative to the mean over all units of its kind.

    It is relative because heads and neurons differ in scale.
    """
    found: dict[str, Tensor] = {}
    for prunable in prunables:
        total, count = torch.zeros(prunable.units, dtype=torch.float64), 0
        with model.loaded(prunable.block + 1):
            for cut in prunable.slices:
                owner, _, leaf = cut.parameter.rpartition(".")
                value = getattr(model.module(owner), leaf).double().square().movedim(cut.axis, 0)
                value = value.reshape(len(value), -1)
                total += torch.stack([value[list(rows)].sum() for rows in cut.rows])
                count += len(cut.rows[0]) * value.shape[1]
        found[prunable.name] = total / count
    scale = {
        kind: torch.cat([found[prunable.name] for prunable in prunables if prunable.kind == kind]).mean()
        for kind in {prunable.kind for prunable in prunables}
    }
    return {prunable.name: (found[prunable.name] / scale[prunable.kind]).tolist() for prunable in prunables}


def random_scores(prunables: Sequence[PrunableModule], seed: int) -> dict[str, list[float]]:
    generator = torch.Generator().manual_seed(seed)
    return {prunable.name: torch.rand(prunable.units, generator=generator).tolist() for prunable in prunables}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calibrate", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    result_file.add_output(parser, "pruning")
    parser.add_argument("--targets", type=float, nargs="+", default=[0.3])
    parser.add_argument("--methods", nargs="+", default=METHODS, help="vtrans, magnitude, random SEED")
    parser.add_argument("--calibration-samples", type=int, default=64)
    parser.add_argument("--test-samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--start", choices=["balanced", "equal"], default="balanced")
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0, help="of the calibration samples and of the masks")
    parser.add_argument("--samples", type=int, default=4, help="calibration samples of a training step")
    parser.add_argument("--mask-rate", type=float, default=0.05)
    parser.add_argument("--kl-factor", type=float, default=1e-6)
    parser.add_argument("--heads-charge", type=float, default=256.0)
    parser.add_argument("--loss", choices=["distill", "task"], default="distill")
    settings = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(settings)
    rows = []
    for row in bench.rows():
        print(json.dumps(row), file=sys.stderr, flush=True)
        rows.append(row)
        result_file.write(bench.result(rows), settings.output)


class Bench:
    """One model, one calibration and one test set."""

    def __init__(self, settings: argparse.Namespace) -> None:
        self.settings = settings
        self.is_labelled = settings.test.suffix == ".tsv"
        self.metric = "accuracy" if self.is_labelled else "perplexity"
        config = transformers.AutoConfig.from_pretrained(settings.model)
        data = self.recipe(VTrans()).eval.data
        self.test = load_samples(data, settings.model, seed=0, vocabulary=config.vocab_size)

    def recipe(self, settings: VTrans) -> Recipe:
        asked = self.settings
        shared = {"length": asked.length, "pack": not self.is_labelled}
        tree = {
            "version": 1,
            "name": "bench-pruning",
            "seed": asked.seed,
            "model": {"placement": "resident"},
            "data": {"source": str(asked.calibrate), "samples": asked.calibration_samples, **shared},
            "steps": [{"pass": "vtrans"}],
            "eval": {"data": {"source": str(asked.test), "samples": asked.test_samples, **shared}},
            "report": {"html": False},
        }
        made = parse_recipe(yaml.safe_dump(tree).encode(), "bench-pruning")
        return replace(made, sweeps=((Step(("steps", 0), "vtrans", settings),),))

    def rows(self) -> Iterator[dict[str, Any]]:
        dense = load_model(self.settings.model, False)
        yield {"method": "dense", "target": 0.0, "parameters": dense.num_parameters(), **self.measured(dense)}
        asked = self.settings
        common = {
            key: getattr(asked, key)
            for key in ("start", "steps", "samples", "mask_rate", "kl_factor", "heads_charge", "loss")
        }
        for target in self.settings.targets:
            of_target = {**common, "target": target}
            for method in self.settings.methods:
                name, _, seed = method.partition(" ")
                if name == "vtrans":
                    yield from self.both(method, VTrans(**of_target))
                else:
                    yield from self.both(method, Ranked(**of_target, ranking=name, draw=int(seed or 0)))

    def both(self, method: str, settings: VTrans) -> Iterator[dict[str, Any]]:
        """Rows with the repair, and for the same decision without it."""
        with tempfile.TemporaryDirectory() as scratch:
            began = time.perf_counter()
            report = compress(
                self.recipe(settings), str(self.settings.model), Path(scratch) / "out", threads=1, measure=False
            )
            yield self.row(method, settings.target, True, report, Path(scratch) / "out", time.perf_counter() - began)
            given = settings.model_dump(exclude={"ranking", "draw", "given", "only", "except_"})
            decision = report["reshapes"][0]["decision"]
            plain = Ranked(**{**given, "ranking": "given", "given": decision, "reconstruct": False})
            began = time.perf_counter()
            report = compress(
                self.recipe(plain), str(self.settings.model), Path(scratch) / "plain", threads=1, measure=False
            )
            yield self.row(method, settings.target, False, report, Path(scratch) / "plain", time.perf_counter() - began)

    def row(
        self, method: str, target: float, repaired: bool, report: dict[str, Any], directory: Path, seconds: float
    ) -> dict[str, Any]:
        reshaped = report["reshapes"][0]
        figures = reshaped["decision"]["figures"]
        model = load(directory)
        if model.num_parameters() != reshaped["parameters_after"]:
            raise AssertionError(f"{method}: {model.num_parameters()} parameters, the report says otherwise")
        return {
            "method": method,
            "target": target,
            "repaired": repaired,
            "parameters": reshaped["parameters_after"],
            "removed_of_blocks": round(1 - figures["size"] / figures["of"], 5),
            "soft_removed": figures.get("soft_removed"),
            "seconds": round(seconds, 1),
            **self.measured(model),
        }

    def measured(self, model: Any) -> dict[str, float]:
        found = accuracy(model, self.test) if self.is_labelled else perplexity(model, self.test)
        return {self.metric: round(found, 4)}

    def result(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        asked = self.settings
        kept = ("targets", "calibration_samples", "test_samples", "length", "steps", "samples", "loss")
        kept += ("start", "seed", "mask_rate", "kl_factor", "heads_charge")
        return {
            "model": asked.model.name,
            "calibrate": asked.calibrate.name,
            "test": asked.test.name,
            "settings": {name: getattr(asked, name) for name in kept},
            "rows": rows,
            "threads": 1,
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        }


@torch.no_grad()
def accuracy(model: Any, samples: Samples) -> float:
    """Accuracy in percent of samples."""
    assert samples.labels is not None
    right = 0
    for numbers, batch in samples.batches(32):
        right += int((model(input_ids=batch).logits.argmax(-1) == samples.labels[numbers]).sum())
    return 100 * right / len(samples.inputs)


@torch.no_grad()
def perplexity(model: Any, samples: Samples) -> float:
    """exp of the mean negative log likelihood of each window's tokens but its first."""
    total, count = 0.0, 0
    for _, batch in samples.batches(8):
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
        wanted = batch[:, 1:]
        total += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum"))
        count += wanted.numel()
    return math.exp(total / count)


if __name__ == "__main__":
    main()
