"""Imports go one way, also those inside functions, and `import compressor` is light."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "compressor"
# layers of the tree, after docs/architecture.md; a unit is a module or a sub-package
READING = {"recipe", "settings", "reference", "yaml_source"}
ENGINE = {"plan", "sweep", "site", "run", "run_data", "journal", "units", "remodel", "reshape"}
TELLING = {"evaluate", "measure", "report", "compare", "gates", "verify", "against_source"}
STORING = {"artifact", "artifact_files", "manifest", "export", "modelling", "stock_loading", "trial"}
MODELS = {
    "structure",
    "model_building",
    "tracing",
    "replay",
    "routing",
    "replaceable",
    "tape",
    "binding",
    "checkpoint",
    "inspection",
    "token_limit",
    "residual",
    "invariance",
    "nudging",
    "prunable",
    "masking",
    "token_sites",
}
OUTER = {"cli", "testing", "progress", "doctor"}
DATA = {"data", "data_files", "data_images", "data_parts", "data_rows"}
# what a unit of arithmetic must not import, and one that also knows what a pass sees
ALL_BUT_PROTOCOL = READING | ENGINE | TELLING | STORING | MODELS | OUTER | {"passes", "layers"} | DATA
ALL_OTHERS = ALL_BUT_PROTOCOL | {"protocol"}
# unit -> what it must not import
FORBIDDEN = {
    "errors": ALL_OTHERS,
    "search_path": ALL_OTHERS,
    "utf8": ALL_OTHERS,
    "streams": ALL_OTHERS,
    "bounds": ALL_OTHERS,
    "attention": ALL_OTHERS,
    "resources": ALL_OTHERS,
    "child": ALL_OTHERS,
    "stopping": ALL_OTHERS - {"journal"},
    "idle_threads": ALL_OTHERS | {"errors", "kernels"},
    "kernels": ALL_OTHERS,
    "layers": READING | ENGINE | TELLING | STORING | MODELS | OUTER | {"passes", "protocol", "data"},
    "blockwise": ALL_OTHERS,
    "norms": ALL_OTHERS,
    "rotation": ALL_OTHERS,
    "slicing": ALL_BUT_PROTOCOL,
    "factorization": ALL_BUT_PROTOCOL,
    "sparse_coding": ALL_OTHERS,
    "straight_through": ALL_OTHERS,
    "variational": ALL_OTHERS,
    "budget": ALL_OTHERS,
    "weighing": ALL_BUT_PROTOCOL,
    "unit_masks": ALL_BUT_PROTOCOL,
    "mask_training": ALL_BUT_PROTOCOL,
    "token_counts": ALL_OTHERS,
    "token_ranking": ALL_OTHERS,
    "watched_attention": ALL_OTHERS,
    "token_sites": READING | ENGINE | TELLING | STORING | OUTER | {"passes", "data", "residual"},
    "kept_patches": ALL_OTHERS,
    "turning": ALL_BUT_PROTOCOL,
    "stream": ALL_OTHERS,
    "pruning": ALL_BUT_PROTOCOL,
    "pruned_parameters": ALL_BUT_PROTOCOL,
    "reconstruction": ALL_OTHERS,
    "protocol": READING | ENGINE | TELLING | STORING | MODELS | OUTER | {"passes", "data"},
    "passes": READING | ENGINE | TELLING | STORING | MODELS | OUTER | {"data"},
    "model_files": ALL_OTHERS,
    "file_names": ALL_OTHERS,
    "glob": ALL_OTHERS,
    "side_files": ALL_OTHERS,
    "model_card": ALL_OTHERS,
    "trusted_code": ALL_OTHERS,
    "manifest": ALL_OTHERS,
    "artifact_files": (ALL_OTHERS - {"manifest"}) | {"export", "modelling"},
    "stock_loading": READING | TELLING | OUTER | ENGINE - {"units"} | {"passes", "data"},
    "checkpoint": READING | ENGINE | TELLING | STORING | OUTER | {"structure", "passes", "layers"},
    "data": READING | ENGINE | TELLING | STORING | MODELS | OUTER | {"passes", "layers"},
    "data_files": ALL_OTHERS - {"data_rows"},
    "data_images": ALL_OTHERS - {"data_files", "data_rows"},
    "data_parts": ALL_OTHERS,
    "data_rows": ALL_OTHERS,
    "model_building": READING
    | ENGINE
    | TELLING
    | STORING
    | OUTER
    | {"structure", "tracing", "replay", "passes", "layers", "protocol", "data"},
    "structure": READING | ENGINE | TELLING | STORING | OUTER | {"passes", "layers", "residual"},
    "nudging": READING | ENGINE | TELLING | STORING | OUTER | {"structure", "passes", "layers", "protocol", "data"},
    "invariance": READING | ENGINE | TELLING | STORING | OUTER | {"structure", "passes", "layers", "protocol", "data"},
    "classes": READING | ENGINE | TELLING | STORING | MODELS | OUTER | {"passes", "protocol", "data"},
    "branches": READING | ENGINE | TELLING | STORING | OUTER | {"passes", "protocol", "data"},
    "residual": READING | ENGINE | TELLING | STORING | OUTER | {"passes", "protocol", "data"},
    "prunable": READING | ENGINE | TELLING | STORING | OUTER | {"passes", "data"},
    "finding_units": READING | ENGINE | TELLING | STORING | OUTER | {"passes", "data"},
    "masking": READING | ENGINE | TELLING | STORING | OUTER | {"structure", "passes", "data"},
    "artifact": READING | {"stock_loading"} | TELLING | OUTER | ENGINE - {"units"} | {"passes", "data"},
    "tracing": READING | ENGINE | TELLING | STORING | OUTER | {"structure", "passes", "layers", "data"},
    "routing": READING | ENGINE | TELLING | STORING | OUTER | {"structure", "passes", "layers", "protocol", "data"},
    "replaceable": READING | ENGINE | TELLING | STORING | OUTER | {"structure", "passes", "layers", "data"},
    "functions": READING | ENGINE | TELLING | STORING | OUTER | {"passes", "data"},
    "tabulate": ALL_OTHERS,
    "tape": READING | ENGINE | TELLING | STORING | OUTER | {"structure", "passes", "layers", "protocol", "data"},
    "modelling": READING | TELLING | OUTER | ENGINE | MODELS | {"artifact", "export", "passes", "protocol", "data"},
    "export": READING | TELLING | OUTER | ENGINE - {"units"} | {"passes", "data"},
    "units": READING | TELLING | OUTER | ENGINE | {"passes", "data"},
    "verify": READING | OUTER | ENGINE - {"units"} | {"passes", "data", "evaluate", "measure", "report", "compare"},
    "against_source": READING | OUTER | ENGINE - {"units"} | TELLING | {"passes", "data"},
    "evaluate": READING | OUTER | ENGINE - {"units"} | {"passes", "measure", "report", "compare"},
    "gates": READING | ENGINE | STORING | MODELS | OUTER | TELLING | {"passes", "layers", "protocol", "data"},
    "settings": ENGINE | STORING | MODELS | OUTER | TELLING - {"gates"} | {"recipe", "passes", "layers", "data"},
    "recipe": ENGINE | STORING | MODELS | OUTER | TELLING | {"layers", "data"},
    "plan": TELLING | OUTER | {"sweep", "run", "run_data", "journal", "data", "data_files", "data_images"},
    "run_data": TELLING | OUTER | STORING | ENGINE | {"passes", "layers"},
    "token_limit": READING | ENGINE | TELLING | STORING | OUTER | {"passes", "layers", "protocol"} | DATA,
    "journal": READING | TELLING | STORING | MODELS | OUTER | {"plan", "sweep", "run", "units", "passes", "layers"},
    "site": TELLING | OUTER | {"sweep", "run", "journal", "passes", "artifact", "data"},
    "remodel": READING | TELLING | STORING | OUTER | ENGINE | {"passes", "layers", "data"},
    "reshape": TELLING | OUTER | STORING | {"sweep", "run", "plan", "passes", "layers"},
    "shaping": TELLING | OUTER | STORING | {"sweep", "run", "plan", "passes", "layers"},
    "sweep": TELLING | OUTER | {"run", "passes", "artifact"},
    "report": ENGINE | MODELS | OUTER | {"passes", "layers", "measure", "compare"},
    "run": OUTER | {"passes"},
}
for unit in FORBIDDEN:
    FORBIDDEN[unit] = FORBIDDEN[unit] - {unit}


def imported(path, with_type_checking=True):
    """(unit, ...) of compressor that a file imports anywhere, also inside functions."""
    tree = ast.parse(path.read_text())
    skipped = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            skipped |= {id(inner) for branch in node.body for inner in ast.walk(branch)}
    for node in ast.walk(tree):
        if id(node) in skipped and not with_type_checking:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "compressor":
            parts = node.module.split(".")
            yield from [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("compressor."))


def unit_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_imports_go_one_way(path):
    bad = set(imported(path)) & FORBIDDEN.get(unit_of(path), set())
    assert not bad, f"{unit_of(path)} must not import {sorted(bad)}"


def test_no_import_anywhere_closes_a_circle():
    """Imports inside functions may defer something slow; they must not dodge a cycle."""
    graph = {}
    for path in PACKAGE.rglob("*.py"):
        unit = unit_of(path)
        known = {name for name in imported(path, with_type_checking=False) if (PACKAGE / f"{name}.py").exists()}
        known |= {name for name in imported(path, with_type_checking=False) if (PACKAGE / name).is_dir()}
        graph.setdefault(unit, set()).update(known - {unit})
    done, open_ = set(), []

    def visit(unit):
        assert unit not in open_, " -> ".join([*open_[open_.index(unit) :], unit])
        if unit not in done:
            open_.append(unit)
            for other in sorted(graph[unit]):
                visit(other)
            done.add(open_.pop())

    for unit in sorted(graph):
        visit(unit)
    assert len(done) > 30


def test_the_table_names_modules_that_exist():
    units = {unit_of(path) for path in PACKAGE.rglob("*.py")}
    named = set(FORBIDDEN) | set().union(*FORBIDDEN.values())
    assert named <= units, named - units


def test_a_pass_never_imports_another_pass():
    for path in (PACKAGE / "passes").glob("[a-z]*.py"):
        assert "compressor.passes" not in path.read_text(), path.name


def test_importing_the_package_is_light():
    code = "import sys, compressor; print([m for m in ('torch', 'transformers', 'pydantic') if m in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
