"""Runs before anything imports torch."""

import gc
import importlib
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent))  # cuda_ext is a folder beside the package, not a part of it

import compressor  # noqa: F401 (torch's threads sleep while they wait, here and in child processes)

# Tiny models: a second thread costs more than it gives, most where the tests share the cores with each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="compress-model-hf-")  # where transformers copies code that it loads


TIERS = ("e2e", "faults")  # folders below tests/; every other one is of the tier `unit`


def pytest_unconfigure():
    """Remove the folder of this process: workers and the process that starts them have one each."""
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)


def pytest_collection_modifyitems(items):
    """Mark each test by its folder: `unit`, `e2e` (whole runs and the command line) or `faults` (planted ones)."""
    for item in items:
        folder = item.path.relative_to(Path(__file__).parent).parts[0]
        if not any(item.get_closest_marker(tier) for tier in TIERS):
            item.add_marker(folder if folder in TIERS else "unit")


def pytest_collection_finish():
    """What was imported and collected stays: the garbage collector needn't visit it in each test, nor forks copy it.

    With its usual thresholds the collector takes 6 % of the time of all tests, most of it for models that stay in use.
    """
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


@pytest.fixture(scope="session", autouse=True)
def started_early():
    """The processes that verify and measure are forked from one server, which has imported torch and transformers.

    Those of a test that changes an environment variable are started anew, except for variables that they don't read.
    """
    from compressor.process import child

    variables, unread = child.environment, ("PYTEST_CURRENT_TEST", "GITHUB_STEP_SUMMARY")
    child.environment = lambda: {name: value for name, value in variables().items() if name not in unread}
    with child.started_early():
        yield


@pytest.fixture(autouse=True)
def nothing_remembered(request):
    """A test that replaces code doesn't see what other tests found with the real code, and leaves nothing behind."""
    if "monkeypatch" not in request.fixturenames:
        yield
        return
    remembered = importlib.import_module("compressor.model.remembered")  # only here, since it imports torch
    remembered.forget()
    yield
    remembered.forget()


@pytest.fixture(scope="session")
def emulated():
    """The CUDA kernels on the CPU."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    cuda_on_cpu = importlib.import_module("cuda_on_cpu")  # only here, since it imports torch
    return cuda_on_cpu.emulated_kernels(cuda_on_cpu.library())


@pytest.fixture
def kernels(emulated, monkeypatch):
    """Those, for the binding: the CPU counts as a CUDA device that has them."""
    importlib.import_module("cuda_on_cpu").use(monkeypatch, emulated)
    return emulated


@pytest.fixture
def in_process(monkeypatch):
    """Verify without a child process, which takes five seconds to start."""
    verify = importlib.import_module("compressor.artifact.verify")  # only here, since it imports torch

    def here(directory, batch, **more):
        return verify.verify(directory, batch, **{"deep": True, **more})

    monkeypatch.setattr(verify, "verify_in_child", here)
