"""What a user did that cannot work, in one sentence."""

import sys
from collections.abc import Callable


class HarmonicaError(Exception):
    """Bad input: the message is one sentence that names the flag or file and the remedy."""


def run_command(main: Callable[[], None]) -> None:
    """Run a command-line entry point; bad input ends it with its sentence and exit code 2."""
    try:
        main()
    except HarmonicaError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
