"""No verb runs a module that lies in the working directory, however the command was started."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import tiny

from compressor.process.search_path import named_entries

ROOT = Path(__file__).parents[2]
PLANTED = ("json", "torch", "safetensors", "transformers", "numpy", "datasets", "yaml", "pydantic", "rich", "typer")


def test_folders_that_pythonpath_names_stay_and_the_working_directory_goes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = named_entries(os.pathsep.join(["/a", "", ".", "./", "b/..", "b", "../c", str(tmp_path)]))
    assert found == ["/a", str(tmp_path / "b"), str(tmp_path.parent / "c"), str(tmp_path)]
    assert named_entries("") == []


@pytest.fixture
def planted(tmp_path):
    """A working directory with modules that leave a mark when they are run."""
    folder = tmp_path / "downloads"
    folder.mkdir()
    for name in PLANTED:
        (folder / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write('{name} ')\n")
    return folder


def console_script():
    """The program that an installed `compress-model` is; it starts without the working directory on its path."""
    module, _, name = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"][
        "compress-model"
    ].partition(":")
    return [sys.executable, "-P", "-c", f"import sys; from {module} import {name}; sys.exit({name}())"]


def run(folder, start, pythonpath, *arguments):
    path = os.pathsep.join([pythonpath, str(ROOT)])  # the package, where it isn't installed
    environment = {**os.environ, "PYTHONPATH": path, "NO_COLOR": "1", "HF_HOME": str(folder.parent / "hf")}
    environment.pop("PYTHONSAFEPATH", None)
    done = subprocess.run(
        [*start, *map(str, arguments)], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert not (folder.parent / "ran").exists(), (folder.parent / "ran").read_text()
    return done


STARTS = {"console script": console_script, "python -m": lambda: [sys.executable, "-m", "compressor"]}


@pytest.mark.parametrize("pythonpath", ["", "."])
@pytest.mark.parametrize("start", STARTS)
def test_the_command_starts_without_the_working_directory(start, pythonpath, planted):
    done = run(planted, STARTS[start](), pythonpath, "passes", "rtn")
    assert done.returncode == 0, done.stderr


# One process is enough for all verbs: what is searched is settled once, as the first begins, and importing torch is
# slow. So one server is enough for the processes that the others start.
VERBS = """
import sys
from compressor.__main__ import main
words = sys.argv[1:]
def run_one():
    end = words.index("+")
    sys.argv = ["compress-model", *words[:end]]
    assert main() == 0, sys.argv
    del words[: end + 1]
run_one()
from compressor.process.child import started_early
with started_early():
    while words:
        run_one()
"""


@pytest.mark.slow
def test_no_verb_runs_a_module_of_the_working_directory(planted):
    """Its own processes, those that verify and those that measure."""
    model = tiny.save("llama", planted.parent / "model")
    data = ["--set", "eval.data.source=random", "--set", "eval.data.samples=4", "--set", "eval.data.length=16"]
    (planted / "r.yaml").write_text(
        "version: 1\nsteps: [{pass: rtn, group_size: 32}]\nreport: {html: false}\n"
        "eval: {metrics: [perplexity, speed], data: {source: random, samples: 4, length: 16}}\n"
    )
    verbs = [
        ["plan", "r.yaml", "--model", model],
        ["run", "r.yaml", "--model", model, "--output", "out", "--fresh"],
        ["verify", "out"],
        ["eval", "out", "--metrics", "perplexity", *data],
        ["compare", "out", model],
        ["inspect", "out"],
        ["report", "out"],
        ["doctor"],
    ]
    words = [word for verb in verbs for word in (*verb, "+")]
    done = run(planted, [sys.executable, "-c", VERBS], os.pathsep + ".", *words)
    assert done.returncode == 0, done.stderr[-800:]
