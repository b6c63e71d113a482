"""Implements fast arithmetic on quantization formats. `reference` is plain torch; faster kernels must agree with it.

`prepare(model)` puts the fastest kernels of this machine into a model. `explain(model)` lists them with the reasons.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compressor.kernels.prepared.prepare import explain as explain
    from compressor.kernels.prepared.prepare import prepare as prepare

__all__ = ["explain", "prepare"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'compressor.kernels' has no attribute {name!r}")
    return getattr(importlib.import_module("compressor.kernels.prepared.prepare"), name)
