"""What a user did that cannot work, in one sentence."""

import functools
import os
import sys
from collections.abc import Callable


class HarmonicaError(Exception):
    """Bad input: the message is one sentence that names the flag or file and the remedy."""


def run_command(program: Callable[[], None]) -> Callable[[], None]:
    """Decorator of command-line programs: bad input ends one with its sentence and exit code 2.

    Under torchrun every process meets the same bad input; the first one says so.
    """

    @functools.wraps(program)
    def run() -> None:
        try:
            program()
        except HarmonicaError as error:
            if os.environ.get("RANK", "0") == "0":
                print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)

    return run
