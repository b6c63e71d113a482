"""Examines this machine and installation, for `compress-model doctor`."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import TypedDict

import psutil
import torch

from compressor._version import __version__
from compressor.evaluation.environment import PACKAGES, cpu_name, environment, package_version
from compressor.evaluation.render import human_bytes
from compressor.kernels.cpu import LEVELS, PARALLEL_FOR, RECORD, library
from compressor.kernels.cuda import devices
from compressor.kernels.prepared.selftest import self_test
from compressor.process.idle_threads import how_threads_wait

LIBRARIES = ("torch", "transformers", "compressed-tensors", "bitsandbytes")
EXTRAS = {"bitsandbytes": "bitsandbytes", "datasets": None}


class Kernels(TypedDict):
    """cpu_library: loaded, or why it is not; self_test: "op, level" -> outcome; cuda: the same, for each build"""

    cpu_library: str
    cpu_build: str
    level: str | None
    threads: str | None
    self_test: dict[str, str]
    cuda: dict[str, str]


class Machine(TypedDict):
    """JSON facts of this machine and installation, as `doctor --json` prints them."""

    compress_model: str
    packages: dict[str, str | None]
    python: str
    os: str
    cpu_features: list[str]
    cpu: str
    cores: int | None
    threads: int
    threads_wait: str
    kernels: Kernels
    gpu: str | None
    memory_available_bytes: int
    disk_free_bytes: int
    cache: str
    cache_writable: bool
    missing_extras: list[str]


def examine() -> Machine:
    """The facts as JSON values: versions, CPU, kernels with reasons, GPU, memory, disk, cache, missing extras."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    known = environment(device)
    cache = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    return {
        "compress_model": __version__,
        "packages": {name: package_version(name) for name in (*PACKAGES, "datasets")},
        "python": known["python"],
        "os": known["os"],
        "cpu_features": known["cpu_features"],
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "threads_wait": how_threads_wait(),
        "kernels": _kernels(),
        "gpu": torch.cuda.get_device_name() if device.type == "cuda" else None,
        "memory_available_bytes": psutil.virtual_memory().available,
        "disk_free_bytes": shutil.disk_usage(Path.cwd()).free,
        "cache": str(cache),
        "cache_writable": _writable(cache),
        "missing_extras": [
            f"{name}: pip install compress-model[{extra}]" if extra else f"{name}: pip install {name}"
            for name, extra in EXTRAS.items()
            if package_version(name) is None
        ],
    }


def summary(found: Machine) -> list[tuple[str, str]]:
    """Ten lines that show whether this machine works, each a label and a sentence. `found` comes from `examine`."""
    packages, kernels = found["packages"], found["kernels"]
    return [
        ("version", f"compress-model {found['compress_model']}, Python {found['python']}, {found['os']}"),
        ("libraries", ", ".join(f"{name} {packages[name]}" for name in LIBRARIES if packages[name])),
        ("processor", f"{found['cpu']}, {found['cores']} cores, {', '.join(found['cpu_features']) or 'no extensions'}"),
        ("threads", f"{found['threads']}; waiting threads: {found['threads_wait']}"),
        ("CPU kernels", _cpu_line(kernels)),
        ("CUDA kernels", "; ".join(f"{name}: {outcome}" for name, outcome in kernels["cuda"].items())),
        ("GPU", found["gpu"] or "none"),
        ("memory", f"{human_bytes(found['memory_available_bytes'])} available"),
        ("disk", f"{human_bytes(found['disk_free_bytes'])} free here; {_cache_line(found)}"),
        (
            "optional",
            "; ".join(f"missing {lacking}" for lacking in found["missing_extras"]) or "everything is installed",
        ),
    ]


def _cpu_line(kernels: Kernels) -> str:
    if kernels["level"] is None:
        return f"not in use: {kernels['cpu_library']}"
    wrong = [f"{name}: {outcome}" for name, outcome in kernels["self_test"].items() if outcome != "ok"]
    tested = f"{len(kernels['self_test'])} self-tests passed" if not wrong else f"WRONG: {'; '.join(wrong)}"
    return f"{kernels['level']}; {tested}"


def _cache_line(found: Machine) -> str:
    return f"cache {found['cache']} is {'writable' if found['cache_writable'] else 'not writable'}"


def _kernels() -> Kernels:
    """The CPU library: whether it is installed, its instruction set, and a test of each op at each level. The CUDA
    kernels: a test on each GPU, or the reason why there are none."""
    found = library()
    record = RECORD.read_text().strip() if RECORD.is_file() else "no record of a build"
    if isinstance(found, str):
        return {
            "cpu_library": found,
            "cpu_build": record,
            "level": None,
            "threads": None,
            "self_test": {},
            "cuda": devices.report(),
        }
    return {
        "cpu_library": "loaded",
        "cpu_build": record,
        "level": LEVELS[found.level],
        "threads": f"torch's ({PARALLEL_FOR})" if found.has_torch_threads else f"one: torch has no {PARALLEL_FOR}",
        "self_test": self_test(),
        "cuda": devices.report(),
    }


def _writable(folder: Path) -> bool:
    while not folder.exists():
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False
