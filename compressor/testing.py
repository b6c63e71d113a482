"""The contract of a pass, as one check that built-in and third-party passes share.

from compressor.testing import check_pass
def test_contract(tmp_path):
    check_pass(MyMethod(bits=4), model_directory, tmp_path)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from compressor.artifact.loader import load
from compressor.artifact.manifest import read_manifest
from compressor.artifact.writer import carried_tensors
from compressor.engine.line_facts import LineFacts
from compressor.engine.plan import make_plan
from compressor.engine.plan_records import Plan
from compressor.engine.run_samples import read_samples
from compressor.engine.sweep import Sweeper, run_sweeps
from compressor.errors import PassError
from compressor.evaluation.sections import Report
from compressor.layers import DENSE
from compressor.process import child
from compressor.protocol import Pass
from compressor.recipe.recipe import Recipe, parse_recipe
from compressor.run import compress
from compressor.storage.file_names import MANIFEST
from compressor.storage.files import file_sha256
from compressor.storage.journal import Journal
from compressor.storage.safetensors_file import TensorInfo, read_bytes, read_header


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
) -> Report:
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
    first = sweep(whole, model, scratch / "first")
    assert whole.steps[-1].settings == settings, "settings were changed while it ran"
    again = sweep(whole, model, scratch / "again")
    assert [file_sha256(file) for file in first.files] == [file_sha256(file) for file in again.files], (
        "a second run writes other bytes"
    )
    _check_forms(settings, plan, first)
    if not settings.reshapes:
        _check_untouched(name, settings, model, scratch / "part", only, before)
    report = _check_resume(whole, model, scratch / "killed", first)
    _check_sizes(settings, plan, report)
    _check_loads_without_passes(scratch / "killed")
    return report


@dataclass
class Swept:
    """What the sweeps of a recipe leave, before an artifact is made of it.

    files   part files: embeddings, blocks, output head
    stored  weight -> the format that its record in the report names; "dense" for one that was kept
    """

    plan: Plan
    files: list[Path]
    stored: dict[str, str]


def sweep(recipe: Recipe, model: Path, work: Path) -> Swept:
    """Run the sweeps of a recipe on the CPU, in this process, into this directory."""
    plan = make_plan(recipe, str(model), prove=False)
    calibration, _ = read_samples(plan, measure=False, trust_remote_code=False)
    with closing(Journal.create(work, {})) as journal:
        sweeper = Sweeper(
            plan, journal, calibration, torch.device("cpu"), recipe.seed, lambda event: None, lambda: False
        )
        files, _ = run_sweeps(sweeper)
        records = [record.weight for line in journal.lines.values() for record in LineFacts.of(line).records]
        stored = {weight.name: weight.form for weight in records}
    return Swept(plan, files, stored)


def weight_hashes(directory: Path) -> dict[str, str]:
    """Hashes of everything that is the model: weights, config, tokenizer; not what tells of one run."""
    told = {"report.json", "report.md", "report.html", "junit.xml", "README.md", "recipe.yaml", MANIFEST}
    return {path.name: file_sha256(path) for path in sorted(directory.iterdir()) if path.name not in told}


def kill_at(step: int, recipe: Recipe, model: Path, output: Path) -> bool:
    """Run in a fresh process that is killed at its `step`-th fsync or rename; False if the run ended before."""
    text = make_plan(recipe, str(model), prove=False).recipe.to_yaml()  # written, no length is unset any more
    request = {"step": step, "recipe": text, "model": str(model), "output": str(output)}
    try:
        child.ask("compressor.contract", request, "is killed")
    except PassError as error:
        if error.data.get("signal") != "SIGKILL":
            raise
        return True
    return False


def _check_forms(settings: Pass, plan: Plan, swept: Swept) -> None:
    selected = plan.selected[plan.recipe.steps[-1].path]
    assert set(swept.stored) == {weight.name for weight in selected}, "weights were left out"
    for weight in selected:
        promised = (settings.stored(weight) or DENSE, *settings.alternatives(weight))
        found = swept.stored[weight.name]
        assert found in promised, f"{' or '.join(promised)} is promised for {weight.name}, {found} is it"


def _check_sizes(settings: Pass, plan: Plan, report: Report) -> None:
    """Where plan claims to know the sizes they are right within 2 %; else it says so, and they are the bounds it says.

    Headers aren't bounded: digits in a name or an offset may come or go.
    """
    predicted, actual = report["sizes"]["predicted_bytes"], report["sizes"]["after_bytes"]
    said = any(warning.code == "sizes-undecided" for warning in plan.warnings)
    assert said == bool(settings.unplanned), f"plan's warnings are {plan.warnings}"
    assert said == (settings.sizes_are != "exact"), f"sizes are {settings.sizes_are}, and unplanned says otherwise"
    if not said:
        assert abs(predicted - actual) <= 0.02 * actual, f"plan says {predicted} bytes, {actual} were written"
        return
    planned = {row.name: row.bytes_after for row in plan.rows}
    for row in report["weights"]:
        name, more = row["name"], row["bytes_after"] - planned[row["name"]]
        is_bounded = more <= 0 if settings.sizes_are == "upper bounds" else more >= 0
        assert is_bounded, f"plan says {settings.sizes_are}; {name} has {more:+} bytes to {planned[name]}"


def _check_loads_without_passes(directory: Path) -> None:
    try:
        child.ask("compressor.contract", {"load": str(directory)}, "loads the artifact")
    except child.ChildBug as bug:
        raise AssertionError(f"the artifact needs the pass to load: {bug}") from bug


def _check_untouched(
    name: str, settings: Pass, model: Path, work: Path, only: str, before: Sequence[dict[str, Any]]
) -> None:
    part = settings.model_copy(update={"only": (only,)})
    swept = sweep(recipe_for(name, part, before=before), model, work)
    assert swept.stored, f"{only} selects nothing"
    after, aside = _tensors(swept.files), carried_tensors(swept.plan.structure)
    for tensor, info in _tensors(model.glob("*.safetensors")).items():
        if tensor.rpartition(".")[0] not in swept.stored and tensor not in aside:
            same = read_bytes(info).equal(read_bytes(after[tensor]))
            assert same, f"{tensor} changed though {only} doesn't select it"


def _check_resume(recipe: Recipe, model: Path, output: Path, expected: Swept) -> Report:
    assert kill_at(7, recipe, model, output), "the run ended before it could be killed"
    report = compress(recipe, str(model), output, measure=False, resume=True)
    written = _tensors(output.glob("*.safetensors"))
    for tensor, info in _tensors(expected.files).items():
        assert read_bytes(info).equal(read_bytes(written[tensor])), f"a killed and resumed run writes another {tensor}"
    assert report["run"]["resumed"], "the report doesn't say it was resumed"
    return report


def _tensors(files: Iterable[Path]) -> dict[str, TensorInfo]:
    return {name: info for file in files for name, info in read_header(file).items()}


__all__ = ["check_pass", "kill_at", "load", "read_manifest", "recipe_for", "weight_hashes"]
