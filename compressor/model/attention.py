"""Selects the implementation of attention and experts: one that torch alone can run.

config.json may name another (`flash_attention_2`, or a repository of kernels on the hub). Those need packages that are
not installed, run only on other devices, or would download code. The model computes the same without them.
"""

from __future__ import annotations

from typing import Any

PLAIN = {"attn_implementation": ("eager", "sdpa"), "experts_implementation": ("eager", "batched_mm", "grouped_mm")}


def replaced_implementations(config: dict[str, Any]) -> dict[str, str]:
    """Keyword of `from_pretrained` -> the implementation that config.json, or a part of it, names and is not used."""
    found: dict[str, str] = {}
    for key, value in config.items():
        name = key.removeprefix("_")
        if name in PLAIN:
            asked = list(value.values()) if isinstance(value, dict) else [value]
            foreign = [entry for entry in asked if entry is not None and entry not in PLAIN[name]]
            if foreign:
                found.setdefault(name, str(foreign[0]))
        elif isinstance(value, dict):
            found = {**replaced_implementations(value), **found}
    return found


def plain_options(config: dict[str, Any]) -> dict[str, None]:
    """Keywords that let `from_pretrained` choose, where config.json names another implementation."""
    return dict.fromkeys(replaced_implementations(config))


def choose_plain(model_config: Any, config: dict[str, Any]) -> None:
    """The same for a config object that was made from config.json. Changes the object."""
    for name in replaced_implementations(config):
        setattr(model_config, f"_{name}", None)
