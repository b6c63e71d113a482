"""The process of the command `compress-model`, and of `python -m compressor`."""

from __future__ import annotations

import os
import sys

from compressor.process.search_path import leave_out_working_directory
from compressor.process.streams import mend_streams


def main() -> int:
    """Run the command of this process's arguments and return its exit code."""
    leave_out_working_directory()  # before anything is imported that could lie there
    mend_streams()
    from compressor.cli.main import INTERRUPTED, main

    code = main()
    if code == INTERRUPTED:  # a thread that is still at work, or a library's clean-up, must not hold up the end
        os._exit(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
