"""Image data sets, for what is trained on images: the bundled models, and Learning-to-Cache."""

from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import CIFAR10, ImageFolder
from torchvision.transforms import CenterCrop, Compose, PILToTensor, Resize

from harmonica.errors import HarmonicaError


class LabelledImages(Dataset):
    """Centre-cropped images, uint8 (3, size, size), and their labels.

    Args:
        data: a folder of class folders (torchvision's ImageFolder), or ``cifar10``, which
            torchvision downloads.

    Raises:
        HarmonicaError: no folder of class folders with images.
    """

    def __init__(self, data: str, size: int):
        crop = Compose([Resize(size), CenterCrop(size), PILToTensor()])
        try:
            if data == "cifar10":
                self.source = CIFAR10("data", train=True, download=True, transform=crop)
            else:
                self.source = ImageFolder(data, transform=crop)
        except (OSError, RuntimeError) as error:
            reason = str(error).split("\n")[0]
            raise HarmonicaError(
                f"--data {data} cannot be read ({reason}); pass a folder of class folders, or "
                "cifar10"
            ) from None

    @property
    def labels(self) -> list[int]:
        return self.source.targets

    @property
    def num_classes(self) -> int:
        return len(self.source.classes)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        try:
            return self.source[index]
        except OSError as error:  # PIL's errors are among them
            reason = str(error).split("\n")[0]
            raise HarmonicaError(
                f"--data holds an image that cannot be read ({reason}); remove it"
            ) from None
