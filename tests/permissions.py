"""Folders that cannot be written to, not even by root."""

import contextlib
import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

LINUX_CAPABILITY_VERSION_3 = 0x20080522
OVERRIDES = 0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH


def obey_permissions() -> int:
    """Root, which may write anywhere, may not from now on; what it takes to undo that."""
    if os.geteuid() != 0:
        return 0
    return _swap_capabilities(0, OVERRIDES)


def _swap_capabilities(gained: int, lost: int) -> int:
    """Change those in effect, of the first 32; returns the earlier ones."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(LINUX_CAPABILITY_VERSION_3, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; then the next 32 of each
    assert libc.capget(header, sets) == 0
    earlier, sets[0] = sets[0], (sets[0] | gained) & ~lost
    assert libc.capset(header, sets) == 0
    return earlier


@contextlib.contextmanager
def read_only(*paths: Path) -> Iterator[None]:
    """These files and folders, whoever asks."""
    modes = {path: path.stat().st_mode for path in paths}
    for path, mode in modes.items():
        path.chmod(mode & 0o555)
    earlier = obey_permissions()
    try:
        yield
    finally:
        if earlier:
            _swap_capabilities(earlier, 0)
        for path, mode in modes.items():
            path.chmod(mode)
