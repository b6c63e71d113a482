"""The command line is quick, says what it knows, and turns every mistake into one line and the right exit code."""

from __future__ import annotations

import ast
import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from fresh import command

import compressor
from compressor.cli.main import main
from compressor.errors import DependencyError
from compressor.process.child import ChildBug
from compressor.process.resources import ran_out
from compressor.process.streams import LostStream

ROOT = Path(__file__).parents[2]


def run(*arguments, **environment):
    return command(*arguments, COLUMNS="160", **environment)


def started(*arguments, **environment):
    """With an interpreter of its own."""
    full = {**os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1", "COLUMNS": "160", **environment}
    words = [sys.executable, "-m", "compressor", *map(str, arguments)]
    return subprocess.run(words, env=full, capture_output=True, text=True, check=False)


def python(code):
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("arguments", [["--help"], ["schema"], ["passes"], ["passes", "gptq"], ["run", "--help"]])
def test_help_schema_and_passes_do_not_wait_for_torch(arguments):
    code = (
        f"import sys; sys.argv = ['compress-model', *{arguments!r}]\n"
        "from compressor.cli.main import main\n"
        "import io, contextlib\n"
        "with contextlib.redirect_stdout(io.StringIO()):\n"
        "    assert main() == 0\n"
        "print(sorted(set(sys.modules) & {'torch', 'transformers', 'matplotlib', 'datasets'}))"
    )
    assert python(code) == "[]"


def test_help_imports_no_package_that_typer_and_rich_do_not_need_themselves():
    """Imports are what makes a command line slow to start."""
    show = "\nimport sys\nprint(sorted({name.partition('.')[0] for name in sys.modules} - sys.stdlib_module_names))"
    code = (
        "import contextlib, io, sys; sys.argv = ['x', '--help']\nfrom compressor.cli.main import app\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit): app()"
    )
    bare = "import typer, rich.console, rich.markdown, rich.syntax, rich.table, rich.panel, rich.pretty"
    needed, found = (set(ast.literal_eval(python(snippet + show))) for snippet in (bare, code))
    assert found - needed == {"compressor"}


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
    found = json.loads(started("doctor", "--json").stdout)
    assert found["packages"]["torch"] and set(found["kernels"]) == {
        "cpu_library", "cpu_build", "level", "threads", "self_test", "cuda",
    }  # fmt: skip
    assert found["threads_wait"].endswith("(environment)")  # of this process, which has said so
    assert set(found["kernels"]["self_test"].values()) <= {"ok"}
    assert isinstance(found["cache_writable"], bool) and found["memory_available_bytes"] > 0


FOUND = {
    "compress_model": "1", "python": "3.11", "os": "Linux", "packages": {"torch": "2", "transformers": "5",
    "compressed-tensors": "0", "bitsandbytes": None}, "cpu": "CPU", "cores": 2, "cpu_features": [], "threads": 2,
    "threads_wait": "asleep", "gpu": None, "memory_available_bytes": 1 << 30, "disk_free_bytes": 1 << 30,
    "cache": "/c", "cache_writable": False, "missing_extras": ["x: pip install x"],
}  # fmt: skip
KERNELS = {
    "avx2; 1 self-tests passed": {"level": "avx2", "cpu_library": "loaded", "self_test": {"a, avx2": "ok"}},
    "avx2; WRONG: a, avx2: off by 3": {"level": "avx2", "cpu_library": "loaded", "self_test": {"a, avx2": "off by 3"}},
    "not in use: no compiler": {"level": None, "cpu_library": "no compiler", "self_test": {}},
}


@pytest.mark.parametrize("line", KERNELS)
def test_doctor_answers_in_ten_lines_and_names_what_is_wrong(line, monkeypatch, capsys):
    kernels = {**KERNELS[line], "cuda": {"nvrtc (experimental)": "no CUDA device"}}
    monkeypatch.setattr("compressor.cli.doctor.examine", lambda: {**FOUND, "kernels": kernels})
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 10 and shown[4].split(maxsplit=2)[2] == line
    assert "not writable" in shown[8] and "missing x: pip install x" in shown[9]
    assert main(["doctor", "--verbose"]) == 0
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) > 20 and not set("{}[]'") & set(shown)
    rows = [[cell.strip() for cell in row.split("│")[1:3]] for row in shown.splitlines() if "│" in row]
    assert ["kernels: level", str(KERNELS[line]["level"] or "none")] in rows and ["packages: torch", "2"] in rows
    for name, outcome in KERNELS[line]["self_test"].items():
        assert [f"kernels: self_test: {name}", outcome] in rows


