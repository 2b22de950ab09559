"""One process at a time: a lock that ends with its holder, however that ends."""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import IO

from harmonica.errors import HarmonicaError


@contextlib.contextmanager
def held(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file ``path`` for as long as the context lasts.

    Args:
        what: is locked, for the refusal; it begins with the flag.

    Raises:
        HarmonicaError: another process holds it, which is named; or there can be no lock.
    """
    with _opened(path, what) as file:
        if not _locked(file, what):
            file.seek(0)
            holder = file.read(200).strip() or "another process"
            raise HarmonicaError(
                f"{what} is in use by {holder}; wait for it or choose another folder"
            )
        yield


@contextlib.contextmanager
def held_if_free(path: Path, what: str) -> Iterator[bool]:
    """Whether the lock file ``path`` is held for as long as the context lasts: another process may
    have it. Arguments and errors otherwise as of ``held``.
    """
    with _opened(path, what) as file:
        yield _locked(file, what)


@contextlib.contextmanager
def held_in_turn(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file ``path``, after all who came first. Arguments and errors otherwise as of
    ``held``.
    """
    with _opened(path, what) as file:
        _locked(file, what, waits=True)
        yield


def _opened(path: Path, what: str) -> IO[str]:
    try:
        return path.open("a+")
    except OSError as error:
        raise HarmonicaError(
            f"{what} cannot be written to ({error.strerror}); choose a folder that can"
        ) from None


def _locked(file: IO[str], what: str, waits: bool = False) -> bool:
    """Whether an open file could be locked, until it is closed; if so, it is signed."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX if waits else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise HarmonicaError(
            f"{what} is on a file system without locks ({error.strerror}); choose another"
        ) from None
    with contextlib.suppress(OSError):  # on a full disk the holder has no name
        _sign(file.fileno())
    return True


def _sign(lock: int) -> None:
    """Write down who holds a lock, past any buffer, which would try again when it is closed."""
    now = datetime.now().astimezone().isoformat(" ", "seconds")
    os.ftruncate(lock, 0)
    os.write(lock, f"process {os.getpid()} on {socket.gethostname()}, since {now}\n".encode())
