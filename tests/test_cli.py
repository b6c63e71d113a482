"""The command line is quick, says what it knows, and keeps the house's import rules."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "compressor"
# module -> what it must not import, after docs/architecture.md
ENGINE = {"sweep", "plan", "run", "recipe", "journal", "evaluate", "report", "cli", "measure"}
FORBIDDEN = {
    "passes": ENGINE | {"artifact", "export", "structure", "binding", "replay", "units", "checkpoint", "data"},
    "layers": ENGINE | {"passes", "artifact", "export", "structure", "units", "protocol"},
    "kernels": ENGINE | {"passes", "layers", "artifact", "structure", "units", "protocol"},
    "artifact": ENGINE | {"passes"},
    "export": ENGINE | {"passes", "artifact"},
    "modelling": ENGINE | {"passes", "artifact", "export", "structure", "units"},
    "verify": ENGINE | {"passes"},
    "structure": ENGINE | {"passes", "artifact"},
    "tracing": ENGINE | {"passes", "layers", "artifact", "structure", "units", "protocol"},
    "checkpoint": ENGINE | {"passes", "layers", "artifact", "structure"},
    "journal": ENGINE - {"journal"} | {"passes", "layers", "artifact", "structure", "units"},
    "errors": ENGINE | {"passes", "layers", "artifact", "structure", "protocol"},
}


def run(*arguments, **environment):
    command = [sys.executable, "-m", "compressor", *map(str, arguments)]
    full = {**os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1", "COLUMNS": "160", **environment}
    return subprocess.run(command, env=full, capture_output=True, text=True, check=False)


def python(code):
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def imported(path):
    """Names of compressor modules that a file imports anywhere, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("compressor"):
            parts = node.module.split(".")
            yield from [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("compressor."))


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_imports_go_one_way(path):
    unit = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    bad = set(imported(path)) & FORBIDDEN.get(unit, set()) - {unit}
    assert not bad, f"{unit} must not import {sorted(bad)}"


def test_a_pass_never_imports_another_pass():
    for path in (PACKAGE / "passes").glob("[a-z]*.py"):
        assert "compressor.passes" not in path.read_text(), path.name


@pytest.mark.parametrize("arguments", [["--help"], ["schema"], ["passes"], ["passes", "gptq"], ["run", "--help"]])
def test_help_schema_and_passes_do_not_wait_for_torch(arguments):
    code = (
        f"import sys; sys.argv = ['compress-model', *{arguments!r}]\n"
        "from compressor.cli import main\n"
        "import io, contextlib\n"
        "with contextlib.redirect_stdout(io.StringIO()):\n"
        "    try: main()\n"
        "    except SystemExit as stop: assert not stop.code\n"
        "print(sorted(set(sys.modules) & {'torch', 'transformers', 'matplotlib', 'datasets'}))"
    )
    assert python(code) == "[]"


def test_importing_the_package_is_light():
    assert python("import sys, compressor; print('torch' in sys.modules, 'pydantic' in sys.modules)") == "False False"


def test_help_takes_less_than_half_a_second_more_than_python_with_typer():
    """The best of several tries on each side, in turn, so that a busy machine doesn't decide."""
    code = "import sys; sys.argv=['x','--help']\nfrom compressor.cli import app\ntry: app()\nexcept SystemExit: pass"
    bare = "import typer, rich.console, rich.table, rich.panel"
    times = {code: [], bare: []}
    for _ in range(4):
        for snippet, found in times.items():
            began = time.perf_counter()
            python(snippet)
            found.append(time.perf_counter() - began)
    assert min(times[code]) - min(times[bare]) < 0.5


@pytest.mark.parametrize(
    "verb", ["run", "plan", "eval", "compare", "inspect", "verify", "passes", "schema", "report", "doctor"]
)
def test_every_verb_has_help(verb):
    done = run(verb, "--help")
    assert done.returncode == 0 and "Usage:" in done.stdout


def test_schema_is_json_schema():
    schema = json.loads(run("schema").stdout)
    assert schema["$schema"].endswith("2020-12/schema") and "pass_gptq" in schema["$defs"]


def test_passes_lists_settings_with_their_defaults():
    rows = json.loads(run("passes", "gptq", "--format", "json").stdout)
    bits = next(row for row in rows if row["setting"] == "bits")
    assert bits == {"setting": "bits", "type": "2 | 3 | 4 | 8", "default": "4", "meaning": "Bits per weight."}
    assert run("passes", "gptk").returncode == 2


def test_doctor_says_what_is_there():
    found = json.loads(run("doctor", "--json").stdout)
    assert found["packages"]["torch"] and found["kernels"]["packed_linear"].startswith("reference")
    assert isinstance(found["cache_writable"], bool) and found["memory_available_bytes"] > 0


def test_plan_predicts_and_writes_nothing(tmp_path):
    done = run("plan", "gptq-w4a16", "--model", "demo", "--output", tmp_path / "o", "--format", "json")
    found = json.loads(done.stdout)
    assert done.returncode == 0 and len(found["weights"]) == 42 and not found["problems"]
    assert 1.1e6 < found["predicted_weight_bytes"] < 1.3e6
    assert list(tmp_path.iterdir()) == []


def test_plan_lists_every_problem_at_once(tmp_path):
    (tmp_path / "r.yaml").write_text("version: 1\nsteps: [{pass: rtn, group_size: 128, only: [nope]}, {pass: rtn}]\n")
    done = run("plan", tmp_path / "r.yaml", "--model", "demo", "--set", "limits.disk=1KiB")
    assert done.returncode == 2
    assert "matches none" in done.stderr and "bytes of disk are needed" in done.stderr


def test_inspect_shows_groups_and_roles():
    found = json.loads(run("inspect", "demo", "--format", "json").stdout)
    assert found["block_count"] == 6 and found["tied"] == {"lm_head.weight": "model.embed_tokens.weight"}
    names = [[w["name"].rpartition(".")[2] for w in group] for group in found["units"][1]["groups"]]
    assert names == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


def test_a_users_mistake_is_one_line_without_a_traceback():
    done = run("inspect", "no/such/dir")
    assert done.returncode == 5 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error[model]: no/such/dir:")
    done = run("verify", "no-such-dir", "--json")
    assert json.loads(done.stdout)["event"] == "error"


def test_completion_is_offered():
    assert "_COMPRESS_MODEL_COMPLETE" in python(
        "from typer.completion import get_completion_script as g;"
        "print(g(prog_name='compress-model', complete_var='_COMPRESS_MODEL_COMPLETE', shell='bash'))"
    )
