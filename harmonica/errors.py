"""What a user did that cannot work, in one sentence."""

import functools
import os
import signal
import sys
import time
from collections.abc import Callable

SAY_FIRST_S = 5
LONGEST_WORD = 250  # that of a path, say


class HarmonicaError(Exception):
    """Bad input: the message is one sentence that names the flag or file and the remedy.

    What it quotes may come from a stranger's file: a quoted word is shortened, a line break is a
    space, and what a terminal would obey is a question mark.
    """

    def __init__(self, message: str):
        words = "".join(c if c.isprintable() or c.isspace() else "?" for c in message).split()
        shown = [
            word if len(word) <= LONGEST_WORD else f"{word[:60]}...{word[-20:]}" for word in words
        ]
        super().__init__(" ".join(shown))


class Interrupted(Exception):
    """A signal asked the program to end; what it stands on is on disk.

    Attributes:
        signal: which one came, to this process or to another.
    """

    def __init__(self, signum: int, standing: str = ""):
        super().__init__(standing)
        self.signal = signal.Signals(signum)


class OutOfReach(HarmonicaError):
    """A budget that a method cannot meet."""


def run_command(program: Callable[[], None]) -> Callable[[], None]:
    """Decorator of command-line programs: bad input ends one with its sentence and exit code 2.

    Under torchrun every process of a machine meets the same bad input. The first one says so; the
    others wait a moment, because the first to end has all the rest stopped.
    """

    @functools.wraps(program)
    def run() -> None:
        try:
            program()
        except HarmonicaError as error:
            if os.environ.get("LOCAL_RANK", "0") == "0":
                print(f"error: {error}", file=sys.stderr, flush=True)
            else:
                time.sleep(SAY_FIRST_S)
            sys.exit(2)
        except Interrupted as stop:
            if str(stop):
                print(f"stopped by {stop.signal.name}; {stop}", file=sys.stderr, flush=True)
            sys.exit(128 + stop.signal)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)

    return run
