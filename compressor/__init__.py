"""compress-model: post-training compression of Hugging Face models, with a report of what it cost.

Public names are imported at their first use, so that `import compressor` is fast. One setting is made at once: torch's
threads sleep while they wait (`idle_threads`), since torch reads it when it is imported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from compressor._version import __version__ as __version__
from compressor.process.idle_threads import wait_asleep

if TYPE_CHECKING:
    from compressor.artifact.loader import load as load
    from compressor.protocol import Pass as Pass
    from compressor.run import compress as compress

__all__ = ["Pass", "compress", "load"]
_HOMES = {"load": "compressor.artifact.loader", "Pass": "compressor.protocol", "compress": "compressor.run"}

wait_asleep()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'compressor' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
