"""Sets of images in files, in order, read a batch at a time."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from harmonica.errors import HarmonicaError
from harmonica.files import Npz, read_image, sha256

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")


@dataclass(frozen=True)
class Batch:
    """Consecutive images of a set.

    Attributes:
        images: (n, 3, H, W) uint8.
        latents: (n, C, h, w) on the model's own scale, where the images were sampled.
    """

    images: Tensor
    latents: Tensor | None = None


class ImageSet(Protocol):
    """Images in order.

    Attributes:
        name: for tables and refusals.
        size: (height, width) of every image.
    """

    name: str
    size: tuple[int, int]

    def __len__(self) -> int: ...

    def read(self, indices: range) -> Batch: ...

    def content_hash(self) -> str | None:
        """sha256 of what is in files; None where images follow from weights and seeds."""
        ...


class NpzImages:
    """``arr_0`` (N, H, W, 3) uint8 of an npz file, as the ADM suite has it; streamed.

    Raises:
        HarmonicaError: not such an array.
    """

    def __init__(self, path: Path, flag: str):
        self.name, self.path = str(path), path
        self._array = Npz(path, flag)["arr_0"]
        shape, dtype = self._array.shape, self._array.dtype
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or not all(shape):
            raise HarmonicaError(
                f"{flag} {path}: arr_0 is {dtype} {shape}; save images as uint8 (N, H, W, 3)"
            )
        self.size = (shape[1], shape[2])

    def __len__(self) -> int:
        return self._array.shape[0]

    def read(self, indices: range) -> Batch:
        rows = torch.from_numpy(self._array.rows(indices))
        return Batch(rows.permute(0, 3, 1, 2).contiguous())

    def content_hash(self) -> str:
        return sha256(self.path)


class FolderImages:
    """The image files under a folder, sorted by path.

    Raises:
        HarmonicaError: there are none; later, one that cannot be read or is of another size.
    """

    def __init__(self, path: Path, flag: str):
        self.name, self.path, self._flag = str(path), path, flag
        self.files = sorted(
            file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file()
        )
        if not self.files:
            raise HarmonicaError(
                f"{flag} {path} holds no images ({', '.join(SUFFIXES)}); pass another folder"
            )
        self.size = self._load(self.files[0]).shape[:2]

    def __len__(self) -> int:
        return len(self.files)

    def _load(self, file: Path) -> np.ndarray:
        """(H, W, 3) uint8."""
        try:
            return read_image(file)
        except HarmonicaError as error:
            raise HarmonicaError(f"{self._flag}: {error}") from None

    def read(self, indices: range) -> Batch:
        images = []
        for file in self.files[indices.start : indices.stop]:
            image = self._load(file)
            if image.shape[:2] != self.size:
                raise HarmonicaError(
                    f"{self._flag}: {file} is {pixels(image.shape[:2])} and {self.files[0].name} "
                    f"{pixels(self.size)}; pass images of one size"
                )
            images.append(torch.from_numpy(image).permute(2, 0, 1))
        return Batch(torch.stack(images))

    def names(self) -> list[str]:
        """Of the files, relative to the folder, without their suffixes."""
        return [str(file.relative_to(self.path).with_suffix("")) for file in self.files]

    def content_hash(self) -> str:
        """Of the relative paths and the sha256 of every file."""
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(f"{file.relative_to(self.path)} {sha256(file)}\n".encode())
        return digest.hexdigest()


def open_images(path: Path, flag: str) -> NpzImages | FolderImages:
    """The images of an npz file or a folder.

    Raises:
        HarmonicaError: it holds none.
    """
    return FolderImages(path, flag) if path.is_dir() else NpzImages(path, flag)


def pixels(size: tuple[int, int]) -> str:
    """(height, width) as people write it."""
    return f"{size[1]}x{size[0]}"
