"""The wheel holds everything a run needs, and works from where it is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from compressor.kernels.cpu import library

ROOT = Path(__file__).parents[2]
NEEDED = {
    "compressor/cli/main.py", "compressor/demo/model.safetensors", "compressor/demo/tokenizer.json",
    "compressor/text/train.txt.gz", "compressor/text/heldout.txt.gz", "compressor/evaluation/templates/report.html.j2",
    "compressor/evaluation/report.schema.json", "compressor/recipes/gptq-w4a16.yaml",
    "compressor/kernels/ops/pack_codes.py",
    "compressor/py.typed", "compressor/kernels/cuda/sources/w_a16.cu", "compressor/kernels/cuda/sources/device.h",
}  # fmt: skip


def copied(folder: Path) -> str:
    """The sources without what an earlier build left."""
    ignored = shutil.ignore_patterns(".*", "out", "build", "*.so", "_cpu_build.txt")
    shutil.copytree(ROOT, folder / "source", ignore=ignored)
    return str(folder / "source")


def reuse_the_library(source: Path) -> None:
    """Let the build find the library that this package was installed with: its installation has proven the compiler."""
    built = source / "build" / f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}" / "compressor/kernels"
    built.mkdir(parents=True)
    for file in (ROOT / "compressor" / "kernels").glob("_cpu.*"):
        shutil.copyfile(file, built / file.name)


@pytest.mark.slow
def test_without_a_compiler_the_package_builds_and_says_why_the_library_is_missing(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    environment = {**os.environ, "CC": "no-compiler-here", "CXX": "no-compiler-here"}
    command += ["-w", str(tmp_path), copied(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as archive:
        assert not any("_cpu." in name for name in archive.namelist())
        archive.extractall(tmp_path / "site")
    code = "from compressor.kernels.cpu import library; print(library())"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert "not built: CompileError" in done.stdout and "no-compiler-here" in done.stdout


@pytest.mark.slow
def test_the_wheel_builds_installs_and_runs(tmp_path):
    source = copied(tmp_path)
    reuse_the_library(Path(source))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    command += ["-w", str(tmp_path), source]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    wheel = next(tmp_path.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    assert names >= NEEDED, NEEDED - names
    assert not any(name.startswith("compressor/kernels/cuda/sources/") and name.endswith(".py") for name in names)
    assert any(name.startswith("compressor/kernels/_cpu.") for name in names) or isinstance(library(), str)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, "-m", "compressor", "plan", "gptq-w4a16", "--model", "demo", "--format", "json"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert '"route"' in done.stdout
    code = "from compressor.kernels.cuda import nvrtc; print(nvrtc.source_text('w_a16'))"
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert "enum Type {" in done.stdout and "__global__" in done.stdout
