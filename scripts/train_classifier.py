"""Train the classifier that CIFAR metrics look through, and take the reference statistics.

    python scripts/train_classifier.py --data TRAIN --test-data TEST --out classifier

``--data`` and ``--test-data`` are folders of class folders (torchvision's ImageFolder); or
``--data cifar10``, which torchvision downloads. The run writes a checkpoint every ``--save-every``
steps and resumes from it when the command is repeated. Batches are a function of the step alone, so
a resumed run sees the same data as one that was never stopped.

At the end ``--out`` holds ``cifar10_classifier.safetensors``, in half precision, with the accuracy
that these weights have on the test images, and ``cifar10_reference.npz``, statistics of its
features of the training images. Copied into ``models/weights/`` they are what ``evaluate.py``
uses for ``--extractor cifar`` and ``--reference cifar10``; they belong together.
"""

import argparse
import hashlib
import json
import math
import time
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from harmonica.errors import HarmonicaError, run_command
from harmonica.files import read_torch, sha256, write_atomically, write_torch
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
from harmonica.options import CommandParser, flag_of

MARGIN = 4
LOG_EVERY = 50
EXTRACTION_BATCH = 500


class Batches:
    """Batch of any step: an epoch's permutation, crops and flips follow from (seed, step)."""

    def __init__(self, images: Tensor, labels: Tensor, batch_size: int, seed: int):
        if len(images) < batch_size:
            raise HarmonicaError(
                f"--batch-size {batch_size} is more than the {len(images)} images; use fewer"
            )
        self.images, self.labels = images, labels
        self.batch_size, self.seed = batch_size, seed
        self.per_epoch = len(images) // batch_size

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """Images (n, 3, 32, 32) in [0, 255], mirrored and shifted at random, and labels (n,)."""
        epoch, position = divmod(step, self.per_epoch)
        order = torch.randperm(
            len(self.images), generator=torch.Generator().manual_seed(self.seed + epoch)
        )
        index = order[position * self.batch_size : (position + 1) * self.batch_size]
        draw = torch.Generator().manual_seed((self.seed + 1) * 1_000_003 + step)
        images = self.images[index].float()
        mirrored = torch.rand(len(index), generator=draw) < 0.5
        images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        padded = F.pad(images, (MARGIN,) * 4, mode="reflect")
        corners = torch.randint(2 * MARGIN + 1, (len(index), 2), generator=draw).tolist()
        crops = [
            image[:, y : y + IMAGE_SIZE, x : x + IMAGE_SIZE]
            for image, (y, x) in zip(padded, corners, strict=True)
        ]
        return torch.stack(crops), self.labels[index]


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
    args: argparse.Namespace, batches: Batches, classes: int, state: PartialState
) -> dict[str, Tensor]:
    """Train from the start or from the checkpoint; returns the weights."""
    torch.manual_seed(args.seed)
    device, total = state.device, args.epochs * batches.per_epoch
    model = CifarClassifier(classes).to(device, memory_format=torch.channels_last)
    optimizer = create_optimizer(model, args.weight_decay)
    checkpoint, step, seconds = args.out / "checkpoint.pt", 0, 0.0
    if checkpoint.exists():
        saved = read_torch(checkpoint)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        step, seconds = saved["step"], saved["seconds"]
    losses, started = [], time.time() - seconds
    with (
        (args.out / "metrics.jsonl").open("a") as metrics,
        tqdm(total=total, initial=step, unit="step", desc="classifier", mininterval=5) as bar,
    ):
        while step < total:
            images, labels = (value.to(device) for value in batches(step))
            with torch.autocast(device.type, torch.bfloat16):
                logits, _, _ = model(images.contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(logits.float(), labels, label_smoothing=args.label_smoothing)
            loss.backward()
            rate = one_cycle(step, total, args.lr)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            bar.update()
            losses.append(loss.detach())
            if step % LOG_EVERY == 0 or step == total:
                mean = torch.stack(losses).mean().item()
                record = {"step": step, "loss": mean, "lr": rate, "seconds": time.time() - started}
                metrics.write(json.dumps(record) + "\n")
                metrics.flush()
                bar.set_postfix(loss=f"{mean:.3f}")
                losses = []
            if step % args.save_every == 0 or step == total:
                write_torch(
                    checkpoint,
                    {
                        "model": model.state_dict(),
                        "optimizer": optimizer.state_dict(),
                        "step": step,
                        "seconds": time.time() - started,
                    },
                )
    return model.state_dict()


def features_of(images: Tensor, extractor: CifarFeatures, state: PartialState, name: str) -> Rows:
    def rows_of(indices: range) -> Rows:
        return extractor(images[indices.start : indices.stop])

    return collect(len(images), EXTRACTION_BATCH, rows_of, state, name)


def export(
    args: argparse.Namespace,
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
        "epochs": str(args.epochs),
        "seed": str(args.seed),
    }
    path = args.out / CLASSIFIER.name
    write_atomically(path, safetensors_bytes(halves, metadata))
    extractor = CifarFeatures(load_classifier(path), sha256(path), state.device)
    rows = features_of(images, extractor, state, "reference")
    save_reference(args.out / REFERENCES["cifar10"].name, rows, extractor, args.neighbours)
    return accuracy


def pixels_sha256(images: Tensor) -> str:
    return hashlib.sha256(images.contiguous().numpy()).hexdigest()


@run_command
def main() -> None:
    parser = CommandParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--test-data", help="needed unless --data is cifar10")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.1, help="at its peak")
    parser.add_argument("--weight-decay", type=float, default=5e-4)
    parser.add_argument("--label-smoothing", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=200)
    parser.add_argument(
        "--neighbours", type=int, default=10_000, help="features kept for precision and recall"
    )
    args = parser.parse_args()
    for name in ("epochs", "batch_size", "save_every", "neighbours"):
        if getattr(args, name) < 1:
            raise HarmonicaError(f"{flag_of(name)} must be at least 1")
    if args.test_data is None and args.data != "cifar10":
        raise HarmonicaError("--test-data is missing; pass a folder of class folders")
    images, labels, classes = load_labelled_images(args.data, IMAGE_SIZE)
    test_images, test_labels, test_classes = load_labelled_images(
        args.test_data or args.data, IMAGE_SIZE, train=False, flag="--test-data"
    )
    if test_classes != classes:
        raise HarmonicaError(
            f"--test-data {args.test_data} has other class folders than --data {args.data}; pass "
            "a folder with the same"
        )
    batches = Batches(images, labels, args.batch_size, args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    state = PartialState(cpu=not torch.cuda.is_available())
    weights = train(args, batches, len(classes), state)
    accuracy = export(args, weights, images, (test_images, test_labels), state)
    print(f"test accuracy {accuracy:.2%}; classifier and reference statistics: {args.out}")


if __name__ == "__main__":
    main()
