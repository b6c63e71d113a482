"""Provides torch as a module that is imported at its first use.

Settings, schema and help must load without torch, but a pass has its settings and its mathematics in one file. Such a
file has `from compressor.lazy import torch`. Type checkers see the real module.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch as torch
else:

    class _OnFirstUse:
        def __init__(self, name: str) -> None:
            self._name = name

        def __getattr__(self, attribute: str) -> Any:
            return getattr(importlib.import_module(self._name), attribute)

    torch = _OnFirstUse("torch")
