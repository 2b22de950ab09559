"""Labelled images: for training the bundled networks, and for Learning-to-Cache."""

import hashlib
import json
import tarfile
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import CIFAR10, ImageFolder
from torchvision.transforms import CenterCrop, Compose, PILToTensor, Resize

from harmonica.errors import HarmonicaError
from harmonica.files import confined_extraction, first_line, read_image


def _open(path: str) -> Image.Image:
    # ImageNet has grey and CMYK images.
    return Image.fromarray(read_image(Path(path), converts=True))


class LabelledImages(Dataset):
    """Centre-cropped images, uint8 (3, size, size), and their labels.

    Args:
        data: a folder of class folders, or ``cifar10``, which torchvision downloads.
        train: which split of CIFAR-10.
        flag: the one that ``data`` came from.

    Raises:
        HarmonicaError: no folder of class folders with images; later, an image that cannot be read.
    """

    def __init__(self, data: str, size: int, *, train: bool = True, flag: str = "--data"):
        self._flag = flag
        crop = Compose([Resize(size), CenterCrop(size), PILToTensor()])
        try:
            if data == "cifar10":
                with confined_extraction():
                    self._source = CIFAR10("data", train=train, download=True, transform=crop)
            else:
                self._source = ImageFolder(data, transform=crop, loader=_open)
        except (OSError, RuntimeError, tarfile.TarError) as error:
            raise HarmonicaError(
                f"{flag} {data} cannot be read ({first_line(error)}); pass a folder of class "
                "folders, or cifar10"
            ) from None
        self.labels: list[int] = self._source.targets
        self.classes: list[str] = self._source.classes

    @cached_property
    def listing_hash(self) -> str:
        """sha256 of which images there are, in which order and classes; not of what is in them."""
        paths = [path for path, _ in getattr(self._source, "imgs", [])]
        return hashlib.sha256(json.dumps([paths, self.labels]).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        try:
            return self._source[index]
        except HarmonicaError as error:
            raise HarmonicaError(f"{self._flag}: {error}") from None


def load_labelled_images(
    data: str, size: int, *, train: bool = True, flag: str = "--data"
) -> tuple[Tensor, Tensor, list[str]]:
    """All of :class:`LabelledImages` in memory.

    Returns:
        uint8 (N, 3, size, size), labels (N,), and the names of the classes.
    """
    dataset = LabelledImages(data, size, train=train, flag=flag)
    images = torch.stack([dataset[i][0] for i in range(len(dataset))])
    return images, torch.tensor(dataset.labels), dataset.classes
