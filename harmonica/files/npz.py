"""Arrays of an npz file, read a stretch of rows at a time; nothing in the file is unpickled."""

import lzma
import math
import zipfile
import zlib
from pathlib import Path
from typing import IO

import numpy as np

from harmonica.errors import HarmonicaError
from harmonica.files.npy import Pickled, read_header
from harmonica.files.reading import existing_file, first_line

_DAMAGED = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, OSError, RuntimeError, NotImplementedError,
    OverflowError, ValueError, EOFError,
)  # fmt: skip
# A few bytes of a compressed file can stand for as many as they like.
MOST_BYTES = 4 << 30


class Npz:
    """The arrays of an npz file.

    Raises:
        HarmonicaError: not a whole npz file; ``flag`` is named.
    """

    def __init__(self, path: Path, flag: str):
        self.path, self.flag = existing_file(path, flag), flag
        try:
            self._archive = zipfile.ZipFile(path)
        except _DAMAGED as error:
            raise self._damaged(error) from None

    def __contains__(self, name: str) -> bool:
        return f"{name}.npy" in self._archive.namelist()

    def __getitem__(self, name: str) -> "NpzArray":
        """The array called ``name``, of which only the header is read.

        Raises:
            HarmonicaError: absent, damaged, or made of Python objects.
        """
        if name not in self:
            held = ", ".join(entry.removesuffix(".npy") for entry in self._archive.namelist())
            raise HarmonicaError(
                f"{self.flag} {self.path} holds no array {name}, but {held or 'nothing'}; pass "
                "another file"
            )
        try:
            return self._open(name)
        except Pickled:
            raise HarmonicaError(
                f"{self.flag} {self.path}: {name} holds pickled objects, which are never loaded; "
                "save plain arrays"
            ) from None
        except _DAMAGED as error:
            raise self._damaged(error) from None

    def _open(self, name: str) -> "NpzArray":
        entry = self._archive.getinfo(f"{name}.npy")
        file = self._archive.open(entry)
        shape, dtype, start = read_header(file, entry.file_size)
        return NpzArray(self, name, shape, dtype, file, start)

    def _damaged(self, error: Exception) -> HarmonicaError:
        return HarmonicaError(
            f"{self.flag} {self.path} is not a whole npz file ({first_line(error)}); copy "
            "or make it again"
        )


class NpzArray:
    """One array of an npz file, which stays on disk.

    Attributes:
        shape: as in numpy, with the data in C order.
    """

    def __init__(
        self,
        npz: Npz,
        name: str,
        shape: tuple[int, ...],
        dtype: np.dtype,
        file: IO[bytes],
        start: int,
    ):
        self.name, self.shape, self.dtype = name, shape, dtype
        self._npz, self._file, self._start = npz, file, start

    def rows(self, indices: range) -> np.ndarray:
        """Consecutive rows, (n, *shape[1:]); going through them in order reads the file once."""
        return self._read(indices.start, (len(indices), *self.shape[1:]))

    def whole(self) -> np.ndarray:
        """All of it."""
        return self._read(0, self.shape)

    def _read(self, start: int, shape: tuple[int, ...]) -> np.ndarray:
        """An array of this shape, from row ``start`` on."""
        row, size = (math.prod(s) * self.dtype.itemsize for s in (self.shape[1:], shape))
        try:
            if size > MOST_BYTES:
                raise ValueError(f"{self.name} is larger than {MOST_BYTES >> 30} GB")
            self._file.seek(self._start + start * row)
            data = self._file.read(size)
            if len(data) < size:
                raise EOFError(f"{self.name} ends early")
            # Arrays that PyTorch takes are writable.
            return np.frombuffer(bytearray(data), self.dtype).reshape(shape)
        except _DAMAGED as error:
            raise self._npz._damaged(error) from None
