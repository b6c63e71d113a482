"""Runs functions of this package in fresh processes: each gets one request, answers it, and ends with its parent.

`ask("compressor.artifact.verify", request, ...)` calls `main(request)` of that module in a new interpreter and returns
its result. An error is raised here as it was raised there: a `CompressError` with its class, place and hint, any other
exception as `ChildBug` with the traceback. The request is passed through standard input and the answer through standard
output, so neither needs disk space. The output of libraries goes to standard error and is shown if the child fails.

The child loads this very package by its path: neither the working directory nor the folder of the package is on its
search path. It has a process group of its own, so that processes that it starts end with it. It ends itself when its
standard input closes, which happens whenever the parent ends.
"""

from __future__ import annotations

import importlib
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from compressor.errors import CompressError, PassError, PreflightError, error_from, error_to_dict
from compressor.process.fork_server import IMPORTS, Forked, ForkServer
from compressor.process.memory import peak_rss_bytes
from compressor.process.resources import ran_out
from compressor.process.search_path import named_entries

PACKAGE = str(Path(__file__).resolve().parent.parent)
LOADER = """
import importlib.util, sys
folder = sys.argv.pop(1)
options = {"submodule_search_locations": [folder]}
spec = importlib.util.spec_from_file_location("compressor", folder + "/__init__.py", **options)
sys.modules["compressor"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["compressor"])
"""  # the package in the folder that is the program's first argument
PROGRAM = LOADER + "from compressor.process.child import serve\nserve(sys.argv[1])\n"
LAST_WORDS = 600  # characters of standard error that are shown for a child that ended without an answer
CRASHES = ("SIGSEGV", "SIGABRT", "SIGBUS", "SIGILL", "SIGFPE")
SET_BY_TORCH = ("TORCHINDUCTOR_CACHE_DIR",)  # when it imports its compiler, as some libraries make it do
Process = subprocess.Popen[bytes] | Forked


class ChildBug(Exception):
    """An unexpected error in a child. A note has the child's traceback."""


_server: ForkServer | None = None
_peaks: list[int] | None = None  # of `peaks_of_processes`


@contextmanager
def peaks_of_processes() -> Iterator[list[int]]:
    """Collects the peak resident size of each process that answers `ask` inside this context, in bytes."""
    global _peaks
    outer, _peaks = _peaks, []
    try:
        yield _peaks
    finally:
        _peaks = outer


@contextmanager
def started_early() -> Iterator[None]:
    """Inside this context `ask` is fast: a server imports torch and transformers now, and forks the processes.

    A nested context does nothing. See `fork_server`.
    """
    global _server
    if _server is not None:
        yield
        return
    server = _server = ForkServer(_interpreter(), environment())
    try:
        yield
    finally:
        _server = None
        server.close()


def fork_from_here() -> None:
    """Let `ask` fork processes from this one as it is now, if a server forked it and it has imported nothing since.

    Otherwise this does nothing. Processes that run a test begin with it, so that theirs import nothing slow either.
    """
    global _server
    if _server is None and all(name in sys.modules for name in IMPORTS):
        _server = ForkServer(None, environment())


def ask(module: str, request: Mapping[str, object], doing: str) -> Any:
    """The result of `main(request)` of that module in a fresh, offline process.

    request  JSON values
    doing    the work of the process, for messages: "verifies the artifact"
    raises   the CompressError of the child; PassError if it was killed or crashed; ChildBug
    """
    request_end, closes_with_us = os.pipe()
    try:
        child, answers, words_end = start(PROGRAM, [PACKAGE, module], request_end)
        try:
            _send(closes_with_us, request)
            answer, words = read_both(answers, words_end)
            status = child.wait()
        finally:
            end(child)
    finally:
        os.close(closes_with_us)
    if not answer.endswith(b"\n"):
        raise _died(status, words.decode(errors="replace").strip(), doing)
    reported = json.loads(answer)
    if "error" in reported:
        raise error_from(reported["error"])
    if "bug" in reported:
        bug = ChildBug(f"{reported['bug']} (in the process that {doing})")
        bug.add_note(reported["traceback"])
        raise bug
    if _peaks is not None:
        _peaks.append(reported["peak_rss_bytes"])
    return reported["result"]


def start(program: str, arguments: Sequence[str], request_end: int) -> tuple[Process, int, int]:
    """Start a fresh process of this program: forked by a server with this process's environment, else started.

    request_end  its standard input; closed here
    returns      the process, and the read ends of its standard output and error
    """
    answers, answers_end = os.pipe()
    words, words_end = os.pipe()
    streams, variables = (request_end, answers_end, words_end), environment()
    process: Process | None = None
    try:
        if _server is not None and _imports_alike(_server.environment, variables):
            process = _server.fork(program, arguments, streams, variables)
        if process is None:  # no server, or it has ended
            process = subprocess.Popen(
                command(program, *arguments), env=variables, stdin=request_end, stdout=answers_end, stderr=words_end,
                process_group=0,
            )  # fmt: skip
    except BaseException:
        os.close(answers)
        os.close(words)
        raise
    finally:
        for stream in streams:
            os.close(stream)
    return process, answers, words


