"""Writes the figures of a benchmark to a JSON file outside of the tree, named by --output."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

FOLDER = Path("out/bench")


def default_path(name: str) -> Path:
    return FOLDER / f"{name}.json"


def add_output(parser: argparse.ArgumentParser, name: str) -> None:
    default = default_path(name)
    parser.add_argument("--output", type=Path, metavar="FILE", default=default, help=f"JSON; left out: {default}")


def write(result: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
