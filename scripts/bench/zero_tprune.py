"""Makes the tables of docs/passes/zero_tprune.md: five ways to prune tokens without training, at equal work.

    python scripts/bench/zero_tprune.py --vit VIT_DIRECTORY --text SST2_DIRECTORY

--vit is what scripts/train/vit.py writes, --text what scripts/train/sst2.py writes; either may be left out. The pass
runs as a user runs it, by a recipe with `target_macs`, and its artifact is measured. It is compared, with the gates
and counts that it chose, with: random tokens, those that the class token attends to most, and the same ranking without
similarity; and ToMe (Bolya et al. 2023, arXiv 2210.09461): in every block the r most alike tokens of two alternate
halves are merged, a mean weighted by how many patches each stands for, whose logarithm is added to attention scores.
Multiply-accumulates are counted by formula; those of the ranking itself are counted for ours and for nothing else.

Time is the process's own (CPU seconds), one thread, batches of 32, dense and pruned in turns, the least of --runs; so
other load on the machine matters little. DeiT-S is timed with random weights: its shapes decide.
"""

from __future__ import annotations

import compressor  # isort: skip (before torch, whose threads then sleep while they wait)

import argparse
import json
import math
import platform
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy
import result_file
import torch
import torch.nn.functional as F
import transformers
import yaml
from torch import Tensor
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    ViTConfig,
    ViTForImageClassification,
)

from compressor.analysis.token_gates import find_token_gates
from compressor.layers.structural.observed_attention import watching
from compressor.layers.structural.token_counts import block_macs
from compressor.layers.structural.token_gate import TokenGate
from compressor.layers.structural.token_ranking import attention_graph, choose_tokens
from compressor.model.structure import read_structure
from compressor.passes.zero_tprune import ZeroTPrune
from compressor.recipe.recipe import parse_recipe
from compressor.run import compress

BATCH = 32
Chooser = Callable[[Tensor, Tensor, int], Tensor]  # (attention, keys, how many patches stay) -> (b, n) bool


def prune(model: Path, data: Path, settings: dict[str, Any], samples: int) -> tuple[Any, dict[str, Any]]:
    """The loaded artifact of a recipe with zero_tprune, and the tokens in its report."""
    step = {"pass": "zero_tprune", **settings}
    calibration = {"source": str(data), "samples": samples, "length": 64, "pack": False}
    tree = {"version": 1, "name": "bench", "data": calibration, "steps": [step], "report": {"html": False}}
    with tempfile.TemporaryDirectory() as scratch:
        report = compress(
            parse_recipe(yaml.safe_dump(tree).encode(), "bench"), str(model), Path(scratch) / "out", measure=False
        )
        assert not report["verification"]["problems"]
        return compressor.load(Path(scratch) / "out"), report["reshapes"][0]


def read_images(path: Path, directory: Path) -> tuple[Tensor, Tensor]:
    stated = json.loads((directory / "preprocessor_config.json").read_text())
    with numpy.load(path) as arrays:
        pixels, labels = torch.from_numpy(arrays["images"]).float() / 255, torch.from_numpy(arrays["labels"])
    return ((pixels - stated["image_mean"][0]) / stated["image_std"][0]).unsqueeze(1), labels


