"""The bundled CIFAR-10 classifier: a small residual network, and its features for metrics."""

from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from harmonica.errors import HarmonicaError
from harmonica.files import first_line, read_safetensors
from harmonica.metrics.collect import Rows
from harmonica.precision import single_precision

IMAGE_SIZE = 32
WIDTHS = (32, 64, 128, 256)
FEATURES = 128
SPATIAL_CHANNELS = 7
# Of the pixels of CIFAR-10, in [0, 255].
PIXEL_MEAN, PIXEL_STD = (125.3, 123.0, 113.9), (63.0, 62.1, 66.7)


def _conv(inputs: int, outputs: int, kernel: int = 3) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class Residual(nn.Module):
    """x + f(f(x)), f a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.inner = nn.Sequential(_conv(channels, channels), _conv(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class CifarClassifier(nn.Module):
    """A residual network of eleven convolutions, 2.0 million parameters.

    Every stage convolves to its width, halves the side, and adds a residual of two convolutions.
    """

    def __init__(self, num_classes: int = 10):
        super().__init__()
        self.register_buffer("mean", torch.tensor(PIXEL_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(PIXEL_STD)[:, None, None], persistent=False)
        self.stem = _conv(3, WIDTHS[0])
        self.stages = nn.ModuleList(
            nn.Sequential(_conv(inputs, outputs), nn.MaxPool2d(2), Residual(outputs))
            for inputs, outputs in pairwise(WIDTHS)
        )
        self.neck = _conv(WIDTHS[-1], FEATURES, kernel=1)
        self.head = nn.Linear(FEATURES, num_classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From images (n, 3, 32, 32) in [0, 255].

        Returns:
            Logits (n, classes), pooled features (n, 128), the map of 8 x 8 (n, 128, 8, 8).
        """
        x = self.stem((images - self.mean) / self.std)  # (n, 32, 32, 32)
        x = self.stages[0](x)  # (n, 64, 16, 16)
        spatial = self.stages[1](x)  # (n, 128, 8, 8)
        x = self.stages[2](spatial)  # (n, 256, 4, 4)
        pooled = self.neck(x).mean((2, 3))
        return self.head(pooled), pooled, spatial


class CifarFeatures:
    """128 pooled features, 448 spatial ones (7 channels of the 8 x 8 map, NHWC order), logits.

    Metrics through it are named ...-cifar: they are comparable with each other only.
    """

    name, suffix, image_size = "cifar", "-cifar", IMAGE_SIZE
    pooled_size, spatial_size = FEATURES, SPATIAL_CHANNELS * 8 * 8

    def __init__(self, classifier: CifarClassifier, sha256: str, device: torch.device):
        self.sha256, self._device = sha256, device
        self._network = classifier.requires_grad_(False).eval().to(device)

    def __call__(self, images: Tensor) -> Rows:
        """Rows of images (n, 3, 32, 32) uint8."""
        with single_precision():
            logits, pooled, spatial = self._network(images.to(self._device).float())
        spatial = spatial[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        return {"pooled": pooled, "spatial": spatial, "logits": logits}


def load_classifier(path: Path) -> CifarClassifier:
    """The classifier in a file that scripts/train_classifier.py wrote, in single precision.

    Raises:
        HarmonicaError: the file holds something else.
    """
    tensors, _ = read_safetensors(path)
    try:
        classifier = CifarClassifier(len(tensors["head.weight"]))
        classifier.load_state_dict(tensors)
    except (KeyError, RuntimeError) as error:
        raise HarmonicaError(
            f"{path} is not a classifier of this project ({first_line(error)}); make it again with "
            "scripts/train_classifier.py"
        ) from None
    return classifier
