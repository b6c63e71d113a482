"""Starts the command `compress-model`, also as `python -m compressor`."""

from __future__ import annotations

import os
import sys

from compressor.process.search_path import leave_out_working_directory
from compressor.process.streams import mend_streams


def main() -> int:
    """Run the command in this process's arguments and return its exit code."""
    leave_out_working_directory()  # before any import that could be found there
    mend_streams()
    from compressor.cli.main import INTERRUPTED, main

    code = main()
    if code == INTERRUPTED:  # a running thread, or the clean-up of a library, must not delay the end
        os._exit(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
