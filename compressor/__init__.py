"""compress-model: smaller, faster models that load where you already work, with an honest report.

Public names are imported at their first use, so that `import compressor` is instant.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compressor.artifact import load as load
    from compressor.protocol import Pass as Pass
    from compressor.run import compress as compress

__version__ = "0.1.0"
__all__ = ["Pass", "compress", "load"]
_HOMES = {"load": "compressor.artifact", "Pass": "compressor.protocol", "compress": "compressor.run"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'compressor' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
