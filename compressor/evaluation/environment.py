"""Collects facts about the machine and the libraries, for the report, `doctor` and the journal."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from compressor.evaluation.sections import Environment

PACKAGES = ("torch", "transformers", "compressed-tensors", "safetensors", "tokenizers", "accelerate", "bitsandbytes")
FEATURES = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "neon", "asimd")


def environment(device: torch.device) -> Environment:
    import torch

    return {
        "python": platform.python_version(),
        "torch": package_version("torch"),
        "transformers": package_version("transformers"),
        "compressed_tensors": package_version("compressed-tensors"),
        "safetensors": package_version("safetensors"),
        "tokenizers": package_version("tokenizers"),
        "os": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "cpu_features": cpu_features(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def package_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def cpu_name() -> str:
    return _cpuinfo("model name") or platform.processor() or "unknown"


def cpu_features() -> list[str]:
    flags = set((_cpuinfo("flags") or _cpuinfo("Features") or "").split())
    return [name for name in FEATURES if name in flags]


def _cpuinfo(key: str) -> str | None:
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return None
    for line in path.read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return None
