"""SIGTERM, SIGUSR1 and Ctrl-C: what is at hand is made safe at once, the run ends between updates.

A handler may run in the middle of anything, and not at all while the process waits for its peers.
So it only notes the signal; a thread, which the interpreter wakes through a pipe whatever the main
thread does, writes the checkpoint; and the processes agree at their next update to end. One that
does not get there, because a peer is gone or an evaluation is long, is ended and says so.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType

from harmonica.errors import HarmonicaError, say_stopped

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# Launchers kill 30 s after their SIGTERM.
GRACE_S = 20


class Interruption:
    """Notes signals while it is entered. Outside of the main thread it does nothing.

    Attributes:
        signal: the first one that came, or None.
        secure: is called in a thread of its own when it comes.
        standing: gives what is said where the process has to be ended; nothing if it is empty.
    """

    def __init__(self):
        self.signal: int | None = None
        self.secure: Callable[[], None] = lambda: None
        self.standing: Callable[[], str] = lambda: ""

    def __enter__(self) -> "Interruption":
        self._active = threading.current_thread() is threading.main_thread()
        if not self._active:
            return self
        self._ended = threading.Event()
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._earlier_wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._earlier = {number: signal.signal(number, self._note) for number in SIGNALS}
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._active:
            return
        self._ended.set()
        for number, handler in self._earlier.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._earlier_wakeup)
        # Not the end of the pipe, whose other end a process that was forked meanwhile may hold.
        os.write(self._write, bytes(1))
        self._watcher.join()
        os.close(self._write)
        os.close(self._read)

    def _note(self, signum: int, _: FrameType | None) -> None:
        if self.signal is None:
            self.signal = signum

    def _watch(self) -> None:
        while came := os.read(self._read, 1)[0]:
            if came in SIGNALS:
                self._secure_and_wait(came)
                return

    def _secure_and_wait(self, signum: int) -> None:
        try:
            self.secure()
        except HarmonicaError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
        if not self._ended.wait(GRACE_S):
            print(file=sys.stderr)  # a progress bar may stand on the line
            say_stopped(signum, self.standing())
            os._exit(128 + signum)
