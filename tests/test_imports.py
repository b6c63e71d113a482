"""A package imports only packages below it; no module closes a circle; `import compressor` is light."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "compressor"
# From the top of the house down. Names on one line are neighbours, which never import each other.
ROWS = """
    cli
    testing contract
    run
    evaluation
    engine
    recipe
    passes analysis
    methods
    protocol artifact data
    model
    layers
    kernels storage
    process
    lazy errors bounds _version
"""
ROW = {name: number for number, line in enumerate(ROWS.strip().splitlines()) for name in line.split()}
TOP = "__init__"  # the package itself: only names for users, which no module of it needs
MODULES = {path: ".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in sorted(PACKAGE.rglob("*.py"))}


def imported(path, with_type_checking=True):
    """Dotted names below `compressor` that a file imports anywhere, also inside functions."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = node.body if with_type_checking else []
    for node in ast.walk(tree):
        assert not isinstance(node, ast.ImportFrom) or not node.level, f"{path}: a relative import escapes this test"
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "compressor":
            base = node.module.split(".")[1:]
            for alias in node.names:
                whole = ".".join([*base, alias.name])
                yield whole if {whole, f"{whole}.__init__"} & set(MODULES.values()) else ".".join(base) or TOP
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.partition(".")[0] == "compressor"]
            yield from (name.partition(".")[2] or TOP for name in names)


@pytest.mark.parametrize("path", [path for path in MODULES if MODULES[path].partition(".")[0] in ROW], ids=MODULES.get)
def test_a_package_imports_only_packages_below_it(path):
    package = MODULES[path].partition(".")[0]
    others = {name.partition(".")[0] for name in imported(path)} - {package}
    above = {name for name in others if name == TOP or ROW[name] <= ROW[package]}
    assert not above, f"{package} must not import {sorted(above)}"


def test_every_package_has_a_row():
    assert {name.partition(".")[0] for name in MODULES.values()} - ROW.keys() == {"__init__", "__main__"}


def test_no_import_anywhere_closes_a_circle():
    """Imports inside functions may defer something slow; they must not dodge a circle."""
    graph = {MODULES[path]: set(imported(path)) & set(MODULES.values()) for path in MODULES}
    done, open_ = set(), []

    def visit(module):
        assert module not in open_, " -> ".join([*open_[open_.index(module) :], module])
        if module not in done:
            open_.append(module)
            for other in sorted(graph[module] - {module}):
                visit(other)
            done.add(open_.pop())

    for module in sorted(graph):
        visit(module)
    assert len(done) == len(MODULES)


def test_nothing_imports_a_single_pass():
    """So a pass touches its own file and the table of names alone: neither the engine nor another pass knows it."""
    for path in MODULES:
        assert not any(name.startswith("passes.") for name in imported(path)), MODULES[path]


def test_importing_the_package_is_light():
    code = "import sys, compressor; print([m for m in ('torch', 'transformers', 'pydantic') if m in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
