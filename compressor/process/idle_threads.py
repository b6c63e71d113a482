"""Lets torch's threads sleep while they have no work, unless the user has chosen otherwise.

The threads of an OpenMP runtime spin for milliseconds after each operation, because another one may follow. On cores
that other processes need too, this time is lost: a thread with work waits for a core that a spinning thread uses. A
runtime reads its setting once from the environment, when torch is imported. So `import compressor` sets it there, and
child processes inherit it.
"""

from __future__ import annotations

import os
import sys

POLICY = "OMP_WAIT_POLICY"
# The variables for waiting: of all OpenMP runtimes, of GNU's (torch on Linux), of Intel's and LLVM's.
VARIABLES = (POLICY, "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")

CHOSEN = tuple(f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ)  # by the user, or a parent
TORCH_WAS_FIRST = "torch" in sys.modules


def wait_asleep() -> None:
    """Let OpenMP's threads of this process (if torch is not imported yet) and of its children sleep while they wait."""
    if not CHOSEN:
        os.environ[POLICY] = "passive"


def how_threads_wait() -> str:
    """How the threads of this process wait, as text for a user."""
    if CHOSEN:
        return f"{', '.join(CHOSEN)} (environment)"
    if TORCH_WAS_FIRST:
        return f"spinning: torch was imported before compressor. Import it after, or set {POLICY}=passive."
    return f"{POLICY}=passive (set by compressor)"


def environment_of_user() -> dict[str, str]:
    """The environment without the variables of `wait_asleep`, for other programs."""
    return {name: value for name, value in os.environ.items() if CHOSEN or name != POLICY}
