"""One process at a time: a lock that ends with its holder, however that ends."""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from harmonica.errors import HarmonicaError


@contextlib.contextmanager
def held(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file ``path`` for as long as the context lasts.

    Args:
        what: is locked, for the refusal; it begins with the flag.

    Raises:
        HarmonicaError: another process holds it, which is named; or there can be no lock.
    """
    try:
        file = path.open("a+")
    except OSError as error:
        raise HarmonicaError(
            f"{what} cannot be written to ({error.strerror}); choose a folder that can"
        ) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read(200).strip() or "another process"
            raise HarmonicaError(
                f"{what} is in use by {holder}; wait for it or choose another folder"
            ) from None
        except OSError as error:
            raise HarmonicaError(
                f"{what} is on a file system without locks ({error.strerror}); choose another"
            ) from None
        with contextlib.suppress(OSError):  # on a full disk the holder has no name
            _sign(file.fileno())
        yield


def _sign(lock: int) -> None:
    """Write down who holds a lock, past any buffer, which would try again when it is closed."""
    now = datetime.now().astimezone().isoformat(" ", "seconds")
    os.ftruncate(lock, 0)
    os.write(lock, f"process {os.getpid()} on {socket.gethostname()}, since {now}\n".encode())
