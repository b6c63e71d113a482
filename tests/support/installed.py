"""A package that is found by its entry points, as an installed one is, without installing it."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from pathlib import Path

import pytest


def announce(patch: pytest.MonkeyPatch, site: Path, points: Mapping[str, Mapping[str, str]], *folders: Path) -> None:
    """Announce entry points to this process and to those that it starts.

    site     the folder that gets the distribution
    points   group -> name -> module:class
    folders  where further modules are
    """
    info = site / "announced-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: announced\nVersion: 1.0\n")
    groups = [
        f"[{group}]\n" + "".join(f"{name} = {place}\n" for name, place in named.items())
        for group, named in points.items()
    ]
    (info / "entry_points.txt").write_text("".join(groups))
    entries = [str(site), *map(str, folders)]
    for entry in entries:
        patch.syspath_prepend(entry)
    patch.setenv("PYTHONPATH", os.pathsep.join([*entries, os.environ.get("PYTHONPATH", "")]))
    importlib.invalidate_caches()
