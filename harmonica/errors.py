"""What a user did that cannot work, in one sentence."""

import functools
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

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


def say_stopped(signum: int, standing: str) -> None:
    """By which signal, and where that leaves things; nothing where nobody knows."""
    if standing:
        name = signal.Signals(signum).name
        print(f"stopped by {name}; {standing}", file=sys.stderr, flush=True)


class OutOfReach(HarmonicaError):
    """A budget that a method cannot meet."""


class HarmonicaWarning(UserWarning):
    """What works, but may not be what was meant; one sentence."""


@contextmanager
def _said_once() -> Iterator[None]:
    """This project's warnings as sentences: each once, by the main process."""
    said: set[str] = set()
    with warnings.catch_warnings():
        shown_by_others = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *place: Any) -> None:
            sentence = str(message)
            if not issubclass(category, HarmonicaWarning):
                shown_by_others(message, category, *place)
            elif sentence not in said and os.environ.get("RANK", "0") == "0":
                print(f"warning: {sentence}", file=sys.stderr, flush=True)
            said.add(sentence)

        warnings.simplefilter("always", HarmonicaWarning)
        warnings.showwarning = show
        yield


def run_command(program: Callable[[], None]) -> Callable[[], None]:
    """Decorator of command-line programs: bad input ends one with its sentence and exit code 2.

    Warnings are sentences too, on stderr, from the main process alone.

    Under torchrun every process of a machine mostly meets the same bad input. The first one says
    so; the others wait a moment, because the first to end has all the rest stopped, and say what
    only they have met.
    """

    @functools.wraps(program)
    def run() -> None:
        try:
            with _said_once():
                program()
        except HarmonicaError as error:
            if os.environ.get("LOCAL_RANK", "0") != "0":
                time.sleep(SAY_FIRST_S)
            print(f"error: {error}", file=sys.stderr, flush=True)
            sys.exit(2)
        except Interrupted as stop:
            say_stopped(stop.signal, str(stop))
            sys.exit(128 + stop.signal)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)

    return run
