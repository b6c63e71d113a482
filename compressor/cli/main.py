"""Runs the command line as a process: it handles signals, reports every error and returns the exit code."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import traceback
import warnings
from collections.abc import Callable

from compressor.cli.progress import json_line
from compressor.cli.render import complain, err
from compressor.cli.verbs import Raised, app
from compressor.engine.interrupt import TELL_SECONDS, Stop, answered
from compressor.errors import CompressError, Interrupted, PreflightError, UsageError
from compressor.process.resources import ran_out
from compressor.process.streams import LostStream, let_go_of_lost
from compressor.process.utf8 import check_utf8

INTERRUPTED = Interrupted.exit_code


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return the exit code that docs/exit-codes.md lists. None takes the process's arguments."""
    if arguments is None:
        arguments = sys.argv[1:]
        _quiet_libraries()
    as_json = "--json" in arguments
    stop = Stop()

    def tell() -> None:
        given_up = "the unfinished part is dropped. " if stop.has_begun else ""
        message = f"stopping: {given_up}{stop.hint}"
        with contextlib.suppress(OSError):  # a stream that can't be written doesn't prevent the stop
            if as_json:
                json_line({"event": "stopping", "message": message})
        with contextlib.suppress(OSError):
            err.print(message, markup=False, highlight=False, soft_wrap=True)
        stop.announced.set()

    def last_words() -> None:
        if err.is_terminal:
            err.show_cursor()  # a progress display has hidden it
        complain(_stopped(stop), as_json)

    with answered(stop, tell, last_words, INTERRUPTED):
        try:
            return _run_verb(arguments, stop, as_json)
        except KeyboardInterrupt:  # it came while an error was reported
            complain(_stopped(stop), as_json)
            return INTERRUPTED
        finally:
            let_go_of_lost()


def _run_verb(arguments: list[str], stop: Stop, as_json: bool) -> int:
    try:
        for argument in arguments:
            check_utf8(argument, "Rename the file, or write the text in UTF-8.")
        code = app(arguments, standalone_mode=False, prog_name="compress-model", obj=stop) or 0
        sys.stdout.flush()
    except SystemExit as error:  # from the shell completion
        if isinstance(error.__context__, BrokenPipeError):  # rich ends the process for it
            return INTERRUPTED
        return error.code if isinstance(error.code, int) else 1
    except BaseException as error:
        found = error.error if isinstance(error, Raised) else error
        return _tell(found, stop, as_json)
    if code == INTERRUPTED:  # typer's code for KeyboardInterrupt while it reads the arguments
        complain(_stopped(stop), as_json)
    return code


def _tell(error: BaseException, stop: Stop, as_json: bool) -> int:
    """Print one line for an error that a user can act on, else the traceback of the bug. Returns the exit code."""
    if isinstance(error, BrokenPipeError):  # `| head` has closed the pipe
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  flushed, in vain, as Python ends
        return INTERRUPTED
    known = _refusal(error, stop)
    if known is not None:
        if stop.is_asked():
            stop.announced.wait(TELL_SECONDS)  # so that "stopping" comes before the error, if somebody reads it
        complain(known, as_json)
        return known.exit_code
    if getattr(error, "format_message", None) is not None:  # no arguments: the help is shown
        return UsageError.exit_code
    with contextlib.suppress(OSError):
        traceback.print_exception(error, file=sys.stderr)
    with contextlib.suppress(OSError):
        if as_json:
            json_line(
                {
                    **CompressError(
                        f"{type(error).__name__}: {error}",
                        hint="Report it with the traceback on standard error.",
                        data={"reason": type(error).__name__},
                    ).event(),
                    "name": "bug",
                }
            )
    with contextlib.suppress(OSError):
        err.print("error[bug]: this should not happen; please report it with the traceback above", markup=False)
    return 1


def _refusal(error: BaseException, stop: Stop) -> CompressError | None:
    """The error for the user, or None if it is a bug."""
    if isinstance(error, CompressError):
        return error
    if stop.is_asked() or isinstance(error, KeyboardInterrupt):
        return _stopped(stop)
    show_message: Callable[[], str] | None = getattr(error, "format_message", None)
    if show_message is not None:  # an error of the argument parser
        message = show_message()
        return (
            UsageError(
                message, hint="Run compress-model --help for the commands, or add --help to this one for its options."
            )
            if message
            else None
        )
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        name = str(error.filename)
        return UsageError(
            f"a name of {len(name):,} characters is too long for a file",
            where=f"{name[:60]}...",
            hint="Use a name of at most 255 bytes.",
            data={"reason": "name-too-long", "length": len(name)},
        )
    if isinstance(error, RecursionError):
        return PreflightError(
            f"Python's limit of {sys.getrecursionlimit()} nested calls was reached",
            hint="Check the JSON and YAML files of the model, recipe and data for very deep nesting.",
            data={"reason": "nested-too-deeply", "limit": sys.getrecursionlimit()},
        )
    if isinstance(error, LostStream):
        what = f"can't be written ({error.strerror})"
        return PreflightError(
            what,
            where=error.filename,
            hint="Free space on that disk, or redirect the output to another one.",
            data={"reason": "lost-stream", "cause": error.strerror},
        )
    if (lack := ran_out(error)) is not None:
        hint = "Free memory or disk space, as the message says, then run the command again."
        return PreflightError(lack.what, where=lack.where, hint=hint, data=lack.data)
    return None


def _stopped(stop: Stop) -> Interrupted:
    return (
        Interrupted("stopped", where="run", hint=stop.hint)
        if stop.work is not None
        else Interrupted("stopped", hint="Run the same command again.")
    )


def _quiet_libraries() -> None:
    """Hide the warnings of libraries, unless the user has turned them on."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