def share_right(run: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        right = [run(x).argmax(-1) == y for x, y in zip(images.split(250), labels.split(250))]
    return float(torch.cat(right).float().mean())


def run_pruned(model: Any, left: list[int], choose: Chooser) -> Callable[[Tensor], Tensor]:
    """A ViT whose blocks keep these numbers of tokens, chosen by their own attention."""

    def run(pixels: Tensor) -> Tensor:
        x = model.vit.embeddings(pixels)
        for block, count in zip(model.vit.layers, left):
            seen: list[Any] = []
            with watching(block.attention, seen):
                x = block(x, None)
            if count < x.shape[1]:
                query, key, scaling = seen[0]
                kept = choose(attention_graph(query, key, scaling, None), key, count - 1)
                x = x[kept].view(len(x), count, -1)
        return model.classifier(model.vit.layernorm(x)[:, 0])

    return run


def by_score(score: Callable[[Tensor], Tensor]) -> Chooser:
    """The class token, and the patches of the largest score (b, n)."""

    def choose(graph: Tensor, _keys: Tensor, count: int) -> Tensor:
        values = score(graph).clone()
        values[:, 0] = math.inf
        kept = torch.zeros_like(values, dtype=torch.bool)
        return kept.scatter_(1, values.topk(count + 1, dim=1).indices, True)

    return choose


def by_gate(gate: dict[str, Any]) -> Chooser:
    def choose(graph: Tensor, keys: Tensor, count: int) -> Tensor:
        valid = torch.ones(len(graph), graph.shape[-1], dtype=torch.bool)
        candidates = valid.clone()
        candidates[:, 0] = False
        return choose_tokens(graph, keys, valid, candidates, [count] * len(graph), gate)

    return choose


def run_merged(model: Any, removed: list[int]) -> Callable[[Tensor], Tensor]:
    """ToMe: each block merges this number of tokens between attention and MLP."""

    def run(pixels: Tensor) -> Tensor:
        x = model.vit.embeddings(pixels)
        size = x.new_ones(x.shape[0], x.shape[1], 1)
        for block, count in zip(model.vit.layers, removed):
            seen: list[Any] = []
            with watching(block.attention, seen):
                attended = block.attention(block.layernorm_before(x), size.log()[:, None, None, :, 0])[0]
            x = x + attended
            if count:
                x, size = merge(x, size, seen[0][1].mean(1), count)
            x = x + block.mlp(block.layernorm_after(x))
        return model.classifier(model.vit.layernorm(x)[:, 0])

    return run


def merge(x: Tensor, size: Tensor, metric: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` tokens of even places most like one of an odd place go into that one; the class token is left alone.

    x (b, n, d); size (b, n, 1): patches that a token stands for; metric (b, n, w): what is compared, the mean of keys
    """
    unit = F.normalize(metric, dim=-1)
    alike = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)
    alike[:, 0] = -math.inf
    closest, partner = alike.max(-1)
    order = closest.sort(dim=1, descending=True).indices
    gone, stays = order[:, :count], order[:, count:].sort(dim=1).values
    into = partner.gather(1, gone)

    def joined(value: Tensor) -> Tensor:
        even, odd = value[:, ::2], value[:, 1::2].clone()
        moved = even.gather(1, gone[:, :, None].expand(-1, -1, value.shape[2]))
        odd.scatter_add_(1, into[:, :, None].expand_as(moved), moved)
        return torch.cat([even.gather(1, stays[:, :, None].expand(-1, -1, value.shape[2])), odd], 1)

    total = joined(size)
    return joined(x * size) / total, total


def merging_schedule(tokens: int, blocks: list[Any], budget: int) -> tuple[list[int], int]:
    """Tokens that each block merges, as evenly as possible, within a number of multiply-accumulates; and its value."""
    for removed in range(tokens * len(blocks)):
        each, more = divmod(removed, len(blocks))
        schedule, total, now = [each + (at < more) for at in range(len(blocks))], 0, tokens
        for at, block in enumerate(blocks):
            schedule[at] = min(schedule[at], (now - 1) // 2)
            total += block_macs(now, now - schedule[at], block.before, block.behind, block.width)
            now -= schedule[at]
        if total <= budget:
            return schedule, total
    raise ValueError("merging can't save so much")


def bench_vit(directory: Path, target: float, samples: int) -> dict[str, Any]:
    dense = AutoModelForImageClassification.from_pretrained(directory).eval()
    images, labels = read_images(directory / "test.npz", directory)
    facts = find_token_gates(read_structure(directory))
    found: dict[str, Any] = {}
    blocks = tuple(range(1, len(facts.blocks)))

    def run(model: Any) -> Callable[[Tensor], Tensor]:
        return lambda x: model(pixel_values=x).logits

    def add(name: str, accuracy: float, macs: float, **more: Any) -> None:
        found[name] = {"accuracy": accuracy, "macs": macs, **more}
        print(name, json.dumps(found[name]), flush=True)

    add("dense", share_right(run(dense), images, labels), 1.0)
    variants: dict[str, dict[str, Any]] = {
        "zero_tprune": {},
        "zero_tprune, importance alone": {"s_share": 0.0},
        "zero_tprune, similarity alone": {"s_share": 1.0},
        "zero_tprune, importance first": {"order": "IS"},
        "zero_tprune, alternate": {"partition": "alternate"},
        "zero_tprune, mean of heads": {"head_aggregation": "mean"},
    }
    reference: dict[str, Any] = {}
    for name, settings in variants.items():
        asked = {"target_macs": target, "blocks": list(blocks), **settings}
        if reference:
            rates = {int(b): k for b, k in reference["decision"]["keep"].items()}
            asked = {"keep": rates, **settings}
        pruned, told = prune(directory, directory / "train.npz", asked, samples)
        reference = reference or told
        tokens = told["tokens"]
        share = tokens["macs_after"] / tokens["macs_before"]
        left = [row["left"] for row in tokens["blocks"]]
        add(
            name,
            share_right(run(pruned), images, labels),
            share,
            macs_without_gates=share - tokens["macs_of_gates"] / tokens["macs_before"],
            tokens=left,
            keep=told["decision"] and told["decision"]["keep"],
        )
    tokens = reference["tokens"]
    left = [row["left"] for row in tokens["blocks"]]
    bare = (tokens["macs_after"] - tokens["macs_of_gates"]) / tokens["macs_before"]
    attention = by_score(lambda graph: graph[:, :, 0].mean(1))
    add("class attention", share_right(run_pruned(dense, left, attention), images, labels), bare, tokens=left)
    drawn = []
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        choose = by_score(lambda graph, made=generator: torch.rand(len(graph), graph.shape[-1], generator=made))
        drawn.append(share_right(run_pruned(dense, left, choose), images, labels))
    add("random", sum(drawn) / len(drawn), bare, tokens=left, drawn=drawn)
    assert facts.tokens is not None
    whole = tokens["macs_after"] / tokens["macs_before"]
    for name, budget in (("ToMe", bare), ("ToMe, its ranking not counted, ours counted", whole)):
        most = int(budget * tokens["macs_before"]) - tokens["outside"]
        schedule, total = merging_schedule(facts.tokens, list(facts.blocks), most)
        share = (total + tokens["outside"]) / tokens["macs_before"]
        bare = share - tokens["macs_of_gates"] / tokens["macs_before"]
        add(name, share_right(run_merged(dense, schedule), images, labels), share, removed=schedule)
    found["filters"] = bench_filters(dense, directory, left, reference)
    return found


def bench_filters(dense: Any, directory: Path, left: list[int], told: dict[str, Any]) -> dict[str, Any]:
    """Agreement with the dense model on training images under bounds of the head filter, and how the measure lies."""
    images = read_images(directory / "train.npz", directory)[0][:1000]
    with torch.no_grad():
        wanted = dense(pixel_values=images).logits.argmax(-1)
    modules = ZeroTPrune(keep={int(b): k for b, k in told["decision"]["keep"].items()})
    facts = find_token_gates(read_structure(directory))
    gate = next(iter(modules.gates(facts, modules.keep).values()))  # type: ignore[arg-type]
    measures: list[Tensor] = []

    def measure(graph: Tensor) -> Tensor:
        from compressor.layers.structural.token_ranking import page_rank

        scaled = page_rank(graph, None, 10, 1e-3)[:, :, 1:] * (graph.shape[-1] - 1)
        measures.append(scaled.var(-1, correction=0).flatten())
        return torch.arange(graph.shape[-1], 0, -1.0).expand(len(graph), -1)

    share_right(run_pruned(dense, left, by_score(measure)), images, wanted)
    every = torch.cat(measures)
    quantiles = {str(q): float(every.quantile(q)) for q in (0.05, 0.25, 0.5, 0.75, 0.95)}
    found = {}
    for bounds in (
        None,
        [0.0, quantiles["0.95"]],
        [quantiles["0.05"], 1e9],
        [quantiles["0.25"], 1e9],
        [0.0, quantiles["0.75"]],
    ):
        choose = by_gate({**gate, "filter": bounds})
        found[str(bounds)] = share_right(run_pruned(dense, left, choose), images, wanted)
    return {"variance_of_n_s": quantiles, "agreement": found}


def bench_text(directory: Path, target: float, samples: int) -> dict[str, Any]:
    dense = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    blocks = list(range(1, dense.config.num_hidden_layers))
    asked = {"target_macs": target, "blocks": blocks}
    pruned, told = prune(directory, directory / "sst2-train.tsv", asked, samples)
    facts = find_token_gates(read_structure(directory))
    keep = {int(b): k for b, k in told["decision"]["keep"].items()}
    settings = ZeroTPrune(keep=keep)
    found: dict[str, Any] = {"keep": told["decision"]["keep"], "notes": told["notes"]}
    for split in ("dev", "test"):
        rows = [line.rpartition("\t") for line in (directory / f"sst2-{split}.tsv").read_text().splitlines()[1:]]
        ids = [tokenizer(text, truncation=True, max_length=64)["input_ids"] for text, _, _ in rows]
        labels = torch.tensor([int(label) for _, _, label in rows])
        order = sorted(range(len(ids)), key=lambda number: len(ids[number]))
        accounts = [settings.account(facts, keep, len(one)) for one in ids]
        share = sum(a["macs_after"] for a in accounts) / sum(a["macs_before"] for a in accounts)
        row: dict[str, Any] = {"macs": share}
        for name, model in (("dense", dense), ("pruned", pruned)):
            right, agreed = 0, []
            for start in range(0, len(order), 64):
                numbers = order[start : start + 64]
                batch = tokenizer.pad({"input_ids": [ids[number] for number in numbers]}, return_tensors="pt")
                with torch.no_grad():
                    answer = model(**batch).logits.argmax(-1)
                right += int((answer == labels[numbers]).sum())
                agreed.append(answer)
            row[name] = right / len(ids)
        found[split] = row
        print(split, json.dumps(row), flush=True)
    return found


def least_seconds(works: list[Callable[[], Any]], runs: int) -> list[float]:
    """Of the process, each in turn."""
    found = [math.inf] * len(works)
    with torch.no_grad():
        for work in works:
            work()
        for _ in range(runs):
            for at, work in enumerate(works):
                began = time.process_time()
                work()
                found[at] = min(found[at], time.process_time() - began)
    return found


def bench_time(directory: Path | None, text: Path | None, runs: int) -> dict[str, Any]:
    """Seconds for a batch of 32, dense and pruned, against the work."""
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        config = ViTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536)
        torch.manual_seed(0)
        ViTForImageClassification(config).save_pretrained(Path(scratch) / "deit-s")
        cases = {"DeiT-S, 197 tokens": (Path(scratch) / "deit-s", 197, {3: 0.7, 6: 0.7, 9: 0.7})}
        if text is not None:
            cases["MiniLM, 64 tokens"] = (text, 64, {1: 0.7, 2: 0.7, 4: 0.8})
        if directory is not None:
            cases["small ViT, 50 tokens"] = (directory, 50, {1: 0.7, 3: 0.7})
        for name, (path, tokens, keep) in cases.items():
            structure = read_structure(path)
            facts, model = find_token_gates(structure), type(structure.model).from_pretrained(path).eval()
            settings = ZeroTPrune(keep=keep)
            account, gates = settings.account(facts, keep, tokens), settings.gates(facts, keep)
            TokenGate.prepare(model)
            if structure.model.main_input_name == "pixel_values":
                side = model.config.image_size
                batch = {"pixel_values": torch.randn(BATCH, model.config.num_channels, side, side)}
            else:
                batch = {"input_ids": torch.randint(1000, 2000, (BATCH, tokens))}

            def pruned(
                model: Any = model, gates: Any = gates, batch: Any = batch, path: str = structure.pieces.blocks_path
            ) -> Any:
                with ExitStack() as stack:
                    for block, gate in gates.items():
                        stack.enter_context(TokenGate.wrapped(model.get_submodule(f"{path}.{block}"), gate))
                    return model(**batch)

            dense, fewer = least_seconds([lambda model=model, batch=batch: model(**batch), pruned], runs)
            work = account["macs_before"] / account["macs_after"]
            found[name] = {
                "seconds_dense": dense,
                "seconds_pruned": fewer,
                "macs": 1 / work,
                "gates_share": account["macs_of_gates"] / account["macs_before"],
                "speed_gain": dense / fewer,
                "work_gain": work,
                "speed_gain_per_work_gain": dense / fewer / work,
            }
            print(name, json.dumps(found[name]), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vit", type=Path)
    parser.add_argument("--text", type=Path)
    result_file.add_output(parser, "zero-tprune")
    parser.add_argument("--target", type=float, default=0.65, help="share of the ViT's work to end with")
    parser.add_argument("--samples", type=int, default=256, help="calibration samples")
    parser.add_argument("--runs", type=int, default=5, help="of each timing")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result: dict[str, Any] = {
        "settings": {
            "target": options.target,
            "samples": options.samples,
            "runs": options.runs,
            "threads": options.threads,
            "batch": BATCH,
        },
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "machine": platform.processor() or platform.machine(),
    }
    if options.vit:
        result["vit"] = bench_vit(options.vit, options.target, options.samples)
    if options.text:
        result["text"] = bench_text(options.text, 0.7, options.samples)
    result["time"] = bench_time(options.vit, options.text, options.runs)
    result_file.write(result, options.output)


if __name__ == "__main__":
    main()
