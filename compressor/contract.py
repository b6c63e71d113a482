"""What `compressor.testing` lets fresh processes do: end a run at a given step, resume it, or load."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from compressor.process import child


def main(request: dict[str, Any]) -> Any:
    """`load` an artifact where no pass can be imported, run a `recipe` until step number `step`, or `resume` one."""
    if "load" in request:
        return _load_without_passes(request["load"])
    if "resume" in request:
        return _resume(request["resume"], request["model"], Path(request["output"]))
    return _end_at(request["step"], request["of"], request["recipe"], request["model"], Path(request["output"]))


def _load_without_passes(directory: str) -> None:
    class Refuse:
        def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
            if name.startswith("compressor.passes"):
                raise ImportError(name)

    assert "compressor.passes" not in sys.modules
    sys.meta_path.insert(0, Refuse())  # type: ignore[arg-type]
    from compressor.artifact.loader import load

    load(directory)


def _resume(recipe: str, model: str, output: Path) -> Any:
    child.fork_from_here()
    from compressor import run
    from compressor.recipe.recipe import parse_recipe

    return run.compress(parse_recipe(recipe.encode(), "contract"), model, output, measure=False, resume=True)


def _end_at(step: int, of: str, recipe: str, model: str, output: Path) -> None:
    """Compress, and be killed instead of the `step`-th fsync or rename, or after the `step`-th commit."""
    from compressor import run
    from compressor.recipe.recipe import parse_recipe
    from compressor.storage.journal import Journal

    left = [step]

    def deadly(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return wrapped

    if of == "commits":
        Journal.commit = deadly(Journal.commit)  # type: ignore[method-assign]
    else:
        os.fsync, os.replace = deadly(os.fsync), deadly(os.replace)
    run.started_early = nullcontext  # type: ignore[assignment]  # seldom lives until its processes would be needed
    run.compress(parse_recipe(recipe.encode(), "contract"), model, output, measure=False)
