"""Implements a server process that has imported torch and transformers, and forks a fresh process on request.

These imports take seconds. A run starts this server before its sweep, so that they run in parallel, and each check of
the artifact then begins at once. A forked process is as fresh as one that was just started and has imported them:
nothing of `compressor` is imported here, and there was no model, no operation of torch and no random number.

This file is run by its path, so it imports only the standard library.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import NoReturn

# What a process that loads a model imports, except for the package and the model's own module. They import the others.
IMPORTS = (
    "torch",
    "transformers",
    "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto",
    "transformers.generation.utils",
    "transformers.processing_utils",
    "compressed_tensors",
    "pydantic",
)
NUMBER_BYTES = 8
LOST = 255  # the exit code of a process whose server ended before it


class Forked:
    """A process that the server forked, with the needed members of `subprocess.Popen`."""

    returncode: int | None = None

    def __init__(self, link: socket.socket, pid: int, busy: threading.Lock) -> None:
        self.pid, self._link, self._busy = pid, link, busy

    def poll(self) -> int | None:
        """The exit code as in Popen; None while it runs."""
        return self._read(socket.MSG_DONTWAIT)

    def wait(self) -> int:
        """Wait for its end and return the exit code."""
        code = self._read(socket.MSG_WAITALL)
        assert code is not None
        return code

    def _read(self, flags: int) -> int | None:
        if self.returncode is None:
            try:
                message = self._link.recv(NUMBER_BYTES, flags)
            except BlockingIOError:
                return None
            self.returncode = int.from_bytes(message, "big", signed=True) if message else LOST
            self._busy.release()
        return self.returncode


class Fork:
    """A fork of this process that became a server, with the needed members of `subprocess.Popen`."""

    def __init__(self, link: socket.socket) -> None:
        self.pid = os.fork()
        if self.pid == 0:
            _become_server(link.detach())

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> None:
        os.waitpid(self.pid, 0)


class ForkServer:
    """The client side. It forks one process at a time.

    interpreter  the command of a Python that becomes the server; None: a fork of this process, which must be one that
                 a server has forked, and must not have used torch yet
    environment  the variables at the server's start. A process may have others, but not those that Python, torch and
                 libraries read when they are imported
    """

    _process: subprocess.Popen[bytes] | Fork

    def __init__(self, interpreter: Sequence[str] | None, environment: Mapping[str, str]) -> None:
        self.environment = dict(environment)
        self._busy = threading.Lock()  # held while a process runs; its exit code is sent over the same link
        self._link, theirs = socket.socketpair()
        with theirs:
            if interpreter is None:
                self._process = Fork(theirs)
                return
            self._process = subprocess.Popen(
                [*interpreter, os.path.abspath(__file__), str(theirs.fileno())],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                process_group=0,
            )

    def fork(
        self, program: str, arguments: Sequence[str], streams: Sequence[int], environment: Mapping[str, str]
    ) -> Forked | None:
        """A process that runs this program in this working directory; None if the server has ended or is busy.

        streams  file descriptors for its standard input, output and error
        """
        asked = {"program": program, "arguments": list(arguments), "environment": dict(environment)}
        if not self._busy.acquire(blocking=False):
            return None
        try:
            pid = self._ask(json.dumps(asked).encode(), streams)
        except OSError:  # the other end is closed, or the next lines have closed this one
            pid = None
        except BaseException:  # such as Ctrl-C: the state of the link is unknown
            self._link.close()
            raise
        if pid is None:
            self._busy.release()
            return None
        return Forked(self._link, pid, self._busy)

    def _ask(self, message: bytes, streams: Sequence[int]) -> int | None:
        here = os.open(".", os.O_RDONLY)
        try:
            socket.send_fds(self._link, [len(message).to_bytes(NUMBER_BYTES, "big")], [*streams, here])
        finally:
            os.close(here)
        self._link.sendall(message)
        number = self._link.recv(NUMBER_BYTES, socket.MSG_WAITALL)
        return int.from_bytes(number, "big") if number else None

    def close(self) -> None:
        """End the server. Processes that it forked continue."""
        self._link.close()
        self._process.kill()
        self._process.wait()


def _serve(link: socket.socket) -> str | None:
    """In the server: fork a process for each request. Returns the program in a forked process, None in the server."""
    for name in IMPORTS:
        importlib.import_module(name)
    conversions = importlib.import_module("transformers.conversion_mapping")
    conversions.get_checkpoint_conversion_mapping("llama")  # the first question makes the rules of all families
    gc.freeze()  # so that the garbage collector of a forked process doesn't visit, and so copy, the imported objects
    while True:
        length, descriptors, _, _ = socket.recv_fds(link, NUMBER_BYTES, 4)
        if not length:
            return None
        asked = json.loads(link.recv(int.from_bytes(length, "big"), socket.MSG_WAITALL))
        pid = os.fork()
        if pid == 0:
            os.setpgid(0, 0)
            link.close()
            _take_on(asked["arguments"], asked["environment"], descriptors)
            program: str = asked["program"]
            return program
        for descriptor in descriptors:
            os.close(descriptor)
        try:
            os.setpgid(pid, pid)  # both sides set it: the client may end the group at once
        except (PermissionError, ProcessLookupError):
            pass
        try:
            link.sendall(pid.to_bytes(NUMBER_BYTES, "big"))
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            link.sendall(code.to_bytes(NUMBER_BYTES, "big", signed=True))
        except BrokenPipeError:  # the client has ended
            return None


def _become_server(number: int) -> NoReturn:
    """In a fork of this process: serve without its streams, files and modules of `compressor`, until the link closes.

    number  file descriptor of the link
    """
    code: str | int | None = 1
    try:
        os.setpgid(0, 0)
        nothing = os.open(os.devnull, os.O_RDWR)
        for stream in range(3):
            os.dup2(nothing, stream)
        os.closerange(3, number)
        os.closerange(number + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        for name in [name for name in sys.modules if name.partition(".")[0] == "compressor"]:
            del sys.modules[name]
        with socket.socket(fileno=number) as link:
            program = _serve(link)
        if program is not None:
            _run(program)
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    finally:  # what stands below on the stack belongs to the process that was forked
        sys.stdout.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))


def _take_on(arguments: Sequence[str], environment: Mapping[str, str], descriptors: Sequence[int]) -> None:
    """Set up a forked process for its request: streams, working directory, variables, arguments."""
    *streams, here = descriptors
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.fchdir(here)
    for descriptor in descriptors:
        os.close(descriptor)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 (they were made for other files)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["-c", *arguments]


def _run(program: str) -> None:
    """Run the program as `python -c` does."""
    sys.modules["__main__"] = main = ModuleType("__main__")
    exec(compile(program, "<string>", "exec"), vars(main))


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as asking:
        to_run = _serve(asking)
    if to_run is not None:
        _run(to_run)
