"""Trains a small ViT on handwritten digits, so that pruning tokens has an accuracy to measure.

    python scripts/train/vit.py --data MNIST_DIRECTORY --out CHECKPOINT_DIRECTORY
    python scripts/train/vit.py --out CHECKPOINT_DIRECTORY            (scikit-learn's digits, which it ships)

--data holds t10k-images-idx3-ubyte.gz and t10k-labels-idx1-ubyte.gz, 10,000 digits of MNIST: the first 8,000 train, the
last 2,000 test. Without it, scikit-learn's 1,797 digits of 8x8 pixels (pip install scikit-learn), the first 1,437 of
which train. Writes the checkpoint, preprocessor_config.json, train.npz and test.npz as recipes read them, and
training_log.json. The last epoch is kept; test is read once, for the log. Deterministic for one seed, one thread count
and one set of library versions. Minutes on two CPU cores.
"""

from __future__ import annotations

import compressor  # noqa: F401 isort: skip (before torch, whose threads then sleep while they wait)

import argparse
import gzip
import json
import struct
import time
from pathlib import Path

import numpy
import torch
import torch.nn.functional as F
import transformers
from transformers import ViTConfig, ViTForImageClassification

TRAINED = 0.8  # of the samples, by index
MEAN, SPREAD = 0.1307, 0.3081  # of MNIST's pixels in [0, 1]


def read_idx(path: Path) -> numpy.ndarray:
    """An array of bytes in the IDX format. raises ValueError for another format"""
    content = gzip.decompress(path.read_bytes())
    zero, kind, dimensions = struct.unpack_from(">HBB", content)
    if zero != 0 or kind != 8:
        raise ValueError(f"{path}: not an IDX file of bytes")
    shape = struct.unpack_from(f">{dimensions}I", content, 4)
    return numpy.frombuffer(content, numpy.uint8, offset=4 + 4 * dimensions).reshape(shape)


def read_digits(directory: Path | None) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Images (n, height, width) uint8 and labels (n,) int64."""
    if directory is not None:
        images, labels = (read_idx(directory / f"t10k-{name}-ubyte.gz") for name in ("images-idx3", "labels-idx1"))
        return images, labels.astype(numpy.int64)
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise SystemExit("without --data scikit-learn is needed: pip install scikit-learn") from error
    found = load_digits()
    return (found.images * 255 / 16).round().astype(numpy.uint8), found.target.astype(numpy.int64)


def shifted(images: torch.Tensor, most: int, generator: torch.Generator) -> torch.Tensor:
    """Each image moved by up to `most` pixels along both axes, background coming in."""
    side = images.shape[-1]
    padded = F.pad(images, (most,) * 4, value=-MEAN / SPREAD)
    moves = torch.randint(0, 2 * most + 1, (len(images), 2), generator=generator).tolist()
    return torch.stack([image[:, y : y + side, x : x + side] for image, (y, x) in zip(padded, moves)])


def accuracy(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    model.eval()
    with torch.no_grad():
        right = [model(pixel_values=x).logits.argmax(-1) == y for x, y in zip(images.split(200), labels.split(200))]
    return float(torch.cat(right).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of MNIST's t10k files; without it scikit-learn's digits")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--patch", type=int, help="pixels; default 4, of scikit-learn's digits 1")
    parser.add_argument("--epochs", type=int, default=36)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    raw, targets = read_digits(options.data)
    side, count = raw.shape[-1], int(TRAINED * len(raw))
    config = ViTConfig(
        image_size=side,
        patch_size=options.patch or (4 if options.data else 1),
        num_channels=1,
        hidden_size=options.width,
        num_hidden_layers=options.blocks,
        num_attention_heads=options.heads,
        intermediate_size=4 * options.width,
        num_labels=10,
    )
    model = ViTForImageClassification(config)
    images = ((torch.from_numpy(raw.copy()).float() / 255 - MEAN) / SPREAD).unsqueeze(1)
    labels = torch.from_numpy(targets)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}], lr=options.rate
    )
    total = options.epochs * -(-count // options.batch)
    warm = max(1, total // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, max(0.0, (total - step) / (total - warm)))
    )
    began, log = time.perf_counter(), []
    for epoch in range(options.epochs):
        model.train()
        losses = []
        for numbers in torch.randperm(count, generator=generator).split(options.batch):
            moved = shifted(images[numbers], max(1, side // 14), generator)
            loss = F.cross_entropy(model(pixel_values=moved).logits, labels[numbers], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        log.append({"epoch": epoch, "train_loss": sum(losses) / len(losses), "seconds": time.perf_counter() - began})
        print(json.dumps(log[-1]), flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    model.eval().save_pretrained(options.out)
    (options.out / "preprocessor_config.json").write_text(json.dumps({"image_mean": [MEAN], "image_std": [SPREAD]}))
    for name, part in (("train", slice(0, count)), ("test", slice(count, None))):
        numpy.savez_compressed(options.out / f"{name}.npz", images=raw[part], labels=targets[part])
    summary = {
        "data": "MNIST t10k" if options.data else "scikit-learn digits",
        "epochs": log,
        "samples": {"train": count, "test": len(raw) - count},
        "train_accuracy": accuracy(model, images[:count], labels[:count]),
        "test_accuracy": accuracy(model, images[count:], labels[count:]),
        "seconds": time.perf_counter() - began,
        "settings": {
            key: getattr(options, key)
            for key in ("width", "blocks", "heads", "epochs", "batch", "rate", "seed", "threads")
        },
        "patch": config.patch_size,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    (options.out / "training_log.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(json.dumps({key: summary[key] for key in ("train_accuracy", "test_accuracy", "seconds")}))


if __name__ == "__main__":
    main()
