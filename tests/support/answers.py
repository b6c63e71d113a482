"""What a child process may do instead of answering, for tests/process/test_child.py; imports nothing slow."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from compressor.errors import DependencyError, ModelError
from compressor.process import child


class UnknownElsewhere(ModelError):
    """Known in the child only."""


def lack_a_package(request):
    raise DependencyError("needs the package x", where="export", hint="pip install x", data={"package": "x"})


def fail_in_a_class_of_its_own(request):
    raise UnknownElsewhere("is damaged", where="config.json", hint="Download it again.", data={"line": 3})


def run_out_of_memory(request):
    raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")


def fill_the_disk(request):
    raise OSError(errno.ENOSPC, "No space left on device", str(Path(request["folder"]) / "file"))


def hang(request):
    grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    note = Path(request["folder"]) / "pids"
    note.with_suffix(".new").write_text(f"{os.getpid()} {grandchild.pid}")
    note.with_suffix(".new").rename(note)
    time.sleep(600)


def talk(request):
    print("words on standard output")
    try:
        return {"answered": input("run the custom code? [y/N] ")}
    except EOFError:
        return {"answered": None, "long": "x" * 300_000}


def tell_what_it_is(request):
    told = {
        "pid": os.getpid(),
        "group": os.getpgid(0),
        "parent is here": os.getppid() == request["here"],
        "folder": os.getcwd(),
        "torch": "torch" in sys.modules,
        "was used before": hasattr(sys, "was_used"),
        "files": len(os.listdir("/proc/self/fd")),
    }
    sys.was_used = True
    return told


def ask_another(request):
    """What a process tells that is forked from this one."""
    child.fork_from_here()
    sys.was_used = True
    told = child.ask("answers", {**request, "kind": "tell what it is", "here": os.getpid()}, "answers for another")
    return told | {"asked by": os.getpid()}


KINDS = {
    "ask another": ask_another,
    "tell what it is": tell_what_it_is,
    "lack a package": lack_a_package,
    "fail in a class of its own": fail_in_a_class_of_its_own,
    "run out of memory": run_out_of_memory,
    "fill the disk": fill_the_disk,
    "divide by zero": lambda request: 1 // 0,
    "be killed": lambda request: os.kill(os.getpid(), signal.SIGKILL),
    "crash": lambda request: os.kill(os.getpid(), signal.SIGSEGV),
    "be asked to end": lambda request: os.kill(os.getpid(), signal.SIGTERM),
    "end without a word": lambda request: os._exit(3),
    "answer what is no JSON": lambda request: object(),
    "tell its search path": lambda request: {"path": sys.path, "json": sys.modules["json"].__file__},
    "hang": hang,
    "talk": talk,
}


def main(request):
    return KINDS[request["kind"]](request)
