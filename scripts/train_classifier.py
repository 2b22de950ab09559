"""Train the classifier that CIFAR metrics look through, and take the reference statistics.

    python scripts/train_classifier.py --data TRAIN --test-data TEST --out classifier

``--data`` and ``--test-data`` are folders of class folders (torchvision's ImageFolder); or
``--data cifar10``, which torchvision downloads. The run writes a checkpoint every ``--save-every``
steps and resumes from it when the command is repeated; ``--epochs`` may be others then, other
options that move the weights are refused. Batches are a function of the step alone, so a resumed
run sees the same data as one that was never stopped.

At the end ``--out`` holds ``cifar10_classifier.safetensors``, in half precision, with the accuracy
that these weights have on the test images, and ``cifar10_reference.npz``, statistics of its
features of the training images. Copied into ``models/weights/`` they are what ``evaluate.py``
uses for ``--extractor cifar`` and ``--reference cifar10``; they belong together.
"""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from accelerate import PartialState
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn
from torch.nn import functional as F

from harmonica.backbone import check_gpus
from harmonica.errors import HarmonicaError, run_command
from harmonica.files import sha256, write_atomically
from harmonica.labelled_images import load_labelled_images
from harmonica.metrics.classifier import (
    IMAGE_SIZE,
    CifarClassifier,
    CifarFeatures,
    load_classifier,
)
from harmonica.metrics.collect import Rows, collect
from harmonica.metrics.reference import save_reference
from harmonica.metrics.weights import CLASSIFIER, REFERENCES
from harmonica.network_training import Batches, NetworkConfig, train_network
from harmonica.options import option, parse

MARGIN = 4
LOG_EVERY = 50
EXTRACTION_BATCH = 500


@dataclass(frozen=True)
class ClassifierConfig(NetworkConfig):
    """How the classifier is trained and measured."""

    MAY_CHANGE: ClassVar = (*NetworkConfig.MAY_CHANGE, "test_data", "neighbours")

    test_data: str | None = option(
        None, "images that the accuracy is measured on; needed unless --data is cifar10"
    )
    out: Path = option(Path("classifier"), "folder of the checkpoint, classifier and statistics")
    lr: float = option(0.1, "learning rate at its peak", low=0)
    weight_decay: float = option(5e-4, "of matrices and filters", low=0)
    label_smoothing: float = option(0.1, "share of a label that all classes share", low=0, high=1)
    neighbours: int = option(10_000, "features kept for precision and recall", low=1)

    def check(self) -> None:
        """Also: test images."""
        super().check()
        if self.test_data is None and self.data != "cifar10":
            raise HarmonicaError("--test-data is missing; pass a folder of class folders")


def shifted(images: Tensor, draw: torch.Generator) -> Tensor:
    """Images (n, 3, H, W), each moved by up to ``MARGIN`` pixels; edges are reflected."""
    size = images.shape[-1]
    padded = F.pad(images, (MARGIN,) * 4, mode="reflect")
    corners = torch.randint(2 * MARGIN + 1, (len(images), 2), generator=draw).tolist()
    return torch.stack(
        [
            image[:, y : y + size, x : x + size]
            for image, (y, x) in zip(padded, corners, strict=True)
        ]
    )


def one_cycle(step: int, total: int, peak: float) -> float:
    """Linearly up over the first quarter of the run, then down a cosine to zero."""
    rise = max(1, total // 4)
    if step < rise:
        return peak * (step + 1) / rise
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise)))


def create_optimizer(model: nn.Module, weight_decay: float) -> torch.optim.SGD:
    """SGD with Nesterov momentum; scales and biases do not decay."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors}]
    return torch.optim.SGD(groups, lr=0.0, momentum=0.9, nesterov=True, fused=True)


def train(
    config: ClassifierConfig, batches: Batches, classes: int, state: PartialState
) -> dict[str, Tensor]:
    """Train from the start or from the checkpoint; returns the weights."""
    torch.manual_seed(config.seed)
    device, total = state.device, config.epochs * batches.per_epoch
    model = CifarClassifier(classes).to(device, memory_format=torch.channels_last)
    optimizer = create_optimizer(model, config.weight_decay)

    def update(step: int) -> dict[str, Tensor]:
        images, labels, draw = batches(step)
        images = shifted(images, draw).to(device, memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16):
            logits, _, _ = model(images)
        loss = F.cross_entropy(
            logits.float(), labels.to(device), label_smoothing=config.label_smoothing
        )
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = one_cycle(step, total, config.lr)
        optimizer.step()
        optimizer.zero_grad()
        return {"loss": loss}

    parts = {"model": model, "optimizer": optimizer}
    train_network(config, batches, parts, update, log_every=LOG_EVERY)
    return model.state_dict()


def features_of(images: Tensor, extractor: CifarFeatures, state: PartialState, name: str) -> Rows:
    def rows_of(indices: range) -> Rows:
        return extractor(images[indices.start : indices.stop])

    return collect(len(images), EXTRACTION_BATCH, rows_of, state, name)


def export(
    config: ClassifierConfig,
    weights: dict[str, Tensor],
    images: Tensor,
    test: tuple[Tensor, Tensor],
    state: PartialState,
) -> float:
    """Write the classifier and the reference statistics; returns the accuracy on test images.

    Everything is measured with the weights as they are stored, in half precision.
    """
    halves = {
        name: (value.half() if value.is_floating_point() else value).cpu().contiguous()
        for name, value in weights.items()
    }
    classifier = CifarClassifier(len(halves["head.weight"]))
    classifier.load_state_dict(halves)
    test_images, test_labels = test
    rows = features_of(test_images, CifarFeatures(classifier, "", state.device), state, "test")
    accuracy = (rows["logits"].argmax(dim=1) == test_labels).double().mean().item()
    metadata = {
        "format": "harmonica-classifier-1",
        "training_images": f"{len(images)}, sha256 of their pixels {pixels_sha256(images)}",
        "test_images": f"{len(test_images)}, sha256 of their pixels {pixels_sha256(test_images)}",
        "test_accuracy": f"{accuracy:.4f}",
        "epochs": str(config.epochs),
        "seed": str(config.seed),
    }
    path = config.out / CLASSIFIER.name
    write_atomically(path, safetensors_bytes(halves, metadata))
    extractor = CifarFeatures(load_classifier(path), sha256(path), state.device)
    rows = features_of(images, extractor, state, "reference")
    save_reference(config.out / REFERENCES["cifar10"].name, rows, extractor, config.neighbours)
    return accuracy


def pixels_sha256(images: Tensor) -> str:
    return hashlib.sha256(images.contiguous().numpy()).hexdigest()


@run_command
def main() -> None:
    config = parse(ClassifierConfig, __doc__.split("\n")[0])
    images, labels, classes = load_labelled_images(config.data, IMAGE_SIZE)
    test_images, test_labels, test_classes = load_labelled_images(
        config.test_data or config.data, IMAGE_SIZE, train=False, flag="--test-data"
    )
    if test_classes != classes:
        raise HarmonicaError(
            f"--test-data {config.test_data} has other class folders than --data {config.data}; "
            "pass a folder with the same"
        )
    batches = Batches(images, labels, config.batch_size, config.seed)
    check_gpus()
    state = PartialState(cpu=not torch.cuda.is_available())
    weights = train(config, batches, len(classes), state)
    accuracy = export(config, weights, images, (test_images, test_labels), state)
    print(f"test accuracy {accuracy:.2%}; classifier and reference statistics: {config.out}")


if __name__ == "__main__":
    main()
