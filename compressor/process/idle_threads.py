"""How torch's threads wait while there is no work for them: asleep, unless the user wants otherwise.

The threads of an OpenMP runtime spin for milliseconds after each operation, in case another one follows. On cores that
other processes want too, this time is lost to everybody: the thread with work waits for a core that a spinning one
holds. A runtime reads how to wait once, when torch is imported, from the environment; so `import compressor` says it
there, and child processes inherit it.
"""

from __future__ import annotations

import os
import sys

POLICY = "OMP_WAIT_POLICY"
# What users say to OpenMP runtimes about waiting: to all of them, to GNU's (torch on Linux), to Intel's and LLVM's.
VARIABLES = (POLICY, "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")

CHOSEN = tuple(f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ)  # by the user, or a parent
TORCH_WAS_FIRST = "torch" in sys.modules


def wait_asleep() -> None:
    """Let OpenMP's threads of this process, if torch isn't imported yet, and of its children sleep while they wait."""
    if not CHOSEN:
        os.environ[POLICY] = "passive"


def how_threads_wait() -> str:
    """How those of this process do, for people."""
    if CHOSEN:
        return f"{', '.join(CHOSEN)} (environment)"
    if TORCH_WAS_FIRST:
        return f"spinning: torch was imported before compressor. Import it after, or set {POLICY}=passive."
    return f"{POLICY}=passive (set by compressor)"


def environment_of_user() -> dict[str, str]:
    """The environment without what `wait_asleep` adds, for programs of others."""
    return {name: value for name, value in os.environ.items() if CHOSEN or name != POLICY}
