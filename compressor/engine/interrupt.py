"""Ends the work within seconds after Ctrl-C, SIGTERM or SIGHUP, whatever the work is doing.

A signal raises KeyboardInterrupt in the main thread, as soon as that thread runs Python code again. A call of native
code (an eigendecomposition, tokenizing a large file) can delay this for minutes. So the command line also has a thread
that the signal itself wakes (`signal.set_wakeup_fd`). This thread reports at once that the work is stopping, and ends
the process if the main thread doesn't end within GRACE_SECONDS. Nothing is lost: whatever a run commits is durable, and
a killed run can be resumed (`compressor.storage.journal`). A second signal ends the process at once.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from compressor.errors import Interrupted
from compressor.storage.journal import has_begun, remove_work

GRACE_SECONDS = 8.0  # docs/exit-codes.md promises that the process ends within 10 seconds
TELL_SECONDS = 1.0  # for the last message, if nobody reads it
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stop:
    """A request to stop, made by a signal, and whether a request is still accepted.

    work       the work directory of the run, once it exists
    announced  set once the user has been told that the work is stopping
    """

    def __init__(self) -> None:
        self.work: Path | None = None
        self.announced = threading.Event()
        self._asked, self._is_closed = threading.Event(), False
        self._lock = threading.RLock()  # the signal handler may run inside `close`, in the same thread

    def is_asked(self) -> bool:
        return self._asked.is_set()

    def accept(self) -> bool:
        """Ask for the stop. Returns False if it is too late to stop."""
        with self._lock:
            if self._is_closed and not self.is_asked():
                return False
            self._asked.set()
            return True

    def close(self) -> None:
        """Accept no request from now on, because a stop would leave a finished result incomplete.

        raises  KeyboardInterrupt if a request was accepted before
        """
        with self._lock:
            if self.is_asked():
                raise KeyboardInterrupt
            self._is_closed = True

    @property
    def has_begun(self) -> bool:
        """Whether the run has a work directory from which it can be resumed."""
        return self.work is not None and has_begun(self.work)

    @property
    def hint(self) -> str:
        """What the user can do after the stop."""
        return "Continue with --resume." if self.has_begun else "Nothing was done yet; start again."


@contextmanager
def signals(stop: Stop) -> Iterator[Stop]:
    """Let the signals raise KeyboardInterrupt in the main thread. In another thread this changes nothing."""

    def handle(number: int, frame: Any) -> None:
        if stop.accept():
            raise KeyboardInterrupt

    old: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        # a hang-up signal that is ignored, as under nohup, stays ignored
        heard = [sign for sign in SIGNALS if sign != signal.SIGHUP or signal.getsignal(sign) != signal.SIG_IGN]
        old = {sign: signal.signal(sign, handle) for sign in heard}
    try:
        yield stop
    finally:
        for sign, handler in old.items():
            signal.signal(sign, handler)


@contextmanager
def answered(stop: Stop, tell: Callable[[], None], last_words: Callable[[], None], exit_code: int) -> Iterator[Stop]:
    """`signals`, and a thread that answers the first signal at once and ends the process if the main thread doesn't.

    tell        called in that thread at the first signal
    last_words  called before the process is ended
    exit_code   exit code of the ended process
    """
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    is_over = threading.Event()

    def end() -> None:
        speaker = threading.Thread(target=last_words, daemon=True)
        speaker.start()
        speaker.join(TELL_SECONDS)
        os._exit(exit_code)

    def end_later() -> None:
        if not is_over.wait(GRACE_SECONDS):
            end()

    def watch() -> None:
        is_first = True
        while (number := os.read(woken, 1)) not in (b"", b"\0"):
            if number[0] in SIGNALS and stop.accept():
                if not is_first:
                    end()
                is_first = False
                threading.Thread(target=end_later, daemon=True).start()
                threading.Thread(target=tell, daemon=True).start()  # standard error may be a pipe that is full

    woken, wakes = os.pipe()
    os.set_blocking(wakes, False)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    before = signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)
    try:
        with signals(stop):
            yield stop
    finally:
        signal.set_wakeup_fd(before)
        is_over.set()
        os.write(wakes, b"\0")
        watcher.join()
        os.close(wakes)
        os.close(woken)


@contextmanager
def interruptible(stop: Stop) -> Iterator[None]:
    """raises Interrupted after an accepted request to stop, also if a library turned it into another error"""
    try:
        yield
    except (KeyboardInterrupt, Exception) as error:
        if not (stop.is_asked() or isinstance(error, KeyboardInterrupt)):
            raise
        work = stop.work
        if work is not None and work.is_dir() and not has_begun(work):
            remove_work(work)
        raise Interrupted("stopped", where="run", hint=stop.hint, data={"resumable": stop.work is not None}) from None
