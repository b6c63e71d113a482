"""Removes the working directory from Python's search path, because the user did not choose to run its files.

`python -m` and `python -c` put the working directory first, and so does an empty entry or `.` in PYTHONPATH. A
downloaded `torch.py` there would then run in place of torch. Entries of PYTHONPATH that name a folder stay. This module
imports nothing that could be found there.
"""

from __future__ import annotations

import os
import sys


def named_entries(pythonpath: str) -> list[str]:
    """The folders in PYTHONPATH as absolute paths, without the working directory as an empty entry or `.`."""
    entries = pythonpath.split(os.pathsep) if pythonpath else []
    return [os.path.abspath(entry) for entry in entries if os.path.normpath(entry or ".") != "."]


def leave_out_working_directory() -> None:
    """Change this process's search path and the variables that its child processes inherit.

    Call it only at the start of a process, before it imports anything that could be in the working directory.
    """
    pythonpath = os.environ.get("PYTHONPATH", "")
    try:
        here = os.getcwd()
    except FileNotFoundError:  # it was deleted, so it has no files
        here = ""
    if not sys.flags.safe_path and sys.path[0] in ("", here):
        del sys.path[0]
    entries = pythonpath.split(os.pathsep) if pythonpath and not sys.flags.ignore_environment else []
    if any(os.path.normpath(entry or ".") == "." for entry in entries) and here not in named_entries(pythonpath):
        sys.path[:] = [entry for entry in sys.path if entry not in ("", here)]
    os.environ["PYTHONSAFEPATH"] = "1"
    if pythonpath:
        os.environ["PYTHONPATH"] = os.pathsep.join(named_entries(pythonpath))
