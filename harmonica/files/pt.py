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
from torch import Tensor

from harmonica.errors import HarmonicaError
from harmonica.files.reading import first_line

# How much may come out for a byte on disk: tensors may share numbers, and things their names.
MOST_PER_BYTE = 4
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
            return _Unpacking(MOST_PER_BYTE * size).plain(content)
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


class _Unpacking:
    """Copies of what was loaded, of plain types; ``room`` is how many bytes they may take."""

    def __init__(self, room: int):
        self._room = room

    def _take(self, amount: int) -> None:
        self._room -= amount
        if self._room < 0:
            raise ValueError("more comes out of it than it holds")

    def plain(self, value: Any) -> Any:
        """The copy: neither subclasses nor attributes, and whatever was shared is counted again."""
        self._take(1)
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, str | bytes):
            self._take(len(value))
        elif isinstance(value, dict):  # whose own methods may be hidden by attributes
            return {self.plain(key): self.plain(item) for key, item in dict.items(value)}
        elif isinstance(value, list):
            return [self.plain(item) for item in value]
        elif type(value) is tuple:
            return tuple(self.plain(item) for item in value)
        elif isinstance(value, argparse.Namespace):
            return argparse.Namespace(**self.plain(vars(value)))
        return value

    def _tensor(self, value: Tensor) -> Tensor:
        is_plain = value.layout == torch.strided and value.device.type == "cpu"
        if type(value) not in (Tensor, torch.nn.Parameter) or not is_plain:
            raise ValueError("it holds tensors without numbers of their own")
        self._take(Tensor.numel(value) * Tensor.element_size(value))
        return Tensor.detach(value)