def test_plan_predicts_and_writes_nothing(tmp_path):
    done = run("plan", "gptq-w4a16", "--model", "demo", "--output", tmp_path / "o", "--format", "json")
    found = json.loads(done.stdout)
    assert done.returncode == 0 and len(found["weights"]) == 42 and not found["problems"]
    assert 1.1e6 < found["predicted_weight_bytes"] < 1.3e6
    assert list(tmp_path.iterdir()) == []


def test_plan_says_width_and_parameters_of_a_sliced_model(capsys):
    assert main(["plan", "slicegpt-25", "--model", "demo"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "slicegpt: 1,705,600 -> 1,279,200 parameters (-25.0 %), width 128 -> 96 (-25.0 %)" in told
    assert "lm_head.weight shared the embedding's weights and gets its own: 262,144 parameters more" in told


def test_plan_lists_every_problem_at_once(tmp_path):
    (tmp_path / "r.yaml").write_text("version: 1\nsteps: [{pass: rtn, group_size: 128, only: [nope]}, {pass: rtn}]\n")
    command = ("plan", tmp_path / "r.yaml", "--model", "demo", "--set", "limits.disk=1KiB")
    shown = run(*command)
    assert shown.returncode == 2
    assert "steps.0.only[0]: " in shown.stderr and "disk of " in shown.stderr
    done = run(*command, "--json")
    assert done.returncode == 2
    first, *_, last = json.loads(done.stdout.splitlines()[0])["problems"]
    assert (first["name"], first["where"], first["data"]["reason"]) == ("recipe", "steps.0.only[0]", "matches-none")
    assert (last["name"], last["data"]["reason"], last["data"]["available"]) == ("preflight", "disk", 1024)


def test_inspect_shows_groups_and_roles():
    found = json.loads(run("inspect", "demo", "--format", "json").stdout)
    assert found["block_count"] == 6 and found["tied"] == {"lm_head.weight": "model.embed_tokens.weight"}
    names = [[w["name"].rpartition(".")[2] for w in group] for group in found["parts"][1]["groups"]]
    assert names == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


def test_a_users_mistake_is_one_line_without_a_traceback():
    done = run("inspect", "no/such/dir")
    assert done.returncode == 5 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error[model]: no/such/dir:")
    done = run("verify", "no-such-dir", "--json")
    assert json.loads(done.stdout)["event"] == "error"


def test_completion_is_offered():
    done = run("--show-completion", "bash")
    assert done.returncode == 0 and "_COMPRESS_MODEL_COMPLETE=complete_bash" in done.stdout
    offered = run(_COMPRESS_MODEL_COMPLETE="complete_bash", COMP_WORDS="compress-model comp", COMP_CWORD="1")
    assert offered.stdout.split() == ["compare"]


HERE = "the working directory"
MISTAKES = {
    "output is here": (["--output", "."], 2, HERE, {"reason": "output-exists", "kind": "directory"}),
    "output is the root": (["--output", "/"], 2, "'/'", {"reason": "no-output-name"}),
    "output is empty": (["--output", ""], 2, HERE, {"reason": "output-exists", "kind": "directory"}),
    "output is a file": (["--output", "file"], 2, "file", {"reason": "output-exists", "kind": "file"}),
    "output is in a file": (["--output", "file/out"], 2, f"{HERE}/file", {"reason": "not-made"}),
    "output is a link": (["--output", "link"], 2, "link", {"reason": "output-is-link"}),
    "output is too long": (["--output", "x" * 250], 2, "x" * 40 + "...", {"reason": "name-too-long"}),
    "nothing to resume": (["--output", "o", "--resume"], 2, "o.work", {"reason": "no-interrupted-run"}),
    "resume and fresh": (["--output", "o", "--resume", "--fresh"], 2, "run", {"reason": "resume-and-fresh"}),
    "gates unmeasured": (["--output", "o", "--no-eval"], 2, "--no-eval", {"reason": "gates-unmeasured"}),
    "no such device": (["--output", "o", "--device", "quantum"], 2, "--device quantum", {"reason": "no-device"}),
    "no such card": (["--output", "o", "--device", "cuda:99"], 5, "--device cuda:99", {"reason": "no-such-card"}),
    "a file of nobody's": (["--output", "o", "--set", "data.source=~nobody-here/x.txt"], 2, "~nobody-here/x.txt",
                           {"reason": "no-such-file"}),
    "pinned to other data": (["--output", "o", "--set", f"data.sha256={'ab' * 32}"], 2, "stdlib",
                             {"pinned": "ab" * 32}),
    "metric not measured": (["--output", "o", "--set", "eval.metrics=[size]"], 2, "gptq-w4a16.yaml:9:1 (eval)",
                            {"reason": "gate-unmeasured", "metric": "perplexity"}),
}  # fmt: skip


def told(shown):
    """The last event of --json."""
    return json.loads(shown.out.splitlines()[-1])


@pytest.mark.parametrize("mistake", sorted(MISTAKES))
def test_a_run_that_cannot_be_is_refused_in_one_line_and_leaves_nothing(mistake, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    arguments, code, where, data = MISTAKES[mistake]
    command, where = ["run", "gptq-w4a16", "--model", "demo", "--quiet", *arguments], where.replace(HERE, str(tmp_path))
    assert main(command) == code
    shown = capsys.readouterr()
    assert shown.err.startswith("error[") and shown.err.count("\n") == 1 and f"]: {where}: " in shown.err
    assert main([*command, "--json"]) == code
    event = told(capsys.readouterr())
    assert (event["event"], event["code"], event["where"]) == ("error", code, where)
    assert data.items() <= event["data"].items()
    assert shown.out == "" and sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


NOT_UTF8 = {
    "a setting": ["plan", "rtn-w8", "--model", "demo", "--set", "steps.0.bits=\udcff"],
    "a model": ["plan", "rtn-w8", "--model", "x\udcff"],
    "an output": ["run", "rtn-w8", "--model", "demo", "--output", "x\udcff"],
    "a recipe": ["plan", "x\udcff.yaml", "--model", "demo"],
    "a comparison": ["compare", "demo", "x\udcff", "--output", "out.md"],
    "data": ["eval", "demo", "--data", "x\udcff.txt"],
}


@pytest.mark.parametrize("case", NOT_UTF8)
def test_an_argument_that_is_not_utf8_is_refused_in_one_line(case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x\udcff").mkdir()
    assert main(NOT_UTF8[case]) == 2
    wrong = next(word for word in NOT_UTF8[case] if "\udcff" in word).replace("\udcff", "\\xff")
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith(f"error[usage]: {wrong}: ")
    assert main([*NOT_UTF8[case], "--json"]) == 2 and told(capsys.readouterr())["data"] == {"reason": "not-utf-8"}
    assert len(list(tmp_path.iterdir())) == 1


def test_an_output_below_a_folder_whose_name_is_not_utf8_is_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "x\udcff").mkdir()
    monkeypatch.chdir(tmp_path / "x\udcff")
    assert main(["run", "rtn-w8", "--model", "demo", "--output", "o", "--json"]) == 2
    event = told(capsys.readouterr())
    assert (event["where"], event["data"]) == (f"{tmp_path}/x\\xff/o", {"reason": "not-utf-8"})


def test_plan_takes_the_arguments_of_run_and_lists_what_is_wrong_with_them(tmp_path, capsys):
    (tmp_path / "o").mkdir()
    output = ["--output", str(tmp_path / "o")]
    assert main(["plan", "gptq-w4a16", "--model", "demo", *output, "--device", "cpu", "--json"]) == 2
    result, error = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert result["problems"][0]["data"] == {"reason": "output-exists", "kind": "directory"}
    assert result["problems"][0]["where"] == str(tmp_path / "o") and error["event"] == "error"


def test_an_error_nobody_foresaw_keeps_its_traceback_and_is_told_in_json(monkeypatch, capsys):
    monkeypatch.setattr("compressor.cli.doctor.examine", lambda: 1 / 0)
    assert main(["doctor", "--json"]) == 1
    shown = capsys.readouterr()
    event = json.loads(shown.out)
    assert (event["event"], event["code"], event["name"]) == ("error", 1, "bug")
    assert "ZeroDivisionError" in shown.err and "error[bug]" in shown.err


NOT_OURS = {
    "a library reads past the end of a file": (EOFError("no more"), 1, "bug", "EOFError: no more",
                                               {"reason": "EOFError"}),
    "Ctrl-C": (KeyboardInterrupt(), 130, "interrupted", "", {}),
    "an abort of typer": (typer.Abort(), 1, "bug", "Abort", {"reason": "Abort"}),
    "memory": (MemoryError(), 5, "preflight", "", {"reason": "out-of-memory", "cause": ""}),
    "memory, as torch says it": (RuntimeError("can't allocate memory: you tried 1 byte"), 5, "preflight", "1 byte",
                                 {"reason": "out-of-memory", "cause": "can't allocate memory: you tried 1 byte"}),
    "disk": (OSError(errno.ENOSPC, "No space left on device"), 5, "preflight", "", {"reason": "disk-full"}),
    "nesting": (RecursionError("maximum recursion depth exceeded"), 5, "preflight", "",
                {"reason": "nested-too-deeply", "limit": sys.getrecursionlimit()}),
    "a file": (OSError(errno.EIO, "Input/output error"), 1, "bug", "Input/output error",
               {"reason": "OSError"}),
    "a child": (ChildBug("ZeroDivisionError: in a child"), 1, "bug", "ZeroDivisionError", {"reason": "ChildBug"}),
    "a child that knew": (DependencyError("x is needed", where="export", hint="pip install x", data={"package": "x"}),
                          6, "missing-dependency", "export: x is needed. pip install x", {"package": "x"}),
}  # fmt: skip


@pytest.mark.parametrize("case", NOT_OURS)
def test_an_exception_of_a_library_gets_no_other_meaning(case, monkeypatch, capsys):
    error, code, name, words, data = NOT_OURS[case]

    def fail():
        raise error

    monkeypatch.setattr("compressor.cli.doctor.examine", fail)
    assert main(["doctor", "--json"]) == code
    shown = capsys.readouterr()
    events = [json.loads(line) for line in shown.out.splitlines()]
    assert [(event["event"], event["code"], event["name"]) for event in events] == [("error", code, name)]
    assert data.items() <= events[0]["data"].items() and bool(data) == bool(events[0]["data"])
    assert words in shown.err and shown.err.splitlines()[-1].startswith(f"error[{name}]")
    assert ("Traceback" in shown.err) == (code == 1)


@pytest.mark.parametrize("arguments", [["schema"], ["passes"], ["--help"]], ids=" ".join)
def test_a_reader_that_goes_away_is_no_bug(arguments):
    words = [sys.executable, "-m", "compressor", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1"}
    done = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    done.stdout.close()
    assert (done.wait(60), done.stderr.read()) == (130, "")


NOT_THERE = {  # arguments -> exit code
    "plan nope --model demo": 2,
    "plan rtn-w8 --set steps.0.bits=x --model demo": 2,
    "plan rtn-w8 --model nope": 5,
    "run nope --model demo --output out": 2,
    "run rtn-w8 --model nope --output out": 5,
    "eval nope": 5,
    "eval demo --baseline nope": 5,
    "compare demo": 2,
    "compare demo nope": 5,
    "inspect nope": 5,
    "verify demo --source nope": 5,
}


def test_a_recipe_or_model_that_is_not_there_is_answered_before_torch_is_imported():
    code = (
        "import sys\nfrom compressor.__main__ import main\nfor words in sys.argv[1:]:\n"
        "    sys.argv = ['compress-model', *words.split()]\n    print(main(), 'torch' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *NOT_THERE], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [f"{status} False" for status in NOT_THERE.values()], done.stderr


LOST = "error[preflight]: standard output: "
NO_ROOM = "(No space left on device)"  # what the system calls it
STREAMS = {
    "closed": ("passes >&-", 0, "", ""),
    "all closed": ("passes <&- >&- 2>&-", 0, "", ""),
    "full, a table": ("passes > /dev/full", 5, LOST, NO_ROOM),
    "full, JSON": ("schema > /dev/full", 5, LOST, NO_ROOM),
    "full, help": ("--help > /dev/full", 5, LOST, NO_ROOM),
    "full, an error in JSON": ("plan nope --model demo --json > /dev/full", 2, "error[recipe]: nope: ", ""),
    "standard error is full": ("plan nope --model demo 2> /dev/full", 2, "", ""),
    "open for reading": ("schema 1< /dev/null", 5, LOST, "(Bad file descriptor)"),
}


@pytest.mark.parametrize("case", STREAMS)
def test_a_stream_that_cannot_be_written_ends_in_one_line_at_most(case):
    arguments, code, start, cause = STREAMS[case]
    line = f'"{sys.executable}" -m compressor {arguments}'
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1"}
    done = subprocess.run(["bash", "-c", line], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code and done.stdout == ""
    assert done.stderr.startswith(start) and cause in done.stderr and done.stderr.count("\n") == bool(start)


def test_a_closed_stream_is_taken_by_no_file():
    """The next file to be opened would get its number, also in a process that this one starts."""
    code = (
        "import os, subprocess, sys; from compressor.process.streams import mend_streams; mend_streams(); "
        "file = open('/dev/null'); assert file.fileno() > 2; print('x', flush=True); "
        "sys.exit(subprocess.run(['bash', '-c', 'echo x']).returncode)"
    )
    words = ["bash", "-c", f'"{sys.executable}" -c "{code}" <&- >&-']
    done = subprocess.run(words, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def test_an_encoding_that_lacks_a_sign_shows_it_escaped():
    done = started("inspect", "no/such/\u00f6", PYTHONIOENCODING="ascii:strict")
    assert done.returncode == 5 and done.stderr.startswith("error[model]: no/such/\\xf6: ")
    code = (
        "from compressor.process.streams import mend_streams; mend_streams(); from compressor.cli.render import out; "
        "out.print('\\u2192 \\u00f6', highlight=False)"
    )
    words = [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    assert subprocess.run(words, env=environment, capture_output=True, text=True).stdout == "\\u2192 \\xf6\n"


@pytest.mark.parametrize("lost", [True, False], ids=["which this tool prints to", "of a library"])
def test_a_run_tells_standard_output_that_is_full_from_its_disk(lost, tmp_path):
    error = (LostStream if lost else OSError)(errno.ENOSPC, "No space left on device", "standard output")
    found = ran_out(error, tmp_path)
    assert (found.where, found.data["reason"]) == ("standard output", "lost-stream" if lost else "disk-full")
    assert "--resume" in found.hint


@pytest.mark.parametrize("verb", [["plan", "rtn-w8", "--model", "demo"], ["verify", "x"], ["passes"]])
def test_a_working_directory_that_is_gone_is_told_before_torch_is_imported(verb, tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert main(verb) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error[usage]: ") and shown.count("\n") == 1
    assert main([*verb, "--json"]) == 2 and told(capsys.readouterr())["data"] == {"reason": "no-working-directory"}


def test_the_version_and_bare_help_are_shown(capsys):
    assert main(["--version"]) == 0 and capsys.readouterr().out == f"compress-model {compressor.__version__}\n"
    assert main([]) == 2
    shown = capsys.readouterr()
    assert "Usage:" in shown.out and "error" not in shown.err


def test_passes_can_be_printed_for_a_page(capsys):
    assert main(["passes", "rtn", "--format", "markdown"]) == 0
    assert "| bits | 2 \\| 3 \\| 4 \\| 8 | 4 | Bits per weight. |" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["plan", "NAME", "--model", "demo"], ["verify", "NAME"], ["report", "NAME"]])
def test_a_name_too_long_for_a_file_is_a_users_mistake(arguments, capsys):
    assert main([word.replace("NAME", "x" * 5000) for word in arguments]) == 2
    said = capsys.readouterr().err
    assert re.match(r"error\[usage\]: \S*x{20}\.\.\.: ", said) and said.count("\n") == 1 and len(said) < 300


def test_more_threads_than_any_machine_has_are_a_users_mistake(capsys):
    assert main(["run", "gptq-w4", "--model", "demo", "--output", "out", "--threads", str(10**20)]) == 2
    assert "Traceback" not in capsys.readouterr().err
