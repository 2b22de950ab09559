"""PyTorch files: what comes out of one is plain, and in proportion to what it takes on disk.

Loading weights only runs no code of the file. But a few bytes can be inflated, expanded or
constructed to as many as they like, and an attribute can stand where a method was.
"""

import argparse
import contextlib
import pickletools
import zipfile
from pathlib import Path
from typing import IO, Any

import torch

from harmonica.errors import HarmonicaError
from harmonica.files.plain import plain
from harmonica.files.reading import first_line

# What files of weights are made of. PyTorch lets more pass, such as bytearray, which takes a size.
_MADE_OF = {
    "_codecs encode", "argparse Namespace", "builtins set", "__builtin__ set",
    "collections Counter", "collections OrderedDict", "torch Size", "torch.storage UntypedStorage",
    "torch._utils _rebuild_parameter", "torch._utils _rebuild_tensor",
    "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor_v3",
}  # fmt: skip
_LEGACY_PICKLES = 5  # magic number, protocol, system, content, keys of storages


def read_torch(source: Path | IO[bytes], name: str | None = None) -> Any:
    """A ``.pt`` file, with tensors, containers and ``argparse.Namespace`` allowed, nothing else.

    Args:
        name: of the source in a refusal; a path names itself.
    """
    is_path = isinstance(source, str | Path)
    try:
        with Path(source).open("rb") if is_path else contextlib.nullcontext(source) as file:
            size = file.seek(0, 2)
            _check_pickles(file, size)
            file.seek(0)
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(file, map_location="cpu", weights_only=True)
            return plain(content, size)
    except Exception as error:
        raise HarmonicaError(
            f"{name or source} is not a weights-only PyTorch file and was not loaded "
            f"({first_line(error)}); use the original file or a safetensors copy"
        ) from None


def _check_pickles(file: IO[bytes], size: int) -> None:
    """Refuse what would grow while it is loaded."""
    file.seek(0)
    if file.read(4) != b"PK\3\4":
        file.seek(0)
        for _ in range(_LEGACY_PICKLES):
            _check_pickle(file)
        return
    _check_directory(file, size)
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if sum(entry.file_size for entry in entries) > size:
            raise ValueError("it is compressed")
        for entry in entries:
            if entry.filename.lower().endswith("data.pkl"):  # as PyTorch looks for it
                with archive.open(entry) as pickle:
                    _check_pickle(pickle)


def _check_directory(file: IO[bytes], size: int) -> None:
    """Refuse a zip file in which PyTorch and Python could find different directories."""
    file.seek(max(0, size - 98))
    tail = file.read()
    end, has_long_form = size - 22, tail[-42:-38] == b"PK\6\7"
    length, start = (int.from_bytes(tail[at : at + 4], "little") for at in (-10, -6))
    if has_long_form:
        end = size - 98
        length, start = (int.from_bytes(tail[at : at + 8], "little") for at in (40, 48))
        if int.from_bytes(tail[-34:-26], "little") != end or tail[:4] != b"PK\6\6":
            raise ValueError("its directory is not where it says")
    if tail[-22:-18] != b"PK\5\6" or start + length != end:
        raise ValueError("its directory is not where it says")


def _check_pickle(file: IO[bytes]) -> None:
    """Go through one pickle, up to its end, and refuse what weights are not made of."""
    for operation, argument, _ in pickletools.genops(file):
        if operation.name == "GLOBAL" and argument not in _MADE_OF:
            module, _, name = argument.partition(" ")
            is_kind = isinstance(getattr(torch, name, None), torch.dtype)
            if module != "torch" or not (is_kind or name.endswith("Storage")):
                raise ValueError(f"{module}.{name} is no part of weights")
