"""Labelled images in memory, for training the bundled networks."""

import torch
from torch import Tensor
from torchvision.datasets import CIFAR10, ImageFolder
from torchvision.transforms import CenterCrop, Compose, PILToTensor, Resize

from harmonica.errors import HarmonicaError


def load_labelled_images(
    data: str, image_size: int, *, train: bool = True, flag: str = "--data"
) -> tuple[Tensor, Tensor, list[str]]:
    """All images of a folder of class folders, or of a split of CIFAR-10, as ``data`` says.

    Returns:
        uint8 (N, 3, image_size, image_size), labels (N,), and the names of the classes.

    Raises:
        HarmonicaError: no folder of class folders with images.
    """
    crop = Compose([Resize(image_size), CenterCrop(image_size), PILToTensor()])
    try:
        if data == "cifar10":
            dataset = CIFAR10("data", train=train, download=True, transform=crop)
        else:
            dataset = ImageFolder(data, transform=crop)
        images = torch.stack([dataset[i][0] for i in range(len(dataset))])
    except (OSError, RuntimeError) as error:
        reason = str(error).split("\n")[0]
        raise HarmonicaError(
            f"{flag} {data} cannot be read ({reason}); pass a folder of class folders, or cifar10"
        ) from None
    return images, torch.tensor(dataset.targets), dataset.classes
