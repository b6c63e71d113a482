"""What `compressor.testing` lets fresh processes do: end at a given step of a run, or load without any pass."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any


def main(request: dict[str, Any]) -> None:
    """`load` an artifact where no pass can be imported, or run a `recipe` until step number `step`."""
    if "load" in request:
        _load_without_passes(request["load"])
    else:
        _end_at(request["step"], request["recipe"], request["model"], Path(request["output"]))


def _load_without_passes(directory: str) -> None:
    class Refuse:
        def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
            if name.startswith("compressor.passes"):
                raise ImportError(name)

    assert "compressor.passes" not in sys.modules
    sys.meta_path.insert(0, Refuse())  # type: ignore[arg-type]
    import compressor

    compressor.load(directory)


def _end_at(step: int, recipe: str, model: str, output: Path) -> None:
    """Compress, and be killed instead of the `step`-th fsync or rename."""
    from compressor import run
    from compressor.recipe.recipe import parse_recipe

    left = [step]

    def deadly(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return wrapped

    os.fsync, os.replace = deadly(os.fsync), deadly(os.replace)
    run.started_early = nullcontext  # type: ignore[assignment]  # seldom lives until its processes would be needed
    run.compress(parse_recipe(recipe.encode(), "contract"), model, output, measure=False)
