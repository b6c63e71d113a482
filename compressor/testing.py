"""The contract of a pass, as one check that built-in and third-party passes share.

from compressor.testing import check_pass
def test_contract(tmp_path):
    check_pass(MyMethod(bits=4), model_directory, tmp_path)
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from compressor import child
from compressor.artifact import MANIFEST, load, read_manifest
from compressor.files import file_sha256
from compressor.layers import DENSE
from compressor.plan import Plan, make_plan
from compressor.protocol import Pass
from compressor.recipe import Recipe, parse_recipe
from compressor.run import compress
from compressor.safetensors_file import read_bytes, read_header

KILLER = """
import os, signal, sys
from pathlib import Path
from compressor.recipe import parse_recipe
from compressor.run import compress
left = [int(sys.argv[4])]
def deadly(call):
    def wrapped(*args, **kwargs):
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **kwargs)
    return wrapped
os.fsync, os.replace = deadly(os.fsync), deadly(os.replace)
compress(parse_recipe(Path(sys.argv[1]).read_bytes(), "contract"), sys.argv[2], Path(sys.argv[3]), measure=False)
"""


def recipe_for(
    name: str, settings: Pass, samples: int = 8, length: int = 16, before: Sequence[dict[str, Any]] = ()
) -> Recipe:
    """A recipe of this one step, after those of `before`, on random tokens, with no evaluation."""
    step = {"pass": name, **settings.model_dump(mode="json", by_alias=True)}
    text = {
        "version": 1,
        "name": "contract",
        "data": {"source": "random", "samples": samples, "length": length},
        "steps": [*before, step],
        "report": {"html": False},
    }
    return parse_recipe(yaml.safe_dump(text).encode(), "contract.yaml")


def check_pass(
    name: str, settings: Pass, model: Path, scratch: Path, only: str, before: Sequence[dict[str, Any]] = ()
) -> dict[str, Any]:
    """Run a pass on a small checkpoint and check everything a user of it relies on. Returns the report.

    only    a pattern for some of the model's weights; all others must come out unchanged (a pass that reshapes the
            model has none)
    before  steps that it needs first, as a recipe has them
    raises  AssertionError naming the promise that doesn't hold
    """
    whole = recipe_for(name, settings, before=before)
    assert whole.steps[-1].settings == settings, "settings don't survive YAML"
    assert parse_recipe(whole.to_yaml().encode(), "again").resolved() == whole.resolved(), "recipe is not a fixed point"
    plan = make_plan(whole, str(model))
    assert not plan.problems, f"plan refuses it: {[str(problem) for problem in plan.problems]}"
    report = compress(whole, str(model), scratch / "first", measure=False)
    assert whole.steps[-1].settings == settings, "settings were changed while it ran"
    _check_forms(settings, plan, report)
    _check_sizes(settings, plan, report)
    compress(whole, str(model), scratch / "second", measure=False)
    assert weight_hashes(scratch / "first") == weight_hashes(scratch / "second"), "a second run writes other bytes"
    _check_loads_without_passes(scratch / "first")
    if not settings.reshapes:
        _check_untouched(name, settings, model, scratch / "part", only, before)
    _check_resume(whole, model, scratch / "killed", weight_hashes(scratch / "first"))
    return report


def weight_hashes(directory: Path) -> dict[str, str]:
    """Hashes of everything that is the model: weights, config, tokenizer; not what tells of one run."""
    told = {"report.json", "report.md", "report.html", "junit.xml", "README.md", "recipe.yaml", MANIFEST}
    return {path.name: file_sha256(path) for path in sorted(directory.iterdir()) if path.name not in told}


def kill_at(step: int, recipe: Recipe, model: Path, output: Path) -> int:
    """Run in a child that is killed at its `step`-th fsync or rename; returns the child's exit status."""
    text = output.with_name(output.name + ".yaml")
    text.write_text(make_plan(recipe, str(model), prove=False).recipe.to_yaml())  # written, no length is unset any more
    command = child.command(KILLER, str(text), str(model), str(output), str(step))
    return subprocess.run(command, env=_environment(), capture_output=True, check=False).returncode


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}


def _check_forms(settings: Pass, plan: Plan, report: dict[str, Any]) -> None:
    stored = {row["name"]: row["form"] for row in report["weights"]}
    selected = plan.selected[plan.recipe.steps[-1].path]
    assert set(stored) == {weight.name for weight in selected}, "weights were left out"
    for weight in selected:
        promised = (settings.stored(weight) or DENSE, *settings.alternatives(weight))
        found = stored[weight.name]
        assert found in promised, f"{' or '.join(promised)} is promised for {weight.name}, {found} is it"


def _check_sizes(settings: Pass, plan: Plan, report: dict[str, Any]) -> None:
    """Where plan claims to know the sizes they are right within 2 %; else it says so, and they are the bounds it says.

    Headers aren't bounded: digits in a name or an offset may come or go.
    """
    predicted, actual = report["sizes"]["predicted_bytes"], report["sizes"]["after_bytes"]
    said = any(warning["code"] == "sizes-undecided" for warning in plan.warnings)
    assert said == bool(settings.unplanned), f"plan's warnings are {plan.warnings}"
    assert said == (settings.sizes_are != "exact"), f"sizes are {settings.sizes_are}, and unplanned says otherwise"
    if not said:
        assert abs(predicted - actual) <= 0.02 * actual, f"plan says {predicted} bytes, {actual} were written"
        return
    planned = {row["name"]: row["bytes_after"] for row in plan.rows}
    for row in report["weights"]:
        name, more = row["name"], row["bytes_after"] - planned[row["name"]]
        is_bounded = more <= 0 if settings.sizes_are == "upper bounds" else more >= 0
        assert is_bounded, f"plan says {settings.sizes_are}; {name} has {more:+} bytes to {planned[name]}"


def _check_loads_without_passes(directory: Path) -> None:
    code = (
        "import sys, json\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.startswith('compressor.passes'): raise ImportError(name)\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "import compressor\n"
        f"compressor.load({str(directory)!r})\n"
    )
    done = subprocess.run(child.command(code), env=_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"the artifact needs the pass to load: {done.stderr[-400:]}"


def _check_untouched(
    name: str, settings: Pass, model: Path, output: Path, only: str, before: Sequence[dict[str, Any]]
) -> None:
    part = settings.model_copy(update={"only": (only,)})
    report = compress(recipe_for(name, part, before=before), str(model), output, measure=False)
    touched = {weight["name"] for weight in report["weights"]}
    assert len(touched) > 0, f"{only} selects nothing"
    given, after = _tensors(model), _tensors(output)
    for tensor, info in given.items():
        if tensor.rpartition(".")[0] not in touched:
            same = read_bytes(info).equal(read_bytes(after[tensor]))
            assert same, f"{tensor} changed though {only} doesn't select it"


def _check_resume(recipe: Recipe, model: Path, output: Path, expected: dict[str, str]) -> None:
    assert kill_at(7, recipe, model, output) == -signal.SIGKILL, "the run ended before it could be killed"
    compress(recipe, str(model), output, measure=False, resume=True)
    assert weight_hashes(output) == expected, "a killed and resumed run writes other bytes"
    assert json.loads((output / "report.json").read_text())["run"]["resumed"], "the report doesn't say it was resumed"


def _tensors(directory: Path) -> dict[str, Any]:
    return {name: info for file in directory.glob("*.safetensors") for name, info in read_header(file).items()}


__all__ = ["check_pass", "kill_at", "load", "read_manifest", "recipe_for", "weight_hashes"]
