"""Feature extractors by name, with their weights checked."""

from typing import Protocol

import torch
from torch import Tensor

from harmonica.downloads import fetch, verify
from harmonica.errors import HarmonicaError
from harmonica.files import first_line, read_torch
from harmonica.metrics.classifier import CifarFeatures, load_classifier
from harmonica.metrics.collect import Rows
from harmonica.metrics.inception import Inception
from harmonica.metrics.weights import CLASSIFIER, METRIC_WEIGHTS, bundled


class Extractor(Protocol):
    """A frozen network and the features that metrics compare.

    Attributes:
        suffix: what it adds to the name of a metric, so that nobody mistakes one for another.
        sha256: of the weights file.
        image_size: side of the images that it takes; None takes any.
        pooled_size, spatial_size: number of features of FID and of sFID.
    """

    name: str
    suffix: str
    sha256: str
    image_size: int | None
    pooled_size: int
    spatial_size: int

    def __call__(self, images: Tensor) -> Rows:
        """Rows "pooled", "spatial" and "logits" of images (n, 3, H, W) uint8."""
        ...


KINDS = {kind.name: kind for kind in (Inception, CifarFeatures)}


def load_extractor(name: str, device: torch.device) -> Extractor:
    """The extractor called ``name``; weights that are published are fetched if missing.

    Raises:
        HarmonicaError: weights that cannot be had, or are not those.
    """
    if name == "cifar":
        path = bundled(CLASSIFIER)
        return CifarFeatures(load_classifier(path), verify(path), device)
    source = METRIC_WEIGHTS["inception"]
    path = fetch(source)
    digest = verify(path, source.sha256)
    try:
        return Inception(read_torch(path), digest, device)
    except RuntimeError as error:
        raise HarmonicaError(f"{path} does not fit ({first_line(error)}); fetch it again") from None
