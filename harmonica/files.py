"""Reading and writing files: writes are atomic, and nothing that is read can run code."""

import argparse
import contextlib
import hashlib
import io
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from harmonica.errors import HarmonicaError


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


def read_checked(path: Path) -> bytes:
    """A file that ``write_checked`` wrote.

    Raises:
        HarmonicaError: it is not what was written.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise HarmonicaError(f"{path} cannot be read ({error.strerror})") from None
    if hashlib.sha256(content).hexdigest() != recorded(path):
        raise HarmonicaError(f"{path} is damaged: it does not match its checksum")
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


def existing_file(path: Path, flag: str) -> Path:
    """The path, if it is a file that can be read; otherwise one sentence naming the flag."""
    path = Path(path)
    if not path.is_file():
        raise HarmonicaError(f"{flag} {path} is not a file; check the path")
    if not os.access(path, os.R_OK):
        raise HarmonicaError(f"{flag} {path} cannot be read; check its permissions")
    return path


def read_json(path: Path) -> Any:
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise HarmonicaError(f"{path} is not readable JSON ({error}); export it again") from None


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file, and its metadata."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError) as error:
        raise HarmonicaError(
            f"{path} is not a whole safetensors file ({error}); fetch or export it again"
        ) from None


def read_torch(source: Path | IO[bytes], name: str | None = None) -> Any:
    """A ``.pt`` file, with tensors, containers and ``argparse.Namespace`` allowed, nothing else.

    Args:
        name: of the source in a refusal; a path names itself.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).strip().split("\n")[0][:120]
        raise HarmonicaError(
            f"{name or source} is not a weights-only PyTorch file and was not loaded ({reason}); "
            "use the original file or a safetensors copy"
        ) from None


def is_safetensors(path: Path) -> bool:
    """Tell by content: a safetensors file opens with the length of a JSON header."""
    with Path(path).open("rb") as file:
        head = file.read(9)
    return len(head) == 9 and head[8:9] == b"{"
