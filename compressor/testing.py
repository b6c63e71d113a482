"""Checks the contract of a pass. Built-in and third-party passes use the same check.

from compressor.testing import check_pass
def test_contract(tmp_path):
    check_pass("my_method", MyMethod(bits=4), model_directory, tmp_path, only="*_proj")
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

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
from compressor.model.model_names import resolve_model
from compressor.model.structure import read_structure
from compressor.model.token_limit import limit_of
from compressor.process import child
from compressor.protocol import Pass, WeightPass
from compressor.recipe.recipe import Recipe, parse_recipe
from compressor.storage.file_names import MANIFEST
from compressor.storage.files import file_sha256
from compressor.storage.journal import Journal
from compressor.storage.safetensors_file import TensorInfo, read_bytes, read_header


def recipe_for(
    name: str, settings: Pass, samples: int = 8, length: int = 16, before: Sequence[dict[str, Any]] = ()
) -> Recipe:
    """A recipe with this step after those of `before`, on random tokens, without evaluation."""
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
    """Run a pass on a small checkpoint and check its contract. Returns the report.

    only    a pattern for some of the model's weights; all others must stay unchanged (not for a pass that reshapes the
            model)
    before  steps that it needs first, as in a recipe
    raises  AssertionError naming the broken part of the contract
    """
    whole = recipe_for(name, settings, before=before)
    assert whole.steps[-1].settings == settings, "settings don't survive YAML"
    assert parse_recipe(whole.to_yaml().encode(), "again").resolved() == whole.resolved(), "recipe is not a fixed point"
    plan = make_plan(whole, str(model))
    assert not plan.problems, f"plan refuses it: {[str(problem) for problem in plan.problems]}"
    first = _swept(replace(plan, tries_loaders=False), scratch / "first")
    assert whole.steps[-1].settings == settings, "settings were changed while it ran"
    again = sweep(whole, model, scratch / "again")
    assert [file_sha256(file) for file in first.files] == [file_sha256(file) for file in again.files], (
        "a second run writes other bytes"
    )
    _check_formats(settings, plan, first)
    if isinstance(settings, WeightPass):
        _check_untouched(name, settings, model, scratch / "part", only, before)
    report = _check_resume(plan.recipe, model, scratch / "killed", first)
    _check_sizes(settings, plan, report)
    _check_loads_without_passes(scratch / "killed")
    return report


@dataclass
class Swept:
    """The result of the sweeps of a recipe, before an artifact is made from it.

    files    one file per part: embeddings, blocks, output head
    stored   weight -> the format in its record in the report; "dense" for a weight that was kept
    written  parameters that stay dense and have new values
    commits  lines of the journal
    """

    plan: Plan
    files: list[Path]
    stored: dict[str, str]
    written: set[str]
    commits: int


def sweep(recipe: Recipe, model: Path, work: Path) -> Swept:
    """Run the sweeps of a recipe on the CPU, in this process, into this directory."""
    return _swept(make_plan(recipe, str(model), prove=False), work)


def _swept(plan: Plan, work: Path) -> Swept:
    calibration, _ = read_samples(plan, measure=False, trust_remote_code=False)
    with closing(Journal.create(work, {})) as journal:
        place = torch.device("cpu")
        sweeper = Sweeper(plan, journal, calibration, place, plan.recipe.seed, lambda event: None, lambda: False)
        outcome = run_sweeps(sweeper)
        lines = [LineFacts.of(line) for line in journal.lines.values()]
    stored = {record.weight.name: record.weight.format_name for line in lines for record in line.records}
    written = {name for line in lines for name in line.written}
    return Swept(plan, outcome.files, stored, written, len(lines))


def weight_hashes(directory: Path) -> dict[str, str]:
    """Hashes of the files of the model: weights, config, tokenizer. Files about a single run are left out."""
    about_the_run = {"report.json", "report.md", "report.html", "junit.xml", "README.md", "recipe.yaml", MANIFEST}
    return {path.name: file_sha256(path) for path in sorted(directory.iterdir()) if path.name not in about_the_run}


def kill_at(step: int, recipe: Recipe, model: Path, output: Path, of: Literal["syncs", "commits"] = "syncs") -> bool:
    """Run in a fresh process that is killed; False if the run ended before.

    step, of  it is killed instead of its `step`-th fsync or rename, or after its `step`-th commit to the journal
    """
    structure = read_structure(resolve_model(str(model)), dtype=recipe.model.dtype)
    return _is_killed(step, of, recipe.fit_lengths(limit_of(structure.model)), model, output)


def _is_killed(step: int, of: str, recipe: Recipe, model: Path, output: Path) -> bool:
    """`kill_at` with a recipe whose lengths fit the model."""
    request = {"step": step, "of": of, "recipe": recipe.to_yaml(), "model": str(model), "output": str(output)}
    try:
        child.ask("compressor.contract", request, "is killed")
    except PassError as error:
        if error.data.get("signal") != "SIGKILL":
            raise
        return True
    return False


def _check_formats(settings: Pass, plan: Plan, swept: Swept) -> None:
    selected = plan.selected[plan.recipe.steps[-1].path]
    assert set(swept.stored) == {weight.name for weight in selected}, "weights were left out"
    for weight in selected:
        assert isinstance(settings, WeightPass)
        promised = (settings.stored(weight) or DENSE, *settings.alternatives(weight))
        found = swept.stored[weight.name]
        assert found in promised, f"{' or '.join(promised)} is promised for {weight.name}, {found} is it"


def _check_sizes(settings: Pass, plan: Plan, report: Report) -> None:
    """Check the planned sizes: exact ones within 2 %, other ones (with a warning) as the bounds that they are.

    Headers are not bounded: the number of digits in a name or an offset may change.
    """
    predicted, actual = report["sizes"]["predicted_bytes"], report["sizes"]["after_bytes"]
    is_warned = any(warning.code == "sizes-undecided" for warning in plan.warnings)
    assert is_warned == bool(settings.unplanned), f"plan's warnings are {plan.warnings}"
    assert is_warned == (settings.sizes_are != "exact"), f"sizes are {settings.sizes_are}, and unplanned says otherwise"
    if not is_warned:
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
    structure = swept.plan.structure
    after, aside = _tensors(swept.files), carried_tensors(structure)
    rescaled = {source.tensor for name in swept.written for source in structure.sources_of(name)}
    for tensor, info in _tensors(model.glob("*.safetensors")).items():
        if tensor.rpartition(".")[0] not in swept.stored and tensor not in aside and tensor not in rescaled:
            same = read_bytes(info).equal(read_bytes(after[tensor]))
            assert same, f"{tensor} changed though {only} doesn't select it"


def _check_resume(recipe: Recipe, model: Path, output: Path, expected: Swept) -> Report:
    """Kill a run in the middle of its parts, and resume it in another fresh process: only the journal knows by then.

    recipe  one whose lengths fit the model
    """
    middle = (expected.commits + 1) // 2
    assert _is_killed(middle, "commits", recipe, model, output), "the run ended before it could be killed"
    request = {"resume": recipe.to_yaml(), "model": str(model), "output": str(output)}
    report: Report = child.ask("compressor.contract", request, "resumes the run")
    written = _tensors(output.glob("*.safetensors"))
    for tensor, info in _tensors(expected.files).items():
        assert read_bytes(info).equal(read_bytes(written[tensor])), f"a killed and resumed run writes another {tensor}"
    assert report["run"]["resumed"], "the report doesn't say it was resumed"
    return report


def _tensors(files: Iterable[Path]) -> dict[str, TensorInfo]:
    return {name: info for file in files for name, info in read_header(file).items()}


__all__ = ["check_pass", "kill_at", "load", "read_manifest", "recipe_for", "weight_hashes"]
