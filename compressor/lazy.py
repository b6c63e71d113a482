"""torch, imported at its first use.

Settings, schema and help must not wait for torch, yet a pass keeps its settings and its mathematics in one file.
Such a file says `from compressor.lazy import torch`; type checkers see the real module.
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
