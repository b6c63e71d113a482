"""Settings of `data`, as a recipe has them."""

from __future__ import annotations

from types import SimpleNamespace

from compressor.data import samples


def ask(source="stdlib", **changes):
    base = {"source": source, "config": None, "split": "train", "format": "text", "field": "text", "samples": 4,
            "length": 32, "pack": True, "sha256": None}  # fmt: skip
    return SimpleNamespace(**{**base, **changes})


def read_documents(settings):
    """(texts, unchanged labels or None, sha256 of the content) of a source, without a model."""
    texts, _, rows = samples._read_texts(settings, None, False)
    return texts, rows.labels, rows.sha256
