"""Writing files: whole or not at all, with their sha256 beside them where it is asked for."""

import contextlib
import hashlib
import io
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import torch

from harmonica.errors import HarmonicaError
from harmonica.files.reading import parse_json


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; the old one stands until the new one is on disk."""
    with atomic_file(path) as file:
        file.write(content)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """A file to write to that takes the place of ``path`` when the context ends well.

    Raises:
        HarmonicaError: it cannot be written; what was there stands.
    """
    path = Path(path)
    # Several threads, processes and machines may write the same file.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if not isinstance(error, OSError):
            raise
        raise HarmonicaError(
            f"cannot write {path}: {error.strerror}; make room, or choose a folder that can be "
            "written to"
        ) from None


def remove_unfinished(folder: Path, wanted: Callable[[str], bool] = lambda name: True) -> None:
    """Remove what processes left that were killed while they wrote.

    Args:
        wanted: by the name of the file that it was to become.
    """
    for left in folder.glob(".*.tmp"):
        if wanted(left.name[1:].rsplit(".", 2)[0]):
            with contextlib.suppress(OSError):  # who writes next hears of it
                left.unlink()


def keep_lines(path: Path, keeps: Callable[[dict], bool]) -> None:
    """Drop lines of a JSON lines file, if there is one: also what is no line, or cut short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(errors="replace").splitlines(keepends=True):
        with contextlib.suppress(HarmonicaError, TypeError, KeyError):
            if line.endswith("\n") and keeps(parse_json(line, "a line")):
                kept.append(line)
    write_atomically(path, "".join(kept).encode())


def _sync_folder(folder: Path) -> None:
    """Without this a rename may not outlive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems have no such thing
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def record_of(path: Path) -> Path:
    """Where the sha256 of a file is kept, as ``sha256sum --check`` reads it."""
    return path.with_name(f"{path.name}.sha256")


def write_record(path: Path, digest: str) -> None:
    write_atomically(record_of(path), f"{digest}  {path.name}\n".encode())


def recorded(path: Path) -> str | None:
    """The sha256 that was kept of a file; None if there is none."""
    try:
        words = record_of(path).read_bytes()[:200].split()
    except OSError:
        return None
    return words[0].decode("ascii", "replace") if words else None


def write_checked(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, its sha256 beside it.

    The record comes first: a file without its own was not finished.
    """
    write_record(path, hashlib.sha256(content).hexdigest())
    write_atomically(path, content)


class DamagedFile(HarmonicaError):
    """A file that is not what was written."""


def read_checked(path: Path) -> bytes:
    """A file that ``write_checked`` wrote.

    Raises:
        DamagedFile: it is not what was written.
        HarmonicaError: nobody can tell, for now.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise HarmonicaError(f"{path} cannot be read ({error.strerror})") from None
    expected, record = recorded(path), record_of(path).name
    if expected is None:
        raise HarmonicaError(
            f"{path} cannot be checked without {record} beside it; put that back, or remove the "
            "file"
        )
    if hashlib.sha256(content).hexdigest() != expected:
        raise DamagedFile(f"{path} is damaged: it does not match its checksum")
    return content


def write_torch(path: Path, content: Any) -> None:
    """Write tensors and counters for :func:`torch.load`, whole or not at all."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, buffer.getvalue())


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
