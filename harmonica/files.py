"""Reading and writing files: writes are atomic, and nothing that is read can run code."""

import argparse
import contextlib
import hashlib
import io
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from harmonica.errors import HarmonicaError


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; the old one stands until the new one is on disk."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise HarmonicaError(
            f"cannot write {path}: {error.strerror}; choose a folder that can be written to"
        ) from None


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


def read_torch(path: Path) -> Any:
    """A ``.pt`` file, with tensors, containers and ``argparse.Namespace`` allowed, nothing else."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).strip().split("\n")[0][:120]
        raise HarmonicaError(
            f"{path} is not a weights-only PyTorch file and was not loaded ({reason}); "
            "use the original file or a safetensors copy"
        ) from None


def is_safetensors(path: Path) -> bool:
    """Tell by content: a safetensors file opens with the length of a JSON header."""
    with Path(path).open("rb") as file:
        head = file.read(9)
    return len(head) == 9 and head[8:9] == b"{"
