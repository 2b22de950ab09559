"""Networks that metrics look through: where their weights come from, and what they must hash to."""

from pathlib import Path

from harmonica.errors import HarmonicaError
from models import BUNDLED_WEIGHTS, WeightSource

METRIC_WEIGHTS = {
    # The 2015 Inception of the TensorFlow evaluation suites, converted by torch-fidelity.
    "inception": WeightSource(
        "weights-inception-2015-12-05-6726825d.pth",
        (
            "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
            "weights-inception-2015-12-05-6726825d.pth",
            "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
            "pt_inception-2015-12-05-6726825d.pth",
        ),
        size=95_628_359,
        arguments="inception",
        sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    ),
    # The AlexNet under LPIPS; the weights of its five layers come with torchmetrics.
    "lpips": WeightSource(
        "alexnet-owt-7be5be79.pth",
        ("https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",),
        size=244_408_911,
        arguments="lpips",
        sha256="7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02",
    ),
}

CLASSIFIER = BUNDLED_WEIGHTS.with_name("cifar10_classifier.safetensors")
REFERENCES = {"cifar10": BUNDLED_WEIGHTS.with_name("cifar10_reference.npz")}


def bundled(path: Path) -> Path:
    """The path of a file that comes with the project.

    Raises:
        HarmonicaError: it is missing.
    """
    if not path.is_file():
        raise HarmonicaError(
            f"{path.name} is missing from {path.parent}; make it with scripts/train_classifier.py, "
            "or pass --extractor inception and a --reference"
        )
    return path
