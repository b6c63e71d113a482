"""Settings of `data`, as a recipe has them."""

from __future__ import annotations

from types import SimpleNamespace


def ask(source="stdlib", **changes):
    base = {"source": source, "config": None, "split": "train", "format": "text", "field": "text", "samples": 4,
            "length": 32, "pack": True, "sha256": None}  # fmt: skip
    return SimpleNamespace(**{**base, **changes})
