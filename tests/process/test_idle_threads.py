"""Every process of this project lets the threads of torch sleep while they wait, unless its user says otherwise."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from compressor.process import child, idle_threads

ROOT = Path(__file__).parents[2]
PROGRAMS = [
    path for pattern in ("*.py", "bench/*.py", "gpu/*.py", "train/*.py") for path in (ROOT / "scripts").glob(pattern)
]
SCRIPTS = sorted(path for path in PROGRAMS if "__main__" in path.read_text())
# a torch that says at its import what the true one's threads would be told, and whether the package was there before
TORCH = """
import os
said = (f"{n}={os.environ[n]}" for n in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME") if n in os.environ)
with open(os.environ["TOLD"], "w") as file:
    file.write(" ".join(said))
os._exit(0)
"""
REQUEST = {"directory": ".", "batch": None, "sealed": False, "deep": False, "source": None, "trust_remote_code": False}


@pytest.fixture
def told(tmp_path):
    """What torch's threads are told in a process of this command, which ends there; set  more of its environment."""
    (tmp_path / "torch.py").write_text(TORCH)

    def run(*command, **more):
        unset = {name: value for name, value in os.environ.items() if name not in idle_threads.VARIABLES}
        (tmp_path / "told").unlink(missing_ok=True)
        paths = os.pathsep.join(map(str, (tmp_path, ROOT, ROOT / "scripts")))
        done = subprocess.run(
            [sys.executable, "-P", *map(str, command)],
            env={**unset, "PYTHONPATH": paths, "TOLD": str(tmp_path / "told"), **more},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return (tmp_path / "told").read_text() if (tmp_path / "told").exists() else done.stdout.strip()

    return run


@pytest.mark.parametrize(
    "command",
    [
        ("-c", "import compressor, torch"),
        ("-c", "from compressor import load"),
        ("-c", "from compressor.kernels import prepare"),
        ("-m", "compressor", "doctor"),
        ("-m", "compressor", "plan", "gptq-w4a16", "--model", "demo"),
        ("-c", "from compressor.cli.main import main; main(['doctor'])"),
        ("-m", "pytest", "-c", ROOT / "pyproject.toml", ROOT / "tests" / "layers" / "test_packed_linear.py"),
    ],
    ids=lambda command: " ".join(map(str, command[1:3])),
)
def test_a_process_of_ours_waits_asleep(command, told):
    assert told(*command) == "OMP_WAIT_POLICY=passive"


@pytest.mark.parametrize("module", ["compressor.artifact.verify", "compressor.evaluation.evaluate"])
def test_a_child_of_ours_waits_asleep(module, tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text(TORCH)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("TOLD", str(tmp_path / "told"))
    for name in idle_threads.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(child.ChildBug):  # it ended without an answer
        child.ask(module, REQUEST, "tells")
    assert (tmp_path / "told").read_text() == "OMP_WAIT_POLICY=passive"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_imports_the_package_before_anything_that_might_be_torch(script):
    names = []
    for node in ast.parse(script.read_text()).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names += [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
    others = [name for name in names if name.partition(".")[0] not in sys.stdlib_module_names]
    if all(name.partition(".")[0] == "matplotlib" for name in others):
        return  # it computes nothing
    assert others[0].partition(".")[0] == "compressor" or "compressor.process.idle_threads" in others


@pytest.mark.parametrize(
    "name, value", [("OMP_WAIT_POLICY", "active"), ("GOMP_SPINCOUNT", "7"), ("KMP_BLOCKTIME", "1")]
)
def test_what_a_user_says_stays(name, value, told):
    assert told("-c", "import compressor, torch", **{name: value}) == f"{name}={value}"
    said = (
        "from compressor.process.idle_threads import *\n"
        "print(how_threads_wait(), 'OMP_WAIT_POLICY' in environment_of_user())"
    )
    assert told("-c", said, **{name: value}) == f"{name}={value} (environment) {name == 'OMP_WAIT_POLICY'}"


def test_programs_of_others_are_told_nothing(told):
    said = (
        "from compressor.process.idle_threads import *\n"
        "print(how_threads_wait(), 'OMP_WAIT_POLICY' in environment_of_user())"
    )
    assert told("-c", said) == "OMP_WAIT_POLICY=passive (set by compressor) False"


def test_the_runtime_of_torch_obeys_and_a_torch_that_came_first_is_told():
    """By what GNU's runtime, if it is the one, writes when it is loaded."""
    code = (
        "import torch, compressor.process.idle_threads as t, os\n"
        "print(t.how_threads_wait(), os.environ['OMP_WAIT_POLICY'])"
    )
    unset = {name: value for name, value in os.environ.items() if name not in idle_threads.VARIABLES}
    for first in ("", "import compressor; "):
        done = subprocess.run(
            [sys.executable, "-c", first + code], env={**unset, "OMP_DISPLAY_ENV": "verbose", "PYTHONPATH": str(ROOT)},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        lines = [line.split("'")[1] for line in done.stderr.splitlines() if "OMP_WAIT_POLICY" in line]
        assert set(lines) <= ({"PASSIVE"} if first else {"PASSIVE", "ACTIVE"})
        spins = [line.split("'")[1] for line in done.stderr.splitlines() if "GOMP_SPINCOUNT" in line]
        assert all((int(count) == 0) == bool(first) for count in spins)
        assert done.stdout.startswith(
            "OMP_WAIT_POLICY=passive (set" if first else "spinning: torch was imported before"
        )
        assert done.stdout.split()[-1] == "passive"
