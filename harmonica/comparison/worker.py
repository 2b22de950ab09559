"""A process of a comparison with ``--jobs``, which ends when the one that started it does."""

import os
import signal
import sys
import threading
from pathlib import Path

from harmonica.comparison.config import CompareConfig
from harmonica.comparison.jobs import finish_all
from harmonica.comparison.run import Comparison
from harmonica.errors import run_command
from harmonica.options import read_preset


@run_command
def work() -> None:
    """Do pieces of the comparison whose folder is the argument, until all are finished."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    folder = Path(sys.argv[1])
    config = CompareConfig(**read_preset(CompareConfig, folder / "config.yaml"))
    finish_all(Comparison(config).pieces(), folder)


def _end_with_parent() -> None:
    os.read(sys.stdin.fileno(), 1)  # nothing is ever written: returns when the parent is gone
    os.kill(os.getpid(), signal.SIGTERM)
