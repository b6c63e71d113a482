"""Fresh processes for tests, forked from the server of the session (`fork_server`): none imports torch."""

from __future__ import annotations

import contextlib
import os
import subprocess

import psutil
import torch

from compressor.process import child

# the package, in a process that those which it starts are forked from
PACKAGE = child.LOADER + "from compressor.process.child import fork_from_here\nfork_from_here()\n"
END = "sys.stdout.flush()\nsys.stderr.flush()\nos._exit({})\n"  # ending an interpreter with torch normally takes long
COMMAND = "from compressor.__main__ import main\ncode = main()\n" + END.format("code")
REFUSE = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {names}: raise ImportError(name)
assert not {names} & set(sys.modules)
sys.meta_path.insert(0, Refuse())
"""


def command(*arguments, cwd=".", terminal=None, without=(), **environment):
    """What `compress-model` does with these arguments, in this directory and with these variables besides.

    without  packages that are not installed
    """
    told = {"NO_COLOR": "1", "COLUMNS": "200", **environment}
    program = (REFUSE.format(names=set(without)) if without else "") + PACKAGE + COMMAND
    return run(program, child.PACKAGE, *arguments, cwd=cwd, terminal=terminal, **told)


class Going:
    """A process of a program that begins with `PACKAGE`, while it goes on; as subprocess.Popen."""

    def __init__(self, program, *arguments):
        request, self.request_end = os.pipe()
        setting = "import os\nos.environ.update(NO_COLOR='1', COLUMNS='300')\n"
        arguments = [child.PACKAGE, *map(str, arguments)]
        self.process, *self.pipes = child.start(setting + program, arguments, request)
        self.pid = self.process.pid

    def communicate(self, timeout):
        psutil.Process(self.pid).wait(timeout)
        os.close(self.request_end)
        said = [part.decode() for part in child.read_both(*self.pipes)]
        self.returncode = self.process.wait()
        return said

    def send_signal(self, sign):
        os.kill(self.pid, sign)


def stranger(program, *arguments, without=("compressor",), input="", **environment):
    """What a program prints where these packages are not installed; it has to end with 0."""
    done = run(
        REFUSE.format(names=set(without)) + program + "\n" + END.format(0), *arguments, input=input, **environment
    )
    assert done.returncode == 0, done.stderr[-1500:]
    return done.stdout


def run(program, *arguments, input="", cwd=".", terminal=None, **environment):
    """A `subprocess.CompletedProcess` of this program, with text.

    terminal     file descriptor for its standard input, instead of a pipe with `input`
    environment  variables besides, set as the program begins; none that something reads when it is imported
    """
    program = f"import os\nos.environ.update({environment!r})\n{program}"
    request, sends = os.pipe()
    if terminal is not None:
        os.dup2(terminal, request, inheritable=False)
    with contextlib.chdir(cwd):
        process, answers, words = child.start(program, [str(value) for value in arguments], request)
    with os.fdopen(sends, "w") as file, contextlib.suppress(BrokenPipeError):
        file.write(input)
    said = [part.decode() for part in child.read_both(answers, words)]
    return subprocess.CompletedProcess([program, *arguments], process.wait(), *said)


LOGITS = """
import torch
from transformers import AutoModelForCausalLM
model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, output_loading_info=True)
assert not any(info[key] for key in ('missing_keys', 'unexpected_keys', 'mismatched_keys')), info
torch.save(model(input_ids=torch.arange(8).view(1, 8)).logits, sys.argv[2])
"""


def logits_without_this_package(artifact, scratch):
    """What a stranger's interpreter computes: torch and transformers, nothing of ours."""
    stranger(LOGITS, artifact, scratch / "logits.pt", without=("compressor", "other_package"))
    return torch.load(scratch / "logits.pt", weights_only=True)