def _imports_alike(first: Mapping[str, str], second: Mapping[str, str]) -> bool:
    """Whether imports read the same in these environments; what torch has set itself since does not count."""
    return {**first, **dict.fromkeys(SET_BY_TORCH)} == {**second, **dict.fromkeys(SET_BY_TORCH)}


def read_both(first: int, second: int) -> tuple[bytes, bytes]:
    """Read two pipes until both are closed, and close them."""
    found: dict[int, bytearray] = {first: bytearray(), second: bytearray()}
    with open(first, "rb", 0), open(second, "rb", 0), selectors.DefaultSelector() as selector:
        for pipe in found:
            selector.register(pipe, selectors.EVENT_READ)
        while selector.get_map():
            for key, _ in selector.select():
                part = os.read(key.fd, 1 << 16)
                if part:
                    found[key.fd] += part
                else:
                    selector.unregister(key.fd)
    return bytes(found[first]), bytes(found[second])


def command(program: str, *arguments: str) -> list[str]:
    """The command of a Python that runs this program without the working directory on its search path.

    raises  PreflightError
    """
    return [*_interpreter(), "-c", program, *arguments]


def _interpreter() -> list[str]:
    """The command of this Python, without the working directory on its search path.

    raises  PreflightError if Python is embedded and there is no interpreter to start
    """
    if not sys.executable:
        raise PreflightError(
            "Python does not know its own interpreter, so no process can be started",
            where="sys.executable",
            hint="Start it with a Python executable: python -m compressor.",
        )
    flags = ["-E"] * sys.flags.ignore_environment + ["-s"] * sys.flags.no_user_site
    return [sys.executable, "-P", *flags]


def environment() -> dict[str, str]:
    """The environment variables of a child: offline, quiet, and PYTHONPATH without the working directory."""
    changed = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "PYTHONSAFEPATH": "1"}
    path = os.pathsep.join(named_entries(os.environ.get("PYTHONPATH", "")))
    return {**os.environ, **changed, "PYTHONPATH": path}


def serve(module: str) -> None:
    """In the child: answer one request, read as a line from standard input."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    asked, answers = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)  # no user answers a library's question
    os.dup2(2, 1)
    line = b""
    while not line.endswith(b"\n"):
        part = os.read(asked, 1 << 16)
        if not part:
            return
        line += part
    threading.Thread(target=_end_with_parent, args=(asked,), daemon=True).start()
    reported: dict[str, Any]
    try:
        reported = {
            "result": importlib.import_module(module).main(json.loads(line)),
            "peak_rss_bytes": peak_rss_bytes(),
        }
    except CompressError as error:
        reported = {"error": error_to_dict(error)}
    except Exception as error:
        if (refusal := ran_out(error)) is not None:
            reported = {"error": error_to_dict(refusal)}
        else:
            reported = {"bug": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
    with os.fdopen(answers, "wb") as file:
        file.write(json.dumps(reported).encode() + b"\n")
    sys.stderr.flush()
    os._exit(0)  # ending an interpreter with torch normally takes a second, without a use


def _send(pipe: int, request: Mapping[str, object]) -> None:
    line = json.dumps(request).encode() + b"\n"
    try:
        while line:
            line = line[os.write(pipe, line) :]
    except BrokenPipeError:  # the child ended; its status gives the reason
        pass


def end(child: Process) -> None:
    """End the child and the processes that it started, if it has not ended."""
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def _end_with_parent(asked: int) -> None:
    """Wait until the pipe from the parent closes, then end this process and those that it started."""
    while os.read(asked, 1):
        pass
    if os.getpgid(0) == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def _died(status: int, words: str, doing: str) -> Exception:
    """The error for a child that ended without an answer."""
    where = f"the process that {doing}"
    if status >= 0:
        bug = ChildBug(f"{where} ended with {status} and no answer")
        bug.add_note(words or "It wrote nothing to standard error.")
        return bug
    name = signal.Signals(-status).name
    if name == "SIGKILL":
        return PassError(
            "it was killed (SIGKILL), as the system does when memory runs out",
            where=where,
            hint="Free memory, then run the command again (for a run: with --resume).",
            data={"signal": name},
        )
    if name in CRASHES:
        message = f"; its last output: {words[-LAST_WORDS:]}" if words else ""
        return PassError(
            f"it crashed in native code ({name}){message}",
            where=where,
            hint="Run compress-model doctor; if it finds no problem, report this message with its output.",
            data={"signal": name, "last_words": words[-LAST_WORDS:]},
        )
    return PassError(
        f"it was ended by {name}",
        where=where,
        hint="Run the command again (for a run: with --resume).",
        data={"signal": name},
    )
